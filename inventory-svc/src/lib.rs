//! Items, stock and reservations.
//!
//! ```text
//!   HTTP ──────────────► items, adjustments ─┐
//!                                            ├─► one transaction: rows, ledger, outbox
//!   inventory.commands ► reserve, release, ──┘        │
//!                        commit                       └─► inventory.items, orders.replies
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`domain`] | items, shortages and movements; pure |
//! | [`items`] | SQL of items and the catalogue's events |
//! | [`stock`] | SQL of balances, reservations and the ledger that explains them |
//! | [`commands`] | the handlers of the order saga's commands |
//! | [`api`] | the HTTP API and its OpenAPI document |
//! | [`config`], [`migrations`], [`app`] | what a process needs: its settings, its schema, the parts put together |

pub mod api;
pub mod app;
pub mod commands;
pub mod config;
pub mod domain;
pub mod items;
pub mod migrations;
pub mod stock;

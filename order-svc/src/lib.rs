//! The order REST API; hosts the order saga and its inspection.
//!
//! | module | what it is |
//! |---|---|
//! | [`domain`] | what an order is: intake, pricing, status graph; pure |
//! | [`order_saga`] | the whole business of an order, from top to bottom |
//! | [`effects`] | what the saga does to orders |
//! | [`orders`] | what can be asked of orders: place, cancel, wait |
//! | [`store`] | the SQL of orders |
//! | [`catalogue`] | what can be ordered, and for how much: SQL and consumer; made anew from its topic |
//! | [`live`] | the clients that wait for an order, and its changes |
//! | [`api`] | the HTTP API |
//! | [`config`], [`migrations`], [`app`] | what a process needs: its settings, its schema, the parts put together |
//! | [`rebuild`] | what an operator runs beside it |

pub mod api;
pub mod app;
pub mod catalogue;
pub mod config;
pub mod domain;
pub mod effects;
pub mod live;
pub mod migrations;
pub mod order_saga;
pub mod orders;
pub mod rebuild;
pub mod store;

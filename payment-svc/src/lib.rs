//! Payments, the payment gateway port, and a simulated provider. In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`domain`] | a payment, what may become of it, and which movements of money that means; pure |
//! | [`store`] | the SQL of payments and their append-only ledger |
//! | [`gateway`] | the port to the payment provider: certain answers and doubt, retries, circuit breaker |
//! | [`effects`] | what each command does: prepared, performed at the gateway, recorded |
//! | [`api`] | payments and their ledger over HTTP |
//! | [`config`], [`migrations`], [`app`] | what a process needs: its settings, its schema, the parts put together |
//! | [`sim`] | a payment provider, simulated: a server of its own |

pub mod api;
pub mod app;
pub mod config;
pub mod domain;
pub mod effects;
pub mod gateway;
pub mod migrations;
pub mod sim;
pub mod store;

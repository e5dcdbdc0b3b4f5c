//! The order REST API; hosts the order saga and its inspection.
//!
//! | module | what it is |
//! |---|---|
//! | [`domain`] | what an order is: intake, pricing, status graph; pure |
//! | [`store`] | the SQL of orders |
//! | [`catalogue`] | what can be ordered, and for how much: SQL and consumer |
//! | [`live`] | who waits for an order, told of its changes |
//! | [`migrations`] | the schema, embedded |

pub mod api;
pub mod catalogue;
pub mod domain;
pub mod effects;
pub mod live;
pub mod migrations;
pub mod order_saga;
pub mod orders;
pub mod store;

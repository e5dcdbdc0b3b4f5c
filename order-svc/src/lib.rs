//! The order REST API; hosts the order saga and its inspection.
//!
//! | module | what it is |
//! |---|---|
//! | [`domain`] | what an order is: intake, pricing, status graph; pure |
//! | [`store`] | the SQL of orders |
//! | [`catalogue`] | what can be ordered, and for how much: SQL and consumer |

pub mod catalogue;
pub mod domain;
pub mod store;

//! What `order-svc` tells the world, on `orders.events`, keyed by order.

use crate::{OrderId, money::Money, product::Line};
use serde::{Deserialize, Serialize};

/// Somebody placed an order; its saga has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderPlaced {
    /// Which.
    pub order: OrderId,
    /// Who.
    pub customer: String,
    /// What.
    pub lines: Vec<Line>,
    /// For how much.
    pub total: Money,
}

impl OrderPlaced {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.placed.v1";
}

/// The order is paid; nothing will undo it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderConfirmed {
    /// Which.
    pub order: OrderId,
}

impl OrderConfirmed {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.confirmed.v1";
}

/// The order came to nothing, and everything that was done for it is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderCancelled {
    /// Which.
    pub order: OrderId,
    /// Why, for example `payment_declined`, `out_of_stock`, `cancelled_by_customer`.
    pub reason: String,
}

impl OrderCancelled {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.cancelled.v1";
}

//! The events of `order-svc`, on `orders.events`, keyed by order.

use crate::{OrderId, money::Money, product::Line};
use serde::{Deserialize, Serialize};

/// A customer placed an order; its saga has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderPlaced {
    /// The order's id.
    pub order: OrderId,
    /// The id of the customer that placed the order.
    pub customer: String,
    /// The lines that the customer ordered.
    pub lines: Vec<Line>,
    /// The price of all lines.
    pub total: Money,
}

impl OrderPlaced {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.placed.v1";
}

/// The order is paid; nothing will undo it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderConfirmed {
    /// The order's id.
    pub order: OrderId,
}

impl OrderConfirmed {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.confirmed.v1";
}

/// The order is cancelled, and everything that was done for it is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderCancelled {
    /// The order's id.
    pub order: OrderId,
    /// The reason, for example `payment_declined`, `out_of_stock`, `cancelled_by_customer`.
    pub reason: String,
}

impl OrderCancelled {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "orders.cancelled.v1";
}

//! What an order looks like from outside.

use crate::{
    domain::{CancelReason, Order, PricedLine, StatusName},
    store::HistoryEntry,
};
use contracts::{OrderId, money::Money};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

/// An order.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OrderView {
    /// Its id, which is also its saga's.
    pub id: OrderId,
    /// The customer that placed it, as the request named it.
    #[schema(example = "customer-17")]
    pub customer_id: String,
    /// What was ordered, in the order of the request.
    pub items: Vec<ItemView>,
    /// The sum of all items, in the currency of their prices.
    pub total: Money,
    /// Where it stands.
    pub status: StatusName,
    /// Why it is being or was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<CancelReason>,
    /// What made it fail, where the reason does not tell: `no_answer`, `given_up`, `unreachable`, `faulty`, `unreadable`, `contradiction`,
    /// `record_lost` or `other`; later builds may know more.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "unreachable")]
    pub cause: Option<String>,
    /// Whether the order waits for an operator: something that was done for it can neither be finished nor undone by
    /// itself.
    #[serde(skip_serializing_if = "is_false")]
    pub waits_for_operator: bool,
    /// When it was placed.
    #[serde(with = "time::serde::rfc3339")]
    pub placed_at: OffsetDateTime,
    /// When it was confirmed or cancelled.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub closed_at: Option<OffsetDateTime>,
    /// 1 when placed, one more with each change of the status.
    #[schema(example = 1)]
    pub version: i64,
}

/// A line of an order.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ItemView {
    /// The product.
    #[schema(example = "WIDGET-1")]
    pub sku: String,
    /// How many pieces.
    #[schema(example = 2)]
    pub quantity: i64,
    /// What one piece cost when the order was placed.
    pub unit_price: Money,
}

/// A status that an order reached: the data of a server-sent event.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct StatusView {
    /// The order's id.
    pub order_id: OrderId,
    /// 1 when placed, one more with each change; also the event's id.
    #[schema(example = 2)]
    pub sequence: i64,
    /// Where the order stands from then on.
    pub status: StatusName,
    /// Why it is being or was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<CancelReason>,
    /// When the order took this status, RFC 3339.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

impl From<Order> for OrderView {
    fn from(order: Order) -> Self {
        Self {
            id: order.id,
            customer_id: order.customer.into(),
            items: order.lines.into_iter().map(ItemView::from).collect(),
            total: order.total,
            status: order.status.name(),
            reason: order.status.reason(),
            cause: order.cause,
            waits_for_operator: order.stuck,
            placed_at: order.placed_at,
            closed_at: order.status.closed_at(),
            version: order.version,
        }
    }
}

impl From<PricedLine> for ItemView {
    fn from(line: PricedLine) -> Self {
        Self { sku: line.sku.into(), quantity: line.quantity.get(), unit_price: line.unit_price }
    }
}

impl StatusView {
    /// Makes the view of a row of an order's history.
    pub fn new(order: OrderId, entry: HistoryEntry) -> Self {
        Self {
            order_id: order,
            sequence: entry.sequence,
            status: entry.status.name(),
            reason: entry.status.reason(),
            at: entry.at,
        }
    }
}

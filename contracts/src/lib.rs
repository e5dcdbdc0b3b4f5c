//! The contracts between the order platform's services. No I/O, no service's internals.
//!
//! | module | what it is |
//! |---|---|
//! | [`topics`] | every topic, declared once |
//! | [`money`] | integer minor units with an ISO 4217 currency |
//! | [`product`] | stock-keeping units and quantities |
//! | [`payments`] | the commands of `payment-svc`, and its answers |
//! | [`inventory`] | the commands of `inventory-svc`, its answers, and its item events |
//! | [`orders`] | the events of `order-svc` |

pub mod inventory;
pub mod money;
pub mod orders;
pub mod payments;
pub mod product;
pub mod topics;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// An order's id, chosen by `order-svc`; also what payments and reservations are known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct OrderId(pub Uuid);

impl std::fmt::Display for OrderId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

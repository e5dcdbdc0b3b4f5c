//! What an order is: pure, no I/O, no clock.
//!
//! Invariant: a value of these types is already checked. A request becomes a [`NewOrder`] ([`intake`]). A `NewOrder`
//! and the catalogue's prices become a [`PlacedOrder`] ([`pricing`]). From then on only [`OrderStatus`] changes, along a
//! declared graph ([`status`]). When the process dies here, nothing is lost: nothing was done.

pub mod intake;
pub mod pricing;
pub mod status;

pub use intake::{BadField, Fault, NewOrder, PlaceOrderRequest, RequestedItem};
pub use pricing::PricedLine;
pub use status::{CancelReason, NotAllowed, OrderStatus, StatusChange, StatusName};

use contracts::{OrderId, money::Money, orders::OrderPlaced, product::Line};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use time::OffsetDateTime;

/// An order that was accepted: priced, totalled and given an id. It is also the order saga's input, stored with the
/// saga, so it changes only by adding optional fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedOrder {
    /// The order's id, which is also the saga's. The stored sagas call it `order`.
    #[serde(rename = "order")]
    pub id: OrderId,
    /// The caller's own name for the customer.
    pub customer: CustomerId,
    /// The lines, each sku once, at the price of the moment the order was placed.
    pub lines: Vec<PricedLine>,
    /// The sum of the lines, in one currency.
    pub total: Money,
    /// The gateway's token of the customer's means of payment.
    pub payment_method: PaymentMethod,
    /// When the order was placed, by the service's clock.
    #[serde(with = "time::serde::rfc3339")]
    pub placed_at: OffsetDateTime,
}

impl PlacedOrder {
    /// The lines without their prices, as other services know them.
    pub fn unpriced_lines(&self) -> Vec<Line> {
        self.lines.iter().map(|line| Line { sku: line.sku.clone(), quantity: line.quantity }).collect()
    }

    /// The event that announces the order.
    pub fn event(&self) -> OrderPlaced {
        OrderPlaced {
            order: self.id,
            customer: self.customer.to_string(),
            lines: self.unpriced_lines(),
            total: self.total,
        }
    }
}

/// An order as it is now. Its payment token is not part of it: no reader of an order needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The order's id, which is also the saga's.
    pub id: OrderId,
    /// The caller's own name for the customer.
    pub customer: CustomerId,
    /// The lines, each sku once, at the price of the moment the order was placed.
    pub lines: Vec<PricedLine>,
    /// The sum of the lines, in one currency.
    pub total: Money,
    /// The status, with the data that belongs to it.
    pub status: OrderStatus,
    /// The cause of the failure, where the reason for the cancellation does not show it: a word of
    /// [`saga_core::command::Why`].
    pub cause: Option<String>,
    /// Whether the order's saga waits for an operator.
    pub stuck: bool,
    /// The sequence of the order's last status in its history: 1 when placed, one more with each change.
    pub version: i64,
    /// When the order was placed.
    pub placed_at: OffsetDateTime,
}

macro_rules! parsed_text {
    ($(#[$doc:meta])* $name:ident, $(#[$error_doc:meta])* $error:ident, $message:literal, $fits:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        $(#[$error_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        #[error($message)]
        pub struct $error;

        impl $name {
            /// The text as it was parsed.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = $error;
            fn from_str(text: &str) -> Result<Self, $error> {
                let fits: fn(&str) -> bool = $fits;
                if fits(text) { Ok(Self(text.to_owned())) } else { Err($error) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = $error;
            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }
    };
}

parsed_text! {
    /// The caller's own name for a customer, 1 to 100 visible ASCII characters.
    CustomerId,
    /// The error of a text that is no customer id.
    MalformedCustomer,
    "a customer id is 1 to 100 visible ASCII characters without spaces",
    |text| (1..=100).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

parsed_text! {
    /// The payment gateway's token of a means of payment. It is worth money, so it is never shown by `Debug`.
    PaymentMethod,
    /// The error of a text that is no payment token.
    MalformedPaymentMethod,
    "a payment method is the gateway's token: 1 to 200 visible ASCII characters without spaces",
    |text| (1..=200).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

impl fmt::Display for CustomerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for CustomerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Debug for PaymentMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PaymentMethod(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_from_outside_are_short_visible_and_free_of_nul() {
        for wrong in ["", " ", "a b", "a\0b", "ä", "a\n", &"x".repeat(101)] {
            assert_eq!(wrong.parse::<CustomerId>(), Err(MalformedCustomer), "{wrong:?}");
        }
        assert!("tok\0".parse::<PaymentMethod>().is_err());
        assert!("auth0|5f7c8ec7c33c6c004bbafe82".parse::<CustomerId>().is_ok());
    }

    #[test]
    fn a_payment_token_is_not_printed() {
        let method: PaymentMethod = "tok_secret".parse().unwrap();
        assert!(!format!("{method:?}").contains("secret"));
    }

    #[test]
    fn a_placed_order_is_stored_under_the_names_of_before() {
        let order = PlacedOrder {
            id: OrderId(uuid::Uuid::nil()),
            customer: "c-1".parse().unwrap(),
            lines: Vec::new(),
            total: Money { amount: 100, currency: "EUR".parse().unwrap() },
            payment_method: "tok_visa".parse().unwrap(),
            placed_at: OffsetDateTime::UNIX_EPOCH,
        };
        let stored = serde_json::to_value(&order).unwrap();
        let names: BTreeSet<_> = stored.as_object().unwrap().keys().map(String::as_str).collect();
        let before = ["order", "customer", "lines", "total", "payment_method", "placed_at"];
        assert_eq!(names, BTreeSet::from(before));
    }
}

//! A request becomes an order, or the list of everything that is wrong with it.
//!
//! The request's types take what JSON can hold (any text, any 64-bit number). So this module, not the decoder, names
//! every bad field at once.

use super::{CustomerId, MalformedCustomer, MalformedPaymentMethod, PaymentMethod};
use contracts::{
    money::Currency,
    product::{Line, MalformedQuantity, MalformedSku, Quantity, Sku},
};
use saga_core::card::{self, holds_a_card_number};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, str::FromStr};

/// The most lines of one order: it bounds what one request can lock, write and send.
pub const MAX_LINES: usize = 100;

/// What `POST /v1/orders` takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlaceOrderRequest {
    /// The caller's own name for the customer.
    #[schema(min_length = 1, max_length = 100, pattern = "^[!-~]+$", example = "customer-17")]
    pub customer_id: String,
    /// What; each sku once.
    #[schema(min_items = 1, max_items = 100)]
    pub items: Vec<RequestedItem>,
    /// The payment gateway's token of the customer's means of payment; never a card's own number, which is refused.
    #[schema(min_length = 1, max_length = 200, pattern = "^[!-~]+$", example = "tok_visa")]
    pub payment_method: String,
}

/// So many pieces of one product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestedItem {
    /// The product.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$", example = "WIDGET-1")]
    pub sku: String,
    /// How many pieces.
    #[schema(minimum = 1, maximum = 1_000_000, example = 2)]
    pub quantity: i64,
}

/// A request whose fields are all well-formed, and that can be priced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOrder {
    /// The caller's own name for the customer.
    pub customer: CustomerId,
    /// The gateway's token of the means of payment.
    pub payment_method: PaymentMethod,
    /// The lines: 1 to [`MAX_LINES`], each sku once.
    pub lines: Vec<Line>,
}

/// A field of the request and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadField {
    /// The field's path, as in `items[0].quantity`.
    pub field: String,
    /// What is wrong with the field.
    pub fault: Fault,
}

impl BadField {
    /// Names a field and its fault.
    pub fn new(field: impl Into<String>, fault: impl Into<Fault>) -> Self {
        Self { field: field.into(), fault: fault.into() }
    }
}

/// The kinds of faults that a field can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The text is no customer id.
    #[error(transparent)]
    Customer(#[from] MalformedCustomer),
    /// The text is no payment token.
    #[error(transparent)]
    PaymentMethod(#[from] MalformedPaymentMethod),
    /// The text holds a card's own number in place of a token or a name.
    #[error("{}: {instead}", card::REFUSED)]
    CardNumber {
        /// What to send instead, in words.
        instead: &'static str,
    },
    /// The text is no sku.
    #[error(transparent)]
    Sku(#[from] MalformedSku),
    /// The number is no quantity.
    #[error(transparent)]
    Quantity(#[from] MalformedQuantity),
    /// The order has no lines.
    #[error("an order has at least one item")]
    NoItems,
    /// The order has more than [`MAX_LINES`] lines.
    #[error("an order has at most {MAX_LINES} items")]
    TooManyItems,
    /// The sku stands in an earlier line already.
    #[error("is the same product as items[{first}]: order it once, with the whole quantity")]
    Duplicate {
        /// The index of the line that has the sku first.
        first: usize,
    },
    /// The sku is not in the catalogue.
    #[error("is not a product of the catalogue")]
    UnknownProduct,
    /// The product is priced in another currency than the first line.
    #[error("is sold in {currency}, but the order's first item in {first}: one order has one currency")]
    OtherCurrency {
        /// The currency of this line.
        currency: Currency,
        /// The currency of the first line.
        first: Currency,
    },
    /// The total is more than an order may cost.
    #[error("come to more than one order may cost")]
    TotalTooLarge,
    /// The total is zero.
    #[error("cost nothing, and there is no payment of nothing")]
    NothingToPay,
}

impl PlaceOrderRequest {
    /// Checks every field; lists every bad one.
    pub fn validate(&self) -> Result<NewOrder, Vec<BadField>> {
        let mut bad = Vec::new();
        let customer = parse_unless_card(&mut bad, "customer_id", &self.customer_id, "send a name of your own");
        let instead = "send the payment gateway's token of the card";
        let payment_method = parse_unless_card(&mut bad, "payment_method", &self.payment_method, instead);
        let lines = self.lines(&mut bad);
        match (customer, payment_method) {
            (Some(customer), Some(payment_method)) if bad.is_empty() => {
                Ok(NewOrder { customer, payment_method, lines })
            }
            _ => Err(bad),
        }
    }

    fn lines(&self, bad: &mut Vec<BadField>) -> Vec<Line> {
        match self.items.len() {
            0 => bad.push(BadField::new("items", Fault::NoItems)),
            1..=MAX_LINES => {}
            _ => {
                bad.push(BadField::new("items", Fault::TooManyItems));
                return Vec::new();
            }
        }
        let mut first_of: HashMap<&str, usize> = HashMap::new();
        let mut lines = Vec::with_capacity(self.items.len());
        for (i, item) in self.items.iter().enumerate() {
            let sku: Option<Sku> = parse(bad, &format!("items[{i}].sku"), &item.sku);
            let first = *first_of.entry(&item.sku).or_insert(i);
            if sku.is_some() && first != i {
                bad.push(BadField::new(format!("items[{i}].sku"), Fault::Duplicate { first }));
            }
            match Quantity::try_from(item.quantity) {
                Ok(quantity) => lines.extend(sku.map(|sku| Line { sku, quantity })),
                Err(error) => bad.push(BadField::new(format!("items[{i}].quantity"), error)),
            }
        }
        lines
    }
}

/// Parses a field that must hold no card number. The types themselves take such a number: it may stand in a saga that
/// an older build began, and that has to end.
fn parse_unless_card<T: FromStr<Err: Into<Fault>>>(
    bad: &mut Vec<BadField>,
    field: &str,
    text: &str,
    instead: &'static str,
) -> Option<T> {
    if holds_a_card_number(text) {
        bad.push(BadField::new(field, Fault::CardNumber { instead }));
        return None;
    }
    parse(bad, field, text)
}

fn parse<T: FromStr<Err: Into<Fault>>>(bad: &mut Vec<BadField>, field: &str, text: &str) -> Option<T> {
    text.parse().map_err(|error| bad.push(BadField::new(field, error))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(sku: &str, quantity: i64) -> RequestedItem {
        RequestedItem { sku: sku.into(), quantity }
    }

    fn request(items: Vec<RequestedItem>) -> PlaceOrderRequest {
        PlaceOrderRequest { customer_id: "c-1".into(), items, payment_method: "tok".into() }
    }

    #[test]
    fn a_good_request_becomes_an_order_with_its_lines_in_their_order() {
        let order = request(vec![item("B", 2), item("A", 1)]).validate().unwrap();
        let lines: Vec<_> = order.lines.iter().map(|line| (line.sku.as_str(), line.quantity.get())).collect();
        assert_eq!(lines, [("B", 2), ("A", 1)]);
    }

    #[test]
    fn every_bad_field_is_named_at_once() {
        let mut request = request(vec![item("A", 0), item("a b", 1), item("A", -1), item("B", i64::MAX)]);
        request.customer_id = "a\0b".into();
        request.payment_method = String::new();
        let bad = request.validate().unwrap_err();
        let fields: Vec<_> = bad.iter().map(|bad| bad.field.as_str()).collect();
        let expected = [
            "customer_id",
            "payment_method",
            "items[0].quantity",
            "items[1].sku",
            "items[2].sku",
            "items[2].quantity",
            "items[3].quantity",
        ];
        assert_eq!(fields, expected);
        assert_eq!(bad[4].fault, Fault::Duplicate { first: 0 });
    }

    #[test]
    fn a_card_number_in_place_of_a_token_or_a_name_is_refused_and_not_repeated() {
        for card in ["4111111111111111", "4111 1111 1111 1111", "3782-822463-10005"] {
            let mut request = request(vec![item("A", 1)]);
            (request.customer_id, request.payment_method) = (card.into(), card.into());
            let bad = request.validate().unwrap_err();
            let fields: Vec<_> = bad.iter().map(|bad| bad.field.as_str()).collect();
            assert_eq!(fields, ["customer_id", "payment_method"], "{card}");
            assert!(bad.iter().all(|bad| matches!(bad.fault, Fault::CardNumber { .. })), "{card}");
            assert!(bad.iter().all(|bad| !bad.fault.to_string().contains("1111")), "{bad:?}");
        }
    }

    #[test]
    fn an_order_has_one_to_a_hundred_lines() {
        assert_eq!(request(vec![]).validate(), Err(vec![BadField::new("items", Fault::NoItems)]));
        let many = |n: usize| request((0..n).map(|i| item(&format!("S{i}"), 1)).collect()).validate();
        assert!(many(MAX_LINES).is_ok());
        assert_eq!(many(MAX_LINES + 1), Err(vec![BadField::new("items", Fault::TooManyItems)]));
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_obeys_the_rules(
            customer_id in ".{0,12}",
            items in prop::collection::vec(("[a-cA-C \0]{0,2}", -2i64..4), 0..5),
        ) {
            let items: Vec<_> = items.into_iter().map(|(sku, quantity)| item(&sku, quantity)).collect();
            let request = PlaceOrderRequest { customer_id, items, payment_method: "tok".into() };
            match request.validate() {
                Ok(order) => {
                    let mut skus: Vec<_> = order.lines.iter().map(|line| line.sku.clone()).collect();
                    prop_assert_eq!(skus.len(), request.items.len());
                    skus.sort();
                    skus.dedup();
                    prop_assert_eq!(skus.len(), request.items.len());
                    prop_assert!(!skus.is_empty());
                    prop_assert_eq!(order.customer.as_str(), request.customer_id);
                }
                Err(bad) => prop_assert!(!bad.is_empty()),
            }
        }
    }
}

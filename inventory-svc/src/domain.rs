//! Items, shortages and movements. Pure: no I/O, no clock.

use contracts::{
    inventory::{ItemChanged, OutOfStock, Shortage},
    money::Money,
    product::{Line, Sku},
};
use saga_core::card::{self, holds_a_card_number};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The highest price of one piece, in minor units: a million of the most expensive pieces still fit an order's total.
pub const MAX_PRICE: i64 = 1_000_000_000;
/// The most pieces that one adjustment moves.
pub const MAX_DELTA: i64 = 1_000_000_000;
/// The longest name or reason, in characters.
pub const MAX_TEXT: usize = 200;

/// A field that is wrong, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {message}")]
pub struct BadField {
    /// The name of the request's field.
    pub field: &'static str,
    /// What is wrong with it, in words.
    pub message: String,
}

fn bad(field: &'static str, message: impl Into<String>) -> BadField {
    BadField { field, message: message.into() }
}

/// A text that people read: 1 to 200 characters, none of them a control character, no space at its ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Text(String);

impl Text {
    /// Parses the field `field`: people write there what they like, but no card number is kept.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, BadField> {
        if holds_a_card_number(text) {
            return Err(bad(field, card::REFUSED));
        }
        let text = text.trim();
        let length = text.chars().count();
        if !(1..=MAX_TEXT).contains(&length) || text.chars().any(char::is_control) {
            return Err(bad(field, format!("is 1 to {MAX_TEXT} characters, none of them a control character")));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text, trimmed, 1 to 200 characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What one piece costs: 0 to [`MAX_PRICE`] minor units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price(Money);

impl Price {
    /// Parses the field `unit_price`.
    pub fn parse(money: Money) -> Result<Self, BadField> {
        match money.amount {
            0..=MAX_PRICE => Ok(Self(money)),
            _ => Err(bad("unit_price.amount", format!("is a whole number of minor units from 0 to {MAX_PRICE}"))),
        }
    }

    /// The price as money.
    pub fn money(self) -> Money {
        self.0
    }
}

/// How many pieces an adjustment adds (or takes away, when negative); never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta(i64);

impl Delta {
    /// Parses the field `delta`.
    pub fn parse(pieces: i64) -> Result<Self, BadField> {
        if pieces == 0 || !(-MAX_DELTA..=MAX_DELTA).contains(&pieces) {
            return Err(bad("delta", format!("is a whole number from -{MAX_DELTA} to {MAX_DELTA}, and not 0")));
        }
        Ok(Self(pieces))
    }

    /// The number of pieces; negative when they are taken away.
    pub fn get(self) -> i64 {
        self.0
    }
}

/// An item as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The item's stock-keeping unit.
    pub sku: Sku,
    /// The item's name, for people.
    pub name: String,
    /// What one piece costs.
    pub unit_price: Money,
    /// Counts the changes of name and price, from 1.
    pub version: i64,
    /// Pieces that are free.
    pub on_hand: i64,
    /// Pieces that are put aside.
    pub reserved: i64,
}

impl Item {
    /// The event that announces the item's state.
    pub fn event(&self) -> ItemChanged {
        ItemChanged { sku: self.sku.clone(), name: self.name.clone(), unit_price: self.unit_price }
    }
}

/// The status of a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReservationStatus {
    /// The pieces are put aside.
    Reserved,
    /// The pieces were put back.
    Released,
    /// The pieces left the house.
    Committed,
}

/// How a reservation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closing {
    /// The pieces go back.
    Release,
    /// The pieces leave the house.
    Commit,
}

impl Closing {
    /// The status that it leads to.
    pub fn status(self) -> &'static str {
        match self {
            Self::Release => "released",
            Self::Commit => "committed",
        }
    }
}

/// The lines of a reservation, each sku once; repeated ones are added up. `None` when a sum overflows.
pub fn gather(lines: &[Line]) -> Option<BTreeMap<Sku, i64>> {
    let mut wanted: BTreeMap<Sku, i64> = BTreeMap::new();
    for line in lines {
        let pieces = wanted.entry(line.sku.clone()).or_default();
        *pieces = pieces.checked_add(line.quantity.get())?;
    }
    Some(wanted)
}

/// Decides about all lines together: the number of pieces to put aside, or every line that falls short of `on_hand`. An
/// item that is not in `on_hand` does not exist.
pub fn decide(wanted: &BTreeMap<Sku, i64>, on_hand: &BTreeMap<Sku, i64>) -> Result<i64, OutOfStock> {
    let short: Vec<Shortage> = wanted
        .iter()
        .filter_map(|(sku, requested)| {
            let available = on_hand.get(sku).copied().unwrap_or(0);
            (available < *requested).then(|| Shortage { sku: sku.clone(), requested: *requested, available })
        })
        .collect();
    if short.is_empty() { Ok(wanted.values().sum()) } else { Err(OutOfStock { short }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sku(text: &str) -> Sku {
        text.parse().unwrap()
    }

    #[test]
    fn every_line_that_falls_short_is_named_an_unknown_one_with_zero() {
        let wanted = BTreeMap::from([(sku("a"), 2), (sku("b"), 2), (sku("c"), 1)]);
        let on_hand = BTreeMap::from([(sku("a"), 2), (sku("b"), 1)]);
        let short = decide(&wanted, &on_hand).unwrap_err().short;
        assert_eq!(
            short,
            [
                Shortage { sku: sku("b"), requested: 2, available: 1 },
                Shortage { sku: sku("c"), requested: 1, available: 0 },
            ]
        );
    }

    #[test]
    fn texts_prices_and_deltas_out_of_range_are_refused() {
        for wrong in ["", "  ", "a\0b", "a\nb", &"x".repeat(201)] {
            assert!(Text::parse("name", wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(Text::parse("name", " Widget ").unwrap().as_str(), "Widget");
        let eur = |amount| Money { amount, currency: "EUR".parse().unwrap() };
        assert!(Price::parse(eur(-1)).is_err() && Price::parse(eur(MAX_PRICE + 1)).is_err());
        assert!(Price::parse(eur(0)).is_ok());
        for wrong in [0, MAX_DELTA + 1, -MAX_DELTA - 1, i64::MIN, i64::MAX] {
            assert!(Delta::parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_put_aside_was_there(wanted in prop::collection::btree_map("[a-d]", 1_i64..50, 0..4),
                                       there in prop::collection::btree_map("[a-d]", 0_i64..50, 0..4)) {
            let wanted: BTreeMap<Sku, i64> = wanted.into_iter().map(|(name, n)| (sku(&name), n)).collect();
            let there: BTreeMap<Sku, i64> = there.into_iter().map(|(name, n)| (sku(&name), n)).collect();
            let enough = wanted.iter().all(|(sku, n)| there.get(sku).is_some_and(|has| has >= n));
            prop_assert_eq!(decide(&wanted, &there).is_ok(), enough);
        }
    }
}

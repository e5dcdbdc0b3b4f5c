//! Stock-keeping units and quantities, made by parsing.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A stock-keeping unit: 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sku(String);

/// A text that is no stock-keeping unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a sku is 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'")]
pub struct MalformedSku;

impl Sku {
    /// The unit as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Sku {
    type Err = MalformedSku;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        match text.len() {
            1..=64 if text.bytes().all(allowed) => Ok(Self(text.to_owned())),
            _ => Err(MalformedSku),
        }
    }
}

impl TryFrom<String> for Sku {
    type Error = MalformedSku;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Sku> for String {
    fn from(sku: Sku) -> Self {
        sku.0
    }
}

impl fmt::Display for Sku {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A quantity of an order's line: 1 to 1,000,000 pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct Quantity(i64);

/// A number that is no quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a quantity is a whole number from 1 to {}", Quantity::MAX)]
pub struct MalformedQuantity;

impl Quantity {
    /// The most pieces of one line.
    pub const MAX: i64 = 1_000_000;

    /// The number of pieces.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Quantity {
    type Error = MalformedQuantity;
    fn try_from(pieces: i64) -> Result<Self, Self::Error> {
        if (1..=Self::MAX).contains(&pieces) { Ok(Self(pieces)) } else { Err(MalformedQuantity) }
    }
}

impl From<Quantity> for i64 {
    fn from(quantity: Quantity) -> Self {
        quantity.0
    }
}

/// A line of an order: so many pieces of one item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The item's stock-keeping unit.
    pub sku: Sku,
    /// The number of pieces.
    pub quantity: Quantity,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_negative_and_huge_quantities_are_refused() {
        for wrong in [0, -1, i64::MIN, Quantity::MAX + 1, i64::MAX] {
            assert!(Quantity::try_from(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Quantity::try_from(1).unwrap().get(), 1);
    }

    #[test]
    fn a_sku_has_no_spaces_no_nul_and_an_end() {
        for wrong in ["", " ", "a b", "a\0b", "ä", &"x".repeat(65)] {
            assert!(wrong.parse::<Sku>().is_err(), "{wrong:?}");
        }
        assert!("WIDGET-1.b_2".parse::<Sku>().is_ok());
    }
}

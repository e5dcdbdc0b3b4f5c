//! The commands of `inventory-svc`, its answers, and its item events. The order's id identifies a reservation.

use crate::{
    OrderId,
    money::Money,
    product::{Line, Sku},
    topics,
};
use saga_core::{
    command::{Command, Done, Never},
    topic::Topic,
};
use serde::{Deserialize, Serialize};

/// Put stock aside for an order: every line or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReserveStock {
    /// The order that the stock is for.
    pub order: OrderId,
    /// The lines, each sku once.
    pub lines: Vec<Line>,
}

/// The stock is put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserved {
    /// How many pieces are put aside, in all lines.
    pub pieces: i64,
}

/// One item or more falls short; nothing was put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfStock {
    /// Each line that falls short.
    pub short: Vec<Shortage>,
}

/// A line that falls short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// The item that falls short.
    pub sku: Sku,
    /// How many pieces the order wants.
    pub requested: i64,
    /// How many pieces are free; 0 for an item that does not exist.
    pub available: i64,
}

impl Command for ReserveStock {
    const TYPE: &'static str = "inventory.reserve.v1";
    const TOPIC: &'static Topic = &topics::INVENTORY_COMMANDS;
    type Reply = Reserved;
    type Rejection = OutOfStock;
}

/// Put back what [`ReserveStock`] put aside, whether or not it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseStock {
    /// The order whose stock is put back.
    pub order: OrderId,
}

impl Command for ReleaseStock {
    const TYPE: &'static str = "inventory.release.v1";
    const TOPIC: &'static Topic = &topics::INVENTORY_COMMANDS;
    type Reply = Done;
    type Rejection = Never;
}

/// The reserved stock leaves the house. It comes after the pivot, so it cannot be refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitStock {
    /// The order whose stock leaves.
    pub order: OrderId,
}

impl Command for CommitStock {
    const TYPE: &'static str = "inventory.commit.v1";
    const TOPIC: &'static Topic = &topics::INVENTORY_COMMANDS;
    type Reply = Done;
    type Rejection = Never;
}

/// An item of the catalogue as it is now; the record's key is the sku. A later `ce_sequence` wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemChanged {
    /// The item's stock-keeping unit; the record's key.
    pub sku: Sku,
    /// The item's name, for people.
    pub name: String,
    /// What one piece costs.
    pub unit_price: Money,
}

impl ItemChanged {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "inventory.item-changed.v1";
}

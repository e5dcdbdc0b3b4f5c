//! What `inventory-svc` can be told, how it answers, and its item events. A reservation is known by its order.

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
    /// For which order.
    pub order: OrderId,
    /// What, each sku once.
    pub lines: Vec<Line>,
}

/// The stock is put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserved {
    /// How many pieces in all.
    pub pieces: i64,
}

/// Not enough of something; nothing was put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfStock {
    /// Each line that falls short.
    pub short: Vec<Shortage>,
}

/// A line that falls short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// Of what.
    pub sku: Sku,
    /// How many were asked for.
    pub requested: i64,
    /// How many there are; 0 for an item nobody knows.
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
    /// Of which order.
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
    /// Of which order.
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
    /// Which.
    pub sku: Sku,
    /// What people call it.
    pub name: String,
    /// What one piece costs.
    pub unit_price: Money,
}

impl ItemChanged {
    /// The CloudEvents type.
    pub const TYPE: &'static str = "inventory.item-changed.v1";
}

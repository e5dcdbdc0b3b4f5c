//! What a ledger holds to have moved, in all: payment-svc's and the provider's are compared by it. Pure.

use anyhow::{Context, bail};
use serde_json::Value;

/// The cents that a ledger holds to have moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// The cents that were ever authorized.
    pub(crate) authorized: i64,
    /// The authorized cents that were taken.
    pub(crate) captured: i64,
    /// The authorized cents that were let go.
    pub(crate) voided: i64,
    /// The taken cents that were given back.
    pub(crate) refunded: i64,
}

impl Totals {
    /// Enters a side of a movement. Each movement has two that add up to nothing; the one that gains holds the amount.
    pub(crate) fn enter(&mut self, entry: &Value) -> anyhow::Result<()> {
        let amount = entry["amount"].as_i64().context("it has no amount")?.max(0);
        match entry["movement"].as_str() {
            Some("authorize") => self.authorized += amount,
            Some("capture") => self.captured += amount,
            Some("void") => self.voided += amount,
            Some("refund") => self.refunded += amount,
            _ => bail!("its movement is unknown"),
        }
        Ok(())
    }

    /// What is authorized, and neither taken nor let go.
    pub(crate) fn held(self) -> i64 {
        self.authorized - self.captured - self.voided
    }
}

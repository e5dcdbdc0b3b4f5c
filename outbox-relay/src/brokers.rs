//! Whether the brokers answer. It is this process's own view, which a restart forms anew, from the first report on.

use std::sync::atomic::{AtomicBool, Ordering};
use tracing::{info, warn};

/// Whether the brokers are away, by the producer's last report.
#[derive(Debug, Default)]
pub(crate) struct Brokers {
    away: AtomicBool,
    /// Whether a task is asking the brokers.
    pub(crate) asking: AtomicBool,
}

impl Brokers {
    pub(crate) fn are_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    pub(crate) fn gone(&self, outbox: &str, reason: &str) {
        if !self.away.swap(true, Ordering::Relaxed) {
            warn!(outbox, reason, "Kafka is not there; waiting for it, nothing is lost");
        }
    }

    pub(crate) fn back(&self, outbox: &str) {
        if self.away.load(Ordering::Relaxed) && self.away.swap(false, Ordering::Relaxed) {
            info!(outbox, "Kafka is there again");
        }
    }
}

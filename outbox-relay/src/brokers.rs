//! Whether the brokers answer. It is this process's own view, which a restart forms anew, from the first report on.

use saga_core::outage::Wait;
use std::sync::atomic::AtomicBool;
use tracing::{info, warn};

/// Whether the brokers are away, by the producer's last report. The producer of one outbox sees this, and sends again at
/// the first report that they are back; so it is no `Outage`, which waits for calm.
#[derive(Debug, Default)]
pub(crate) struct Brokers {
    away: Wait,
    /// Whether a task is asking the brokers.
    pub(crate) asking: AtomicBool,
}

impl Brokers {
    pub(crate) fn are_away(&self) -> bool {
        self.away.goes_on()
    }

    pub(crate) fn gone(&self, outbox: &str, reason: &str) {
        if self.away.begins() {
            warn!(outbox, reason, "Kafka is not there; waiting for it, nothing is lost");
        }
    }

    pub(crate) fn back(&self, outbox: &str) {
        if self.away.ends() {
            info!(outbox, "Kafka is there again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::testkit::Log;

    #[test]
    fn brokers_that_are_away_are_logged_once_and_so_is_that_they_are_back() {
        let (brokers, log) = (Brokers::default(), Log::hear("info"));
        brokers.back("orders");
        assert!(!brokers.are_away() && log.said("Kafka").is_empty(), "they were never away");
        brokers.gone("orders", "all down");
        brokers.gone("orders", "all down");
        assert!(brokers.are_away());
        brokers.back("orders");
        brokers.back("orders");
        assert!(!brokers.are_away());
        assert_eq!(log.said("Kafka is not there").len(), 1);
        assert_eq!(log.said("Kafka is there again").len(), 1);
    }
}

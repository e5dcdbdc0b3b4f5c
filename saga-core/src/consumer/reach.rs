//! Whether a client is cut off: it reaches no broker, although the brokers answer another client of this process.
//!
//! librdkafka can lose its way to a cluster for good ([`crate::brokers`]). While no client gets answers, it is an outage,
//! and a new client would help no more.

use std::time::{Duration, Instant};

/// A client that is cut off for so long is replaced; otherwise it reconnects within two seconds.
const CUT_OFF_MAX: Duration = Duration::from_secs(10);

/// Whether a client is cut off, and since when.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// The client reaches no broker.
    nothing: bool,
    /// Since when the brokers answer another client meanwhile.
    cut_off: Option<Instant>,
}

impl Reach {
    /// Takes whether the client is connected to a broker.
    pub(super) fn connected(&mut self, connected: bool) {
        self.nothing = !connected;
    }

    /// The brokers answered another client; returns whether this one is to be replaced.
    pub(super) fn answered_another(&mut self, now: Instant) -> bool {
        self.cut_off = self.nothing.then(|| self.cut_off.unwrap_or(now));
        self.cut_off.is_some_and(|since| now >= since + CUT_OFF_MAX)
    }

    /// The brokers answered no client.
    pub(super) fn unanswered(&mut self) {
        self.cut_off = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn a_client_that_alone_reaches_no_broker_is_replaced() {
        let (mut reach, start) = (Reach::default(), clock::monotonic());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!reach.answered_another(after(0)), "nothing is known of a new client");

        reach.connected(false);
        assert!(!reach.answered_another(after(1)) && !reach.answered_another(after(10)), "it may reconnect by itself");
        reach.connected(true);
        assert!(!reach.answered_another(after(11)));

        reach.connected(false);
        assert!(!reach.answered_another(after(12)));
        reach.unanswered();
        assert!(!reach.answered_another(after(22)) && !reach.answered_another(after(31)), "it was an outage");
        assert!(reach.answered_another(after(32)));
    }
}

//! Whether a client is cut off: it reaches no broker, although the brokers answer another client of this process.
//!
//! librdkafka can lose its way to a cluster for good ([`crate::brokers`]). While no client gets answers, it is an outage,
//! and a new client would help no more.

use std::time::{Duration, Instant};

/// A client that is cut off for so long is replaced; otherwise it reconnects within two seconds. The time doubles each
/// time that a new client did not help, as the broker may take no more of this process's connections.
const CUT_OFF_MAX: Duration = Duration::from_secs(10);
/// The longest such time.
const CUT_OFF_MAX_AT_LAST: Duration = Duration::from_secs(600);
/// What the client said of itself is old after so long: it says it every two seconds, unless the polling task is busy.
const FRESH_FOR: Duration = Duration::from_secs(5);

/// Whether a client is cut off, and since when.
#[derive(Debug)]
pub(super) struct Reach {
    /// When the client last said that it reaches no broker; `None`: it reaches one, or has said nothing yet.
    nothing: Option<Instant>,
    /// Since when the brokers answer another client meanwhile.
    cut_off: Option<Instant>,
    patience: Duration,
}

impl Default for Reach {
    fn default() -> Self {
        Self { nothing: None, cut_off: None, patience: CUT_OFF_MAX }
    }
}

impl Reach {
    /// A new client begins.
    pub(super) fn begins(&mut self) {
        (self.nothing, self.cut_off) = (None, None);
    }

    /// Takes whether the client is connected to a broker.
    pub(super) fn connected(&mut self, connected: bool, now: Instant) {
        match connected {
            true => *self = Self::default(),
            false => self.nothing = Some(now),
        }
    }

    /// The brokers answered another client; returns whether this one is to be replaced.
    pub(super) fn answered_another(&mut self, now: Instant) -> bool {
        let nothing = self.nothing.is_some_and(|said| now.saturating_duration_since(said) < FRESH_FOR);
        self.cut_off = nothing.then(|| self.cut_off.unwrap_or(now));
        let is_cut_off = self.cut_off.is_some_and(|since| now >= since + self.patience);
        if is_cut_off {
            self.patience = (self.patience * 2).min(CUT_OFF_MAX_AT_LAST);
        }
        is_cut_off
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

    /// Asks the brokers every two seconds, as long as this client reaches none; returns when it is replaced.
    fn replaced_after(reach: &mut Reach, begin: Instant) -> Option<u64> {
        (0..1_000).map(|n| n * 2).find(|&seconds| {
            let now = begin + Duration::from_secs(seconds);
            reach.connected(false, now);
            reach.answered_another(now)
        })
    }

    #[test]
    fn a_client_that_alone_reaches_no_broker_is_replaced_ever_more_rarely() {
        let (mut reach, start) = (Reach::default(), clock::monotonic());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!reach.answered_another(after(0)), "nothing is known of a new client");
        for expected in [10, 20, 40] {
            assert_eq!(replaced_after(&mut reach, after(1_000)), Some(expected));
            reach.begins();
        }
        reach.connected(true, after(2_000));
        assert_eq!(replaced_after(&mut reach, after(3_000)), Some(10));
    }

    #[test]
    fn a_client_is_not_replaced_in_an_outage_or_for_what_it_said_long_ago() {
        let (mut reach, start) = (Reach::default(), clock::monotonic());
        let after = |seconds| start + Duration::from_secs(seconds);
        for seconds in 0..30 {
            // The brokers answer now and then.
            reach.connected(false, after(seconds));
            assert!(!reach.answered_another(after(seconds)), "{seconds}");
            reach.unanswered();
        }
        reach.connected(false, after(30));
        reach.answered_another(after(30));
        assert!(!reach.answered_another(after(45)), "it has said nothing for 15 s");
    }
}

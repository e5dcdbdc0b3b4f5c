//! A circuit breaker: after enough failures in a row, ask nobody for a while, then let one request try.
//!
//! Our own because it is sixty lines that depend on nothing, and the crates for it are unmaintained or bring their own
//! executor. It only saves time and the provider: what it turns away is in doubt like any other unanswered request, and
//! is asked again later. When the process dies it is closed again, which costs a few requests.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// When the circuit opens, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct BreakerConfig {
    /// Failures in a row that open it.
    pub failures: u32,
    /// How long nobody is asked.
    pub open_for: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self { failures: 5, open_for: Duration::from_secs(1) }
    }
}

/// Whether the provider may be asked.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
    },
    /// One request is trying; taken for lost at `until`, should it never report.
    Trying {
        until: Instant,
    },
}

impl Breaker {
    /// A closed circuit.
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: Mutex::new(State::Closed { failures: 0 }) }
    }

    /// Whether to ask now. Whoever is let through reports back by [`Breaker::succeeded`] or [`Breaker::failed`].
    pub fn admits(&self, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Closed { .. } => true,
            State::Open { until } | State::Trying { until } if now >= until => {
                *state = State::Trying { until: now + self.config.open_for };
                true
            }
            State::Open { .. } | State::Trying { .. } => false,
        }
    }

    /// The provider answered.
    pub fn succeeded(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Closed { failures: 0 };
    }

    /// The provider did not answer; true when that opened the circuit.
    pub fn failed(&self, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let open = State::Open { until: now + self.config.open_for };
        match *state {
            State::Closed { failures } if failures + 1 < self.config.failures => {
                *state = State::Closed { failures: failures + 1 };
                false
            }
            State::Closed { .. } | State::Trying { .. } => {
                *state = open;
                true
            }
            // Asked before it opened.
            State::Open { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_tries_one_and_closes_when_that_succeeds() {
        let config = BreakerConfig { failures: 3, open_for: Duration::from_secs(1) };
        let (breaker, start) = (Breaker::new(config), Instant::now());
        assert!(!breaker.failed(start) && !breaker.failed(start));
        breaker.succeeded();
        assert!(!breaker.failed(start) && !breaker.failed(start), "a success begins the count anew");
        assert!(breaker.failed(start));
        assert!(!breaker.admits(start + Duration::from_millis(999)));
        let later = start + Duration::from_secs(1);
        assert!(breaker.admits(later), "one may try");
        assert!(!breaker.admits(later), "and only one");
        assert!(breaker.failed(later));
        assert!(!breaker.admits(later + Duration::from_millis(999)));
        assert!(breaker.admits(later + Duration::from_secs(1)));
        breaker.succeeded();
        assert!(breaker.admits(later + Duration::from_secs(1)) && breaker.admits(later + Duration::from_secs(1)));
    }

    #[test]
    fn a_try_that_never_reports_does_not_keep_it_open_for_ever() {
        let config = BreakerConfig { failures: 1, open_for: Duration::from_secs(1) };
        let (breaker, start) = (Breaker::new(config), Instant::now());
        assert!(breaker.failed(start));
        assert!(breaker.admits(start + Duration::from_secs(1)));
        assert!(breaker.admits(start + Duration::from_secs(2)));
    }
}

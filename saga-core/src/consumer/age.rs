//! Whether the inbox remembers messages of an age: by the database's clock, not by the host's.
//!
//! The inbox's partitions are ranges of time, made by the database. A host whose clock is wrong must not give up what they
//! hold, and one whose database's clock is wrong must not either. While the two differ by minutes nobody knows which is
//! right, so nothing is given up for its age.

use crate::clock;
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;

/// A difference between the clocks that is logged.
const SKEW_LOGGED: Duration = Duration::from_secs(5);

/// A difference between the clocks with which no age can be judged.
const SKEW_MAX: Duration = Duration::from_secs(120);

/// The database's clock as it was read last; from then on it advances as the monotonic clock does.
#[derive(Debug, Default)]
pub(super) struct DatabaseClock(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    read: Option<(OffsetDateTime, Instant)>,
    skewed: bool,
}

impl DatabaseClock {
    /// The database said that it was `time`; it was asked at `asked`.
    pub(super) fn set(&self, time: OffsetDateTime, asked: Instant) {
        // It looked at its clock somewhere on the way there and back.
        let read = asked + clock::monotonic().saturating_duration_since(asked) / 2;
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.read = Some((time, read));
        let skew = state.skew();
        let skewed = skew > SKEW_LOGGED;
        match (std::mem::replace(&mut state.skewed, skewed), skewed) {
            (false, true) => tracing::warn!(
                ?skew,
                "the clocks of this host and of its database differ; beyond {SKEW_MAX:?} the consumer gives up nothing for its age \
                 and is unhealthy: synchronize both clocks"
            ),
            (true, false) => tracing::info!("the clocks of this host and of its database agree again"),
            _ => {}
        }
    }

    /// The time by the database's clock; by the host's until it was read.
    pub(super) fn now(&self) -> OffsetDateTime {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now()
    }

    /// Fine, or that the clocks differ too much to judge an age.
    pub(super) fn check(&self) -> Result<(), String> {
        let skew = self.0.lock().unwrap_or_else(PoisonError::into_inner).skew();
        if skew <= SKEW_MAX {
            return Ok(());
        }
        Err(format!("the clocks of this host and of its database differ by {} s: synchronize both", skew.as_secs()))
    }
}

impl State {
    fn now(&self) -> OffsetDateTime {
        let read = self.read.and_then(|(time, at)| {
            let since = clock::monotonic().saturating_duration_since(at);
            time.checked_add(since.try_into().ok()?)
        });
        read.unwrap_or_else(clock::host)
    }

    fn skew(&self) -> Duration {
        (self.now() - clock::host()).unsigned_abs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_judged_by_the_database_unless_the_clocks_differ_by_minutes() {
        let clock = DatabaseClock::default();
        let ahead = |seconds| clock.set(clock::host() + time::Duration::seconds(seconds), clock::monotonic());
        assert!(clock.check().is_ok());
        ahead(60);
        assert!(clock.check().is_ok() && clock.now() > clock::host() + time::Duration::seconds(50));
        for days in [14, -20_000] {
            ahead(days * 24 * 3600);
            let said = clock.check().unwrap_err();
            assert!(said.contains("differ by"), "{said}");
        }
        ahead(0);
        assert!(clock.check().is_ok());
    }
}

//! Time: the only place that reads the clock.
//!
//! Rules that depend on time take `now` as a parameter, so that tests choose it and a retry decides as the first
//! attempt did. SQL may use the server's `now()` and `clock_timestamp()`; what compares times across processes should.

use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// The wall clock, UTC, cut to the microseconds that PostgreSQL keeps: what is written is what is read back.
#[must_use]
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(now.microsecond() * 1_000).unwrap_or(now)
}

/// The monotonic clock: for measuring, and for deadlines that must not move with the wall clock.
#[must_use]
pub fn monotonic() -> Instant {
    Instant::now()
}

/// `wait` for SQL's `make_interval(secs => …)`. What is longer than a thousand years is a thousand years: added to a time, it
/// is one that PostgreSQL can write.
pub(crate) fn seconds(wait: Duration) -> f64 {
    const LONGEST: Duration = Duration::from_secs(1_000 * 365 * 24 * 3_600);
    wait.min(LONGEST).as_secs_f64()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_has_no_digits_that_the_database_would_cut() {
        assert_eq!(super::now().nanosecond() % 1_000, 0);
    }
}

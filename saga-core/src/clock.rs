//! Time: the only place that reads the clock.
//!
//! Rules that depend on time take `now` as a parameter, so that tests choose it and a retry decides as the first
//! attempt did.
//!
//! The database's clock decides. It is one for all processes, and the host's may be an hour off, or in 1970. Whoever reads
//! `clock_timestamp()` passes it on with [`heard`]; from then on [`now`] is that time, carried on by the monotonic clock. How
//! far the host's clock is off is [`skew`], which health and the log tell. Until the database was heard, the host's clock
//! has to do.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

/// What the database said, and when it did by the monotonic clock.
#[derive(Debug, Clone, Copy)]
struct Heard {
    time: OffsetDateTime,
    at: Instant,
}

static DATABASE: Mutex<Option<Heard>> = Mutex::new(None);

/// What was heard so long ago is heard again: the database may have failed over to a machine with another clock.
const FRESH: Duration = Duration::from_secs(10);

/// An answer that took longer says too little of when the database looked at its clock, as long as a better one is fresh.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(250);

/// The time by the database's clock, UTC, cut to the microseconds that PostgreSQL keeps: what is written is what is read
/// back. The host's, until the database was heard.
#[must_use]
pub fn now() -> OffsetDateTime {
    cut(by_database(*database()).unwrap_or_else(host))
}

/// The database said that it was `time`; it was asked at `asked`.
pub fn heard(time: OffsetDateTime, asked: Instant) {
    let (now, mut database) = (monotonic(), database());
    let took = now.saturating_duration_since(asked);
    if took <= ROUND_TRIP_MAX || !is_fresh(*database, now) {
        // It looked at its clock somewhere on the way there and back.
        *database = Some(Heard { time, at: asked + took / 2 });
    }
}

/// Whether the database was heard lately. If not, and if it matters, ask it first.
#[must_use]
pub fn is_known() -> bool {
    is_fresh(*database(), monotonic())
}

/// How far the host's clock is ahead of the database's; negative when it is behind. `None` until the database was heard.
#[must_use]
pub fn skew() -> Option<time::Duration> {
    by_database(*database()).map(|database| host() - database)
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

/// The host's own clock, UTC: for its log, and for nothing that decides.
#[must_use]
pub(crate) fn host() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    #[cfg(feature = "testkit")]
    let now = now + time::Duration::seconds(HOST_IS_OFF_BY.load(std::sync::atomic::Ordering::Relaxed));
    cut(now)
}

/// A new UUIDv7 for a message: it carries its time of birth in milliseconds, by the clock that inboxes judge its age by.
pub(crate) fn uuid() -> Uuid {
    let now = now();
    let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, now.nanosecond()))
}

/// Seconds that tests let the host's clock be ahead.
#[cfg(feature = "testkit")]
pub(crate) static HOST_IS_OFF_BY: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

fn cut(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_nanosecond(time.microsecond() * 1_000).unwrap_or(time)
}

fn by_database(heard: Option<Heard>) -> Option<OffsetDateTime> {
    let Heard { time, at } = heard?;
    time.checked_add(monotonic().saturating_duration_since(at).try_into().ok()?)
}

fn is_fresh(heard: Option<Heard>, now: Instant) -> bool {
    heard.is_some_and(|heard| now.saturating_duration_since(heard.at) < FRESH)
}

fn database() -> std::sync::MutexGuard<'static, Option<Heard>> {
    DATABASE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_no_digits_that_the_database_would_cut() {
        assert_eq!(now().nanosecond() % 1_000, 0);
    }

    #[test]
    fn what_the_database_said_is_carried_on_by_the_monotonic_clock() {
        let past = OffsetDateTime::UNIX_EPOCH;
        let heard = Heard { time: past, at: monotonic().checked_sub(Duration::from_secs(60)).unwrap() };
        let carried = by_database(Some(heard)).unwrap() - past;
        assert!(carried >= Duration::from_secs(60) && carried < Duration::from_secs(120), "{carried}");
        assert_eq!(by_database(None), None);
        assert!(!is_fresh(Some(heard), monotonic()) && is_fresh(Some(heard), heard.at));
    }
}

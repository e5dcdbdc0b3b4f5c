//! Time: the only place that reads the clock.
//!
//! Rules that depend on time take `now` as a parameter, so that tests choose it and a retry decides as the first
//! attempt did.
//!
//! The database's clock decides. It is one for all processes, and the host's may be an hour off, or in 1970. A part
//! that reads `clock_timestamp()` passes it on with [`DatabaseClock::heard`]; from then on [`now`] is that time,
//! carried on by the monotonic clock. [`DatabaseClock::skew`] is how far the host's clock is off, which health and the
//! log show. Until the database has answered once, the host's clock decides.
//!
//! ```
//! use saga_core::clock::{self, DatabaseClock};
//!
//! let clock = DatabaseClock::of("shop");
//! assert!(!clock.is_known(), "until the database has answered, the host's clock decides");
//!
//! // The database's clock is an hour ahead of the host's.
//! clock.heard(clock::now() + time::Duration::hours(1), clock::monotonic());
//! assert!(clock.check().is_err(), "health is red, and no part gives work up because of its age");
//! ```

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

/// The database's time in its answer, and the moment of that by the monotonic clock.
#[derive(Debug, Clone, Copy)]
struct Heard {
    time: OffsetDateTime,
    at: Instant,
}

/// The age from which a reading is stale: the database may have failed over to a machine with another clock.
const FRESH_FOR: Duration = Duration::from_secs(10);

/// An answer that took longer, because of a lock for example, shows too little of when the database read its clock.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(250);

/// The process logs a difference of this much between the host's clock and the database's.
const SKEW_LOGGED: Duration = Duration::from_secs(5);

/// From this difference on health is red, and no part gives work up because of its age.
const SKEW_MAX: Duration = Duration::from_secs(120);

/// The clock of one database, as it was when it was last read; from then on it advances as the monotonic clock does.
#[derive(Debug)]
pub struct DatabaseClock {
    /// The database's name in log lines; `None`: the clock logs nothing.
    name: Option<String>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    heard: Option<Heard>,
    skewed: bool,
}

/// The clock that [`now`] goes by: that of the database which this process read last.
static PROCESS: DatabaseClock = DatabaseClock::named(None);

/// The clocks of this process's databases, by name.
static ALL: Mutex<BTreeMap<String, Arc<DatabaseClock>>> = Mutex::new(BTreeMap::new());

impl DatabaseClock {
    const fn named(name: Option<String>) -> Self {
        Self { name, state: Mutex::new(State { heard: None, skewed: false }) }
    }

    /// The clock of the database of this name (`Outage::dependency`), one for all parts of the process.
    #[must_use]
    pub fn of(database: &str) -> Arc<Self> {
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Self::named(Some(database.to_owned())));
        Arc::clone(all.entry(database.to_owned()).or_insert_with(new))
    }

    /// Takes the database's `time` from an answer to a question of `asked`. A difference of seconds from the host's
    /// clock is logged once, and so is its end.
    pub fn heard(&self, time: OffsetDateTime, asked: Instant) {
        let (now, mut state) = (monotonic(), self.state());
        let took = now.saturating_duration_since(asked);
        if took <= ROUND_TRIP_MAX || state.heard.is_none() {
            // The database read its clock somewhere on the way there and back.
            state.heard = Some(Heard { time, at: asked + took / 2 });
        }
        let Some(database) = &self.name else { return };
        let skew = state.skew().unwrap_or_default();
        let skewed = skew.unsigned_abs() >= SKEW_LOGGED;
        match (std::mem::replace(&mut state.skewed, skewed), skewed) {
            (false, true) => tracing::warn!(
                database,
                ahead_by_seconds = skew.whole_seconds(),
                "the clocks of this host and of its database differ; the database's decides, and work goes on; synchronize both \
                 hosts' clocks (NTP): from {SKEW_MAX:?} on this process is not healthy"
            ),
            (true, false) => tracing::info!(database, "the clocks of this host and of its database agree again"),
            _ => {}
        }
    }

    /// The time by the database's clock, UTC, in the microseconds that PostgreSQL keeps. The host's, until the database
    /// has answered once.
    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        cut(by_database(self.state().heard).unwrap_or_else(host))
    }

    /// Seconds since `at`, by the database's clock; 0 for what is still to come.
    #[must_use]
    pub fn since(&self, at: OffsetDateTime) -> f64 {
        (self.now() - at).as_seconds_f64().max(0.0)
    }

    /// Whether a reading of the last 10 s is there. If not, and if it matters, ask the database first.
    #[must_use]
    pub fn is_known(&self) -> bool {
        is_fresh(self.state().heard, monotonic())
    }

    /// How far the host's clock is ahead of the database's; negative when it is behind. `None` until the database has
    /// answered once.
    #[must_use]
    pub fn skew(&self) -> Option<time::Duration> {
        self.state().skew()
    }

    /// Succeeds unless the clocks differ by two minutes or more.
    ///
    /// # Errors
    /// The difference, in words, with what to do.
    pub fn check(&self) -> Result<(), String> {
        let skew = self.skew().unwrap_or_default();
        if skew.unsigned_abs() < SKEW_MAX {
            return Ok(());
        }
        let (seconds, way) = (skew.unsigned_abs().as_secs(), if skew.is_negative() { "behind" } else { "ahead of" });
        Err(format!(
            "the clocks of this host and of its database differ: the host's is {seconds} s {way} the database's; synchronize \
             both (NTP)"
        ))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn skew(&self) -> Option<time::Duration> {
        by_database(self.heard).map(|database| host() - database)
    }
}

/// The time by the database's clock, UTC, cut to the microseconds that PostgreSQL keeps, so that it reads back what was
/// written. The host's time, until the database has answered once.
#[must_use]
pub fn now() -> OffsetDateTime {
    PROCESS.now()
}

/// The clock that [`now`] goes by.
#[must_use]
pub fn process() -> &'static DatabaseClock {
    &PROCESS
}

/// The monotonic clock: for measuring, and for deadlines that must not move with the wall clock.
#[must_use]
pub fn monotonic() -> Instant {
    Instant::now()
}

/// `wait` for SQL's `make_interval(secs => …)`. A longer wait than a thousand years becomes a thousand years: added to
/// a time, it is one that PostgreSQL can write.
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

/// A new UUIDv7 for a message: it carries its time of birth in milliseconds, by the clock that inboxes judge its age
/// by.
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
    heard.is_some_and(|heard| now.saturating_duration_since(heard.at) < FRESH_FOR)
}

/// Asks a database for the time, which decides from now on. Returns it with the moment of the question.
///
/// # Errors
/// When the database does not answer.
pub(crate) async fn hear<'e>(executor: impl sqlx::PgExecutor<'e>) -> Result<(OffsetDateTime, Instant), sqlx::Error> {
    let asked = monotonic();
    let time = sqlx::query_scalar("select clock_timestamp()").fetch_one(executor).await?;
    process().heard(time, asked);
    Ok((time, asked))
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

    #[test]
    fn a_host_whose_clock_is_minutes_off_is_not_healthy_and_some_seconds_are_said_once() {
        let (log, clock) = (crate::testkit::Log::hear("warn"), DatabaseClock::of("of this test"));
        assert!(clock.check().is_ok(), "the database was not heard yet");
        let mut healthy = Vec::new();
        for seconds in [0, 2, 30, -30, 118, 121, 3600, -1_700_000_000, 1, -7] {
            clock.heard(host() - time::Duration::seconds(seconds), monotonic());
            healthy.push(clock.check().is_ok());
        }
        assert_eq!(healthy, [true, true, true, true, true, false, false, false, true, true]);
        assert_eq!(log.said("the clocks of this host and of its database differ").len(), 2);
    }
}

//! A part of a process, and how its work goes: what health asks of each part.
//!
//! A part reports what stands in its way, if it knows ([`HealthIssue`]). It also reports what waits for it, and since when
//! none of that has moved ([`WaitingWork`]). Work that does not move is an issue of its own, even if the part knows of
//! none. Nothing here survives the process.
//!
//! ```
//! use saga_core::{clock, part::Movement};
//! use std::time::Duration;
//!
//! let (mut offset, start) = (Movement::default(), clock::monotonic());
//! let later = |seconds| start + Duration::from_secs(seconds);
//! assert_eq!(offset.waits_at(7, start), start);
//! assert_eq!(offset.waits_at(7, later(40)), start, "work waits, and offset 7 is where it stands for 40 s");
//! assert_eq!(offset.waits_at(8, later(41)), later(41), "it moved");
//! ```

use crate::{
    clock,
    error_class::{ErrorClass, Found, in_words},
    reason,
};
use serde::Serialize;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// Work that has not moved for this long is stalled.
pub const STALLED_AFTER: Duration = Duration::from_secs(30);

macro_rules! causes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        /// Why a part does not do its work: a small vocabulary, for programs and for readers that may not see more. It
        /// only grows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Cause { $($(#[$doc])* $variant),+ }

        impl Cause {
            /// All causes, in the order of their declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name, as it stands in answers and metrics.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

causes! {
    /// The part has not begun yet.
    Starting = "starting",
    /// The process stops.
    Stopping = "stopping",
    /// The loop that asks the parts has not turned for too long: nothing is known of them.
    Unwatched = "unwatched",
    /// The part did not answer in time.
    NoAnswer = "no_answer",
    /// The database cannot be reached, or cannot work now.
    DatabaseAway = "database_away",
    /// This process has all connections of its pool in use, and wants more.
    PoolFull = "pool_full",
    /// A lock is waited for that another session holds.
    Locked = "locked",
    /// The database takes no writes.
    DatabaseReadOnly = "database_read_only",
    /// A table, a column or a function is not there.
    TableMissing = "table_missing",
    /// The role lacks a right.
    RightMissing = "right_missing",
    /// The database refuses for another reason that an operator has to set right: a password, a name.
    DatabaseMisconfigured = "database_misconfigured",
    /// The provider that effects are performed at does not let this process in: its token is missing or wrong.
    ProviderForbidden = "provider_forbidden",
    /// No broker can be reached.
    KafkaAway = "kafka_away",
    /// The topic is not there.
    TopicMissing = "topic_missing",
    /// The brokers refuse the topic, or what was asked of them.
    KafkaForbidden = "kafka_forbidden",
    /// A partition has no leader, or one that takes nothing.
    Leaderless = "leaderless",
    /// The topic refuses what is sent to it.
    Refused = "refused",
    /// The group gives this process no partitions.
    Unassigned = "unassigned",
    /// The clocks of this host and of its database differ by minutes.
    ClockSkew = "clock_skew",
    /// Data that the part needs is missing.
    Empty = "empty",
    /// An operator paused the part.
    Paused = "paused",
    /// The position is of another cluster, or of another outbox: an operator has to say how it was copied.
    Moved = "moved",
    /// Work waits and does not move, for no reason that the part knows.
    Stalled = "stalled",
    /// A fault in this program.
    Fault = "fault",
}

impl Cause {
    /// What an error of the database means for the part that met it.
    #[must_use]
    pub fn of(error: &sqlx::Error) -> Self {
        Self::of_found(Found::Error(error))
    }

    /// The same of an error that was found in a chain of causes.
    pub(crate) fn of_found(error: Found<'_>) -> Self {
        match (error.code().as_deref(), error.class()) {
            _ if error.is_pool_full() => Self::PoolFull,
            (Some("42P01" | "42703" | "42883" | "42704" | "3F000"), _) => Self::TableMissing,
            (Some("42501"), _) => Self::RightMissing,
            (Some("25006"), _) => Self::DatabaseReadOnly,
            (Some("55P03"), _) => Self::Locked,
            (_, ErrorClass::Passing | ErrorClass::Stale) => Self::DatabaseAway,
            (_, ErrorClass::Configuration) => Self::DatabaseMisconfigured,
            (_, ErrorClass::Own) => Self::Fault,
        }
    }
}

/// What stands in a part's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthIssue {
    /// The cause, for programs and for any reader.
    pub cause: Cause,
    /// The reason in words, for the log and for operators. It may hold text of the database or of a broker.
    pub reason: String,
    /// When it began; `None` if the part does not know.
    pub since: Option<Instant>,
}

impl HealthIssue {
    /// An issue that the part has just met; its age is not known.
    pub fn new(cause: Cause, reason: impl Into<String>) -> Self {
        Self { cause, reason: reason::reason(&reason.into()), since: None }
    }

    /// Joins several issues: the cause of the first, all the reasons, and the earliest age. A pause's age counts only
    /// among pauses.
    pub fn all(issues: impl IntoIterator<Item = Self>) -> Option<Self> {
        let issues: Vec<Self> = issues.into_iter().collect();
        let cause = issues.first()?.cause;
        let alike = |issue: &&Self| (issue.cause == Cause::Paused) == (cause == Cause::Paused);
        let since = issues.iter().filter(alike).filter_map(|issue| issue.since).min();
        let reasons: Vec<String> = issues.into_iter().map(|issue| issue.reason).collect();
        Some(Self { since, ..Self::new(cause, reasons.join("; ")) })
    }
}

impl From<&sqlx::Error> for HealthIssue {
    fn from(error: &sqlx::Error) -> Self {
        Self::new(Cause::of(error), in_words(error))
    }
}

/// What waits for a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingWork {
    /// How many items; `None` where that is not known.
    pub items: Option<u64>,
    /// When the oldest item came; `None` where that is not known.
    pub oldest: Option<OffsetDateTime>,
    /// When some of it last moved, or came, if none has moved since.
    pub still_since: Instant,
}

/// How a part's work goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartReport {
    /// What stands in the part's way; `None`: nothing that it knows.
    pub issue: Option<HealthIssue>,
    /// What waits for the part; `None`: nothing.
    pub waiting: Option<WaitingWork>,
}

impl PartReport {
    /// A report of no issue, and of no work that waits.
    #[must_use]
    pub fn fine() -> Self {
        Self::default()
    }

    /// A report of an issue.
    pub fn red(cause: Cause, reason: impl Into<String>) -> Self {
        HealthIssue::new(cause, reason).into()
    }

    /// Adds what waits for the part.
    #[must_use]
    pub fn with_waiting(self, waiting: Option<WaitingWork>) -> Self {
        Self { waiting, ..self }
    }

    /// The issue: what the part reports itself, or that its work has not moved for too long.
    pub(crate) fn verdict(&self, now: Instant) -> Option<HealthIssue> {
        let stalled = || {
            let since = self.waiting?.still_since;
            let still = now.saturating_duration_since(since);
            let reason = format!("work waits, and nothing of it has moved for {} s", still.as_secs());
            (still >= STALLED_AFTER)
                .then(|| HealthIssue { since: Some(since), ..HealthIssue::new(Cause::Stalled, reason) })
        };
        self.issue.clone().or_else(stalled)
    }
}

impl From<HealthIssue> for PartReport {
    fn from(issue: HealthIssue) -> Self {
        Self { issue: Some(issue), waiting: None }
    }
}

impl From<Result<(), HealthIssue>> for PartReport {
    fn from(result: Result<(), HealthIssue>) -> Self {
        Self { issue: result.err(), waiting: None }
    }
}

impl From<Result<(), sqlx::Error>> for PartReport {
    fn from(result: Result<(), sqlx::Error>) -> Self {
        result.map_err(|error| HealthIssue::from(&error)).into()
    }
}

/// Finds out since when work stands still, from a mark that changes whenever some of it is done.
#[derive(Debug)]
pub struct Movement<M> {
    last: Option<(M, Instant)>,
}

impl<M> Default for Movement<M> {
    fn default() -> Self {
        Self { last: None }
    }
}

impl<M: PartialEq> Movement<M> {
    /// Takes the current mark while something waits; returns since when the mark is the same.
    pub fn waits(&mut self, mark: M) -> Instant {
        self.waits_at(mark, clock::monotonic())
    }

    /// The same as [`Movement::waits`], at the moment `now`.
    pub fn waits_at(&mut self, mark: M, now: Instant) -> Instant {
        match &self.last {
            Some((last, since)) if *last == mark => *since,
            _ => {
                self.last = Some((mark, now));
                now
            }
        }
    }

    /// Records that nothing waits.
    pub fn rests(&mut self) {
        self.last = None;
    }
}

/// How many looks in a row at what waits, a few seconds apart, may fail.
const MISSED_MAX: u32 = 3;

/// Whether a part knows what waits for it. A failed look means neither that nothing waits nor that nothing moves;
/// several in a row are an issue of their own.
#[derive(Debug, Default)]
pub struct LookFailures {
    missed: u32,
    last: Option<HealthIssue>,
}

impl LookFailures {
    /// Records a look that failed, for this reason.
    pub fn missed(&mut self, why: &HealthIssue) {
        self.missed = self.missed.saturating_add(1);
        let since = self.last.as_ref().and_then(|first| first.since).or_else(|| Some(clock::monotonic()));
        let reason = format!("what waits is not known: {}", why.reason);
        self.last = Some(HealthIssue { since, ..HealthIssue::new(why.cause, reason) });
    }

    /// Records a look that showed what waits.
    pub fn seen(&mut self) {
        *self = Self::default();
    }

    /// The issue that several looks in a row failed; `None` otherwise.
    #[must_use]
    pub fn issue(&self) -> Option<HealthIssue> {
        self.last.clone().filter(|_| self.missed >= MISSED_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_waits_and_does_not_move_is_stalled_and_what_moves_or_rests_is_not() {
        let start = clock::monotonic();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut movement = Movement::default();
        let mut verdict = |mark: Option<u8>, seconds| {
            let waiting = mark.map(|mark| WaitingWork {
                items: None,
                oldest: None,
                still_since: movement.waits_at(mark, at(seconds)),
            });
            if waiting.is_none() {
                movement.rests();
            }
            PartReport { waiting, issue: None }.verdict(at(seconds)).map(|issue| issue.cause)
        };
        let seen =
            [(Some(1), 0), (Some(1), 29), (Some(2), 31), (Some(2), 61), (None, 62), (Some(2), 63), (Some(2), 93)];
        let seen = seen.map(|(mark, seconds)| verdict(mark, seconds));
        assert_eq!(seen, [None, None, None, Some(Cause::Stalled), None, None, Some(Cause::Stalled)]);
    }

    #[test]
    fn what_was_just_met_is_not_as_old_as_a_pause_beside_it() {
        let (now, long_ago) = (clock::monotonic() + Duration::from_secs(7_200), clock::monotonic());
        let met = |cause, since| HealthIssue { since: Some(since), ..HealthIssue::new(cause, cause.as_str()) };
        let both = HealthIssue::all([met(Cause::TopicMissing, now), met(Cause::Paused, long_ago)]).unwrap();
        assert_eq!((both.cause, both.since), (Cause::TopicMissing, Some(now)));
        assert_eq!(both.reason, "topic_missing; paused");
    }

    #[test]
    fn looks_that_come_to_nothing_are_a_trouble_when_there_are_several_in_a_row() {
        let (mut looks, slow) = (LookFailures::default(), HealthIssue::new(Cause::NoAnswer, "it took too long"));
        for _ in 1..MISSED_MAX {
            looks.missed(&slow);
            assert_eq!(looks.issue(), None);
        }
        looks.missed(&slow);
        let issue = looks.issue().expect("nothing is known");
        assert_eq!(issue.cause, Cause::NoAnswer);
        assert!(issue.reason.contains("it took too long") && issue.since.is_some(), "{issue:?}");
        looks.seen();
        looks.missed(&slow);
        assert_eq!(looks.issue(), None, "they are counted anew");
    }

    #[test]
    fn every_cause_is_written_as_it_is_serialized() {
        for cause in Cause::ALL {
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.as_str());
        }
    }

    #[test]
    fn a_part_that_knows_its_trouble_says_that_and_not_that_it_is_stalled() {
        let waiting = WaitingWork { items: None, oldest: None, still_since: clock::monotonic() };
        let report = PartReport::red(Cause::KafkaAway, "no broker").with_waiting(Some(waiting));
        let later = clock::monotonic() + STALLED_AFTER * 2;
        assert_eq!(report.verdict(later).map(|issue| issue.cause), Some(Cause::KafkaAway));
    }
}

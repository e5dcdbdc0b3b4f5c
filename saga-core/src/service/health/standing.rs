//! The standing of a part: what its report comes to, and how the log and the metrics show it.

use super::{Concern, Name};
use crate::{
    clock,
    part::{Cause, HealthIssue, PartReport, WaitingWork},
};
use serde::Serialize;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long a full pool excuses a check that callers depend on and that could not be asked. Callers wait as the check
/// does, so this is about as long as one of them would.
const BUSY_MAX: Duration = Duration::from_secs(30);

/// How long a lock on a table excuses the check that waits for it.
const LOCKED_MAX: Duration = Duration::from_secs(10);

/// A part that has not begun after so long is logged as red.
const STARTS_MAX: Duration = Duration::from_secs(60);

/// A part as it was last seen.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) concern: Concern,
    pub(super) standing: PartStanding,
    /// When the part last gave a report of its own.
    answered: Instant,
    /// The cause of its redness that the log holds; `None`: the log holds that it is fine.
    logged: Option<Cause>,
}

impl Part {
    /// Judges a report. How busy a process is says nothing of whether it can be sent requests. So while the pool is
    /// `full`, a part that could not be asked keeps its standing. It does so for a bound only, because a table that is
    /// locked fills the pool, too. A lock alone is excused for less: a migration or an index that is being made holds one
    /// for a moment, and all replicas see it at once.
    pub(super) fn seen(concern: Concern, report: &PartReport, before: Option<&Self>, full: bool, now: Instant) -> Self {
        let cause = report.issue.as_ref().map(|issue| issue.cause);
        let unasked = full && concern == Concern::Callers && matches!(cause, Some(Cause::NoAnswer | Cause::PoolFull));
        let locked = concern == Concern::Callers && cause == Some(Cause::Locked);
        let answered = before.filter(|_| unasked || locked).map_or(now, |before| before.answered);
        let excuse = if unasked { BUSY_MAX } else { LOCKED_MAX };
        let standing = match before {
            Some(before) if (unasked || locked) && now.saturating_duration_since(answered) < excuse => {
                before.standing.clone()
            }
            _ => PartStanding::judged(report, before.map(|before| &before.standing), now),
        };
        Self { concern, standing, answered, logged: before.and_then(|before| before.logged) }
    }

    /// Logs a change of the part, once. Nothing is wrong with a part that starts, nor with one that is red before the
    /// process has begun (`starting`, for so long). A part that is red then is logged when it still is afterwards.
    pub(super) fn tell(&mut self, name: &Name, starting: Option<Duration>) {
        let is = self.standing.cause;
        let starts = Some(self.standing.age()).filter(|_| is == Some(Cause::Starting)).or(starting);
        if is.is_some() && starts.is_some_and(|starts| starts < STARTS_MAX) {
            return;
        }
        let reason = self.standing.reason.as_deref().unwrap_or_default();
        match (std::mem::replace(&mut self.logged, is), is) {
            (None, Some(cause)) if self.concern == Concern::Callers => {
                tracing::warn!(check = %name, cause = cause.as_str(), reason, "not ready");
            }
            (None, Some(cause)) => {
                tracing::warn!(check = %name, cause = cause.as_str(), reason, "work does not move");
            }
            (Some(was), Some(is)) if was != is => {
                tracing::info!(check = %name, cause = is.as_str(), reason, "for another reason now");
            }
            (Some(_), None) => tracing::info!(check = %name, "in order again"),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
}

/// The standing of a part when it was last asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartStanding {
    /// Whether the part's work moves.
    pub state: State,
    /// Why the part's work does not move; absent while it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Since when the part's work does not move; absent while it does.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// How many items wait for the part, if it knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
    /// Since when the oldest of the waiting items waits.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub oldest: Option<OffsetDateTime>,
    /// The reason in words: for the roles of the admin listener only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether a part's work moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The part does its work, or has none.
    Ok,
    /// The part has work that does not move, or would not.
    Red,
}

impl PartStanding {
    fn red(issue: HealthIssue, before: Option<&Self>, now: Instant) -> Self {
        let began = issue.since.unwrap_or(now);
        let began = clock::now() - now.saturating_duration_since(began);
        // The cause may change while the part is red; since when it is red does not. But a start and an operator's
        // pause are no fault, and have ages of their own.
        let before = before.filter(|before| goes_on(before.cause, issue.cause)).and_then(|before| before.since);
        let since = before.map_or(began, |before| before.min(began));
        Self {
            state: State::Red,
            cause: Some(issue.cause),
            since: Some(since),
            waiting: None,
            oldest: None,
            reason: Some(issue.reason),
        }
    }

    /// The standing of the process itself.
    pub(super) fn of_process(issue: Option<HealthIssue>, before: Option<&Self>) -> Self {
        issue.map_or_else(Self::ok, |issue| Self::red(issue, before, clock::monotonic()))
    }

    fn ok() -> Self {
        Self { state: State::Ok, cause: None, since: None, waiting: None, oldest: None, reason: None }
    }

    fn judged(report: &PartReport, before: Option<&Self>, now: Instant) -> Self {
        let standing = report.verdict(now).map_or_else(Self::ok, |issue| Self::red(issue, before, now));
        let Some(WaitingWork { items, oldest, .. }) = report.waiting else { return standing };
        Self { waiting: items, oldest, ..standing }
    }

    pub(super) fn word(&self) -> &'static str {
        self.cause.map_or("ok", Cause::as_str)
    }

    /// For how long the part has been red.
    fn age(&self) -> Duration {
        let age = self.since.map(|since| clock::now() - since).unwrap_or_default();
        age.try_into().unwrap_or_default()
    }

    pub(super) fn is_red(&self) -> bool {
        self.state == State::Red
    }
}

/// Whether a part that was red because of `was` and is red because of `is` has been red all the while.
fn goes_on(was: Option<Cause>, is: Cause) -> bool {
    was == Some(is) || is != Cause::Paused && !matches!(was, Some(Cause::Starting | Cause::Paused))
}

/// Keeps a part's metrics.
pub(super) fn measure(name: &Name, concern: Concern, before: Option<&PartStanding>, now: &PartStanding) {
    let (was, is) = (before.and_then(|before| before.cause), now.cause);
    let gauge = |cause: Option<Cause>| {
        let reason = cause.map_or("none", Cause::as_str);
        metrics::gauge!("work_stalled_seconds", "part" => name.clone(), "reason" => reason)
    };
    if was != is {
        gauge(was).set(0.0);
    }
    gauge(is).set(now.since.map_or(0.0, |_| now.age().as_secs_f64().max(0.001)));
    if concern == Concern::Callers {
        metrics::gauge!("ready", "check" => name.clone()).set(f64::from(u8::from(!now.is_red())));
    }
}

/// Describes the metrics of health on `/metrics`.
pub(in crate::service) fn describe() {
    metrics::describe_gauge!(
        "work_stalled_seconds",
        metrics::Unit::Seconds,
        "For how long a part of this process has not done its work, by part and cause; 0 while it does"
    );
    metrics::describe_gauge!("ready", "1 while what callers need is there, by check; `process` is the process itself");
    metrics::describe_gauge!(
        "health_age_seconds",
        metrics::Unit::Seconds,
        "How long ago the parts were last asked; what is older than 15 s says nothing"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::Log;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_full_pool_excuses_a_check_for_a_while_and_never_turns_red_into_green() {
        let start = clock::monotonic();
        let no_answer = || PartReport::red(Cause::NoAnswer, "no answer within 2s");
        let no_connection = || PartReport::red(Cause::PoolFull, "the pool is full");
        let seen = |report: PartReport, before: Option<&Part>, full, seconds| {
            Part::seen(Concern::Callers, &report, before, full, at(start, seconds))
        };
        let fine = seen(PartReport::fine(), None, false, 0);
        let excused = seen(no_connection(), Some(&fine), true, 10);
        let excused = seen(no_answer(), Some(&excused), true, 29);
        assert_eq!(excused.standing.word(), "ok");
        let too_long = seen(no_connection(), Some(&excused), true, 30);
        assert_eq!(too_long.standing.word(), "pool_full", "callers have not been served for as long");
        let answered = seen(PartReport::fine(), Some(&too_long), true, 32);
        assert_eq!(seen(no_connection(), Some(&answered), true, 61).standing.word(), "ok", "it is counted anew");

        let waits = || PartReport::red(Cause::Locked, "another session holds a lock");
        let for_a_moment = seen(waits(), Some(&fine), false, 9);
        assert_eq!(for_a_moment.standing.word(), "ok", "a migration holds a lock for a moment");
        assert_eq!(seen(waits(), Some(&for_a_moment), false, 10).standing.word(), "locked");

        let locked = seen(no_answer(), Some(&fine), false, 1);
        assert_eq!(locked.standing.word(), "no_answer", "nothing excuses it while the pool has connections");
        assert_eq!(seen(no_connection(), Some(&locked), true, 3).standing.word(), "no_answer");
        assert_eq!(seen(no_connection(), None, true, 0).standing.word(), "pool_full", "it never answered");
        let refused = PartReport::red(Cause::TableMissing, "no table");
        assert_eq!(seen(refused, Some(&fine), true, 1).standing.word(), "table_missing");
    }

    #[test]
    fn what_starts_is_no_warning_and_what_never_does_is_one() {
        let log = Log::hear("info");
        let now = clock::monotonic();
        let mut part = None::<Part>;
        let mut logged = |report: PartReport, starting: Option<u64>| {
            let mut seen = Part::seen(Concern::Work, &report, part.as_ref(), false, now);
            seen.tell(&"replies".into(), starting.map(Duration::from_secs));
            part = Some(seen);
            let said = ["work does not move", "for another reason now", "in order again"];
            said.map(|message| log.said(message).len())
        };
        let starts = |seconds| {
            let since = now.checked_sub(Duration::from_secs(seconds));
            PartReport::from(HealthIssue { since, ..HealthIssue::new(Cause::Starting, "it has not started") })
        };
        let missing = || PartReport::red(Cause::TableMissing, "no table");
        assert_eq!(logged(missing(), Some(1)), [0, 0, 0], "the process migrates");
        assert_eq!(logged(missing(), Some(61)), [1, 0, 0], "it does so for too long");
        assert_eq!(logged(missing(), None), [1, 0, 0], "once");
        assert_eq!(logged(PartReport::fine(), None), [1, 0, 1]);
        assert_eq!(logged(starts(0), None), [1, 0, 1]);
        assert_eq!(logged(starts(1), None), [1, 0, 1]);
        assert_eq!(logged(starts(61), None), [2, 0, 1], "it never does");
        assert_eq!(logged(missing(), None), [2, 1, 1]);
    }

    #[test]
    fn since_goes_on_through_causes_but_not_from_a_start_nor_through_a_pause() {
        let hours = |was: Cause, is: Cause| {
            let two_hours_ago = clock::now() - Duration::from_secs(7_200);
            let was = PartStanding::judged(&PartReport::red(was, "why"), None, clock::monotonic());
            let was = PartStanding { since: Some(two_hours_ago), ..was };
            let is = PartStanding::judged(&PartReport::red(is, "why"), Some(&was), clock::monotonic());
            (clock::now() - is.since.unwrap()).whole_hours()
        };
        assert_eq!(hours(Cause::KafkaAway, Cause::Stalled), 2, "it has been red all the time");
        assert_eq!(hours(Cause::Paused, Cause::KafkaAway), 0, "Kafka's blip is no older than itself");
        assert_eq!(hours(Cause::KafkaAway, Cause::Paused), 0, "nor is a pause");
        assert_eq!(hours(Cause::Paused, Cause::Paused), 2);
        assert_eq!(hours(Cause::Starting, Cause::TableMissing), 0);
        assert_eq!(hours(Cause::Starting, Cause::Starting), 2);
    }
}

//! How a part stands: what its report comes to, and how that is told in the log and in the metrics.

use super::{Concern, Name};
use crate::{
    clock,
    part::{Cause, Report, Trouble, Waiting},
};
use serde::Serialize;
use std::time::Instant;
use time::OffsetDateTime;

/// How a part stood when it was last asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    /// Whether its work moves.
    pub state: State,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Since when it does not.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// How much waits for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
    /// Since when the oldest of that waits.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub oldest: Option<OffsetDateTime>,
    /// Why, in words: for the roles of the admin listener only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Ok or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It does its work, or has none.
    Ok,
    /// It has work that does not move, or would not.
    Red,
}

impl Standing {
    fn red(trouble: Trouble, before: Option<&Self>, now: Instant) -> Self {
        let began = trouble.since.unwrap_or(now);
        let began = clock::now() - now.saturating_duration_since(began);
        // The cause may change while it is red; since when it is red does not.
        let since = before.and_then(|before| before.since).map_or(began, |before| before.min(began));
        Self {
            state: State::Red,
            cause: Some(trouble.cause),
            since: Some(since),
            waiting: None,
            oldest: None,
            reason: Some(trouble.reason),
        }
    }

    pub(super) fn of(cause: Cause, reason: &str) -> Self {
        let now = clock::monotonic();
        Self::red(Trouble::new(cause, reason), None, now)
    }

    fn ok() -> Self {
        Self { state: State::Ok, cause: None, since: None, waiting: None, oldest: None, reason: None }
    }

    pub(super) fn judged(report: &Report, before: Option<&Self>, now: Instant) -> Self {
        let standing = report.verdict(now).map_or_else(Self::ok, |trouble| Self::red(trouble, before, now));
        let Some(Waiting { items, oldest, .. }) = report.waiting else { return standing };
        Self { waiting: items, oldest, ..standing }
    }

    pub(super) fn word(&self) -> &'static str {
        self.cause.map_or("ok", Cause::as_str)
    }

    pub(super) fn is_red(&self) -> bool {
        self.state == State::Red
    }
}

/// Logs a part's change, once, and keeps the metrics.
pub(super) fn tell(name: &Name, concern: Concern, before: Option<&Standing>, now: &Standing) {
    let reason = now.reason.as_deref().unwrap_or_default();
    let (was, is) = (before.and_then(|before| before.cause), now.cause);
    match (was, is) {
        (None, Some(Cause::Starting)) => tracing::info!(check = %name, reason, "starting"),
        (None | Some(Cause::Starting), Some(cause)) if concern == Concern::Callers => {
            tracing::warn!(check = %name, cause = cause.as_str(), reason, "not ready");
        }
        (None | Some(Cause::Starting), Some(cause)) => {
            tracing::warn!(check = %name, cause = cause.as_str(), reason, "work does not move");
        }
        (Some(was), Some(is)) if was != is => {
            tracing::info!(check = %name, cause = is.as_str(), reason, "for another reason now");
        }
        (Some(_), None) => tracing::info!(check = %name, "in order again"),
        (Some(_), Some(_)) | (None, None) => {}
    }
    let gauge = |cause: Option<Cause>| {
        let reason = cause.map_or("none", Cause::as_str);
        metrics::gauge!("work_stalled_seconds", "part" => name.clone(), "reason" => reason)
    };
    if was != is {
        gauge(was).set(0.0);
    }
    let stalled = now.since.map_or(0.0, |since| (clock::now() - since).as_seconds_f64().max(0.001));
    gauge(is).set(stalled);
    if concern == Concern::Callers {
        metrics::gauge!("ready", "check" => name.clone()).set(f64::from(u8::from(!now.is_red())));
    }
}

/// Says on `/metrics` what the metrics of health mean.
pub(in crate::service) fn describe() {
    metrics::describe_gauge!(
        "work_stalled_seconds",
        metrics::Unit::Seconds,
        "For how long a part of this process has not done its work, by part and cause; 0 while it does"
    );
    metrics::describe_gauge!("ready", "1 while what callers need is there, by check");
    metrics::describe_gauge!(
        "health_age_seconds",
        metrics::Unit::Seconds,
        "How long ago the parts were last asked; what is older than 15 s says nothing"
    );
}

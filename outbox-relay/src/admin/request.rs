//! What requests have in common: the outbox's name, the reason, and the answer to a request that fails.

use crate::{Relay, outbox::Outbox, position::ReadError};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use saga_core::{
    card::{self, holds_a_card_number},
    http::Problem,
};
use serde::Deserialize;
use utoipa::ToSchema;

/// The longest reason, in characters: it is a line, not an essay.
const LONGEST_REASON: usize = 1_000;

/// Finds the outbox of that name; 404 if this relay has none.
pub(super) fn outbox<'a>(relay: &'a Relay, name: &str) -> Result<&'a Outbox, Problem> {
    let found = relay.outboxes().iter().find(|outbox| outbox.name == name);
    found.map(AsRef::as_ref).ok_or_else(|| Problem::not_found("This relay has no outbox of that name."))
}

/// Why an operator acts: goes into the audit.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, min_length = 1, max_length = 1000, example = "limit raised, see ticket 4711")]
pub(super) struct Reason(String);

impl Reason {
    /// Checks the reason: it is not empty, not too long, and holds no card number.
    pub(super) fn check(&self) -> Result<&str, Problem> {
        let reason = self.0.trim();
        match reason.chars().count() {
            0 => Err(Problem::field("reason", "must not be empty")),
            _ if holds_a_card_number(reason) => Err(Problem::field("reason", card::REFUSED)),
            1..=LONGEST_REASON => Ok(reason),
            _ => Err(Problem::field("reason", "must not have more than 1000 characters")),
        }
    }
}

/// The problem with which a request fails.
pub(super) struct Failed(Problem);

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<sqlx::Error> for Failed {
    /// The answer for a wait that took too long says what to do about it: an operator reads it.
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|error| error.code());
        let (kind, title, detail) = match code.as_deref() {
            Some("55P03") => (
                "locked",
                "Another transaction holds a lock that this needs",
                "Nothing was changed. Find the transaction in the outbox's database (pg_stat_activity where \
                 wait_event_type = 'Lock', then pg_blocking_pids), let it end, and repeat the request.",
            ),
            Some("57014") => (
                "too-slow",
                "The database took too long",
                "Nothing was changed. Ask for less (a topic, a key, a smaller limit), or see in pg_stat_activity what \
                 keeps the outbox's database busy, and repeat the request.",
            ),
            _ => return Self(error.into()),
        };
        tracing::warn!(%error, "an operator's request waited too long");
        Self(Problem::new(StatusCode::SERVICE_UNAVAILABLE, kind, title).detail(detail).retry_after(5))
    }
}

impl From<ReadError> for Failed {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Database(error) => error.into(),
            error @ ReadError::Snapshot(_) => Self(Problem::internal(&error)),
        }
    }
}

impl From<serde_json::Error> for Failed {
    fn from(error: serde_json::Error) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_a_line_without_a_card_number() {
        for wrong in ["", " ", &"x".repeat(LONGEST_REASON + 1), "paid with 4111 1111 1111 1111"] {
            assert!(Reason(wrong.to_owned()).check().is_err(), "{wrong}");
        }
        assert_eq!(Reason(" see ticket 4711 ".to_owned()).check().ok(), Some("see ticket 4711"));
    }
}

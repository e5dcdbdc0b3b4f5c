//! What requests have in common: which outbox, and why.

use crate::{Relay, outbox::Outbox};
use saga_core::http::Problem;
use serde::Deserialize;
use utoipa::ToSchema;

/// A reason is a line, not an essay.
const LONGEST_REASON: usize = 1_000;

/// The outbox of that name.
pub(super) fn outbox<'a>(relay: &'a Relay, name: &str) -> Result<&'a Outbox, Problem> {
    let found = relay.outboxes().iter().find(|outbox| outbox.name == name);
    found.map(AsRef::as_ref).ok_or_else(|| Problem::not_found("This relay has no outbox of that name."))
}

/// Why an operator does it: goes into the audit.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, min_length = 1, max_length = 1000, example = "limit raised, see ticket 4711")]
pub(super) struct Reason(String);

impl Reason {
    /// The reason, if there is one.
    pub(super) fn check(&self) -> Result<&str, Problem> {
        let reason = self.0.trim();
        match reason.chars().count() {
            0 => Err(Problem::field("reason", "must not be empty")),
            1..=LONGEST_REASON => Ok(reason),
            _ => Err(Problem::field("reason", "must not have more than 1000 characters")),
        }
    }
}

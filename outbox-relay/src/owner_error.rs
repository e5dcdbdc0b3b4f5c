//! Why an owner stopped publishing: each reason with the trouble that health shows for it.
//!
//! After each of them the process gives the lease back, unless another process has it, and tries again. It stores none:
//! when the process dies, the next owner finds its own reasons.

use crate::{anchor::AnchorError, lease::LeaseError, position::ReadError, record::commit::CommitError};
use saga_core::{
    error_class::is_pool_full,
    part::{Cause, HealthIssue},
};
use tokio::task::JoinError;

/// Why an owner stopped publishing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnerError {
    /// The lease is lost.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The position may not be followed here.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// Progress could not be recorded.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The outbox could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The database returned an error.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// librdkafka does not accept the configuration.
    #[error("the Kafka producer could not be made: {0}")]
    Producer(#[from] rdkafka::error::KafkaError),
    /// A session ended for a reason that the next one cannot cure.
    #[error("publishing stopped: {0}")]
    Session(String),
    /// A task of the owner's panicked.
    #[error("publishing stopped, by a fault in the relay itself: {what} ended: {why}")]
    Panicked {
        /// The task's work, in words.
        what: &'static str,
        /// The text of the panic.
        why: String,
    },
}

impl OwnerError {
    /// The issue that the error is for the outbox.
    pub(crate) fn issue(&self) -> HealthIssue {
        let cause = match (self.database(), self) {
            (Some(error), _) => Cause::of(error),
            (None, Self::Anchor(_)) => Cause::Moved,
            (None, Self::Lease(_)) => Cause::DatabaseAway,
            (None, _) => Cause::Fault,
        };
        match self.database() {
            Some(error) if is_pool_full(error) => HealthIssue::from(error),
            _ => HealthIssue::new(cause, self.to_string()),
        }
    }

    /// The database's error, if the cause is the database.
    pub(crate) fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Commit(CommitError::Database(error))
            | Self::Read(ReadError::Database(error))
            | Self::Database(error) => Some(error),
            Self::Anchor(error) => error.database(),
            _ => None,
        }
    }
}

/// The result of a task, unless it panicked.
pub(crate) fn joined<T>(what: &'static str, ended: Result<T, JoinError>) -> Result<T, OwnerError> {
    ended.map_err(|why| OwnerError::Panicked { what, why: why.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panicked_is_an_error_that_says_which_and_why() {
        let ended = tokio::spawn(async { panic!("year 300000 has no calendar") }).await;
        let error = joined::<()>("reading the outbox", ended).unwrap_err().to_string();
        assert!(error.contains("reading the outbox") && error.contains("year 300000"), "{error}");
        assert!(joined("reading the outbox", tokio::spawn(async {}).await).is_ok());
    }
}

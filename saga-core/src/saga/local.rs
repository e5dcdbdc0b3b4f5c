//! Local effects: what a saga does in the orchestrator's own database, in the transaction that takes the step.
//!
//! The effect and the step happen together or not at all. When the process dies before the commit, neither has
//! happened.

use super::state::Failure;
use crate::{id::SagaId, outbox::Tx};
use async_trait::async_trait;
use serde_json::Value;

/// One run of a local effect.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct LocalCall<'a> {
    /// The saga that the effect runs for.
    pub saga: SagaId,
    /// The effect's name, under which the engine knows it.
    pub name: &'a str,
    /// The input that the saga was started with.
    pub input: &'a Value,
    /// Why the saga is undone; `None` while it goes forward.
    pub failure: Option<&'a Failure>,
}

/// An effect in the orchestrator's own database. It is bound to its name when the engine is built.
///
/// Locks: the engine holds the saga's row. Calls come sorted by saga; an effect that locks business rows should find
/// one row per saga, or lock them in an order of its own.
#[async_trait]
pub trait LocalEffect: Send + Sync + 'static {
    /// Runs the effect. An error rolls back what this call wrote. An error that is the effect's own is tried again
    /// after a pause, a few times ([`RetryPolicy::LOCAL`](super::RetryPolicy::LOCAL)); then the saga is stuck. The rest
    /// of the batch goes on.
    ///
    /// # Errors
    /// An error of the database that is not the effect's own repeats the batch and counts nothing. Any other one counts as an
    /// attempt.
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError>;

    /// Runs the effect for many sagas, by default one after the other. Override it where one statement can do what many
    /// would.
    ///
    /// # Errors
    /// The same as of [`LocalEffect::run`]; then the engine runs the effect for each saga alone.
    async fn run_many(&self, tx: &mut Tx<'_>, calls: &[LocalCall<'_>]) -> Result<(), LocalError> {
        for call in calls {
            self.run(tx, call).await?;
        }
        Ok(())
    }
}

/// A local effect did not work.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The database returned an error. If it is not the effect's own fault ([`error_class`](crate::error_class)), the
    /// engine repeats the batch and counts no attempt.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// The effect returned an error of its own, or wrapped one of the database's.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

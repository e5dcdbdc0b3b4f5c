//! Local effects: what a saga does in the orchestrator's own database, in the transaction that takes the step.
//!
//! All of it or nothing: when the process dies before the commit, neither the effect nor the saga's step has happened.

use super::state::Failure;
use crate::{id::SagaId, outbox::Tx};
use async_trait::async_trait;
use serde_json::Value;

/// One run of a local effect.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct LocalCall<'a> {
    /// For which saga.
    pub saga: SagaId,
    /// The effect's name.
    pub name: &'a str,
    /// The saga's input.
    pub input: &'a Value,
    /// While the saga is undone: why.
    pub failure: Option<&'a Failure>,
}

/// An effect in the orchestrator's own database. It is bound to its name when the engine is built.
///
/// Locks: the engine holds the saga's row. Calls come sorted by saga; an effect that locks business rows should find
/// one row per saga, or lock them in an order of its own.
#[async_trait]
pub trait LocalEffect: Send + Sync + 'static {
    /// Does it. An error rolls back what this call wrote. One that is the effect's own is tried again after a pause, a few
    /// times ([`RetryPolicy::LOCAL`](super::RetryPolicy::LOCAL)), then the saga is stuck; the rest of the batch goes on.
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError>;

    /// Does it for many sagas. Worth writing where one statement can do what many would.
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
    /// The database said no. What is not the effect's own fault ([`error_class`](crate::error_class)) repeats the batch and
    /// counts nothing.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// The effect said no; or the database, in the effect's own words.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

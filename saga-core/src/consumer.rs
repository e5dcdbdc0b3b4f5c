//! Kafka records to batches to one transaction per batch.

use crate::{
    envelope::Envelope,
    outbox::{AppendError, Tx},
};
use std::future::Future;

/// A record as a handler sees it.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its headers.
    pub envelope: Envelope,
    /// The record's key.
    pub key: Option<Vec<u8>>,
    /// The record's value; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Where it stood.
    pub at: Coordinates,
}

/// Where a record stands in Kafka.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Coordinates {
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
}

/// What a consumer does with the messages that its inbox has not seen.
pub trait Handler: Send + Sync + 'static {
    /// Handles `batch` (never empty, in partition order) in `tx`; the runtime commits. A business refusal is a reply,
    /// never an `Err`. May be called again with the same messages after an error: everything it did is rolled back.
    fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> impl Future<Output = Result<(), HandleError>> + Send;

    /// Called after the batch's commit; for waking whoever works on what was written.
    fn committed(&self) {}
}

/// Why a batch was not handled.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// The database said no. Serialization failures, deadlocks and outages are repeated and count nothing; anything
    /// else counts as an attempt.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// It will never work: undecodable, unknown type or version. Dead-lettered at once.
    #[error("{0}")]
    Poison(String),
    /// It did not work this time: counted, retried with back-off, then dead-lettered.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// A message that can never be published is the handler's fault; anything else is the database's word.
impl From<AppendError> for HandleError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Database(error) => Self::Database(error),
            invalid @ AppendError::Invalid { .. } => Self::Failed(invalid.into()),
        }
    }
}

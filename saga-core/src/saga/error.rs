//! Why an engine cannot be built, and why it refuses what a caller asks.

use super::{definition::DefinitionError, engine::Unread, local::LocalError};
use crate::id::SagaId;

/// What is wrong with an engine that cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("the saga engine cannot be built: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct EngineErrors(pub Vec<EngineError>);

/// One mistake in what the engine was built from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A definition is not sound.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// A saga names a local effect that no call of `.local(..)` bound.
    #[error("saga `{saga}` runs the local effect `{effect}`, which is not bound: call `.local({effect:?}, ..)`")]
    UnboundLocal {
        /// The definition's name.
        saga: String,
        /// The effect's name.
        effect: String,
    },
    /// Two definitions with one name and version.
    #[error("saga `{0}` version {1} is defined twice")]
    DefinedTwice(String, u32),
}

/// Why a saga was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// This engine does not have the saga's definition.
    #[error("saga `{0}` version {1} is not defined in this engine")]
    Undefined(String, u32),
    /// There is a saga of this definition with this business key, or one with this id.
    #[error("there is a saga with this id or business key already")]
    Exists,
    /// The input cannot be written as JSON, or the first command cannot be built.
    #[error("the input does not fit: {0}")]
    Input(String),
    /// A local effect before the first command did not work.
    #[error(transparent)]
    Local(anyhow::Error),
    /// The database returned an error.
    #[error("{0}")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for StartError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

#[cfg(feature = "testkit")]
impl From<crate::testkit::failpoints::Injected> for StartError {
    fn from(injected: crate::testkit::failpoints::Injected) -> Self {
        Self::Database(injected.into())
    }
}

impl From<LocalError> for StartError {
    fn from(error: LocalError) -> Self {
        match error {
            LocalError::Database(error) => Self::Database(error),
            LocalError::Failed(error) => Self::Local(error),
        }
    }
}

/// What became of a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// The saga is being undone from now on.
    Accepted,
    /// The saga was being undone before.
    AlreadyCancelling,
    /// The pivot's command was issued: the saga can only be completed.
    TooLate,
    /// The saga has ended, one way or the other.
    Finished,
    /// There is no such saga.
    Unknown,
}

/// Why a cancel could not be decided.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// The saga is of a definition version that this engine does not know.
    #[error("saga `{0}` version {1} is not defined in this engine")]
    Undefined(String, u32),
    /// This build cannot read the saga's row: another build wrote it, or it is damaged.
    #[error("this build cannot read saga {0}: {1}")]
    Unreadable(SagaId, String),
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

impl From<Unread> for CancelError {
    fn from(Unread { locked, flaw }: Unread) -> Self {
        match flaw {
            Some(flaw) => Self::Unreadable(locked.saga, flaw),
            None => Self::Undefined(locked.definition, locked.version.unsigned_abs()),
        }
    }
}

/// Why a retry was not done.
#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    /// There is no such saga.
    #[error("there is no saga {0}")]
    Unknown(SagaId),
    /// The saga has changed since the operator read it: read it again.
    #[error("the saga is at revision {found}, not {expected}")]
    Revision {
        /// The revision that the caller read.
        expected: i32,
        /// The revision that the saga has now.
        found: i32,
    },
    /// Only a stuck saga can be retried.
    #[error("the saga is {0}, not stuck")]
    NotStuck(String),
    /// The saga is of a definition version that this engine does not know.
    #[error("saga `{0}` version {1} is not defined in this engine")]
    Undefined(String, u32),
    /// This build cannot read the saga's row: another build wrote it, or it is damaged.
    #[error("this build cannot read saga {0}: {1}")]
    Unreadable(SagaId, String),
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

impl From<Unread> for RetryError {
    fn from(Unread { locked, flaw }: Unread) -> Self {
        match flaw {
            Some(flaw) => Self::Unreadable(locked.saga, flaw),
            None => Self::Undefined(locked.definition, locked.version.unsigned_abs()),
        }
    }
}

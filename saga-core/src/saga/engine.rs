//! The engine: definitions and local effects bound together, and what a service asks of them.
//!
//! Nobody owns a saga: any number of engines work on one database. What has to be atomic takes the caller's transaction.

use super::{
    definition::{DefinitionError, Saga},
    local::LocalEffect,
};
use crate::{
    consumer::{HandleError, Handler, Message},
    id::SagaId,
    outbox::Tx,
    topic::Topic,
};
use serde::Serialize;
use sqlx::PgPool;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Runs the sagas of one service.
pub struct Engine {}

/// Puts an [`Engine`] together.
pub struct EngineBuilder {}

/// What is wrong with an engine that cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("the saga engine cannot be built: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct EngineErrors(pub Vec<EngineError>);

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// In a definition.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// A saga names an effect that the engine was not given.
    #[error("saga `{saga}` runs the local effect `{effect}`, which is not bound: call `.local({effect:?}, ..)`")]
    UnboundLocal {
        /// Which saga.
        saga: String,
        /// Which effect.
        effect: String,
    },
    /// Two definitions with one name and version.
    #[error("saga `{0}` version {1} is defined twice")]
    DefinedTwice(String, u32),
}

/// Why a saga was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// This engine was not given that definition.
    #[error("saga `{0}` version {1} is not defined in this engine")]
    Undefined(String, u32),
    /// There is a saga of this definition with this business key, or one with this id.
    #[error("there is a saga with this id or business key already")]
    Exists,
    /// The input cannot be written as JSON, or the first command cannot be built.
    #[error("the input does not fit: {0}")]
    Input(String),
    /// A local effect before the first command did not work. The caller's transaction is spoilt.
    #[error(transparent)]
    Local(anyhow::Error),
    /// The database said no.
    #[error(transparent)]
    Database(sqlx::Error),
}

/// What became of a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It is being undone from now on.
    Accepted,
    /// It was being undone before.
    AlreadyCancelling,
    /// The pivot's command was issued: it can only be completed.
    TooLate,
    /// It has ended, one way or the other.
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
    /// A local undo did not work; the saga is now stuck, and the cancel is decided.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Why a retry was not done.
#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    /// There is no such saga.
    #[error("there is no saga {0}")]
    Unknown(SagaId),
    /// Somebody or something was faster: look again.
    #[error("the saga is at version {found}, not {expected}")]
    Version {
        /// What the caller saw.
        expected: i32,
        /// What it is now.
        found: i32,
    },
    /// Only a stuck saga can be retried.
    #[error("the saga is {0}, not stuck")]
    NotStuck(String),
    /// The saga is of a definition version that this engine does not know.
    #[error("saga `{0}` version {1} is not defined in this engine")]
    Undefined(String, u32),
    /// The database said no.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl Engine {
    /// An engine over `pool` whose participants answer on `reply_topic`.
    pub fn builder(_pool: PgPool, _reply_topic: &'static Topic) -> EngineBuilder {
        EngineBuilder {}
    }

    /// Starts a saga in the caller's transaction: its row, its log, its first command, all or nothing.
    pub async fn start_in<I: Serialize>(
        &self,
        _tx: &mut Tx<'_>,
        _id: SagaId,
        _saga: &Saga<I>,
        _input: &I,
        _business_key: &str,
    ) -> Result<(), StartError> {
        todo!("next slice")
    }

    /// Cancels a saga in the caller's transaction; the answer is final. Call it before locking business rows: sagas
    /// are locked first everywhere.
    pub async fn cancel_in(&self, _tx: &mut Tx<'_>, _id: SagaId, _reason: &str) -> Result<Cancelled, CancelError> {
        todo!("next slice")
    }

    /// Gives a stuck saga a fresh start, in a transaction of its own.
    pub async fn retry(&self, _id: SagaId, _expected: i32, _reason: &str, _actor: &str) -> Result<(), RetryError> {
        todo!("next slice")
    }

    /// What takes the replies: give it to the consumer of the reply topic.
    pub fn handler(self: &Arc<Self>) -> ReplyHandler {
        ReplyHandler { _engine: Arc::clone(self) }
    }

    /// Works off what is due, until `token` is cancelled.
    pub async fn run_timers(&self, _token: CancellationToken) -> Result<(), sqlx::Error> {
        todo!("next slice")
    }
}

impl EngineBuilder {
    /// Adds a definition.
    #[must_use]
    pub fn define<I>(self, _saga: &Saga<I>) -> Self {
        self
    }

    /// Binds a local effect to its name.
    #[must_use]
    pub fn local(self, _name: &str, _effect: impl LocalEffect) -> Self {
        self
    }

    /// The engine, if every definition is sound and every local effect that they name is bound.
    pub fn build(self) -> Result<Arc<Engine>, EngineErrors> {
        Ok(Arc::new(Engine {}))
    }
}

/// Takes the replies of the engine's participants.
#[derive(Clone)]
pub struct ReplyHandler {
    _engine: Arc<Engine>,
}

impl Handler for ReplyHandler {
    async fn handle(&self, _tx: &mut Tx<'_>, _batch: &[Message]) -> Result<(), HandleError> {
        todo!("next slice")
    }
}

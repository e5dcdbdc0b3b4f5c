//! What a service writes to take part in sagas: handlers of commands and of undos, and external effects.
//!
//! A handler runs in the transaction that also holds the fence, the inbox rows and the reply: it commits with them or
//! not at all, and may be called again after a rollback. A command that comes twice, or after its undo, may be handled
//! and then rolled back: what the handler finds may be its own work. It must do nothing that the transaction does not
//! undo; what lies outside the database is an [`ExternalEffect`].

use crate::{
    command::{Command, Failed, Happened, Never},
    envelope::SagaHeaders,
    id::{CommandId, MessageId},
    outbox::Tx,
};
use async_trait::async_trait;
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;

/// The outcome of a command.
pub enum Decision<C: Command> {
    /// The command is done; final.
    Done(C::Reply),
    /// Certainly nothing happened and nothing will; final. What the handler wrote is rolled back.
    Rejected(C::Rejection),
    /// The command failed this time: what the handler wrote is rolled back, the command stays open and a resend tries
    /// again.
    Failed(String),
}

/// The command that is being handled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandContext {
    /// The saga headers: saga, step, occurrence, command id, attempt.
    pub saga: SagaHeaders,
    /// The id of the message that brought the command; new with every resend.
    pub message: MessageId,
    /// For an undo: the command that it undoes, whether or not it was ever seen here. `None` for other commands.
    pub undoes: Option<CommandId>,
}

impl CommandContext {
    /// The command's id: the same for every resend, so it is the key under which an external effect is performed.
    pub fn idempotency_key(&self) -> CommandId {
        self.saga.command
    }
}

/// Handles a command within the batch's transaction.
#[async_trait]
pub trait CommandHandler<C: Command>: Send + Sync + 'static {
    /// Decides, and writes what follows from it. `Err` rolls the batch back; the consumer repeats it, then parks the
    /// message.
    ///
    /// # Errors
    /// The batch is rolled back. An error of the database that passes is repeated; any other one counts as an attempt.
    async fn decide(&self, tx: &mut Tx<'_>, cx: &CommandContext, command: C) -> anyhow::Result<Decision<C>>;
}

/// Takes back, within the batch's transaction, what `Do` did.
#[async_trait]
pub trait UndoHandler<Do: Command, Undo: Command<Rejection = Never>>: Send + Sync + 'static {
    /// Called only where `Do` was done, or may have been. Only for an external effect can `happened` be in doubt.
    ///
    /// # Errors
    /// The same as of [`CommandHandler::decide`].
    async fn undo(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: Undo,
        happened: Happened<Do::Reply>,
    ) -> anyhow::Result<Decision<Undo>>;
}

/// How an external effect begins.
pub enum Prepare<C: Command, P> {
    /// Commit the intent, with what was written, then call.
    Call(P),
    /// The command is decided without a call, as by a [`CommandHandler`].
    Decided(Decision<C>),
}

/// The outcome of a call outside the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Performed<A> {
    /// A certain answer, yes or no.
    Answered(A),
    /// No certain answer (time-out, 5xx, connection lost). The call is repeated under the same key, with back-off,
    /// until [`IntentConfig::max_attempts`](super::IntentConfig::max_attempts).
    InDoubt(Failed),
    /// An answer to something else than was asked. A repeated call would get it again under the same key, so the
    /// command is answered `failed` at once. Its effect stays in doubt; a resend calls again.
    Contradiction(String),
    /// No call was made, for example because the circuit is open. Nothing new is in doubt, and no attempt is counted.
    /// The participant tries again after a while, for as long as it takes.
    NotMade {
        /// Why no call was made.
        reason: String,
        /// How long to wait before the next try; at least 50 ms.
        again_after: Duration,
    },
    /// The provider does not let this process in (401), whatever it asks for: an operator has to act. Health is red
    /// with the reason. Nothing new is in doubt, and no attempt is counted. The participant tries again for as long as
    /// it takes.
    NotLetIn {
        /// The refusal, and what the operator should do.
        reason: String,
    },
}

/// A committed intention to perform an external effect.
#[derive(Debug, Clone)]
pub struct Intent<C, P> {
    /// The context of the command; its id is the idempotency key.
    pub cx: CommandContext,
    /// The command, as it was sent.
    pub command: C,
    /// The value that `prepare` returned.
    pub prepared: P,
}

/// An effect outside the database: prepared in one transaction, performed in none, recorded in another.
#[async_trait]
pub trait ExternalEffect<C: Command>: Send + Sync + 'static {
    /// What the call needs beside the command; stored with the intent.
    type Prepared: Serialize + DeserializeOwned + Send + Sync;
    /// The certain answers that the provider gives.
    type Answer: Serialize + DeserializeOwned + Send + Sync;

    /// Runs in the batch's transaction, before the call. It may refuse only what it must always have refused. A call of
    /// this command may be under way or may have had its effect, and the record of that may be lost.
    ///
    /// # Errors
    /// The same as of [`CommandHandler::decide`]: no call is made.
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &C,
    ) -> anyhow::Result<Prepare<C, Self::Prepared>>;

    /// Makes the call. No transaction is held. The call is repeated, possibly by another process, until it is answered.
    /// So it must be idempotent under [`CommandContext::idempotency_key`].
    async fn perform(&self, intent: &Intent<C, Self::Prepared>) -> Performed<Self::Answer>;

    /// Runs in the transaction that closes the intent. Unlike a handler's, its writes beside [`Decision::Rejected`] are
    /// kept, so that it can record a refusal from outside. Only `Failed` rolls them back.
    ///
    /// # Errors
    /// Nothing is written, and the call is repeated under its key. An error of the database that passes counts as no attempt.
    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<C, Self::Prepared>,
        answer: Self::Answer,
    ) -> anyhow::Result<Decision<C>>;
}

/// Takes back, outside the database, what `Do` did or may have done. It has the same phases as an [`ExternalEffect`].
///
/// In doubt it must work without any trace of `Do` in this database: the record may have been lost, while the effect
/// outside was not. [`CommandContext::undoes`] is the key that `Do` was, or is still being, called under. A call under
/// that key that arrives after the undo must have no effect any more; providers offer that as a void by idempotency
/// key.
#[async_trait]
pub trait ExternalUndo<Do: Command, Undo: Command<Rejection = Never>>: Send + Sync + 'static {
    /// What the call needs beside the command; stored with the intent.
    type Prepared: Serialize + DeserializeOwned + Send + Sync;
    /// The certain answers that the provider gives.
    type Answer: Serialize + DeserializeOwned + Send + Sync;

    /// Runs in a transaction, before the call. It runs only where `Do` was done or may have been, and only after `Do`'s
    /// intent, if there is one, settled.
    ///
    /// # Errors
    /// The same as of [`ExternalEffect::prepare`].
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &Undo,
        happened: Happened<Do::Reply>,
    ) -> anyhow::Result<Prepare<Undo, Self::Prepared>>;

    /// The call; see [`ExternalEffect::perform`].
    async fn perform(&self, intent: &Intent<Undo, Self::Prepared>) -> Performed<Self::Answer>;

    /// Runs in the transaction that closes the intent.
    ///
    /// # Errors
    /// The same as of [`ExternalEffect::record`].
    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<Undo, Self::Prepared>,
        answer: Self::Answer,
    ) -> anyhow::Result<Decision<Undo>>;
}

//! What a service writes to take part in sagas: handlers of commands and of undos, and external effects.
//!
//! A handler runs in the transaction that also holds the fence, the inbox rows and the reply: it commits with them or
//! not at all, and may be called again after a rollback. A command that comes twice, or after its undo, may be handled and
//! then rolled back: what the handler finds may be its own work. It must do nothing that the transaction does not undo;
//! what lies outside the database is an [`ExternalEffect`].

use crate::{
    command::{Command, Failed, Happened, Never},
    envelope::SagaHeaders,
    id::{CommandId, MessageId},
    outbox::Tx,
};
use async_trait::async_trait;
use serde::{Serialize, de::DeserializeOwned};
use std::time::Duration;

/// What a command comes to.
pub enum Decision<C: Command> {
    /// It is done; final.
    Done(C::Reply),
    /// Certainly nothing happened and nothing will; final. What the handler wrote is rolled back.
    Rejected(C::Rejection),
    /// Not now: what the handler wrote is rolled back, the command stays open and a resend tries again.
    Failed(String),
}

/// Which command is being handled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandContext {
    /// The saga's part: saga, step, occurrence, command id, attempt.
    pub saga: SagaHeaders,
    /// The message that brought it; new with every resend.
    pub message: MessageId,
    /// For an undo: the command that it undoes, whether or not that one was ever seen here. `None` for other commands.
    pub undoes: Option<CommandId>,
}

impl CommandContext {
    /// The same for every resend, and so the key that an external effect is performed under.
    pub fn idempotency_key(&self) -> CommandId {
        self.saga.command
    }
}

/// Handles a command within the batch's transaction.
#[async_trait]
pub trait CommandHandler<C: Command>: Send + Sync + 'static {
    /// Decides, and writes what follows from it. `Err` rolls the batch back; the consumer repeats it, then parks the
    /// message.
    async fn decide(&self, tx: &mut Tx<'_>, cx: &CommandContext, command: C) -> anyhow::Result<Decision<C>>;
}

/// Takes back, within the batch's transaction, what `Do` did.
#[async_trait]
pub trait UndoHandler<Do: Command, Undo: Command<Rejection = Never>>: Send + Sync + 'static {
    /// Called only where `Do` was done, or may have been: that it is in doubt is said of external effects alone.
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
    /// Commit the intent, then call. What was written commits with it.
    Call(P),
    /// It is decided without a call, as by a [`CommandHandler`].
    Decided(Decision<C>),
}

/// What a call outside the database came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Performed<A> {
    /// A certain answer, yes or no.
    Answered(A),
    /// No certain answer (time-out, 5xx, connection lost): called again under the same key, with back-off, until
    /// [`IntentConfig::max_attempts`](super::IntentConfig::max_attempts).
    InDoubt(Failed),
    /// An answer that says something else than was asked for. Under the same key it would be the same again, so the command
    /// is answered `failed` at once and its effect stays in doubt; a resend calls again.
    Contradiction(String),
    /// No call was made (the circuit is open, say): nothing is in doubt that was not before, and no attempt is counted. It
    /// is tried again after a while, for as long as it takes.
    NotMade {
        /// Why.
        reason: String,
        /// When to try again.
        again_after: Duration,
    },
    /// The provider does not let this process in (401), whatever it asks for: an operator has to act. Health is red with
    /// the reason. Nothing is in doubt that was not before, and no attempt is counted; it is tried again for as long as it takes.
    NotLetIn {
        /// Why, and what to do.
        reason: String,
    },
}

/// A committed intention to perform an external effect.
#[derive(Debug, Clone)]
pub struct Intent<C, P> {
    /// Which command; its id is the idempotency key.
    pub cx: CommandContext,
    /// The command.
    pub command: C,
    /// What `prepare` wanted to be remembered.
    pub prepared: P,
}

/// An effect outside the database: prepared in one transaction, performed in none, recorded in another.
#[async_trait]
pub trait ExternalEffect<C: Command>: Send + Sync + 'static {
    /// What the call needs beside the command; stored with the intent.
    type Prepared: Serialize + DeserializeOwned + Send + Sync;
    /// What the outside world answers for certain.
    type Answer: Serialize + DeserializeOwned + Send + Sync;

    /// In the batch's transaction, before the call. What it refuses it must always have refused: a call of this command may
    /// be under way, or may have had its effect, and the record of that may be lost.
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &C,
    ) -> anyhow::Result<Prepare<C, Self::Prepared>>;

    /// The call. No transaction is held. Repeated, possibly by another process, until it is answered, so it must be
    /// idempotent under [`CommandContext::idempotency_key`].
    async fn perform(&self, intent: &Intent<C, Self::Prepared>) -> Performed<Self::Answer>;

    /// In the transaction that closes the intent. Unlike a handler's, what it writes beside [`Decision::Rejected`] is
    /// kept, so that a refusal from outside can be put on record; only `Failed` rolls it back.
    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<C, Self::Prepared>,
        answer: Self::Answer,
    ) -> anyhow::Result<Decision<C>>;
}

/// Takes back, outside the database, what `Do` did or may have done. Same life as an [`ExternalEffect`].
///
/// In doubt it must work without any trace of `Do` in this database: the record may have been lost, while the effect
/// outside was not. [`CommandContext::undoes`] is the key that `Do` was, or is still being, called under. A call under
/// that key that arrives after the undo must have no effect any more; providers offer that as a void by idempotency key.
#[async_trait]
pub trait ExternalUndo<Do: Command, Undo: Command<Rejection = Never>>: Send + Sync + 'static {
    /// What the call needs beside the command; stored with the intent.
    type Prepared: Serialize + DeserializeOwned + Send + Sync;
    /// What the outside world answers for certain.
    type Answer: Serialize + DeserializeOwned + Send + Sync;

    /// In a transaction, before the call; only where `Do` was done or may have been, and only after its intent, if there
    /// is one, settled.
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &Undo,
        happened: Happened<Do::Reply>,
    ) -> anyhow::Result<Prepare<Undo, Self::Prepared>>;

    /// The call; see [`ExternalEffect::perform`].
    async fn perform(&self, intent: &Intent<Undo, Self::Prepared>) -> Performed<Self::Answer>;

    /// In the transaction that closes the intent.
    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<Undo, Self::Prepared>,
        answer: Self::Answer,
    ) -> anyhow::Result<Decision<Undo>>;
}

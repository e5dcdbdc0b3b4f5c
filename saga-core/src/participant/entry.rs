//! A registered command type without its type: payloads and answers as JSON, so that one table can hold every kind.

use super::handler::{
    CommandContext, CommandHandler, Decision, ExternalEffect, ExternalUndo, Intent, Performed, Prepare, UndoHandler,
};
use crate::{
    command::{Command, Failed, Happened, Never, Op, Why},
    consumer::HandleError,
    json,
    outbox::Tx,
};
use async_trait::async_trait;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::marker::PhantomData;

/// A decision with its reply encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Settlement {
    Done(Vec<u8>),
    Rejected(Vec<u8>),
    Failed(Failed),
}

/// How the handling of a command began.
#[derive(Debug)]
pub(super) enum HandlerStart {
    Settled(Settlement),
    /// The intent is to be committed with this value; then the call is made.
    Call(Value),
}

/// An intent as it is stored.
#[derive(Debug, Clone)]
pub(super) struct StoredIntent {
    pub(super) cx: CommandContext,
    pub(super) payload: Vec<u8>,
    pub(super) prepared: Value,
}

#[async_trait]
pub(super) trait CommandEntry: Send + Sync {
    /// Whether the command does or undoes.
    fn op(&self) -> Op;

    /// The type of the command that an undo undoes; `None` for other commands.
    fn undoes(&self) -> Option<&'static str> {
        None
    }

    /// Whether the command's effect is outside the database.
    fn is_external(&self) -> bool {
        false
    }

    /// The reply of an undo that has nothing to undo.
    fn nothing_to_undo(&self) -> Result<Vec<u8>, HandleError> {
        Err(HandleError::Poison("not an undo".into()))
    }

    /// Runs the handler, or prepares the effect. For an undo, `reply` is the reply of the command that it undoes;
    /// `None` in doubt.
    async fn begin(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        payload: &[u8],
        reply: Option<&[u8]>,
    ) -> Result<HandlerStart, HandleError>;

    /// Makes the call outside the database.
    async fn perform(&self, _intent: &StoredIntent) -> Performed<Value> {
        Performed::InDoubt("this command has no external effect in this version of the service".into())
    }

    /// Records the answer of the call.
    async fn record(&self, _tx: &mut Tx<'_>, _intent: StoredIntent, _answer: Value) -> Result<Settlement, HandleError> {
        Err(HandleError::Poison("this command has no external effect in this version of the service".into()))
    }
}

/// What an entry is registered for, without owning any of it.
type For<T> = PhantomData<fn() -> T>;

pub(super) struct Plain<C, H>(H, For<C>);

impl<C: Command, H: CommandHandler<C>> Plain<C, H> {
    pub(super) fn new(handler: H) -> Self {
        Self(handler, PhantomData)
    }
}

#[async_trait]
impl<C: Command, H: CommandHandler<C>> CommandEntry for Plain<C, H> {
    fn op(&self) -> Op {
        Op::Do
    }

    async fn begin(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        payload: &[u8],
        _reply: Option<&[u8]>,
    ) -> Result<HandlerStart, HandleError> {
        let command = decode::<C>(C::TYPE, payload)?;
        settled(self.0.decide(tx, cx, command).await).map(HandlerStart::Settled)
    }
}

pub(super) struct Undoing<D, U, H>(H, For<(D, U)>);

impl<D: Command, U: Command<Rejection = Never>, H: UndoHandler<D, U>> Undoing<D, U, H> {
    pub(super) fn new(handler: H) -> Self {
        Self(handler, PhantomData)
    }
}

#[async_trait]
impl<D: Command, U: Command<Rejection = Never, Reply: Default>, H: UndoHandler<D, U>> CommandEntry
    for Undoing<D, U, H>
{
    fn op(&self) -> Op {
        Op::Undo
    }

    fn undoes(&self) -> Option<&'static str> {
        Some(D::TYPE)
    }

    fn nothing_to_undo(&self) -> Result<Vec<u8>, HandleError> {
        encode(&U::Reply::default())
    }

    async fn begin(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        payload: &[u8],
        reply: Option<&[u8]>,
    ) -> Result<HandlerStart, HandleError> {
        let command = decode::<U>(U::TYPE, payload)?;
        settled(self.0.undo(tx, cx, command, happened::<D>(reply)?).await).map(HandlerStart::Settled)
    }
}

pub(super) struct External<C, E>(E, For<C>);

impl<C: Command, E: ExternalEffect<C>> External<C, E> {
    pub(super) fn new(effect: E) -> Self {
        Self(effect, PhantomData)
    }
}

#[async_trait]
impl<C: Command, E: ExternalEffect<C>> CommandEntry for External<C, E> {
    fn op(&self) -> Op {
        Op::Do
    }

    fn is_external(&self) -> bool {
        true
    }

    async fn begin(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        payload: &[u8],
        _reply: Option<&[u8]>,
    ) -> Result<HandlerStart, HandleError> {
        let command = decode::<C>(C::TYPE, payload)?;
        begun(self.0.prepare(tx, cx, &command).await)
    }

    async fn perform(&self, intent: &StoredIntent) -> Performed<Value> {
        match typed::<C, E::Prepared>(intent.clone()) {
            Ok(intent) => answered(self.0.perform(&intent).await),
            Err(e) => Performed::InDoubt(e.to_string().into()),
        }
    }

    async fn record(&self, tx: &mut Tx<'_>, intent: StoredIntent, answer: Value) -> Result<Settlement, HandleError> {
        let intent = typed::<C, E::Prepared>(intent)?;
        let answer = serde_json::from_value(answer).map_err(anyhow::Error::from)?;
        settled(self.0.record(tx, intent, answer).await)
    }
}

pub(super) struct ExternalUndoing<D, U, E>(E, For<(D, U)>);

impl<D: Command, U: Command<Rejection = Never>, E: ExternalUndo<D, U>> ExternalUndoing<D, U, E> {
    pub(super) fn new(effect: E) -> Self {
        Self(effect, PhantomData)
    }
}

#[async_trait]
impl<D, U, E> CommandEntry for ExternalUndoing<D, U, E>
where
    D: Command,
    U: Command<Rejection = Never, Reply: Default>,
    E: ExternalUndo<D, U>,
{
    fn op(&self) -> Op {
        Op::Undo
    }

    fn undoes(&self) -> Option<&'static str> {
        Some(D::TYPE)
    }

    fn is_external(&self) -> bool {
        true
    }

    fn nothing_to_undo(&self) -> Result<Vec<u8>, HandleError> {
        encode(&U::Reply::default())
    }

    async fn begin(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        payload: &[u8],
        reply: Option<&[u8]>,
    ) -> Result<HandlerStart, HandleError> {
        let command = decode::<U>(U::TYPE, payload)?;
        begun(self.0.prepare(tx, cx, &command, happened::<D>(reply)?).await)
    }

    async fn perform(&self, intent: &StoredIntent) -> Performed<Value> {
        match typed::<U, E::Prepared>(intent.clone()) {
            Ok(intent) => answered(self.0.perform(&intent).await),
            Err(e) => Performed::InDoubt(e.to_string().into()),
        }
    }

    async fn record(&self, tx: &mut Tx<'_>, intent: StoredIntent, answer: Value) -> Result<Settlement, HandleError> {
        let intent = typed::<U, E::Prepared>(intent)?;
        let answer = serde_json::from_value(answer).map_err(anyhow::Error::from)?;
        settled(self.0.record(tx, intent, answer).await)
    }
}

/// A command as a message brings it.
fn decode<T: DeserializeOwned>(kind: &str, payload: &[u8]) -> Result<T, HandleError> {
    json::read(payload).map_err(|why| HandleError::Poison(format!("payload is not a {kind}: {why}")))
}

fn happened<D: Command>(reply: Option<&[u8]>) -> Result<Happened<D::Reply>, HandleError> {
    match reply {
        Some(reply) => Ok(Happened::Yes(serde_json::from_slice(reply).map_err(|e| {
            HandleError::Poison(format!("the stored reply is not that of a {}, which this undoes: {e}", D::TYPE))
        })?)),
        None => Ok(Happened::InDoubt),
    }
}

/// A reply as it is stored and sent: it must be readable again, here and by the orchestrator.
fn encode<T: Serialize>(reply: &T) -> Result<Vec<u8>, HandleError> {
    let text = serde_json::to_vec(reply).map_err(|e| HandleError::Failed(e.into()))?;
    match json::flaw_of_text(&text) {
        Some(flaw) => Err(HandleError::Poison(format!("the handler's reply cannot be kept: {flaw}"))),
        None => Ok(text),
    }
}

/// An intent as it was stored. An older build may have taken an array in the place of an object; then its call may be
/// made already, and has to come to its end.
fn typed<C: Command, P: DeserializeOwned>(stored: StoredIntent) -> Result<Intent<C, P>, HandleError> {
    let unreadable = |error| HandleError::Poison(format!("the stored payload is not a {}: {error}", C::TYPE));
    Ok(Intent {
        command: serde_json::from_slice(&stored.payload).map_err(unreadable)?,
        prepared: serde_json::from_value(stored.prepared).map_err(anyhow::Error::from)?,
        cx: stored.cx,
    })
}

fn settled<C: Command>(decision: anyhow::Result<Decision<C>>) -> Result<Settlement, HandleError> {
    match decision.map_err(classify)? {
        Decision::Done(reply) => encode(&reply).map(Settlement::Done),
        Decision::Rejected(rejection) => encode(&rejection).map(Settlement::Rejected),
        Decision::Failed(why) => Ok(Settlement::Failed(why.into())),
    }
}

fn begun<C: Command, P: Serialize>(prepared: anyhow::Result<Prepare<C, P>>) -> Result<HandlerStart, HandleError> {
    match prepared.map_err(classify)? {
        Prepare::Call(prepared) => {
            let prepared = serde_json::to_value(prepared).map_err(anyhow::Error::from)?;
            match json::flaw(&prepared) {
                Some(flaw) => Err(HandleError::Poison(format!("what the effect prepared cannot be kept: {flaw}"))),
                None => Ok(HandlerStart::Call(prepared)),
            }
        }
        Prepare::Decided(decision) => settled(Ok(decision)).map(HandlerStart::Settled),
    }
}

fn answered<A: Serialize>(performed: Performed<A>) -> Performed<Value> {
    match performed {
        Performed::Answered(answer) => match serde_json::to_value(answer) {
            Ok(answer) => Performed::Answered(answer),
            Err(e) => {
                let reason = format!("the answer cannot be stored: {e}");
                Performed::InDoubt(Failed::new(Why::Unreadable, &reason))
            }
        },
        Performed::InDoubt(failed) => Performed::InDoubt(failed),
        Performed::Contradiction(reason) => Performed::Contradiction(reason),
        Performed::NotMade { reason, again_after } => Performed::NotMade { reason, again_after },
        Performed::NotLetIn { reason } => Performed::NotLetIn { reason },
    }
}

/// A handler's `?` on a database error must stay a database error, or a deadlock would count as an attempt.
fn classify(error: anyhow::Error) -> HandleError {
    match error.downcast::<sqlx::Error>() {
        Ok(error) => HandleError::Database(error),
        Err(error) => HandleError::Failed(error),
    }
}

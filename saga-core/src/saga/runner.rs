//! Batches of replies and due timers through `decide` and the store.
//!
//! ```text
//!   reply topic ─> consumer ─> [inbox | load for update | decide | local effects | saga, event, due, outbox] commit
//!   saga_due ────────────────> [claim, skip locked      | decide | local effects | saga, event, due, outbox] commit
//! ```
//!
//! A process that dies before the commit has done nothing: the records come again, the due times are still due. After
//! the commit, the inbox knows the records, and the relay sends the commands.

use super::{
    backlog::Backlog,
    batch::{BatchError, SagaBatch},
    due,
    engine::{Engine, Unread},
    loaded_saga::{LoadedSaga, PendingEvent},
    log::LogEvent,
    measure,
    state::{Answer, Event, Reply, Verdict},
    store::{self, Locked, Row, Undecided},
    timers::PUT_OFF,
};
use crate::{
    command::{Failed, Outcome, Why},
    consumer::{HandleError, Handler, Message, NO_SAGA, Unfit},
    envelope::{Envelope, SagaHeaders},
    fail_point::fail_point,
    id::{MessageId, SagaId},
    json,
    outbox::Tx,
};
use serde::Deserialize as _;
use serde_json::Value;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

/// Takes the replies of the engine's participants: give it to the consumer of the reply topic.
#[derive(Clone)]
pub struct ReplyHandler {
    pub(super) engine: Arc<Engine>,
}

impl Handler for ReplyHandler {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        let (mut replies, mut unfit) = (Vec::with_capacity(batch.len()), Vec::new());
        for message in batch {
            match self.engine.knows_source(&message.envelope) {
                Err(stranger) => unfit.push(stranger),
                Ok(()) => match IncomingReply::from_message(message) {
                    Ok(reply) => replies.push(reply),
                    Err(error) => unfit.push(Unfit::poison(message.envelope.id, error)?),
                },
            }
        }
        HandleError::unfit(unfit)?;
        self.engine.take_replies_in(tx, replies).await.map_err(|error| match error {
            BatchError::Database(error) => HandleError::Database(error),
            BatchError::Effect(error) => HandleError::Failed(error),
            BatchError::Poison(why, Some(message)) => HandleError::Poison(why).of(message),
            BatchError::Poison(why, None) => HandleError::Poison(why),
            BatchError::Unfit(unfit) => HandleError::Several(unfit),
        })
    }

    fn says_how_far_it_read(&self) -> bool {
        true
    }

    // True: the last statement is `store::update_in`, whose error is returned. Local effects before it run in savepoints,
    // and PostgreSQL refuses to release a savepoint after a swallowed error.
    fn ends_with_a_statement(&self) -> bool {
        true
    }
}

/// A reply, from the topic or from `saga_undecided`, where another transaction set it aside.
pub(super) struct IncomingReply<'m> {
    message: MessageId,
    kind: Option<&'m str>,
    headers: SagaHeaders,
    outcome: Outcome,
    payload: Option<&'m [u8]>,
    cause: Option<&'m Envelope>,
}

impl<'m> IncomingReply<'m> {
    fn from_message(message: &'m Message) -> Result<Self, HandleError> {
        let envelope = &message.envelope;
        let Some(headers) = envelope.saga.clone() else {
            return Err(HandleError::Poison(format!("`{}` is no reply: it names no saga", envelope.kind)));
        };
        let Some(outcome) = headers.outcome else {
            return Err(HandleError::Poison(format!("`{}` is no reply: it has no outcome", envelope.kind)));
        };
        let payload = message.payload.as_deref();
        let kind = Some(envelope.kind.as_str());
        Ok(Self { message: envelope.id, kind, headers, outcome, payload, cause: Some(envelope) })
    }

    pub(super) fn from_undecided(reply: &'m Undecided) -> Self {
        let headers = SagaHeaders {
            saga: reply.saga,
            definition: reply.definition.clone(),
            version: u32::try_from(reply.version).unwrap_or(0),
            step: reply.step.clone(),
            op: reply.op,
            occurrence: 0,
            command: reply.command,
            attempt: u32::try_from(reply.attempt).unwrap_or(0),
            undoes: None,
            happened: None,
            orchestrator: None,
            reply_to: None,
            outcome: Some(reply.outcome),
        };
        let (kind, payload) = (reply.kind.as_deref(), reply.payload.as_deref());
        Self { message: reply.message, kind, headers, outcome: reply.outcome, payload, cause: None }
    }

    /// Makes a dead letter of a reply whose saga does not exist here. The saga was lost, for example in a restore, or
    /// the reply came to the wrong place. The reply may be all that is known of an effect, so it is kept. `None` for a
    /// reply that was set aside while its saga existed.
    fn without_saga(self) -> Option<Unfit> {
        let SagaHeaders { saga, definition, step, op, .. } = &self.headers;
        measure::unknown_saga();
        let outcome = self.outcome;
        let reason = format!("there is no saga {saga} ({definition}) here; {op} of its step {step} {outcome}");
        self.cause.map(|_| Unfit { message: self.message, class: NO_SAGA, reason })
    }

    fn into_event(self) -> PendingEvent<'m> {
        let Self { kind, headers, outcome, payload, cause, .. } = self;
        let (answer, flaw) = read_answer(outcome, payload);
        let SagaHeaders { step, op, attempt, command, .. } = headers;
        let event = Event::Reply(Reply { command, attempt, answer });
        PendingEvent { event, what: LogEvent::Reply { step, op, attempt, outcome }, cause, kind, flaw }
    }

    fn set_aside(self, unread: &Unread) -> Undecided {
        let Unread { locked, flaw } = unread;
        Undecided {
            message: self.message,
            // PostgreSQL has no place for a NUL; a type that has one stays another type.
            kind: self.kind.map(|kind| kind.replace('\0', "\u{fffd}")),
            saga: self.headers.saga,
            definition: locked.definition.clone(),
            version: locked.version,
            fingerprint: locked.fingerprint.clone(),
            step: self.headers.step,
            op: self.headers.op,
            command: self.headers.command,
            attempt: i32::try_from(self.headers.attempt).unwrap_or(i32::MAX),
            outcome: self.outcome,
            payload: self.payload.map(<[u8]>::to_vec),
            put_off: if flaw.is_some() { PUT_OFF } else { Duration::ZERO },
        }
    }
}

/// The answer in a reply, and what is wrong with its payload. A flaw matters only if the reply is waited for.
fn read_answer(outcome: Outcome, payload: Option<&[u8]>) -> (Answer, Option<String>) {
    let payload = payload.unwrap_or(b"null");
    if outcome == Outcome::Failed {
        return (Answer::Failed(failed(payload)), None);
    }
    let (value, flaw) = match serde_json::from_slice(payload) {
        Ok(value) => {
            let flaw = json::flaw(&value);
            (value, flaw)
        }
        Err(error) => (Value::Null, Some(error.to_string())),
    };
    match outcome {
        Outcome::Rejected => (Answer::Rejected(value), flaw),
        Outcome::Succeeded | Outcome::Failed => (Answer::Succeeded(value), flaw),
    }
}

/// Reads why a participant failed.
fn failed(payload: &[u8]) -> Failed {
    let reported = serde_json::from_slice::<Value>(payload).ok();
    let field = |name: &str| reported.as_ref().and_then(|reported| reported.get(name));
    let error = field("error").and_then(Value::as_str);
    let text = error.map_or_else(|| String::from_utf8_lossy(payload).into_owned(), ToOwned::to_owned);
    // Participants of other builds do not send `why`.
    let why = field("why").and_then(|why| Why::deserialize(why).ok()).unwrap_or_default();
    Failed::new(why, &text)
}

/// Parts a batch: first what it decides, then what it leaves as it is because it cannot be read.
pub fn divide<S, U>(read: impl IntoIterator<Item = Result<S, U>>) -> (Vec<S>, Vec<U>) {
    let (mut readable, mut unread) = (Vec::new(), Vec::new());
    for row in read {
        match row {
            Ok(row) => readable.push(row),
            Err(left) => unread.push(left),
        }
    }
    (readable, unread)
}

impl Engine {
    /// Decides replies in the caller's transaction. Several replies to one saga are taken in their order.
    pub(super) async fn take_replies_in(
        &self,
        tx: &mut Tx<'_>,
        replies: Vec<IncomingReply<'_>>,
    ) -> Result<(), BatchError> {
        let mut by_saga: BTreeMap<SagaId, Vec<IncomingReply<'_>>> = BTreeMap::new();
        for reply in replies {
            by_saga.entry(reply.headers.saga).or_default().push(reply);
        }
        let ids: Vec<SagaId> = by_saga.keys().copied().collect();
        let rows = store::load_in(tx, &ids).await?;
        fail_point!("saga.after-load", self.reply_topic());
        let (readable, unread) = divide(rows.into_iter().map(|locked| self.read(locked)));
        let mut replies_of = |saga| by_saga.remove(&saga).unwrap_or_default().into_iter();
        let loaded = |(definition, row): (_, Row)| {
            let events = replies_of(row.state.saga).map(IncomingReply::into_event).collect();
            LoadedSaga::new(definition, row, events)
        };
        let sagas: Vec<_> = readable.into_iter().map(loaded).collect();
        let mut aside = Vec::new();
        for unread in unread {
            measure::unread(&unread, "its replies are set aside, and tried again every minute");
            aside.extend(replies_of(unread.locked.saga).map(|reply| reply.set_aside(&unread)));
        }
        let lost: Vec<_> = by_saga.into_values().flatten().filter_map(IncomingReply::without_saga).collect();
        if !lost.is_empty() {
            return Err(BatchError::Unfit(lost));
        }
        if let Some(first) = aside.iter().find(|reply| reply.put_off.is_zero()) {
            // The log names one of them: in a rollout they are many, and most are of one definition.
            tracing::warn!(
                saga = %first.saga,
                saga_type = first.definition,
                version = first.version,
                replies = aside.len(),
                "replies to sagas of unknown definitions, this one first, are set aside"
            );
        }
        if !aside.is_empty() {
            store::set_aside_in(tx, &aside).await?;
        }
        SagaBatch::new(self, sagas).run_in(tx).await?;
        fail_point!("saga.after-store", self.reply_topic());
        Ok(())
    }

    /// Lets time pass for sagas that were claimed; returns for how many something was due. The claim is in vain if
    /// another replica settled the row between the look at `saga_due` and the lock. A row that cannot be read is put
    /// off.
    pub(super) async fn take_due_in(
        &self,
        tx: &mut Tx<'_>,
        rows: Vec<Locked>,
        backlog: &Backlog,
    ) -> Result<usize, BatchError> {
        let (readable, unread) = divide(rows.into_iter().map(|locked| self.read(locked)));
        let loaded = |(definition, row): (_, Row)| {
            let due = PendingEvent { event: Event::Due, what: LogEvent::Due, cause: None, kind: None, flaw: None };
            // Where the saga has to wait, `saga_due` had too early a time: the batch sets it right.
            let waits = backlog.holds(row.state.saga, row.state.due());
            LoadedSaga::new(definition, row, if waits { VecDeque::new() } else { VecDeque::from([due]) })
        };
        let sagas = readable.into_iter().map(loaded).collect();
        if !unread.is_empty() {
            unread.iter().for_each(|unread| measure::unread(unread, "what is due for it is put off for a minute"));
            let put_off: Vec<_> = unread.iter().map(|unread| unread.locked.saga).collect();
            due::put_off_in(tx, &put_off, PUT_OFF).await?;
            self.timers_health().puts_off(put_off.iter().map(|saga| saga.0));
        }
        let mut batch = SagaBatch::new(self, sagas);
        batch.run_in(tx).await?;
        Ok(batch.sagas.iter().flat_map(|loaded| &loaded.verdicts).filter(|verdict| **verdict == Verdict::Taken).count())
    }
}

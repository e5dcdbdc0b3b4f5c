//! One saga in a transaction: its row, the events that wait for it, and what follows from them.

use super::{
    batch::BatchError,
    decide::{answers, decide},
    definition::{BuildFrom, Definition, Remote, StepKind},
    local::LocalCall,
    log::{LogEntry, LogEvent},
    state::{Action, Answer, Effects, Event, Ignored, Open, Reply, Send, State, StepState, TimelineEntry, Verdict},
    store::{self, Due, Row, SagaUpdate},
};
use crate::{
    command::Op,
    envelope::{Envelope, SagaHeaders, header},
    id::SagaId,
    json,
    outbox::NewMessage,
    reason::reason,
    trace,
};
use serde_json::Value;
use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use time::OffsetDateTime;

/// A saga's log takes so many kinds of unexpected replies; further ones are only counted.
const UNEXPECTED_MAX: usize = 64;

/// Something that happens to a saga, with what its log will say.
pub(super) struct PendingEvent<'m> {
    pub(super) event: Event,
    pub(super) what: LogEvent,
    /// The message that caused it: what follows continues its trace.
    pub(super) cause: Option<&'m Envelope>,
    /// A reply's type; `None` where that is not known.
    pub(super) kind: Option<&'m str>,
    /// What is wrong with a reply's payload; it matters only if the reply is waited for.
    pub(super) flaw: Option<String>,
}

/// One saga in a transaction.
pub(super) struct LoadedSaga<'m> {
    definition: Arc<Definition>,
    row: Row,
    from_revision: i32,
    from_status: &'static str,
    events: VecDeque<PendingEvent<'m>>,
    cause: Option<&'m Envelope>,
    local: Option<(usize, Op)>,
    entries: Vec<LogEntry>,
    /// Why replies were ignored in this transaction, including kinds that the log has already.
    pub(super) ignored: Vec<Ignored>,
    pub(super) messages: Vec<NewMessage>,
    pub(super) verdicts: Vec<Verdict>,
    /// Attempts that were settled in this transaction, and when; the step's duration metric is computed from them.
    pub(super) settled: Vec<(Open, OffsetDateTime)>,
}

/// A local effect that has to be run before its saga goes on.
pub(super) struct LocalToRun<'a> {
    saga: SagaId,
    name: &'a str,
    input: &'a Value,
    state: &'a State,
}

impl<'a> LocalToRun<'a> {
    pub(super) fn call(self) -> LocalCall<'a> {
        LocalCall { saga: self.saga, name: self.name, input: self.input, failure: self.state.failure.as_ref() }
    }
}

impl<'m> LoadedSaga<'m> {
    pub(super) fn new(definition: Arc<Definition>, row: Row, events: VecDeque<PendingEvent<'m>>) -> Self {
        let (from_revision, from_status) = (row.revision, row.state.status.as_str());
        Self {
            definition,
            row,
            from_revision,
            from_status,
            events,
            cause: None,
            local: None,
            entries: Vec::new(),
            ignored: Vec::new(),
            messages: Vec::new(),
            verdicts: Vec::new(),
            settled: Vec::new(),
        }
    }

    pub(super) fn saga(&self) -> SagaId {
        self.row.state.saga
    }

    pub(super) fn locked_at(&self) -> OffsetDateTime {
        self.row.now
    }

    pub(super) fn definition(&self) -> &Definition {
        &self.definition
    }

    pub(super) fn state(&self) -> &State {
        &self.row.state
    }

    /// A span for log lines about this saga alone. It continues the trace of the message that came last, whatever else
    /// shared the transaction.
    pub(super) fn span(&self) -> tracing::Span {
        let span = tracing::info_span!("saga", saga = %self.saga(), saga_type = self.definition.name());
        if let Some(cause) = self.cause {
            trace::continue_from(&span, cause);
        }
        span
    }

    pub(super) fn entries(&self) -> &[LogEntry] {
        &self.entries
    }

    pub(super) fn was_finished(&self) -> bool {
        matches!(self.from_status, "completed" | "compensated")
    }

    /// Takes events until none is left, or until a local effect has to be run.
    pub(super) fn decide(&mut self, reply_topic: &str, now: OffsetDateTime) -> Result<(), BatchError> {
        while self.local.is_none()
            && let Some(event) = self.events.pop_front()
        {
            self.take(event, reply_topic, now)?;
        }
        Ok(())
    }

    fn take(&mut self, event: PendingEvent<'m>, reply_topic: &str, now: OffsetDateTime) -> Result<(), BatchError> {
        let PendingEvent { event, what, cause, kind, flaw } = event;
        let before = self.row.state.open().copied();
        if let Event::Reply(reply) = &event
            && let Ok(open) = answers(&self.definition, &self.row.state, reply)
            && let Err(flaw) = self.check(&open, reply, flaw, kind)
        {
            return Err(BatchError::Poison(flaw, cause.map(|cause| cause.id)));
        }
        let (state, effects) = decide(&self.definition, &self.row.state, &event, now);
        self.verdicts.push(effects.verdict);
        if let Verdict::Ignored(why) = effects.verdict {
            self.ignore(what, why);
            return Ok(());
        }
        if let Some(open) = before
            && state.open().is_none_or(|now_open| (now_open.step, now_open.op) != (open.step, open.op))
        {
            self.settled.push((open, now));
        }
        self.cause = cause;
        self.entries.push(LogEntry { what, then: Vec::new() });
        self.apply(state, effects, reply_topic, now);
        Ok(())
    }

    /// Logs an unexpected reply, once per kind. Any other ignored event was not due, or its caller gets the answer.
    fn ignore(&mut self, what: LogEvent, why: Ignored) {
        let LogEvent::Reply { step, op, attempt, outcome } = what else { return };
        self.ignored.push(why);
        let what = LogEvent::Ignored { step, op, attempt, outcome, why };
        if self.entries.iter().all(|entry| entry.what.unexpected_reply() != what.unexpected_reply()) {
            self.entries.push(LogEntry { what, then: Vec::new() });
        }
    }

    /// Whether the log may already have one of the new lines; [`LoadedSaga::forget`] then needs the lines that it has.
    pub(super) fn has_unexpected_replies(&self) -> bool {
        self.entries.iter().any(|entry| entry.what.unexpected_reply().is_some())
    }

    /// Leaves out replies of a kind that the log has already, or all of them once the log has enough.
    pub(super) fn forget(&mut self, log: &[LogEntry]) {
        self.entries.retain(|entry| {
            let unexpected_reply = entry.what.unexpected_reply();
            unexpected_reply.is_none()
                || (log.len() < UNEXPECTED_MAX
                    && log.iter().all(|entry| entry.what.unexpected_reply() != unexpected_reply))
        });
    }

    /// Takes the outcome of the local effect that the saga waited for.
    pub(super) fn settle_local(&mut self, reply_topic: &str, event: &Event, now: OffsetDateTime) {
        self.local = None;
        let (state, effects) = decide(&self.definition, &self.row.state, event, now);
        self.apply(state, effects, reply_topic, now);
    }

    fn apply(&mut self, state: State, effects: Effects, reply_topic: &str, now: OffsetDateTime) {
        let deadline = self.row.state.deadline;
        self.row.state = state;
        let mut timeline = effects.timeline;
        for action in effects.actions {
            match action {
                Action::RunLocal { step, op } => self.local = Some((step, op)),
                Action::Send(send) => match self.message(&send, reply_topic) {
                    Ok(message) => self.messages.push(message),
                    Err(error) => {
                        let unsent = Event::unsent(&error, deadline);
                        let (state, effects) = decide(&self.definition, &self.row.state, &unsent, now);
                        self.row.state = state;
                        // The command was not sent, so the log must not say that it was.
                        timeline.pop();
                        timeline.extend(effects.timeline);
                    }
                },
            }
        }
        if let Some(entry) = self.entries.last_mut() {
            entry.then.extend(timeline);
        }
    }

    /// The local effect that has to be run before this saga goes on.
    pub(super) fn pending(&self) -> Option<LocalToRun<'_>> {
        let (step, op) = self.local?;
        let step = &self.definition.steps()[step];
        let name = match (&step.kind, op) {
            (StepKind::Local { undo: Some(undo), .. }, Op::Undo) => undo,
            _ => &step.name,
        };
        Some(LocalToRun { saga: self.saga(), name, input: &self.row.input, state: &self.row.state })
    }

    /// Whether the saga has begun to be undone in this transaction and is not at the end of it.
    pub(super) fn has_turned(&self) -> bool {
        let mut timeline = self.entries.iter().flat_map(|entry| &entry.then);
        !self.row.state.is_finished() && timeline.any(|entry| matches!(entry, TimelineEntry::Compensating { .. }))
    }

    /// A call of the local effect `name` for this saga.
    pub(super) fn call_of<'a>(&'a self, name: &'a str) -> LocalCall<'a> {
        LocalToRun { saga: self.saga(), name, input: &self.row.input, state: &self.row.state }.call()
    }

    /// What the saga's row becomes; `None` when nothing happened that the row has to show.
    pub(super) fn change(&self, now: OffsetDateTime) -> Option<SagaUpdate<'_>> {
        let state = &self.row.state;
        let same_status = state.status.as_str() == self.from_status;
        let (due, armed_at) = match (self.row.armed_at, state.due()) {
            _ if state.is_finished() => (if self.was_finished() { Due::Keep } else { Due::Remove }, None),
            (Some(armed), Some(due)) if same_status && now < armed && armed <= due => (Due::Keep, Some(armed)),
            (None, None) if same_status => (Due::Keep, None),
            (_, due) => (Due::Set, due),
        };
        let changed = !self.entries.is_empty() || due != Due::Keep;
        changed.then(|| SagaUpdate {
            definition: &self.row.definition,
            version: self.row.version,
            from_revision: self.from_revision,
            to_revision: self.from_revision + i32::try_from(self.entries.len()).unwrap_or(i32::MAX),
            state,
            due,
            armed_at,
        })
    }

    /// The rows that this transaction adds to the saga's log.
    pub(super) fn events(&self) -> impl Iterator<Item = store::Event<'_>> {
        let revisions = self.from_revision + 1..;
        let saga = self.saga();
        revisions.zip(&self.entries).map(move |(revision, entry)| store::Event { saga, revision, entry })
    }

    fn check(&self, open: &Open, reply: &Reply, flaw: Option<String>, kind: Option<&str>) -> Result<(), String> {
        let step = &self.definition.steps()[open.step];
        let remote = remote(&step.kind);
        let Some(call) = remote.and_then(|remote| remote.call(open.op)) else { return Ok(()) };
        let other = kind.filter(|kind| kind.strip_suffix(".reply") != Some(call.kind));
        let flaw = flaw.or_else(|| other.map(|kind| format!("its type is {:?}", reason(kind))));
        let checked = match (&reply.answer, flaw) {
            (Answer::Failed(_), None) => return Ok(()),
            (_, Some(flaw)) => Err(flaw),
            (Answer::Succeeded(value), None) => (call.check_reply)(value).map_err(|error| error.to_string()),
            (Answer::Rejected(value), None) => (call.check_rejection)(value).map_err(|error| error.to_string()),
        };
        checked.map_err(|error| format!("not an answer to `{}` of step `{}`: {error}", call.kind, step.name))
    }

    fn message(&self, send: &Send, reply_topic: &str) -> Result<NewMessage, String> {
        message(&self.definition, &self.row.state, &self.row.input, send, reply_topic).map(|message| match self.cause {
            Some(cause) => message.caused_by(cause),
            None => message,
        })
    }
}

/// The message that carries a command.
pub(super) fn message(
    definition: &Definition,
    state: &State,
    input: &Value,
    send: &Send,
    reply_topic: &str,
) -> Result<NewMessage, String> {
    let step = &definition.steps()[send.step];
    let call = remote(&step.kind)
        .and_then(|remote| remote.call(send.op))
        .ok_or_else(|| format!("step `{}` has no command for {}", step.name, send.op))?;
    let earlier = definition.steps().iter().zip(&state.steps).take(send.step);
    let replies: Vec<&Value> =
        earlier.filter(|(step, _)| remote(&step.kind).is_some()).map(|(_, how)| reply(how)).collect();
    let happened = match &state.steps[send.step] {
        StepState::Done(reply) if send.op == Op::Undo => Some(reply),
        _ => None,
    };
    let from = BuildFrom { input, replies: &replies, happened };
    // The builder is the service's code. A panic fails this saga, not its whole batch.
    let payload = catch_unwind(AssertUnwindSafe(|| (call.build)(from)))
        .map_err(|_| format!("building `{}` panicked", call.kind))?
        .map_err(|error| format!("building `{}`: {error}", call.kind))?;
    if let Some(flaw) = json::flaw_of_text(&payload) {
        return Err(format!("building `{}`: {flaw}", call.kind));
    }
    let headers = SagaHeaders {
        saga: state.saga,
        definition: definition.name().to_owned(),
        version: definition.version(),
        step: step.name.clone(),
        op: send.op,
        occurrence: send.occurrence,
        command: send.command,
        attempt: send.attempt,
        undoes: send.undoes.map(|(command, _)| command),
        happened: send.undoes.map(|(_, happened)| happened),
        orchestrator: state
            .naming
            .as_ref()
            .map(|naming| naming.orchestrator.clone())
            .filter(|name| name != reply_topic),
        reply_to: Some(reply_topic.to_owned()),
        outcome: None,
    };
    let mut message = NewMessage::tombstone(call.topic, &state.saga.to_string(), call.kind).with_saga(&headers);
    message.payload = Some(payload);
    message.headers.insert(header::CONTENT_TYPE.into(), "application/json".into());
    Ok(message)
}

fn remote(kind: &StepKind) -> Option<&Remote> {
    match kind {
        StepKind::Remote(remote) => Some(remote),
        StepKind::Local { .. } => None,
    }
}

fn reply(how: &StepState) -> &Value {
    match how {
        StepState::Done(reply) => reply,
        StepState::Issued | StepState::NotDone | StepState::Undone => &Value::Null,
    }
}

//! What inspection shows of a saga: where it stands, what is left, the way back, why it waits and what would unblock
//! it, and its timeline. Pure; payloads (input, replies, rejections) are left out unless they are asked for.

use super::{
    decide::command_id,
    definition::{Definition, StepKind, StepRole},
    log::{LogEntry, LogEvent},
    state::{Failure, Open, State, Status, StepState, StuckWhy, TimelineEntry, Wait},
};
use crate::{
    command::{Op, Outcome},
    id::{CommandId, SagaId},
};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::ToSchema;

/// A saga in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct SagaSummary {
    /// The saga's id.
    #[schema(value_type = uuid::Uuid)]
    pub id: SagaId,
    /// Its definition's name.
    pub definition: String,
    /// Its definition's version.
    pub version: i32,
    /// The business key that it was started with, for example an order's number.
    pub business_key: String,
    /// `running`, `compensating`, `stuck`, `completed` or `compensated`.
    pub status: String,
    /// Counts its events; an operator's command names the one it was meant for.
    pub revision: i32,
    /// Whether this replica can read its state. If not, it does not know its definition, or another build wrote the row
    /// in a format of its own, or the row is damaged.
    pub readable: bool,
    /// The step that is open; `null` when it has ended or is not readable.
    pub step: Option<String>,
    /// When the saga began.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When something happened to it last.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// When the saga ended; `null` before.
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
}

/// A saga with its steps and its timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct SagaView {
    /// The fields that a list shows of the saga.
    #[serde(flatten)]
    pub summary: SagaSummary,
    /// Whether this replica knows its definition; otherwise only the timeline is shown, with numbers for the names of
    /// steps.
    pub definition_known: bool,
    /// Why it is, or was, undone.
    pub failure: Option<FailureView>,
    /// Why it waits, and what would unblock it; `null` when it has ended.
    pub waits: Option<WaitView>,
    /// Every step and how far it has come.
    pub steps: Vec<StepView>,
    /// The steps that are still to be done, should all go well.
    pub remaining: Vec<String>,
    /// The steps that are undone, newest first, or would be if it were cancelled now. Empty past the pivot.
    pub undo_path: Vec<String>,
    /// Replies that wait for a replica that knows its definition.
    pub undecided_replies: i64,
    /// What it was started with; only when payloads are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub input: Option<Value>,
    /// What happened, oldest first.
    pub timeline: Vec<TimelineLine>,
}

/// Why a saga is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FailureView {
    /// The step that was open.
    pub step: String,
    /// `rejected`, `failed`, `cancelled` or `deadline`.
    #[schema(value_type = String)]
    pub kind: super::state::FailureKind,
    /// The reason that came with a cancel, or the last error.
    pub reason: Option<String>,
    /// The payload of the participant's rejection; only when payloads are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub rejection: Option<Value>,
}

/// Why a saga waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct WaitView {
    /// What it waits for, in words.
    pub why: String,
    /// What would move it on, in words.
    pub unblocked_by: String,
    /// The attempt that is open, from 1; 0 where its command could not be built or its state is not readable.
    pub attempt: u32,
    /// When the first attempt was issued; where its state is not readable, when something happened to it last.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// When something happens by itself; `null` when nothing will.
    #[serde(with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
}

/// A step and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct StepView {
    /// The step's name, unique within the saga.
    pub name: String,
    /// `local`, `compensable`, `pivot` or `retriable`.
    pub kind: &'static str,
    /// `waiting`, `issued`, `done`, `not_done` or `undone`.
    pub state: &'static str,
    /// The type of its command; `null` for a local step.
    pub command: Option<&'static str>,
    /// The type of the command, or the name of the local effect, that undoes it; `null` where nothing does.
    pub undo: Option<String>,
    /// The step's reply; only when payloads are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub reply: Option<Value>,
}

/// A line of the timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Line)]
pub struct TimelineLine {
    /// When the event happened.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// The revision of the event; lines of one event happened in one transaction.
    pub revision: i32,
    /// `started`, `reply`, `ignored`, `due`, `cancel`, `retry`, and what followed: `sent`, `ran`, `pausing`,
    /// `compensating`, `stuck`, `completed`, `compensated`. `unreadable`: another build wrote it.
    pub what: &'static str,
    /// The step's name; absent where the line is about no step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// `do` or `undo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub op: Option<&'static str>,
    /// The type of the command that was sent or answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<&'static str>,
    /// The command's id, the same for every attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<uuid::Uuid>)]
    pub command_id: Option<CommandId>,
    /// The attempt, from 1; only where a command was sent or answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// `succeeded`, `rejected` or `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// A reason, an error or a time, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Whether a view has the payloads in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payloads {
    /// Left out, because they are personal: names, addresses, tokens.
    Redacted,
    /// Included, for a caller that may see them and asked.
    Shown,
}

/// A saga's row and log, as they are.
pub(super) struct StoredSaga {
    pub(super) summary: SagaSummary,
    /// `None` where it cannot be read, as for the input.
    pub(super) state: Option<State>,
    pub(super) input: Option<Value>,
    /// An entry, or why it cannot be read.
    pub(super) log: Vec<(i32, OffsetDateTime, Result<LogEntry, String>)>,
    pub(super) undecided: i64,
}

/// Renders a saga's row and log.
pub(super) fn view(found: StoredSaga, definition: Option<&Definition>, payloads: Payloads) -> SagaView {
    let StoredSaga { summary, state, input, log, undecided } = found;
    let names = Names { definition, state: state.as_ref() };
    let shown = |value: &Value| (payloads == Payloads::Shown).then(|| value.clone());
    let read = definition.zip(state.as_ref());
    SagaView {
        definition_known: definition.is_some(),
        failure: state.as_ref().and_then(|state| state.failure.as_ref()).map(|failure| failure_view(failure, shown)),
        waits: match &state {
            Some(state) => state.open().map(|open| wait_view(&names, state, open, undecided)),
            None => unread_wait(&summary, definition.is_some(), undecided),
        },
        steps: read.map(|(definition, state)| steps(definition, state, shown)).unwrap_or_default(),
        remaining: read.map(|(definition, state)| remaining(definition, state)).unwrap_or_default(),
        undo_path: read.map(|(definition, state)| undo_path(definition, state)).unwrap_or_default(),
        undecided_replies: undecided,
        input: input.as_ref().and_then(shown),
        timeline: log.into_iter().flat_map(|(revision, at, entry)| lines(&names, revision, at, entry)).collect(),
        summary,
    }
}

/// Names of steps and commands, as far as this replica knows them.
pub(super) struct Names<'d> {
    pub(super) definition: Option<&'d Definition>,
    pub(super) state: Option<&'d State>,
}

impl Names<'_> {
    fn step(&self, step: usize) -> String {
        let known = self.definition.and_then(|definition| definition.steps().get(step));
        known.map_or_else(|| format!("step {step}"), |step| step.name.clone())
    }

    pub(super) fn open_step(&self) -> Option<String> {
        Some(self.step(self.state?.open()?.step))
    }

    /// The type of a step's command, and its id.
    fn command(&self, step: &str, op: Op) -> Option<(&'static str, Option<CommandId>)> {
        let definition = self.definition?;
        let index = definition.steps().iter().position(|known| known.name == step)?;
        match &definition.steps()[index].kind {
            StepKind::Remote(remote) => {
                let id = self.state.map(|state| command_id(definition, state, index, op));
                remote.call(op).map(|call| (call.kind, id))
            }
            StepKind::Local { .. } => None,
        }
    }
}

fn failure_view(failure: &Failure, shown: impl Fn(&Value) -> Option<Value>) -> FailureView {
    FailureView {
        step: failure.step.clone(),
        kind: failure.kind,
        reason: failure.reason.clone(),
        rejection: failure.rejection.as_ref().and_then(shown),
    }
}

/// Why a saga waits that this replica cannot read; `None` if it has ended.
fn unread_wait(summary: &SagaSummary, definition_known: bool, undecided: i64) -> Option<WaitView> {
    let (why, unblocked_by) = match definition_known {
        _ if summary.finished_at.is_some() => return None,
        false if undecided > 0 => (
            "a reply has come, but no replica that took it knows this version of the definition",
            "a replica that runs this version of the definition",
        ),
        false => ("this replica does not know this version of the definition", "a replica that runs it"),
        true => (
            "this replica cannot read the saga's row: another build wrote it, or it is damaged",
            "a replica of the build that wrote it; what is due and what was answered is tried again every minute",
        ),
    };
    let (why, unblocked_by) = (why.to_owned(), unblocked_by.to_owned());
    Some(WaitView { why, unblocked_by, attempt: 0, since: summary.updated_at, until: None })
}

fn wait_view(names: &Names<'_>, state: &State, open: &Open, undecided: i64) -> WaitView {
    let step = names.step(open.step);
    let what = match open.op {
        Op::Do => format!("`{step}`"),
        Op::Undo => format!("the undo of `{step}`"),
    };
    let (why, unblocked_by) = match (&state.status, open.wait) {
        _ if undecided > 0 => (
            format!("a reply has come, but no replica that took it knows {what} of this definition version"),
            "a replica that runs this version of the definition".to_owned(),
        ),
        (Status::Stuck { why, .. }, _) => stuck(why, &what),
        (_, Wait::Pause) => (
            format!("{what} failed and is tried again after a pause"),
            "the end of the pause, or a late reply to an earlier attempt".to_owned(),
        ),
        (_, Wait::Local) => {
            (format!("{what} did not work here and is tried again after a pause"), "the end of the pause".to_owned())
        }
        (_, Wait::Reply) => {
            (format!("{what} has not been answered yet"), "the participant's reply, or the end of the wait".to_owned())
        }
    };
    WaitView { why, unblocked_by, attempt: open.attempt, since: open.since, until: state.due() }
}

fn stuck(why: &StuckWhy, what: &str) -> (String, String) {
    let reply_or_retry = "a late reply, or `retry` once the participant works".to_owned();
    match why {
        StuckWhy::PivotInDoubt { error } => (
            with(
                format!(
                    "it is not known whether the pivot {what} happened, so neither going on nor undoing would be right"
                ),
                error,
            ),
            reply_or_retry,
        ),
        StuckWhy::NotDone { error } | StuckWhy::NotUndone { error } => {
            (with(format!("{what} did not get done in all its attempts"), error), reply_or_retry)
        }
        StuckWhy::Broken { error } => {
            (format!("{what} does not work here: {error}"), "`retry` once its cause is mended".to_owned())
        }
    }
}

/// `what`, and the participant's last error, if there is one.
fn with(what: String, error: &str) -> String {
    if error.is_empty() { what } else { format!("{what}: {error}") }
}

fn steps(definition: &Definition, state: &State, shown: impl Fn(&Value) -> Option<Value>) -> Vec<StepView> {
    let step = |(index, step): (usize, &super::definition::Step)| {
        let (kind, command, undo) = match &step.kind {
            StepKind::Local { undo, .. } => ("local", None, undo.clone()),
            StepKind::Remote(remote) => {
                (remote.role.as_str(), Some(remote.action.kind), remote.undo.as_ref().map(|undo| undo.kind.to_owned()))
            }
        };
        let (state, reply) = match state.steps.get(index) {
            None => ("waiting", None),
            Some(StepState::Issued) if index >= state.issued() => ("waiting", None),
            Some(StepState::Issued) => ("issued", None),
            Some(StepState::Done(reply)) => ("done", shown(reply).filter(|_| kind != "local")),
            Some(StepState::NotDone) => ("not_done", None),
            Some(StepState::Undone) => ("undone", None),
        };
        StepView { name: step.name.clone(), kind, state, command, undo, reply }
    };
    definition.steps().iter().enumerate().map(step).collect()
}

fn remaining(definition: &Definition, state: &State) -> Vec<String> {
    if state.failure.is_some() {
        return Vec::new();
    }
    let done = state.steps.iter().filter(|how| matches!(how, StepState::Done(_))).count();
    definition.steps().iter().skip(done).map(|step| step.name.clone()).collect()
}

fn undo_path(definition: &Definition, state: &State) -> Vec<String> {
    let past_pivot = definition.pivot().is_some_and(|pivot| state.issued() > pivot);
    if state.is_finished() || (past_pivot && state.failure.is_none()) {
        return Vec::new();
    }
    let undoable = |step: usize| match &definition.steps()[step].kind {
        StepKind::Local { undo, .. } => undo.is_some(),
        StepKind::Remote(remote) => remote.undo.is_some() && remote.role == StepRole::Compensable,
    };
    let begun = state.steps.iter().take(state.issued()).enumerate().rev();
    begun
        .filter(|(step, how)| undoable(*step) && matches!(how, StepState::Issued | StepState::Done(_)))
        .map(|(step, _)| definition.steps()[step].name.clone())
        .collect()
}

fn lines(names: &Names<'_>, revision: i32, at: OffsetDateTime, entry: Result<LogEntry, String>) -> Vec<TimelineLine> {
    let plain = |what| TimelineLine {
        at,
        revision,
        what,
        step: None,
        op: None,
        command: None,
        command_id: None,
        attempt: None,
        outcome: None,
        note: None,
    };
    let of = |what, step: String, op: Op| {
        let command = names.command(&step, op);
        let (command, command_id) = (command.map(|(kind, _)| kind), command.and_then(|(_, id)| id));
        TimelineLine { command, command_id, op: Some(op.as_str()), step: Some(step), ..plain(what) }
    };
    let answered = |line: TimelineLine, attempt, outcome: Outcome| TimelineLine {
        attempt: Some(attempt),
        outcome: Some(outcome.as_str()),
        ..line
    };
    let entry = match entry {
        Ok(entry) => entry,
        Err(error) => return vec![TimelineLine { note: Some(error), ..plain("unreadable") }],
    };
    let kind = entry.what.kind();
    let mut lines = vec![match entry.what {
        LogEvent::Started | LogEvent::Due => plain(kind),
        LogEvent::Reply { step, op, attempt, outcome } => answered(of(kind, step, op), attempt, outcome),
        LogEvent::Ignored { step, op, attempt, outcome, why } => {
            TimelineLine { note: Some(why.as_str().into()), ..answered(of(kind, step, op), attempt, outcome) }
        }
        LogEvent::Cancel { reason } => TimelineLine { note: Some(reason), ..plain(kind) },
        LogEvent::Retry { reason, actor } => TimelineLine { note: Some(format!("{actor}: {reason}")), ..plain(kind) },
    }];
    lines.extend(entry.then.into_iter().map(|entry| match entry {
        TimelineEntry::Sent { step, op, attempt } => {
            TimelineLine { attempt: Some(attempt), ..of("sent", names.step(step), op) }
        }
        TimelineEntry::Ran { step, op } => of("ran", names.step(step), op),
        TimelineEntry::Pausing { until, error } => {
            let error = error.map(|error| format!(": {error}")).unwrap_or_default();
            TimelineLine { note: Some(format!("until {until}{error}")), ..plain("pausing") }
        }
        TimelineEntry::Compensating { kind } => {
            let kind = serde_json::to_value(kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
            TimelineLine { note: kind, ..plain("compensating") }
        }
        TimelineEntry::Stuck(why) => TimelineLine { note: Some(stuck(&why, "it").0), ..plain("stuck") },
        TimelineEntry::Completed => plain("completed"),
        TimelineEntry::Compensated => plain("compensated"),
    }));
    lines
}

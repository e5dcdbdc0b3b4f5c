//! What is known of one saga, what can happen to it, and what follows.
//!
//! [`State`] is stored as JSON in the saga's row, so it is small. A field that is added later needs a default, or a new
//! [`FORMAT`] where older builds must not ignore it. Its invariant: at most one command is open, and [`Status`] carries
//! it. Everything before the open step is settled, one way or the other. When the process dies, the state in the row is
//! all there is, and it is enough.

use crate::{
    command::{Failed, Happened, Op, Why},
    id::{CommandId, Nonce, SagaId},
    reason::reason,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;

/// One saga as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// The saga's id. Not in the JSON: it is the row's key.
    #[serde(skip, default = "nil")]
    pub saga: SagaId,
    /// The format that it is stored in (see [`FORMAT`]); a saga keeps the one that it began with. The first format is
    /// not written: builds of that time did not write it.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub format: u16,
    /// What its command ids are derived from; `None` in the first format. It never changes: the ids are derived again
    /// for each resend and each reply, and are the keys that providers know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub naming: Option<Naming>,
    /// How far each step has come that was begun, in the order of the definition.
    pub steps: Vec<StepState>,
    /// Where the saga stands.
    pub status: Status,
    /// Why the saga is undone; `None` while it goes forward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// When the saga is undone by itself. `None` once the pivot's command is issued.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "super::moment::option")]
    pub deadline: Option<OffsetDateTime>,
}

/// The format that a saga begins with. A build reads this one and those before it. It counts what an older build would
/// misunderstand; fields that it can ignore need no new one. It is part of the row's fingerprint: builds that do not
/// know it, even those from before it, leave the row alone and say so.
///
/// 2: command ids are derived from [`Naming`].
pub const FORMAT: u16 = 2;

fn first() -> u16 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_first(format: &u16) -> bool {
    *format == first()
}

/// What names a saga's commands, beside its id and its definition. No two definitions have commands with the same id,
/// whatever their services, sagas and steps are called. Public data does not suffice to compute the ids.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Naming {
    /// The engine's reply topic when the saga began. It names the orchestrator because no two can share it: each would
    /// get, and ignore, the other's replies. (`ce_source` is the relay's name for its outbox, which may change while
    /// sagas are open.) Kept, so that the topic may change too.
    pub orchestrator: String,
    /// The random part that keeps the ids secret.
    pub nonce: Nonce,
}

fn nil() -> SagaId {
    SagaId(uuid::Uuid::nil())
}

/// How far a step has come.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// The step's command was issued and not finally answered: in doubt.
    Issued,
    /// The step is done, and this was the reply (null for a local effect).
    Done(Value),
    /// Certainly nothing happened: the step was refused, or rolled back, or never sent.
    NotDone,
    /// The step was undone, and the undo was acknowledged.
    Undone,
}

/// Where a saga stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Status {
    /// The saga goes forward.
    Running {
        /// The command or local effect that it waits for.
        open: Open,
    },
    /// The saga is being undone, newest step first.
    Compensating {
        /// The undo that it waits for.
        open: Open,
    },
    /// Only an operator, or a late reply, moves the saga on.
    Stuck {
        /// The command that it waits for; its reply is still taken.
        open: Open,
        /// What did not get done, and the last error.
        why: StuckWhy,
    },
    /// Every step is done.
    Completed,
    /// Every step that had an effect, or may have had one, is undone.
    Compensated,
}

impl Status {
    /// The value of the `status` column in the saga's row.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Running { .. } => "running",
            Self::Compensating { .. } => "compensating",
            Self::Stuck { .. } => "stuck",
            Self::Completed => "completed",
            Self::Compensated => "compensated",
        }
    }
}

/// The one command, or local effect, that a saga waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Open {
    /// Index of the step.
    pub step: usize,
    /// `do` for the step's command, `undo` for its undo.
    pub op: Op,
    /// How often the command was issued; travels as `ce_attempt`. 0 when it could not be built and was never sent.
    pub attempt: u32,
    /// Attempts since the last fresh start (the first issue or an operator's retry); the retry policy caps them.
    pub tries: u32,
    /// A reply, a pause or a local effect.
    pub wait: Wait,
    /// When the first attempt was issued.
    #[serde(with = "super::moment")]
    pub since: OffsetDateTime,
    /// When the wait ends by itself; `None`: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "super::moment::option")]
    pub due: Option<OffsetDateTime>,
}

/// What the open command waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// The participant's answer.
    Reply,
    /// The pause before the next attempt: the participant reported a failure.
    Pause,
    /// The engine itself, which runs the local effect in the same transaction. A committed row has it only when the
    /// effect failed: it is tried again when it is due, or the saga is stuck on it.
    Local,
}

/// Why a saga is stuck.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum StuckWhy {
    /// It is not known whether the pivot happened: neither going on nor undoing would be right.
    PivotInDoubt {
        /// The participant's last error; empty in a state that an older build stored.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// A step after the pivot does not get done.
    NotDone {
        /// The participant's last error; empty in a state that an older build stored.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// An undo does not get done.
    NotUndone {
        /// The participant's last error; empty in a state that an older build stored.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// A local effect failed, or a command could not be built.
    Broken {
        /// The effect's or the builder's error.
        error: String,
    },
}

/// Why a saga is undone. Local undo effects receive it, so that the service can keep the reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// The name of the step that was open.
    pub step: String,
    /// What made the saga fail.
    pub kind: FailureKind,
    /// The payload of the participant's rejection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejection: Option<Value>,
    /// The reason that came with a cancel, or the last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What made the step fail, for programs; absent where nothing failed. Builds before this one do not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Why>,
}

/// What made a saga fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A participant refused.
    Rejected,
    /// A step before the pivot did not get done in all its attempts.
    Failed,
    /// A caller cancelled the saga.
    Cancelled,
    /// The saga's own deadline passed.
    Deadline,
}

/// What can happen to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// A participant answered.
    Reply(Reply),
    /// Time passed. Harmless when nothing is due.
    Due,
    /// A caller wants the saga undone.
    Cancel {
        /// The reason that the caller gave.
        reason: String,
    },
    /// An operator gives a stuck saga a fresh start.
    Retry,
    /// The local effect that the last decision asked for was run.
    LocalDone,
    /// The local effect that the last decision asked for did not work, and was rolled back.
    Broken {
        /// The effect's error, cleaned.
        error: String,
    },
    /// The command that the last decision asked for could not be built, and was not sent.
    Unsent {
        /// The builder's error, cleaned.
        error: String,
        /// The saga's deadline before that decision: what was not sent does not end it.
        deadline: Option<OffsetDateTime>,
    },
}

impl Event {
    /// A local effect failed with `error`, which is cleaned because it is stored.
    pub fn broken(error: &str) -> Self {
        Self::Broken { error: reason(error) }
    }

    /// A command could not be built because of `error`, which is cleaned; `deadline` was the saga's before that
    /// decision.
    pub fn unsent(error: &str, deadline: Option<OffsetDateTime>) -> Self {
        Self::Unsent { error: reason(error), deadline }
    }
}

/// A participant's answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reply {
    /// The id of the command that is answered.
    pub command: CommandId,
    /// The attempt that is answered, from 1.
    pub attempt: u32,
    /// The answer, with its payload.
    pub answer: Answer,
}

/// A participant's answer to an attempt. Only the first two are final.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The command is done; this is its reply.
    Succeeded(Value),
    /// Certainly nothing happened, and nothing will.
    Rejected(Value),
    /// This attempt failed; whether anything happened is in doubt.
    Failed(Failed),
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Effects {
    /// What became of the event.
    pub verdict: Verdict,
    /// What is to be done now: one action at most, until there are steps that do several things at once.
    pub actions: Vec<Action>,
    /// What the timeline gets.
    pub timeline: Vec<TimelineEntry>,
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The event moved the saga.
    Taken,
    /// The event did not move the saga, and that is in order.
    Ignored(Ignored),
}

/// Why an event did not move the saga.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ignored {
    /// A reply to a command that was answered before.
    Duplicate,
    /// A reply to a command, or an attempt, that is no longer waited for.
    Late,
    /// A reply to a command that this saga never issued.
    Unknown,
    /// A timer came early: nothing is due.
    NotDue,
    /// A cancel of a saga that is being undone.
    AlreadyCompensating,
    /// A cancel after the pivot's command was issued.
    PastThePivot,
    /// A cancel or a retry of a saga that has ended.
    Finished,
    /// A retry of a saga that is not stuck.
    NotStuck,
    /// News of a local effect that the saga does not wait for.
    NotLocal,
}

impl Ignored {
    /// The reason as metrics and the log have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Late => "late",
            Self::Unknown => "unknown",
            Self::NotDue => "not_due",
            Self::AlreadyCompensating => "already_compensating",
            Self::PastThePivot => "past_the_pivot",
            Self::Finished => "finished",
            Self::NotStuck => "not_stuck",
            Self::NotLocal => "not_local",
        }
    }
}

/// Something to be done, in the transaction that stores the state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Append this command to the outbox.
    Send(Send),
    /// Run this local effect, then report [`Event::LocalDone`] or [`Event::Broken`].
    RunLocal {
        /// Index of the step.
        step: usize,
        /// The effect or its undo.
        op: Op,
    },
}

/// A command to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Send {
    /// Index of the step.
    pub step: usize,
    /// `do` for the step's command, `undo` for its undo.
    pub op: Op,
    /// The run of the step; 0 until an operator can retry with edited input.
    pub occurrence: u32,
    /// The command's id, stable across resends.
    pub command: CommandId,
    /// For an undo: the command that it undoes, and what is known of it.
    pub undoes: Option<(CommandId, Happened)>,
    /// The attempt, counted from 1.
    pub attempt: u32,
}

/// What a decision adds to the timeline; it is stored in the log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineEntry {
    /// A command was issued.
    Sent {
        /// Index of the step.
        step: usize,
        /// `do` for the step's command, `undo` for its undo.
        op: Op,
        /// The attempt, counted from 1.
        attempt: u32,
    },
    /// A local effect was run.
    Ran {
        /// Index of the step.
        step: usize,
        /// The effect or its undo.
        op: Op,
    },
    /// An attempt failed, or was not answered in time, and the next one comes after a pause.
    Pausing {
        /// When the next attempt is due.
        #[serde(with = "super::moment")]
        until: OffsetDateTime,
        /// Why the attempt failed; absent in lines of older builds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The saga is undone from here on.
    Compensating {
        /// What made the saga fail.
        kind: FailureKind,
    },
    /// The saga is stuck: an operator has to act.
    Stuck(StuckWhy),
    /// Every step is done.
    Completed,
    /// Everything is undone.
    Compensated,
}

impl State {
    /// The command that the saga waits for.
    pub fn open(&self) -> Option<&Open> {
        match &self.status {
            Status::Running { open } | Status::Compensating { open } | Status::Stuck { open, .. } => Some(open),
            Status::Completed | Status::Compensated => None,
        }
    }

    /// How many steps were begun whose command, if it is one, was sent.
    pub fn issued(&self) -> usize {
        let unsent = self.open().is_some_and(|open| open.op == Op::Do && open.attempt == 0);
        self.steps.len() - usize::from(unsent)
    }

    /// When something happens by itself. Every saga that is neither stuck nor finished has such a time.
    pub fn due(&self) -> Option<OffsetDateTime> {
        let open = self.open()?.due;
        match (open, self.deadline) {
            (Some(open), Some(deadline)) => Some(open.min(deadline)),
            (open, deadline) => open.or(deadline),
        }
    }

    /// Whether nothing will change any more.
    pub fn is_finished(&self) -> bool {
        self.open().is_none()
    }
}

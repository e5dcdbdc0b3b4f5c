//! What is known of one saga, what can happen to it, and what follows.
//!
//! [`State`] is stored as JSON in the saga's row, so it is small, and a field that is added later needs a default (or, where
//! older builds must not ignore it, a new [`FORMAT`]). Its
//! invariant: at most one command is open, and [`Status`] carries it. Everything before the open step is settled, one
//! way or the other. When the process dies, the state in the row is all there is, and it is enough.

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
    /// Which saga. Not in the JSON: it is the row's key.
    #[serde(skip, default = "nil")]
    pub saga: SagaId,
    /// In what format it is stored, and what [`FORMAT`] is for; it keeps the one that it began with. Not written where it
    /// is the first, which did not write it.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub format: u16,
    /// What its command ids are derived from; `None` in the first format. It never changes: the ids are derived again for
    /// each resend and each reply, and are the keys that providers know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub naming: Option<Naming>,
    /// How far each step has come that was begun, in the order of the definition.
    pub steps: Vec<StepState>,
    /// What is going on.
    pub status: Status,
    /// Why the saga is undone; `None` while it goes forward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// When the saga is undone by itself. `None` once the pivot's command is issued.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "super::moment::option")]
    pub deadline: Option<OffsetDateTime>,
}

/// The format that a saga begins with. A build reads this one and those before it. It counts what an older build would
/// misunderstand; fields that it can ignore need no new one. It is a part of the fingerprint in the saga's row, so that
/// builds that do not know it, also those from before there was a number, leave the row alone and say so.
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

/// What names a saga's commands, beside its id and its definition. Of two definitions, of one service or of two, no
/// commands have the same id, whatever their sagas and steps are called; and nobody can compute the ids from what is public.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Naming {
    /// The engine's reply topic when the saga began. It names the orchestrator because no two can share it: each would get,
    /// and ignore, the other's replies. (`ce_source` is the relay's name for its outbox, which an operator may change while
    /// sagas are open.) Kept, so that the topic may be changed while they are.
    pub orchestrator: String,
    /// What makes the ids a secret.
    pub nonce: Nonce,
}

fn nil() -> SagaId {
    SagaId(uuid::Uuid::nil())
}

/// How far a step has come.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Its command was issued and not finally answered: in doubt.
    Issued,
    /// It is done, and this was the reply (null for a local effect).
    Done(Value),
    /// Certainly nothing happened.
    NotDone,
    /// It was undone, and the undo was acknowledged.
    Undone,
}

/// What is going on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Status {
    /// Going forward.
    Running {
        /// What it waits for.
        open: Open,
    },
    /// Being undone, newest step first.
    Compensating {
        /// What it waits for.
        open: Open,
    },
    /// Nobody but an operator, or a late reply, moves it on.
    Stuck {
        /// What it waits for; its reply is still taken.
        open: Open,
        /// Why.
        why: StuckWhy,
    },
    /// Every step is done.
    Completed,
    /// Every step that had an effect, or may have had one, is undone.
    Compensated,
}

impl Status {
    /// As it stands in the saga's row.
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
    /// Do or undo.
    pub op: Op,
    /// How often the command was issued, in all; travels as `ce_attempt`. 0 when it could not be built: it was never sent.
    pub attempt: u32,
    /// How often since somebody last gave it a fresh start: what the retry policy's cap is held against.
    pub tries: u32,
    /// What is waited for.
    pub wait: Wait,
    /// When the first attempt was issued.
    #[serde(with = "super::moment")]
    pub since: OffsetDateTime,
    /// When the wait ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "super::moment::option")]
    pub due: Option<OffsetDateTime>,
}

/// What the open command waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// The participant's answer.
    Reply,
    /// The pause before the next attempt: the participant said that it did not work.
    Pause,
    /// The engine itself, which runs the local effect in the same transaction. Seen in a committed row only when the
    /// effect failed: it is tried again when it is due, or the saga is stuck on it.
    Local,
}

/// Why a saga is stuck.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum StuckWhy {
    /// Nobody knows whether the pivot happened: neither going on nor undoing would be right.
    PivotInDoubt {
        /// What the participant said last; empty in a state that an older build stored.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// A step after the pivot does not get done.
    NotDone {
        /// As above.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// An undo does not get done.
    NotUndone {
        /// As above.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        error: String,
    },
    /// A local effect failed, or a command could not be built.
    Broken {
        /// How.
        error: String,
    },
}

/// Why a saga is undone. Local undo effects are told, so that the service can keep the reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failure {
    /// The step that was open.
    pub step: String,
    /// What happened.
    pub kind: FailureKind,
    /// What the participant said when it refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejection: Option<Value>,
    /// What whoever cancelled said, or the last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What made the step fail, for machines; of a failure alone. Builds before this one do not write it.
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
    /// Somebody cancelled.
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
    /// Somebody wants it undone.
    Cancel {
        /// Why.
        reason: String,
    },
    /// An operator gives a stuck saga a fresh start.
    Retry,
    /// The local effect that the last decision asked for was run.
    LocalDone,
    /// The local effect that the last decision asked for did not work, and was rolled back.
    Broken {
        /// How.
        error: String,
    },
    /// The command that the last decision asked for could not be built, and was not sent.
    Unsent {
        /// How.
        error: String,
        /// The saga's deadline before that decision: what was not sent does not end it.
        deadline: Option<OffsetDateTime>,
    },
}

impl Event {
    /// A local effect did not work, for this reason, which is cleaned: it is stored.
    pub fn broken(error: &str) -> Self {
        Self::Broken { error: reason(error) }
    }

    /// A command could not be built, for this reason, which is cleaned; before that decision the saga's deadline was this.
    pub fn unsent(error: &str, deadline: Option<OffsetDateTime>) -> Self {
        Self::Unsent { error: reason(error), deadline }
    }
}

/// A participant's answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reply {
    /// Which command is answered.
    pub command: CommandId,
    /// Which of its attempts.
    pub attempt: u32,
    /// The answer.
    pub answer: Answer,
}

/// What a participant says. Only the first two are final.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is done.
    Succeeded(Value),
    /// Certainly nothing happened, and nothing will.
    Rejected(Value),
    /// Not this time.
    Failed(Failed),
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Effects {
    /// What became of the event.
    pub verdict: Verdict,
    /// What is to be done now. One at most, until there are steps that do several things at once.
    pub actions: Vec<Action>,
    /// What is to be told: the lines of the timeline.
    pub told: Vec<Told>,
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It moved the saga.
    Taken,
    /// It did not, and that is in order.
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
    /// Nothing is due.
    NotDue,
    /// A cancel of a saga that is being undone.
    AlreadyCompensating,
    /// A cancel after the pivot's command was issued.
    PastThePivot,
    /// A cancel or a retry of a saga that has ended.
    Finished,
    /// A retry of a saga that is not stuck.
    NotStuck,
    /// News of a local effect that nobody asked for.
    NotLocal,
}

impl Ignored {
    /// As it stands in metrics and in the log.
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
    /// Run this local effect, then say [`Event::LocalDone`] or [`Event::Broken`].
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
    /// Do or undo.
    pub op: Op,
    /// Which run of the step.
    pub occurrence: u32,
    /// Stable across resends.
    pub command: CommandId,
    /// Of an undo: the command that it undoes, and what is known of it.
    pub undoes: Option<(CommandId, Happened)>,
    /// From 1.
    pub attempt: u32,
}

/// A line of the timeline.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// A command was issued.
    Sent {
        /// Which step's.
        step: usize,
        /// Do or undo.
        op: Op,
        /// From 1.
        attempt: u32,
    },
    /// A local effect was run.
    Ran {
        /// Which step's.
        step: usize,
        /// The effect or its undo.
        op: Op,
    },
    /// An attempt failed, or was not answered in time, and the next one comes after a pause.
    Pausing {
        /// Until then.
        #[serde(with = "super::moment")]
        until: OffsetDateTime,
        /// What did not work; lines of older builds do not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The saga is undone from here on.
    Compensating {
        /// Because of that.
        kind: FailureKind,
    },
    /// Somebody has to look.
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

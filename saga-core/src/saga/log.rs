//! The entries of a saga's log: what happened, and what followed. The engine writes an entry with the state and never
//! changes it. Inspection shows the entries as the timeline. Pure.

use super::state::{Ignored, TimelineEntry};
use crate::command::{Op, Outcome};
use serde::{Deserialize, Serialize};

/// One entry of a saga's log: an event, and what followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// What happened to the saga.
    #[serde(flatten)]
    pub what: LogEvent,
    /// What the engine did in answer, in order; empty where nothing followed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub then: Vec<TimelineEntry>,
}

/// What happened to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LogEvent {
    /// The saga began.
    Started,
    /// The open command was answered.
    Reply {
        /// The step's name.
        step: String,
        /// `do` for the step's command, `undo` for its undo.
        op: Op,
        /// The attempt that was answered, counted from 1.
        attempt: u32,
        /// What the participant answered.
        outcome: Outcome,
    },
    /// A reply came that the saga does not wait for.
    Ignored {
        /// The step's name, as the reply has it.
        step: String,
        /// `do` for the step's command, `undo` for its undo, as the reply has it.
        op: Op,
        /// The attempt, as the reply has it.
        attempt: u32,
        /// The outcome, as the reply has it.
        outcome: Outcome,
        /// Why the saga does not wait for it.
        why: Ignored,
    },
    /// A wait was over.
    Due,
    /// A caller cancelled the saga.
    Cancel {
        /// The reason that the caller gave.
        reason: String,
    },
    /// An operator gave it a fresh start.
    Retry {
        /// The reason that the operator gave.
        reason: String,
        /// The name under which the operator asked.
        actor: String,
    },
}

/// What an unexpected reply says of its saga, whatever the attempt. The saga's log takes each kind once: a participant,
/// or a stranger, may send the same reply for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnexpectedReply<'w> {
    /// `None` where the command is none of the saga's: such a reply may say anything.
    answers: Option<(&'w str, Op, Outcome)>,
    why: Ignored,
}

impl LogEvent {
    /// The kind of an unexpected reply; `None` for any other line.
    pub(super) fn unexpected_reply(&self) -> Option<UnexpectedReply<'_>> {
        match self {
            Self::Ignored { why: why @ Ignored::Unknown, .. } => Some(UnexpectedReply { answers: None, why: *why }),
            Self::Ignored { step, op, outcome, why, .. } => {
                Some(UnexpectedReply { answers: Some((step, *op, *outcome)), why: *why })
            }
            _ => None,
        }
    }

    /// The value of the log's `kind` column.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Reply { .. } => "reply",
            Self::Ignored { .. } => "ignored",
            Self::Due => "due",
            Self::Cancel { .. } => "cancel",
            Self::Retry { .. } => "retry",
        }
    }
}

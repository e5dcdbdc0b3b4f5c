//! The lines of a saga's log: what happened, and what followed. Written with the state, never changed, shown as the
//! timeline. Pure.

use super::state::{Ignored, Told};
use crate::command::{Op, Outcome};
use serde::{Deserialize, Serialize};

/// One event of a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What happened.
    #[serde(flatten)]
    pub what: What,
    /// What followed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub then: Vec<Told>,
}

/// What happened to a saga.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// It began.
    Started,
    /// The open command was answered.
    Reply {
        /// The step's name.
        step: String,
        /// Do or undo.
        op: Op,
        /// Which attempt.
        attempt: u32,
        /// How.
        outcome: Outcome,
    },
    /// A reply came that nobody waits for.
    Ignored {
        /// The step's name, as the reply has it.
        step: String,
        /// Do or undo.
        op: Op,
        /// Which attempt.
        attempt: u32,
        /// How.
        outcome: Outcome,
        /// Why nobody waits for it.
        why: Ignored,
    },
    /// A wait was over.
    Due,
    /// Somebody wanted it undone.
    Cancel {
        /// Why.
        reason: String,
    },
    /// An operator gave it a fresh start.
    Retry {
        /// Why.
        reason: String,
        /// Who.
        actor: String,
    },
}

/// What a reply that nobody waits for tells of its saga, whatever the attempt. A saga's log tells each of them once: a
/// participant, or a stranger, may send the same thing for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stray<'w> {
    /// `None` where the command is none of the saga's: then the reply may say anything.
    answers: Option<(&'w str, Op, Outcome)>,
    why: Ignored,
}

impl What {
    /// `None` for what is no such reply.
    pub(super) fn stray(&self) -> Option<Stray<'_>> {
        match self {
            Self::Ignored { why: why @ Ignored::Unknown, .. } => Some(Stray { answers: None, why: *why }),
            Self::Ignored { step, op, outcome, why, .. } => {
                Some(Stray { answers: Some((step, *op, *outcome)), why: *why })
            }
            _ => None,
        }
    }

    /// As it stands in the log's column.
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

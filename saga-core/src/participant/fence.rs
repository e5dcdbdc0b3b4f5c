//! Pure: the state of one run of a step at its participant, and what a command may do in it.
//!
//! ```text
//!   do:    Absent ─► Open (failed, certainly nothing happened; a resend tries again)
//!                 ─► Calling ─► Succeeded | Rejected | InDoubt (attempts ran out; a resend calls again)
//!                 ─► Succeeded | Rejected                    Absent/Open/InDoubt ─► Refused, once its undo was taken
//!   undo:  Absent ─► Open | Waiting (for the do's call) | Calling | InDoubt ─► Done
//! ```

use super::entry::Settled;
use crate::{
    envelope::{Op, Outcome},
    id::{CommandId, SagaId},
};

/// Which run of which step: what a fence is known by. Its order is the order in which fences are locked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FenceKey {
    pub(super) saga: SagaId,
    pub(super) step: String,
    pub(super) occurrence: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DoState {
    Absent,
    Open,
    Calling,
    InDoubt,
    Succeeded(Vec<u8>),
    Rejected(Vec<u8>),
    Refused,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum UndoState {
    Absent,
    Open,
    Waiting,
    Calling,
    InDoubt,
    Done(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fence {
    pub(super) run: DoState,
    pub(super) run_command: Option<CommandId>,
    pub(super) undo: UndoState,
    pub(super) undo_command: Option<CommandId>,
}

/// What a command is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Move {
    /// Its handler runs.
    Run,
    /// The undo's handler runs, knowing what the do came to: its reply, or `None` when that is in doubt.
    Undo(Option<Vec<u8>>),
    /// There is nothing to undo.
    NothingToUndo,
    /// The undo came first, so the do is refused for good.
    Refuse,
    /// The stored reply is given again.
    Answer(Outcome, Vec<u8>),
    /// It is being called; the reply will come.
    Ignore,
    /// Its call was given up in doubt; it is called again.
    CallAgain,
    /// The undo waits until the do's call is settled.
    Wait,
}

impl Fence {
    pub(super) fn new() -> Self {
        Self { run: DoState::Absent, run_command: None, undo: UndoState::Absent, undo_command: None }
    }

    /// What a command (first or resent) is to do here.
    pub(super) fn next(&self, op: Op) -> Move {
        match op {
            Op::Do => self.next_do(),
            Op::Undo => self.next_undo(),
        }
    }

    fn next_do(&self) -> Move {
        let undone = self.undo != UndoState::Absent;
        match &self.run {
            DoState::Succeeded(reply) => Move::Answer(Outcome::Succeeded, reply.clone()),
            DoState::Rejected(reply) => Move::Answer(Outcome::Rejected, reply.clone()),
            DoState::Calling => Move::Ignore,
            DoState::Refused => Move::Refuse,
            DoState::Absent | DoState::Open | DoState::InDoubt if undone => Move::Refuse,
            DoState::Absent | DoState::Open => Move::Run,
            DoState::InDoubt => Move::CallAgain,
        }
    }

    fn next_undo(&self) -> Move {
        match &self.undo {
            UndoState::Done(reply) => Move::Answer(Outcome::Succeeded, reply.clone()),
            UndoState::Waiting | UndoState::Calling => Move::Ignore,
            UndoState::InDoubt => Move::CallAgain,
            UndoState::Absent | UndoState::Open => match &self.run {
                DoState::Succeeded(reply) => Move::Undo(Some(reply.clone())),
                DoState::InDoubt => Move::Undo(None),
                DoState::Calling => Move::Wait,
                DoState::Absent | DoState::Open | DoState::Rejected(_) | DoState::Refused => Move::NothingToUndo,
            },
        }
    }

    /// The command of `op` that this fence belongs to, once one was seen.
    pub(super) fn command(&self, op: Op) -> Option<CommandId> {
        match op {
            Op::Do => self.run_command,
            Op::Undo => self.undo_command,
        }
    }

    /// Notes the command of `op`.
    pub(super) fn note(&mut self, op: Op, command: CommandId) {
        match op {
            Op::Do => self.run_command = Some(command),
            Op::Undo => self.undo_command = Some(command),
        }
    }

    /// The handler, or the call, came to this. Returns the do's intent where the undo has settled it.
    pub(super) fn settle(&mut self, op: Op, settled: &Settled) -> Option<CommandId> {
        let doubted = self.run == DoState::InDoubt;
        match (op, settled) {
            (Op::Do, Settled::Done(reply)) => self.run = DoState::Succeeded(reply.clone()),
            (Op::Do, Settled::Rejected(reply)) => self.run = DoState::Rejected(reply.clone()),
            (Op::Do, Settled::Failed(_)) => self.run = DoState::Open,
            (Op::Undo, Settled::Done(reply)) => {
                self.undo = UndoState::Done(reply.clone());
                self.refuse();
                return self.run_command.filter(|_| doubted);
            }
            // An undo has no rejections to give (`Never` has no value); were there one, it would stay open.
            (Op::Undo, Settled::Rejected(_) | Settled::Failed(_)) => self.undo = UndoState::Open,
        }
        None
    }

    /// A call is about to be made, or made again.
    pub(super) fn calling(&mut self, op: Op) {
        match op {
            Op::Do => self.run = DoState::Calling,
            Op::Undo => self.undo = UndoState::Calling,
        }
    }

    /// A call was given up without an answer.
    pub(super) fn in_doubt(&mut self, op: Op) {
        match op {
            Op::Do => self.run = DoState::InDoubt,
            Op::Undo => self.undo = UndoState::InDoubt,
        }
    }

    /// The undo was taken: a do that is not final will never be.
    pub(super) fn refuse(&mut self) {
        if matches!(self.run, DoState::Absent | DoState::Open | DoState::InDoubt) {
            self.run = DoState::Refused;
        }
    }
}

impl Move {
    /// What the handler is given of the do, when this move runs a handler.
    pub(super) fn runs(&self) -> Option<Option<&[u8]>> {
        match self {
            Self::Run => Some(None),
            Self::Undo(ran) => Some(ran.as_deref()),
            Self::NothingToUndo | Self::Refuse | Self::Answer(..) | Self::Ignore | Self::CallAgain | Self::Wait => None,
        }
    }
}

//! What participants do with commands, as far as a saga can see: their fences, the effects behind them, and what is
//! left when a fence is lost.

use super::{
    messages::Note,
    model::{Choice, Limits, Mistake, World},
};
use crate::command::Op;

/// How far a step's effect has come, at its participant (or, for a local effect, in the database).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fence {
    /// No command came yet; or the fence was lost, and an effect in the same database with it.
    Absent,
    /// External: the intent is committed, the call is not made.
    Calling,
    /// External: the call has had its effect, and no record of it exists yet.
    Called,
    /// The step's effect is done.
    Done,
    /// The step's command was refused.
    Rejected,
    /// The step's effect was done and is undone.
    Undone,
    /// The undo came first, or asked outside; what comes later is refused.
    Tombstone,
    /// External: the fence is lost, and a call is still on its way.
    Adrift,
    /// External: the fence is lost, and the effect is there.
    Held,
    /// Like `Absent`, but an undo came and failed, and a do is refused.
    Marked,
    /// Like `Adrift`, but an undo came and failed, and a do is refused.
    MarkedAdrift,
    /// Like `Held`, but an undo came and failed, and a do is refused.
    MarkedHeld,
}

impl Fence {
    /// Whether there is an effect, or one may come of what is under way.
    pub(super) fn has_effect(self) -> bool {
        match self {
            Self::Calling | Self::Called | Self::Done => true,
            Self::Adrift | Self::Held | Self::MarkedAdrift | Self::MarkedHeld => true,
            Self::Absent | Self::Rejected | Self::Undone | Self::Tombstone | Self::Marked => false,
        }
    }

    /// The fence after a call got there.
    pub(super) fn called(self) -> Self {
        match self {
            Self::Adrift => Self::Held,
            Self::MarkedAdrift => Self::MarkedHeld,
            _ => Self::Called,
        }
    }

    /// The fence after a loss; `None` where nothing that matters is lost.
    pub(super) fn lost(self, external: bool) -> Option<Self> {
        match self {
            Self::Calling => Some(Self::Adrift),
            Self::Called | Self::Done if external => Some(Self::Held),
            Self::Done => Some(Self::Absent),
            _ => None,
        }
    }

    fn marked(self) -> Self {
        match self {
            Self::Absent => Self::Marked,
            Self::Adrift => Self::MarkedAdrift,
            Self::Held => Self::MarkedHeld,
            other => other,
        }
    }
}

/// What a participant may do with a command.
pub(super) fn choices(limits: Limits, op: Op, fence: Fence, refusable: bool) -> Vec<Choice> {
    use Fence::*;
    let fails = limits.failures.then_some(Choice::Fail);
    match (op, fence) {
        (Op::Undo, Calling) if limits.mistake == Some(Mistake::UndoesDuringTheCall) => vec![Choice::Succeed],
        // The call is under way: a do is answered when it is recorded, an undo waits until then.
        (_, Calling | Called) => Vec::new(),
        (Op::Do, Absent) => {
            [Choice::Succeed].into_iter().chain(refusable.then_some(Choice::Reject)).chain(fails).collect()
        }
        // A refusal means that certainly nothing happened. That is not certain of what may be there under the same key.
        (Op::Do, Adrift | Held) | (Op::Undo, Done) => [Choice::Succeed].into_iter().chain(fails).collect(),
        (Op::Undo, Absent | Adrift | Held | Marked | MarkedAdrift | MarkedHeld) if limits.external => {
            [Choice::Succeed].into_iter().chain(fails).collect()
        }
        _ => vec![Choice::Repeat],
    }
}

/// The outcome of a do: its fence, and its answer, if it has one by now.
pub(super) fn act(limits: Limits, fence: Fence, choice: Choice, attempt: u32) -> (Fence, Option<Note>) {
    use Fence::*;
    match (fence, choice) {
        (_, Choice::Fail) => (fence, Some(Note::Failed(attempt))),
        (Absent, Choice::Reject) => (Rejected, Some(Note::Rejected)),
        (Absent | Adrift, _) if limits.external => (Calling, None),
        (Held, _) => (Called, None),
        (Absent | Done, _) => (Done, Some(Note::Succeeded)),
        _ => (fence, Some(Note::Rejected)),
    }
}

/// The outcome of an undo: the fence of its step, and its answer.
pub(super) fn undo(limits: Limits, fence: Fence, choice: Choice, knows: bool, attempt: u32) -> (Fence, Note) {
    use Fence::*;
    let (failed, trusting) = (Note::Failed(attempt), limits.mistake == Some(Mistake::TakesAbsenceForProof));
    match fence {
        Calling => (Adrift, Note::Succeeded),
        // The undo gets the same answer as before.
        Undone | Tombstone => (fence, Note::Succeeded),
        Done if choice == Choice::Fail => (Done, failed),
        Done => (Undone, Note::Succeeded),
        Adrift | Held if trusting => (fence, Note::Succeeded),
        Absent | Rejected if trusting => (if fence == Absent { Tombstone } else { fence }, Note::Succeeded),
        // The orchestrator knows of an effect that this participant has no record of.
        _ if knows || choice == Choice::Fail => (fence.marked(), failed),
        Rejected => (Rejected, Note::Succeeded),
        // The undo asks outside: what is there is taken back, and what is on its way is refused there.
        Held | MarkedHeld => (Undone, Note::Succeeded),
        _ => (Tombstone, Note::Succeeded),
    }
}

impl World {
    /// Whether the record of this step was lost.
    pub(super) fn has_lost(&self, step: usize) -> bool {
        self.lost & (1 << step) != 0
    }

    /// Whether the undo of this step carries that the step happened.
    pub(super) fn knows(&self, step: usize) -> bool {
        self.known & (1 << step) != 0
    }
}

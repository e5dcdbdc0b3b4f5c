//! Pure: the state of one run of a step at its participant, and what a command may do in it.
//!
//! ```text
//!   do:    Absent ─► Open (failed, certainly nothing happened; a resend tries again)
//!                 ─► Calling ─► Succeeded | Rejected | InDoubt (attempts ran out; a resend calls again)
//!                 ─► Succeeded | Rejected        Absent/Open ─► Refused, once its undo came; InDoubt, once it is done
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
    /// As it is made: nothing was ever done.
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
            DoState::Absent | DoState::Open if undone => Move::Refuse,
            DoState::Absent | DoState::Open => Move::Run,
            // To refuse would say that certainly nothing happened; its undo settles that, and is answered.
            DoState::InDoubt if undone => Move::Ignore,
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
                if doubted {
                    self.run = DoState::Refused;
                }
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

    /// The undo was taken: a do that certainly did nothing never will.
    pub(super) fn refuse(&mut self) {
        if matches!(self.run, DoState::Absent | DoState::Open) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the world does next: commands come in any order and number, handlers and calls end in any way.
    #[derive(Debug, Clone, Copy)]
    enum Event {
        Deliver(Op, End),
        CallEnds(End),
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum End {
        Done,
        Rejected,
        Failed,
        /// It is (still) being called: an intent is committed.
        Call,
        /// Attempts ran out; it may have happened.
        DoubtDone,
        DoubtNot,
    }

    fn event() -> impl Strategy<Value = Event> {
        let end = prop_oneof![
            Just(End::Done),
            Just(End::Rejected),
            Just(End::Failed),
            Just(End::Call),
            Just(End::DoubtDone),
            Just(End::DoubtNot)
        ];
        let op = prop_oneof![Just(Op::Do), Just(Op::Undo)];
        prop_oneof![(op, end.clone()).prop_map(|(op, end)| Event::Deliver(op, end)), end.prop_map(Event::CallEnds),]
    }

    /// A fence, and the effect as it is in the world.
    struct World {
        fence: Fence,
        effect: bool,
        effects: usize,
        answers: [Option<(Outcome, Vec<u8>)>; 2],
    }

    impl World {
        fn take(&mut self, op: Op) {
            match op {
                // Under one idempotency key: what was done is not done again.
                Op::Do if self.effect => {}
                Op::Do => {
                    self.effect = true;
                    self.effects += 1;
                }
                Op::Undo => self.effect = false,
            }
        }

        fn settle(&mut self, op: Op, end: End) {
            let settled = match (op, end) {
                (_, End::Done) => Settled::Done(vec![1]),
                (Op::Do, End::Rejected) => Settled::Rejected(vec![2]),
                _ => Settled::Failed("later".into()),
            };
            if let Settled::Done(_) = settled {
                self.take(op);
            }
            self.fence.settle(op, &settled);
        }

        fn deliver(&mut self, op: Op, end: End) -> Result<(), TestCaseError> {
            match self.fence.next(op) {
                Move::Run | Move::Undo(_) => match end {
                    End::Done | End::Rejected | End::Failed => self.settle(op, end),
                    End::Call | End::DoubtDone | End::DoubtNot => self.fence.calling(op),
                },
                Move::NothingToUndo => {
                    prop_assert!(!self.effect, "there is something to undo");
                    self.settle(op, End::Done);
                }
                Move::Refuse => self.fence.refuse(),
                Move::Answer(outcome, reply) => {
                    let answer = &mut self.answers[usize::from(op == Op::Undo)];
                    let first = answer.get_or_insert((outcome, reply.clone()));
                    prop_assert_eq!(&(outcome, reply), &*first, "a final answer changed");
                }
                Move::Ignore => {}
                Move::CallAgain => self.fence.calling(op),
                Move::Wait => self.fence.undo = UndoState::Waiting,
            }
            Ok(())
        }

        fn call_ends(&mut self, end: End) -> Result<(), TestCaseError> {
            let op = match (&self.fence.run, &self.fence.undo) {
                (DoState::Calling, _) => Op::Do,
                (_, UndoState::Calling) => Op::Undo,
                _ => return Ok(()),
            };
            match end {
                End::Call => return Ok(()),
                // A call that failed or was refused certainly did nothing, unless an earlier one under its key did.
                End::Rejected | End::Failed if self.effect && op == Op::Do => self.settle(op, End::Done),
                End::Done | End::Rejected | End::Failed => self.settle(op, end),
                End::DoubtDone | End::DoubtNot => {
                    if end == End::DoubtDone {
                        self.take(op);
                    }
                    self.fence.in_doubt(op);
                }
            }
            // The undo that waited is handled like one that has just come.
            if op == Op::Do && self.fence.undo == UndoState::Waiting {
                self.fence.undo = UndoState::Absent;
                self.deliver(Op::Undo, end)?;
            }
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn an_effect_happens_once_and_never_after_its_undo(events in prop::collection::vec(event(), 0..30)) {
            let mut world =
                World { fence: Fence::new(), effect: false, effects: 0, answers: [None, None] };
            for event in events {
                match event {
                    Event::Deliver(op, end) => world.deliver(op, end)?,
                    Event::CallEnds(end) => world.call_ends(end)?,
                }
                prop_assert!(world.effects <= 1, "it happened {} times", world.effects);
                if matches!(world.fence.undo, UndoState::Done(_)) {
                    prop_assert!(!world.effect, "undone, and there");
                }
                if matches!(world.fence.run, DoState::Rejected(_) | DoState::Open | DoState::Absent) {
                    prop_assert!(!world.effect, "certainly nothing happened, and it did");
                }
            }
        }
    }
}

//! Pure: the state of one run of a step at its participant, and what a command may do in it.
//!
//! ```text
//!   do:    Absent ─► Open (failed, certainly nothing happened; a resend tries again)
//!                 ─► Calling ─► Succeeded | Rejected | InDoubt (attempts ran out; a resend calls again)
//!                 ─► Succeeded | Rejected        Absent/Open ─► Refused, once its undo came; InDoubt, once it is done
//!   undo:  Absent ─► Open | Waiting (for the do's call) | Calling | InDoubt ─► Done
//! ```
//!
//! A fence can be lost (a restore, an asynchronous failover), so its absence proves little. An effect in the same
//! database is lost with it; one outside is not. An undo without a record of its do has nothing to undo only if the
//! effect is local and the orchestrator is in doubt, too. An external undo asks outside. An undo of what the
//! orchestrator knows to have happened fails, and leaves its mark: a do that comes after it is refused.

use super::{entry::Settlement, handler::CommandContext};
use crate::{
    command::{Happened, Op, Outcome},
    envelope::SagaHeaders,
    id::{CommandId, SagaId},
};

/// Identifies a run of a step, and whose it is; the key of a fence. Fences are locked in its order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FenceKey {
    pub(super) saga: SagaId,
    pub(super) step: String,
    pub(super) occurrence: i32,
    pub(super) namespace: Namespace,
}

/// The namespace of saga and step: two orchestrators, or two definitions of one, may use the same names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Namespace {
    pub(super) orchestrator: String,
    pub(super) definition: String,
}

/// The commands of a fence as far as one command knows them: its own id, and for an undo the id of what it undoes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FenceCommands {
    pub(super) run: Option<CommandId>,
    pub(super) undo: Option<CommandId>,
    /// None of the commands is the first of its run, and their ids are of the first derivation. Then only the topic for
    /// their replies tells their orchestrator from another.
    pub(super) nameless: bool,
}

/// Where a fence's row is. Builds that know no namespaces look under saga, step and occurrence alone. So the first
/// namespace that comes has its row there; another one's is apart, under a name of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Plain,
    Apart,
}

impl FenceCommands {
    pub(super) fn of(cx: &CommandContext) -> Self {
        let saga = &cx.saga;
        let first_derivation = CommandId::derive(saga.saga, &saga.step, saga.op, saga.occurrence) == saga.command;
        let again = saga.op == Op::Undo || saga.attempt > 1;
        let nameless = first_derivation && again && saga.orchestrator.is_none();
        match saga.op {
            Op::Do => Self { run: Some(saga.command), undo: None, nameless },
            Op::Undo => Self { run: cx.undoes, undo: Some(saga.command), nameless },
        }
    }

    pub(super) fn and(self, other: Self) -> Self {
        let nameless = self.nameless && other.nameless;
        Self { run: self.run.or(other.run), undo: self.undo.or(other.undo), nameless }
    }
}

impl FenceKey {
    /// The step in the fence's row.
    pub(super) fn row_step(&self, stored: Stored) -> String {
        match stored {
            Stored::Plain => self.step.clone(),
            Stored::Apart => format!("{}{}", self.step, self.namespace.suffix()),
        }
    }
}

impl Namespace {
    /// The orchestrator's own name, or else the reply topic: it is on every command, of every build, and two
    /// orchestrators cannot share one. `ce_source` is the relay's name for the outbox, which an operator may change.
    pub(super) fn of(saga: &SagaHeaders) -> Self {
        let orchestrator = saga.orchestrator.as_ref().or(saga.reply_to.as_ref()).cloned().unwrap_or_default();
        Self { orchestrator, definition: saga.definition.clone() }
    }

    /// The part that follows the step's name in a row that is apart; the SQL of `store` spells it the same.
    pub(super) fn suffix(&self) -> String {
        format!(" [{} of {}]", self.definition, self.orchestrator)
    }
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
    pub(super) stored: Stored,
    /// Whether the same run has a record under another topic for replies. That record is another orchestrator's, or
    /// this one's from before its topic was renamed.
    pub(super) elsewhere: bool,
    pub(super) run: DoState,
    pub(super) run_command: Option<CommandId>,
    pub(super) undo: UndoState,
    pub(super) undo_command: Option<CommandId>,
}

/// Where the effect of an undo's step is, and so what the absence of its record proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EffectPlace {
    /// In the fence's database: there is no effect without its fence.
    Here,
    /// Outside the database: only the provider knows.
    Outside,
    /// This participant does not handle the step's command, so it never has a record of it.
    Unknown,
}

/// What a command asks of its fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FenceRequest {
    Do,
    /// What the orchestrator knows of the step, and where its effect is.
    Undo(Happened, EffectPlace),
}

/// Why an undo fails if the orchestrator knows that its step was done, and this participant has no record of it.
const LOST: &str = "the orchestrator took the success of this step, and this participant has no record of it: the \
    command went to another topic or database, or the record was lost in a restore or a failover. Look where the effect \
    is, and undo it by hand";

/// Why an undo fails if this participant does not handle the command of its step.
const NOT_OURS: &str = "this participant does not handle the command that this one undoes, so it does not know whether \
    there is something to undo. Send both to one topic";

/// Why a resent command fails if this participant knows it only under another topic for replies.
const RENAMED: &str = "this participant has a record of this step for a saga of the same id and definition, whose replies went to \
    another topic. If the orchestrator's reply topic was renamed, give it its former name until the sagas that began before have \
    ended; if not, these are two orchestrators: look where the effect is, and settle it by hand";

/// What a command is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FenceDecision {
    /// The command's handler runs.
    Run,
    /// The undo's handler runs; this is what is known of the do.
    Undo(Happened<Vec<u8>>),
    /// The command fails without its handler, for this reason.
    Fail(&'static str),
    /// There is nothing to undo.
    NothingToUndo,
    /// The undo came first, so the do is refused for good.
    Refuse,
    /// The participant sends the stored reply again.
    Answer(Outcome, Vec<u8>),
    /// The command is being called; its reply will come.
    Ignore,
    /// The command's call was given up in doubt; the participant calls again.
    CallAgain,
    /// The undo waits until the do's call is settled.
    Wait,
}

impl Fence {
    /// A new fence: nothing was ever done.
    pub(super) fn new() -> Self {
        Self {
            stored: Stored::Plain,
            elsewhere: false,
            run: DoState::Absent,
            run_command: None,
            undo: UndoState::Absent,
            undo_command: None,
        }
    }

    /// Whether this fence, which a build that knows no namespaces wrote, is that of `commands`. If neither of the two
    /// ids can be compared it is: that build would take it as well.
    pub(super) fn is_of(&self, commands: FenceCommands) -> bool {
        let same = |mine: Option<CommandId>, theirs: Option<CommandId>| Some(mine? == theirs?);
        same(self.run_command, commands.run).or_else(|| same(self.undo_command, commands.undo)).unwrap_or(true)
    }

    /// What a command (first or resent) is to do here.
    pub(super) fn next(&self, asked: FenceRequest) -> FenceDecision {
        match asked {
            FenceRequest::Do => self.next_do(),
            FenceRequest::Undo(happened, place) => self.next_undo(happened, place),
        }
    }

    fn next_do(&self) -> FenceDecision {
        let undone = self.undo != UndoState::Absent;
        match &self.run {
            DoState::Succeeded(reply) => FenceDecision::Answer(Outcome::Succeeded, reply.clone()),
            DoState::Rejected(reply) => FenceDecision::Answer(Outcome::Rejected, reply.clone()),
            DoState::Calling => FenceDecision::Ignore,
            DoState::Refused => FenceDecision::Refuse,
            DoState::Absent | DoState::Open if undone => FenceDecision::Refuse,
            DoState::Absent | DoState::Open if self.elsewhere => FenceDecision::Fail(RENAMED),
            DoState::Absent | DoState::Open => FenceDecision::Run,
            // A refusal would mean that certainly nothing happened; the do's undo settles that, and gets the answer.
            DoState::InDoubt if undone => FenceDecision::Ignore,
            DoState::InDoubt => FenceDecision::CallAgain,
        }
    }

    fn next_undo(&self, happened: Happened, place: EffectPlace) -> FenceDecision {
        match &self.undo {
            UndoState::Done(reply) => FenceDecision::Answer(Outcome::Succeeded, reply.clone()),
            UndoState::Waiting | UndoState::Calling => FenceDecision::Ignore,
            UndoState::InDoubt => FenceDecision::CallAgain,
            UndoState::Absent | UndoState::Open => match (&self.run, happened, place) {
                (DoState::Succeeded(reply), ..) => FenceDecision::Undo(Happened::Yes(reply.clone())),
                (DoState::InDoubt, ..) => FenceDecision::Undo(Happened::InDoubt),
                (DoState::Calling, ..) => FenceDecision::Wait,
                (DoState::Absent | DoState::Open, Happened::InDoubt, EffectPlace::Here) if self.elsewhere => {
                    FenceDecision::Fail(RENAMED)
                }
                (_, Happened::Yes(()), _) => FenceDecision::Fail(LOST),
                (DoState::Rejected(_), ..) | (_, _, EffectPlace::Here) => FenceDecision::NothingToUndo,
                (DoState::Absent | DoState::Open | DoState::Refused, _, EffectPlace::Outside) => {
                    FenceDecision::Undo(Happened::InDoubt)
                }
                (DoState::Absent | DoState::Open | DoState::Refused, _, EffectPlace::Unknown) => {
                    FenceDecision::Fail(NOT_OURS)
                }
            },
        }
    }

    /// The command of `op` that this fence belongs to; `None` until one came.
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

    /// Records the outcome of a handler or a call. Returns the do's intent where the undo has settled it.
    pub(super) fn settle(&mut self, op: Op, settled: &Settlement) -> Option<CommandId> {
        let doubted = self.run == DoState::InDoubt;
        match (op, settled) {
            (Op::Do, Settlement::Done(reply)) => self.run = DoState::Succeeded(reply.clone()),
            (Op::Do, Settlement::Rejected(reply)) => self.run = DoState::Rejected(reply.clone()),
            (Op::Do, Settlement::Failed(_)) => self.run = DoState::Open,
            (Op::Undo, Settlement::Done(reply)) => {
                self.undo = UndoState::Done(reply.clone());
                if doubted {
                    self.run = DoState::Refused;
                }
                self.refuse();
                return self.run_command.filter(|_| doubted);
            }
            // An undo has no rejections to give (`Never` has no value); if it had one, it would stay open.
            (Op::Undo, Settlement::Rejected(_) | Settlement::Failed(_)) => self.undo = UndoState::Open,
        }
        None
    }

    /// Records that a call is about to be made, or made again.
    pub(super) fn calling(&mut self, op: Op) {
        match op {
            Op::Do => self.run = DoState::Calling,
            Op::Undo => self.undo = UndoState::Calling,
        }
    }

    /// Records that a call was given up without an answer.
    pub(super) fn in_doubt(&mut self, op: Op) {
        match op {
            Op::Do => self.run = DoState::InDoubt,
            Op::Undo => self.undo = UndoState::InDoubt,
        }
    }

    /// Records that the undo was taken: a do that certainly did nothing never will.
    pub(super) fn refuse(&mut self) {
        if matches!(self.run, DoState::Absent | DoState::Open) {
            self.run = DoState::Refused;
        }
    }
}

impl FenceDecision {
    /// What the handler gets of the do, when this decision runs a handler: its reply, or `None`.
    pub(super) fn runs(&self) -> Option<Option<&[u8]>> {
        match self {
            Self::Run => Some(None),
            Self::Undo(Happened::Yes(reply)) => Some(Some(reply)),
            Self::Undo(Happened::InDoubt) => Some(None),
            Self::Fail(_)
            | Self::NothingToUndo
            | Self::Refuse
            | Self::Answer(..)
            | Self::Ignore
            | Self::CallAgain
            | Self::Wait => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the world does next: commands come in any order and number, handlers and calls end in any way, and the
    /// database forgets.
    #[derive(Debug, Clone, Copy)]
    enum Event {
        Deliver(Op, End),
        CallEnds(End),
        /// The orchestrator takes the success that the do was answered with.
        Taken,
        /// The fence is gone, with its intent, and with an effect in the same database.
        Lost,
        /// A call whose intent was lost gets there all the same.
        StrayArrives,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum End {
        Done,
        Rejected,
        Failed,
        /// The call is under way: an intent is committed.
        Call,
        /// Attempts ran out; it may have happened.
        DoubtDone,
        DoubtNot,
    }

    fn event() -> impl Strategy<Value = Event> {
        let ends = [End::Done, End::Rejected, End::Failed, End::Call, End::DoubtDone, End::DoubtNot];
        let end = prop::sample::select(ends.to_vec());
        let op = prop_oneof![Just(Op::Do), Just(Op::Undo)];
        prop_oneof![
            4 => (op, end.clone()).prop_map(|(op, end)| Event::Deliver(op, end)),
            3 => end.prop_map(Event::CallEnds),
            1 => Just(Event::Taken),
            1 => Just(Event::Lost),
            1 => Just(Event::StrayArrives),
        ]
    }

    /// A fence, the effect as it is in the world, and what the orchestrator knows.
    struct World {
        fence: Fence,
        place: EffectPlace,
        effect: bool,
        effects: usize,
        /// Outside: the undo was taken there, or the do was refused there; nothing comes under the do's key any more.
        voided: bool,
        /// A call whose intent was lost is under way.
        stray: bool,
        lost: bool,
        /// The do's success was answered, and then taken.
        success: (bool, bool),
        /// What the orchestrator's undo says of the do, which stays the same.
        said: Option<Happened>,
        /// The undo was answered with success.
        undone: bool,
        answers: [Option<(Outcome, Vec<u8>)>; 2],
    }

    impl World {
        fn new(place: EffectPlace) -> Self {
            Self {
                fence: Fence::new(),
                place,
                effect: false,
                effects: 0,
                voided: false,
                stray: false,
                lost: false,
                success: (false, false),
                said: None,
                undone: false,
                answers: [None, None],
            }
        }

        fn take(&mut self, op: Op) {
            match op {
                // Under one idempotency key: what was done is not done again.
                Op::Do if self.effect || self.voided => {}
                Op::Do => {
                    self.effect = true;
                    self.effects += 1;
                }
                Op::Undo => {
                    self.effect = false;
                    self.voided = self.place == EffectPlace::Outside;
                }
            }
        }

        fn settle(&mut self, op: Op, end: End) {
            let settled = match (op, end) {
                (_, End::Done) => Settlement::Done(vec![1]),
                (Op::Do, End::Rejected) => Settlement::Rejected(vec![2]),
                _ => Settlement::Failed("later".into()),
            };
            if let Settlement::Done(_) = settled {
                self.take(op);
                self.success.0 |= op == Op::Do;
                self.undone |= op == Op::Undo;
            }
            if let Settlement::Rejected(_) = settled {
                self.voided |= self.place == EffectPlace::Outside;
            }
            self.fence.settle(op, &settled);
        }

        fn asked(&mut self, op: Op) -> FenceRequest {
            let taken = self.success.1;
            match op {
                Op::Do => FenceRequest::Do,
                Op::Undo => FenceRequest::Undo(
                    *self.said.get_or_insert(if taken { Happened::Yes(()) } else { Happened::InDoubt }),
                    self.place,
                ),
            }
        }

        fn deliver(&mut self, op: Op, end: End) -> Result<(), TestCaseError> {
            let asked = self.asked(op);
            match self.fence.next(asked) {
                FenceDecision::Run | FenceDecision::Undo(_) => match end {
                    // A refusal means that certainly nothing happened.
                    End::Rejected if self.effect && op == Op::Do => self.settle(op, End::Done),
                    End::Done | End::Rejected | End::Failed => self.settle(op, end),
                    // An effect in the same database is not called.
                    End::Call | End::DoubtDone | End::DoubtNot if self.place == EffectPlace::Here => {
                        self.settle(op, End::Failed);
                    }
                    End::Call | End::DoubtDone | End::DoubtNot => self.fence.calling(op),
                },
                FenceDecision::Fail(_) => {
                    prop_assert!(self.lost && self.success.1, "it fails though no record was lost");
                    self.settle(op, End::Failed);
                }
                FenceDecision::NothingToUndo => {
                    prop_assert!(!self.effect, "there is something to undo");
                    prop_assert_eq!(self.said, Some(Happened::InDoubt), "the orchestrator knows better");
                    self.settle(op, End::Done);
                }
                FenceDecision::Refuse => self.fence.refuse(),
                FenceDecision::Answer(outcome, reply) => {
                    let answer = &mut self.answers[usize::from(op == Op::Undo)];
                    let first = answer.get_or_insert((outcome, reply.clone()));
                    prop_assert_eq!(&(outcome, reply), &*first, "a final answer changed");
                }
                FenceDecision::Ignore => {}
                FenceDecision::CallAgain => self.fence.calling(op),
                FenceDecision::Wait => self.fence.undo = UndoState::Waiting,
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

        /// An effect in the same database goes with its fence, and what comes then comes for the first time. Once its
        /// undo is on its way that is not so any more: Kafka brings the do and then the undo again, in this order.
        fn lose(&mut self) {
            if self.place == EffectPlace::Here {
                if self.said.is_some() {
                    return;
                }
                (self.effect, self.effects) = (false, 0);
            }
            self.stray |= self.fence.run == DoState::Calling;
            self.lost = true;
            self.answers = [None, None];
            self.fence = Fence::new();
        }

        fn happens(&mut self, event: Event) -> Result<(), TestCaseError> {
            match event {
                Event::Deliver(op, end) => self.deliver(op, end)?,
                Event::CallEnds(end) => self.call_ends(end)?,
                Event::Taken => self.success.1 |= self.success.0 && self.said.is_none(),
                Event::Lost => self.lose(),
                Event::StrayArrives if self.stray => {
                    self.stray = false;
                    self.take(Op::Do);
                }
                Event::StrayArrives => {}
            }
            prop_assert!(self.effects <= 1, "it happened {} times", self.effects);
            prop_assert!(!self.undone || !self.effect, "undone, and there");
            match self.fence.run {
                DoState::Rejected(_) => prop_assert!(!self.effect, "refused, and done"),
                DoState::Open | DoState::Absent if !self.lost => {
                    prop_assert!(!self.effect, "certainly nothing happened, and it did");
                }
                _ => {}
            }
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        #[test]
        fn an_effect_happens_once_and_never_after_its_undo(
            outside: bool,
            events in prop::collection::vec(event(), 0..40),
        ) {
            let mut world = World::new(if outside { EffectPlace::Outside } else { EffectPlace::Here });
            for event in events {
                world.happens(event)?;
            }
        }
    }

    #[test]
    fn without_a_record_an_undo_succeeds_only_where_absence_is_proof() {
        let yes = Happened::Yes(());
        for (place, in_doubt) in [
            (EffectPlace::Here, FenceDecision::NothingToUndo),
            (EffectPlace::Outside, FenceDecision::Undo(Happened::InDoubt)),
            (EffectPlace::Unknown, FenceDecision::Fail(NOT_OURS)),
        ] {
            assert_eq!(Fence::new().next(FenceRequest::Undo(Happened::InDoubt, place)), in_doubt);
            let mut fence = Fence::new();
            assert_eq!(fence.next(FenceRequest::Undo(yes, place)), FenceDecision::Fail(LOST));
            fence.settle(Op::Undo, &Settlement::Failed(LOST.into()));
            assert_eq!(fence.next(FenceRequest::Undo(yes, place)), FenceDecision::Fail(LOST), "and so does its resend");
            assert_eq!(fence.next(FenceRequest::Do), FenceDecision::Refuse, "a do that comes after it is refused");
        }
    }
}

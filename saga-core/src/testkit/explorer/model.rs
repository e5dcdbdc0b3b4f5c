//! The model: what can happen to a saga, its messages and its participants.

use super::{
    fences::{self, Fence},
    messages::{ATTEMPTS_MAX, Note, bit, notes},
    rules::{self, Violation},
};
use crate::{
    command::{Failed, Happened, Op},
    id::{Nonce, SagaId},
    saga::{
        decide::{command_id, start},
        definition::{Definition, Remote, StepKind, StepRole},
        state::{Action, Answer, Effects, Event, Naming, Open, Reply, State, Status, StuckWhy},
    },
};
use serde_json::Value;
use std::{cell::RefCell, collections::HashMap, rc::Rc};
use time::{Duration, OffsetDateTime};

/// The function under exploration: the production one, or a seeded mistake that has to be found.
pub type Decide = fn(&Definition, &State, &Event, OffsetDateTime) -> (State, Effects);

/// The limits of an exploration.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How often one command is issued at most; later attempts are like earlier ones.
    pub attempts: u32,
    /// How often a local effect breaks, or a command cannot be built.
    pub breaks: u8,
    /// How many participants' fences are lost: after the do, before the undo.
    pub losses: u8,
    /// Whether the effects of steps are external: called, and recorded any time later.
    pub external: bool,
    /// Whether participants may answer that an attempt failed.
    pub failures: bool,
    /// Whether callers may cancel.
    pub cancels: bool,
    /// The mistake that the participants make, which the exploration has to find; `None`: they make none.
    pub mistake: Option<Mistake>,
}

/// A seeded mistake of participants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// The participants take the absence of a fence for proof that nothing happened.
    TakesAbsenceForProof,
    /// The undo does not wait for the call that is under way, however slow that is.
    UndoesDuringTheCall,
}

/// Divides the sagas of a batch, each read or not, into those that are decided and those that are left as they are: the
/// production function, or a seeded mistake that has to be found.
pub type Divide = fn(Vec<Result<(), ()>>) -> (Vec<()>, Vec<()>);

/// Most steps of an explored definition: a message is one bit of 128.
pub(super) const STEPS_MAX: usize = 8;
/// A saga, all messages that were ever sent for it, and its participants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub(super) state: u32,
    pub(super) messages: u128,
    pub(super) fences: [Fence; STEPS_MAX],
    breaks: u8,
    /// The saga's deadline has passed, and the saga can still be undone.
    pub(super) late: bool,
    /// A bit for each step whose fence was lost.
    pub(super) lost: u8,
    /// A bit for each step whose undo carries that the step happened.
    pub(super) known: u8,
}

/// Something that can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExplorerStep {
    /// A participant gets a command and makes this choice.
    Deliver(usize, Op, u32, Choice),
    /// An external call has its effect.
    Call(usize),
    /// A participant's fence is lost, with its intent, and with an effect in the same database.
    Lose(usize),
    /// An external call is recorded and answered.
    Record(usize, Choice),
    /// The orchestrator gets a reply; a local effect that follows may break.
    Reply(usize, Op, Note, Local),
    /// The saga's deadline passes; the timers have not seen it yet.
    Deadline,
    /// The timers look at the saga: the open wait is over, or the saga is late.
    Due(Local),
    /// A caller cancels.
    Cancel(Local),
    /// An operator retries.
    Retry(Local),
}

/// What a participant does with a command that it has not settled yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// The participant does it.
    Succeed,
    /// The participant refuses.
    Reject,
    /// The participant answers that the attempt failed.
    Fail,
    /// The participant repeats its earlier answer.
    Repeat,
}

/// Whether local effects work, and commands can be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Local {
    /// Local effects work, and commands can be built.
    Works,
    /// The first local effect that follows fails, or the first command cannot be built.
    Breaks,
}

/// The state after a decision, and its effects.
type Decided = (u32, Rc<Effects>);

/// A definition, its rules, and the states that the exploration met.
pub struct Model<'d> {
    pub(super) definition: &'d Definition,
    pub(super) limits: Limits,
    decide: Decide,
    /// If set, each batch has another saga beside, which cannot be read.
    beside: Option<Divide>,
    states: RefCell<Vec<Rc<State>>>,
    known: RefCell<HashMap<State, u32>>,
    memo: RefCell<HashMap<(u32, Event), Decided>>,
}

impl<'d> Model<'d> {
    /// What can happen to sagas of `definition`.
    ///
    /// # Panics
    /// When there are too many steps or attempts for the explorer.
    pub fn new(definition: &'d Definition, limits: Limits, decide: Decide) -> Self {
        assert!(definition.steps().len() <= STEPS_MAX && limits.attempts <= ATTEMPTS_MAX, "too large to explore");
        let (states, known, memo) = Default::default();
        Self { definition, limits, decide, beside: None, states, known, memo }
    }

    /// Puts a saga that cannot be read into each batch of replies and of due sagas.
    #[must_use]
    pub fn beside_an_unreadable_saga(self, divide: Divide) -> Self {
        Self { beside: Some(divide), ..self }
    }

    /// Whether a batch decides its readable saga. The other one is left as it is.
    fn is_decided(&self) -> Result<bool, Violation> {
        let Some(divide) = self.beside else { return Ok(true) };
        let (decided, left) = divide(vec![Err(()), Ok(())]);
        rules::check_left(decided.len(), left.len())?;
        Ok(!decided.is_empty())
    }

    /// The worlds in which a saga can begin: each of its first local effects works (or there is no saga).
    ///
    /// # Errors
    /// The rule that the definition breaks at its start.
    pub fn begin(&self) -> Result<World, Violation> {
        let (state, effects) = start(self.definition, saga(), naming(), morning());
        let breaks = self.limits.breaks;
        let (state, fences) = (self.intern(state), [Fence::Absent; STEPS_MAX]);
        let world = World { state, messages: 0, fences, breaks, late: false, lost: 0, known: 0 };
        self.carry_out(world, state, Rc::new(effects), Local::Works)
    }

    /// The saga's state in `world`.
    pub fn state(&self, world: &World) -> Rc<State> {
        Rc::clone(&self.states.borrow()[world.state as usize])
    }

    /// Everything that can happen to `world` next.
    pub fn next_steps(&self, world: &World) -> Vec<ExplorerStep> {
        let mut next_steps = Vec::with_capacity(16);
        for (step, fence) in world.fences.iter().enumerate().take(self.definition.steps().len()) {
            match fence {
                Fence::Calling => {
                    next_steps.push(ExplorerStep::Call(step));
                    if self.refusable(step) {
                        next_steps.push(ExplorerStep::Record(step, Choice::Reject));
                    }
                }
                Fence::Called => next_steps.push(ExplorerStep::Record(step, Choice::Succeed)),
                Fence::Adrift | Fence::MarkedAdrift => next_steps.push(ExplorerStep::Call(step)),
                _ => {}
            }
            next_steps.extend(self.loses(world, step).map(|_| ExplorerStep::Lose(step)));
        }
        let locals: &[Local] = if world.breaks > 0 { &[Local::Works, Local::Breaks] } else { &[Local::Works] };
        for (step, op, note) in notes(world.messages) {
            match note {
                Note::Command(attempt) => self.deliveries(world, step, op, attempt, &mut next_steps),
                _ => next_steps.extend(locals.iter().map(|local| ExplorerStep::Reply(step, op, note, *local))),
            }
        }
        let state = self.state(world);
        let Some(open) = state.open() else { return next_steps };
        let stuck = matches!(state.status, Status::Stuck { .. });
        next_steps.extend((!world.late && self.can_be_late(&state)).then_some(ExplorerStep::Deadline));
        for local in locals.iter().copied() {
            next_steps.extend((open.due.is_some() || world.late).then_some(ExplorerStep::Due(local)));
            next_steps.extend(self.limits.cancels.then_some(ExplorerStep::Cancel(local)));
            next_steps.extend((stuck && open.attempt < self.limits.attempts).then_some(ExplorerStep::Retry(local)));
        }
        next_steps
    }

    fn deliveries(&self, world: &World, step: usize, op: Op, attempt: u32, next_steps: &mut Vec<ExplorerStep>) {
        let choices = match op {
            Op::Undo if self.is_undone_elsewhere(step) => vec![Choice::Repeat],
            _ => fences::choices(self.limits, op, world.fences[step], self.refusable(step)),
        };
        next_steps.extend(choices.into_iter().map(|choice| ExplorerStep::Deliver(step, op, attempt, choice)));
    }

    /// What the loss of the step's fence leaves, where it can be lost.
    fn loses(&self, world: &World, step: usize) -> Option<Fence> {
        let may = self.remote(step).is_some()
            && !world.has_lost(step)
            && world.lost.count_ones() < u32::from(self.limits.losses);
        may.then(|| world.fences[step].lost(self.limits.external)).flatten()
    }

    fn remote(&self, step: usize) -> Option<&Remote> {
        match &self.definition.steps()[step].kind {
            StepKind::Remote(remote) => Some(remote),
            StepKind::Local { .. } => None,
        }
    }

    /// Whether the saga can still be late, by its definition and not by the deadline that the saga remembers.
    fn can_be_late(&self, state: &State) -> bool {
        let past = self.definition.pivot().is_some_and(|pivot| state.issued() > pivot);
        self.definition.deadline().is_some() && state.failure.is_none() && !past && !state.is_finished()
    }

    fn is_undone_elsewhere(&self, step: usize) -> bool {
        self.remote(step).is_some_and(|remote| remote.undone_elsewhere().is_some())
    }

    fn refusable(&self, step: usize) -> bool {
        self.remote(step).is_none_or(|remote| remote.role != StepRole::Retriable)
    }

    /// The world after `next`, or the rule that it breaks.
    ///
    /// # Errors
    /// The rule that this step breaks.
    pub fn take(&self, world: &World, next: ExplorerStep) -> Result<World, Violation> {
        let mut after = *world;
        let (event, local) = match next {
            ExplorerStep::Deliver(step, op, attempt, choice) => {
                self.deliver(&mut after, step, op, attempt, choice);
                return self.checked(after);
            }
            ExplorerStep::Call(step) => {
                after.fences[step] = world.fences[step].called();
                return self.checked(after);
            }
            ExplorerStep::Lose(step) => {
                after.fences[step] = self.loses(world, step).unwrap_or(world.fences[step]);
                after.lost |= 1 << step;
                return self.checked(after);
            }
            ExplorerStep::Record(step, choice) => {
                self.settle(&mut after, step, choice);
                return self.checked(after);
            }
            ExplorerStep::Deadline => {
                after.late = true;
                return self.checked(after);
            }
            ExplorerStep::Reply(step, op, note, local) => (self.reply(world, step, op, note), local),
            ExplorerStep::Due(local) => (Event::Due, local),
            ExplorerStep::Cancel(local) => (Event::Cancel { reason: String::new() }, local),
            ExplorerStep::Retry(local) => (Event::Retry, local),
        };
        if matches!(next, ExplorerStep::Reply(..) | ExplorerStep::Due(_)) && !self.is_decided()? {
            return self.checked(after);
        }
        let (state, effects) = self.decided(world, event);
        if let ExplorerStep::Cancel(_) = next {
            rules::check_cancel(self, world, effects.verdict)?;
        }
        after.state = state;
        let after = self.carry_out(after, world.state, effects, local)?;
        rules::check_step(self, world, &after)?;
        Ok(after)
    }

    fn deliver(&self, world: &mut World, step: usize, op: Op, attempt: u32, choice: Choice) {
        let (limits, fence, knows) = (self.limits, world.fences[step], world.knows(step));
        let (fence, note) = match op {
            Op::Do => fences::act(limits, fence, choice, attempt),
            // The undo goes to another participant, whose fence of this step is always absent.
            Op::Undo if self.is_undone_elsewhere(step) => {
                (fence, Some(fences::undo(limits, Fence::Absent, choice, knows, attempt).1))
            }
            Op::Undo => {
                let (fence, note) = fences::undo(limits, fence, choice, knows, attempt);
                (fence, Some(note))
            }
        };
        world.fences[step] = fence;
        world.messages |= note.map_or(0, |note| bit(step, op, note));
    }

    fn settle(&self, world: &mut World, step: usize, choice: Choice) {
        let (fence, note) = match choice {
            Choice::Reject => (Fence::Rejected, Note::Rejected),
            Choice::Succeed | Choice::Fail | Choice::Repeat => (Fence::Done, Note::Succeeded),
        };
        world.fences[step] = fence;
        world.messages |= bit(step, Op::Do, note);
    }

    fn reply(&self, world: &World, step: usize, op: Op, note: Note) -> Event {
        // A final answer counts whatever its attempt, so all of them carry the first one's number.
        let (attempt, answer) = match note {
            Note::Rejected => (1, Answer::Rejected(Value::Null)),
            Note::Failed(attempt) => (attempt, Answer::Failed(Failed::default())),
            Note::Succeeded | Note::Command(_) => (1, Answer::Succeeded(Value::Null)),
        };
        let command = command_id(self.definition, &self.state(world), step, op);
        Event::Reply(Reply { command, attempt, answer })
    }

    /// Carries out a decision: commands go out, local effects run in the same transaction.
    fn carry_out(
        &self,
        mut world: World,
        mut before: u32,
        mut effects: Rc<Effects>,
        mut local: Local,
    ) -> Result<World, Violation> {
        while let Some(action) = effects.actions.first() {
            rules::check_action(self, &world, action)?;
            let event = match action {
                Action::Send(_) if local == Local::Breaks => {
                    world.breaks -= 1;
                    local = Local::Works;
                    let deadline = self.states.borrow()[before as usize].deadline;
                    Event::Unsent { error: String::new(), deadline }
                }
                Action::Send(send) => {
                    if let Some((_, Happened::Yes(()))) = send.undoes {
                        world.known |= 1 << send.step;
                    }
                    world.messages |= bit(send.step, send.op, Note::Command(send.attempt.min(ATTEMPTS_MAX)));
                    break;
                }
                Action::RunLocal { .. } if local == Local::Breaks => {
                    world.breaks -= 1;
                    local = Local::Works;
                    Event::Broken { error: String::new() }
                }
                Action::RunLocal { step, op: Op::Do } => {
                    world.fences[*step] = Fence::Done;
                    Event::LocalDone
                }
                Action::RunLocal { step, op: Op::Undo } => {
                    world.fences[*step] = Fence::Undone;
                    Event::LocalDone
                }
            };
            before = world.state;
            (world.state, effects) = self.decided(&world, event);
        }
        let state = self.state(&world);
        world.late &= state.failure.is_none();
        self.checked(world)
    }

    fn checked(&self, world: World) -> Result<World, Violation> {
        rules::check_world(self, &world)?;
        Ok(world)
    }

    /// Calls `decide` once for each state and event, and remembers the answer: it is a function.
    fn decided(&self, &World { state, late, .. }: &World, event: Event) -> Decided {
        let now = match event {
            _ if late => evening(),
            Event::Due => noon(),
            _ => morning(),
        };
        let key = (if late { state | LATE_BIT } else { state }, event);
        if let Some((state, effects)) = self.memo.borrow().get(&key) {
            return (*state, Rc::clone(effects));
        }
        let before = Rc::clone(&self.states.borrow()[state as usize]);
        let (after, effects) = (self.decide)(self.definition, &before, &key.1, now);
        let decided = (self.intern(after), Rc::new(effects));
        self.memo.borrow_mut().insert(key, decided.clone());
        decided
    }

    /// Times differ from path to path, and only "later" matters: all waits end at noon, all deadlines at night. Texts
    /// for people differ as well, and decide nothing.
    fn intern(&self, mut state: State) -> u32 {
        let canonical = |open: Open| Open { since: morning(), due: open.due.map(|_| noon()), ..open };
        state.deadline = state.deadline.map(|_| evening());
        state.status = match state.status {
            Status::Running { open } => Status::Running { open: canonical(open) },
            Status::Compensating { open } => Status::Compensating { open: canonical(open) },
            Status::Stuck { open, why } => Status::Stuck { open: canonical(open), why: without_words(why) },
            ended => ended,
        };
        if let Some(reason) = state.failure.as_mut().and_then(|failure| failure.reason.as_mut()) {
            reason.clear();
        }
        let mut states = self.states.borrow_mut();
        *self.known.borrow_mut().entry(state).or_insert_with_key(|state| {
            states.push(Rc::new(state.clone()));
            u32::try_from(states.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// How many different states of sagas were met.
    pub fn states(&self) -> usize {
        self.states.borrow().len()
    }
}

const LATE_BIT: u32 = 1 << 31;

fn without_words(mut why: StuckWhy) -> StuckWhy {
    match &mut why {
        StuckWhy::PivotInDoubt { error }
        | StuckWhy::NotDone { error }
        | StuckWhy::NotUndone { error }
        | StuckWhy::Broken { error } => error.clear(),
    }
    why
}

fn naming() -> Naming {
    Naming { orchestrator: "explorer".into(), nonce: Nonce(uuid::Uuid::nil()) }
}

fn saga() -> SagaId {
    SagaId(uuid::Uuid::from_u128(1))
}

fn morning() -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH
}

fn noon() -> OffsetDateTime {
    morning() + Duration::hours(12)
}

fn evening() -> OffsetDateTime {
    morning() + Duration::hours(20)
}

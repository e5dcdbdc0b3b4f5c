//! What can happen to a saga, its messages and its participants.

use super::rules::{self, Violation};
use crate::{
    envelope::Op,
    id::{CommandId, SagaId},
    saga::{
        decide::start,
        definition::{Definition, Role, StepKind},
        state::{Action, Answer, Effects, Event, Open, Reply, State, Status},
    },
};
use serde_json::Value;
use std::{cell::RefCell, collections::HashMap, rc::Rc};
use time::{Duration, OffsetDateTime};

/// The function under exploration: the production one, or a seeded mistake that has to be found.
pub type Decide = fn(&Definition, &State, &Event, OffsetDateTime) -> (State, Effects);

/// How far an exploration goes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How often one command is issued at most; later attempts are like earlier ones.
    pub attempts: u32,
    /// How often a local effect breaks.
    pub breaks: u8,
    /// Whether the effects of steps are external: called, and recorded any time later.
    pub external: bool,
    /// Whether participants say that it did not work this time.
    pub failures: bool,
    /// Whether somebody may cancel.
    pub cancels: bool,
}

/// How far a step's effect has come, at its participant (or, for a local effect, in the database).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fence {
    /// Nothing came yet.
    Absent,
    /// External: the intent is committed, the call is not made.
    Calling,
    /// External: the call has had its effect, and nobody has recorded it.
    Called,
    /// It is done.
    Done,
    /// It was refused.
    Rejected,
    /// It was done and is undone.
    Undone,
    /// The undo came first.
    Tombstone,
}

impl Fence {
    /// Whether there is an effect, or one may come of what is under way.
    pub(super) fn has_effect(self) -> bool {
        matches!(self, Self::Calling | Self::Called | Self::Done)
    }
}

/// Most steps of an explored definition: a message is one bit of 128.
pub(super) const STEPS: usize = 8;
/// Most attempts of a command.
const ATTEMPTS: u32 = 3;

/// A saga, all messages that were ever sent for it, and its participants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub(super) state: u32,
    messages: u128,
    pub(super) fences: [Fence; STEPS],
    breaks: u8,
    /// The saga's deadline has passed, and the saga can still be undone.
    pub(super) late: bool,
}

/// A message, by what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Note {
    /// A command, by attempt.
    Command(u32),
    /// It is done.
    Succeeded,
    /// Certainly nothing happened.
    Rejected,
    /// That attempt did not work.
    Failed(u32),
}

/// Something that can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Move {
    /// A participant gets a command and does this with it.
    Deliver(usize, Op, u32, Choice),
    /// An external call has its effect.
    Call(usize),
    /// An external call is recorded and answered.
    Record(usize, Choice),
    /// The orchestrator gets a reply; a local effect that follows may break.
    Reply(usize, Op, Note, Local),
    /// The saga's deadline passes; nothing looks at the saga yet.
    Deadline,
    /// The timers look at the saga: the open wait is over, or the saga is late.
    Due(Local),
    /// Somebody cancels.
    Cancel(Local),
    /// An operator retries.
    Retry(Local),
}

/// What a participant does with a command that it has not settled yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// Does it.
    Succeed,
    /// Refuses.
    Reject,
    /// Says that it does not work now.
    Fail,
    /// Gives the answer that it gave before.
    Repeat,
}

/// Whether local effects work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Local {
    /// They do.
    Works,
    /// The first one that is run breaks.
    Breaks,
}

/// The state after, and what follows.
type Decided = (u32, Rc<Effects>);

/// A definition, its rules, and the states that were met.
pub struct Model<'d> {
    pub(super) definition: &'d Definition,
    pub(super) limits: Limits,
    decide: Decide,
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
        assert!(definition.steps().len() <= STEPS && limits.attempts <= ATTEMPTS, "too large to explore");
        let (states, known, memo) = Default::default();
        Self { definition, limits, decide, states, known, memo }
    }

    /// The worlds in which a saga can begin: each of its first local effects works (or there is no saga).
    pub fn begin(&self) -> Result<World, Violation> {
        let (state, effects) = start(self.definition, saga(), morning());
        let breaks = self.limits.breaks;
        let (state, fences) = (self.intern(state), [Fence::Absent; STEPS]);
        let world = World { state, messages: 0, fences, breaks, late: false };
        self.carry_out(world, Rc::new(effects), Local::Works)
    }

    /// The saga's state in `world`.
    pub fn state(&self, world: &World) -> Rc<State> {
        Rc::clone(&self.states.borrow()[world.state as usize])
    }

    /// Everything that can happen to `world` next.
    pub fn moves(&self, world: &World) -> Vec<Move> {
        let mut moves = Vec::with_capacity(16);
        for (step, fence) in world.fences.iter().enumerate().take(self.definition.steps().len()) {
            match fence {
                Fence::Calling => {
                    moves.push(Move::Call(step));
                    if self.refusable(step) {
                        moves.push(Move::Record(step, Choice::Reject));
                    }
                }
                Fence::Called => moves.push(Move::Record(step, Choice::Succeed)),
                _ => {}
            }
        }
        let locals: &[Local] = if world.breaks > 0 { &[Local::Works, Local::Breaks] } else { &[Local::Works] };
        for (step, op, note) in notes(world.messages) {
            match note {
                Note::Command(attempt) => self.deliveries(world, step, op, attempt, &mut moves),
                _ => moves.extend(locals.iter().map(|local| Move::Reply(step, op, note, *local))),
            }
        }
        let state = self.state(world);
        let Some(open) = state.open() else { return moves };
        let stuck = matches!(state.status, Status::Stuck { .. });
        moves.extend((!world.late && self.can_be_late(&state)).then_some(Move::Deadline));
        for local in locals.iter().copied() {
            moves.extend((open.due.is_some() || world.late).then_some(Move::Due(local)));
            moves.extend(self.limits.cancels.then_some(Move::Cancel(local)));
            moves.extend((stuck && open.attempt < self.limits.attempts).then_some(Move::Retry(local)));
        }
        moves
    }

    fn deliveries(&self, world: &World, step: usize, op: Op, attempt: u32, moves: &mut Vec<Move>) {
        use Fence::{Absent, Called, Calling, Done};
        let deliver = |choice| Move::Deliver(step, op, attempt, choice);
        match (op, world.fences[step]) {
            // The call is under way: a do is answered when it is recorded, an undo waits until then.
            (_, Calling | Called) => {}
            (Op::Do, Absent) | (Op::Undo, Done) => {
                moves.push(deliver(Choice::Succeed));
                moves.extend((op == Op::Do && self.refusable(step)).then(|| deliver(Choice::Reject)));
                moves.extend(self.limits.failures.then(|| deliver(Choice::Fail)));
            }
            _ => moves.push(deliver(Choice::Repeat)),
        }
    }

    /// Held against the definition and not against the deadline that the saga remembers.
    fn can_be_late(&self, state: &State) -> bool {
        let past = self.definition.pivot().is_some_and(|pivot| state.steps.len() > pivot);
        self.definition.deadline().is_some() && state.failure.is_none() && !past && !state.is_finished()
    }

    fn refusable(&self, step: usize) -> bool {
        !matches!(&self.definition.steps()[step].kind, StepKind::Remote(remote) if remote.role == Role::Retriable)
    }

    /// What becomes of `world`, or the rule that is broken.
    pub fn take(&self, world: &World, next: Move) -> Result<World, Violation> {
        let mut after = *world;
        let (event, local) = match next {
            Move::Deliver(step, op, attempt, choice) => {
                self.deliver(&mut after, step, op, attempt, choice);
                return self.checked(after);
            }
            Move::Call(step) => {
                after.fences[step] = Fence::Called;
                return self.checked(after);
            }
            Move::Record(step, choice) => {
                self.settle(&mut after, step, choice);
                return self.checked(after);
            }
            Move::Deadline => {
                after.late = true;
                return self.checked(after);
            }
            Move::Reply(step, op, note, local) => (self.reply(step, op, note), local),
            Move::Due(local) => (Event::Due, local),
            Move::Cancel(local) => (Event::Cancel { reason: String::new() }, local),
            Move::Retry(local) => (Event::Retry, local),
        };
        let (state, effects) = self.decided(world, event);
        after.state = state;
        let after = self.carry_out(after, effects, local)?;
        rules::check_step(self, world, &after)?;
        Ok(after)
    }

    fn deliver(&self, world: &mut World, step: usize, op: Op, attempt: u32, choice: Choice) {
        let fence = &mut world.fences[step];
        match (op, *fence, choice) {
            (_, _, Choice::Fail) => world.messages |= bit(step, op, Note::Failed(attempt)),
            (Op::Do, Fence::Absent, _) if self.limits.external && choice == Choice::Succeed => *fence = Fence::Calling,
            (Op::Do, Fence::Absent, _) => self.settle(world, step, choice),
            (Op::Do, Fence::Done, _) => world.messages |= bit(step, op, Note::Succeeded),
            (Op::Do, _, _) => world.messages |= bit(step, op, Note::Rejected),
            (Op::Undo, before, _) => {
                *fence = match before {
                    Fence::Absent => Fence::Tombstone,
                    Fence::Done => Fence::Undone,
                    settled => settled,
                };
                world.messages |= bit(step, op, Note::Succeeded);
            }
        }
    }

    fn settle(&self, world: &mut World, step: usize, choice: Choice) {
        let (fence, note) = match choice {
            Choice::Reject => (Fence::Rejected, Note::Rejected),
            Choice::Succeed | Choice::Fail | Choice::Repeat => (Fence::Done, Note::Succeeded),
        };
        world.fences[step] = fence;
        world.messages |= bit(step, Op::Do, note);
    }

    fn reply(&self, step: usize, op: Op, note: Note) -> Event {
        // A final answer counts whatever its attempt, so all of them are the first's.
        let (attempt, answer) = match note {
            Note::Rejected => (1, Answer::Rejected(Value::Null)),
            Note::Failed(attempt) => (attempt, Answer::Failed(String::new())),
            Note::Succeeded | Note::Command(_) => (1, Answer::Succeeded(Value::Null)),
        };
        let command = CommandId::derive(saga(), &self.definition.steps()[step].name, op, 0);
        Event::Reply(Reply { command, attempt, answer })
    }

    /// Does what was decided: commands go out, local effects are run in the same transaction.
    fn carry_out(&self, mut world: World, mut effects: Rc<Effects>, mut local: Local) -> Result<World, Violation> {
        while let Some(action) = effects.actions.first() {
            rules::check_action(self, &world, action)?;
            let event = match action {
                Action::Send(send) => {
                    world.messages |= bit(send.step, send.op, Note::Command(send.attempt.min(ATTEMPTS)));
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

    /// `decide`, asked once for each state and event: it is a function.
    fn decided(&self, &World { state, late, .. }: &World, event: Event) -> Decided {
        let now = match event {
            _ if late => evening(),
            Event::Due => noon(),
            _ => morning(),
        };
        let key = (if late { state | LATE } else { state }, event);
        if let Some((state, effects)) = self.memo.borrow().get(&key) {
            return (*state, Rc::clone(effects));
        }
        let before = Rc::clone(&self.states.borrow()[state as usize]);
        let (after, effects) = (self.decide)(self.definition, &before, &key.1, now);
        let decided = (self.intern(after), Rc::new(effects));
        self.memo.borrow_mut().insert(key, decided.clone());
        decided
    }

    /// Times differ from path to path and mean nothing here but "later": all waits end at noon, all deadlines at night.
    fn intern(&self, mut state: State) -> u32 {
        let canonical = |open: Open| Open { since: morning(), due: open.due.map(|_| noon()), ..open };
        state.deadline = state.deadline.map(|_| evening());
        state.status = match state.status {
            Status::Running { open } => Status::Running { open: canonical(open) },
            Status::Compensating { open } => Status::Compensating { open: canonical(open) },
            Status::Stuck { open, why } => Status::Stuck { open: canonical(open), why },
            ended => ended,
        };
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

const LATE: u32 = 1 << 31;

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

/// Eight messages per step and direction: three attempts of the command, three failures, two final answers.
fn bit(step: usize, op: Op, note: Note) -> u128 {
    let note = match note {
        Note::Command(attempt) => attempt - 1,
        Note::Failed(attempt) => 2 + attempt,
        Note::Succeeded => 6,
        Note::Rejected => 7,
    };
    1 << (step * 16 + usize::from(op == Op::Undo) * 8 + note as usize)
}

fn notes(messages: u128) -> impl Iterator<Item = (usize, Op, Note)> {
    let mut left = messages;
    std::iter::from_fn(move || {
        let index = (left != 0).then(|| left.trailing_zeros())?;
        left &= left - 1;
        let note = match index % 8 {
            attempt @ 0..=2 => Note::Command(attempt + 1),
            attempt @ 3..=5 => Note::Failed(attempt - 2),
            6 => Note::Succeeded,
            _ => Note::Rejected,
        };
        let op = if index % 16 < 8 { Op::Do } else { Op::Undo };
        Some((index as usize / 16, op, note))
    })
}

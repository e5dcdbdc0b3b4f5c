//! The rules of a saga, checked against the world as it is and not as the saga believes it to be.

use super::{
    fences::Fence,
    model::{ExplorerStep, Model, World},
};
use crate::{
    command::{Happened, Op},
    saga::{
        definition::{StepKind, StepRole},
        state::{Action, State, Status, StepState, StuckWhy, Verdict},
    },
};
use std::fmt;

/// A broken rule, and how to get there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The rule, as a sentence.
    pub rule: &'static str,
    /// What happened, in order; [`Model::replay`] takes it again.
    pub schedule: Vec<ExplorerStep>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken: {}; replay {:?}", self.rule, self.schedule)
    }
}

fn broken(rule: &'static str) -> Violation {
    Violation { rule, schedule: Vec::new() }
}

fn hold(holds: bool, rule: &'static str) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(broken(rule)) }
}

/// Checks what holds before each action.
pub(super) fn check_action(model: &Model<'_>, world: &World, action: &Action) -> Result<(), Violation> {
    let (step, op) = match action {
        Action::Send(send) => (send.step, send.op),
        Action::RunLocal { step, op } => (*step, *op),
    };
    let state = model.state(world);
    let steps = model.definition.steps();
    if op == Op::Do {
        hold(!world.late, "nothing, above all no pivot, is begun after the saga's deadline")?;
        let earlier = state.steps[..step].iter().all(|how| matches!(how, StepState::Done(_)));
        hold(earlier, "a step is begun when every step before it is done")?;
        return hold(state.failure.is_none(), "nothing is begun once the saga is being undone");
    }
    hold(state.failure.is_some(), "nothing is undone without a reason")?;
    if let Action::Send(send) = action {
        let knows = matches!(send.undoes, Some((_, Happened::Yes(()))));
        let done = matches!(state.steps[step], StepState::Done(_));
        hold(knows == done, "an undo says whether the saga took its step's success")?;
        hold(world.was_sent(step, Op::Do), "nothing is undone that was never sent")?;
    }
    hold(
        matches!(state.steps[step], StepState::Issued | StepState::Done(_)),
        "only a step that was issued and not rejected is undone",
    )?;
    let newer_settled =
        (step + 1..steps.len()).all(|newer| !undoable(&steps[newer].kind) || !world.fences[newer].has_effect());
    hold(newer_settled, "steps are undone newest first, each after the one before is acknowledged")?;
    let pivot_out = model.definition.pivot().is_none_or(|pivot| {
        pivot >= state.steps.len() || (state.steps[pivot] == StepState::NotDone && !world.fences[pivot].has_effect())
    });
    hold(pivot_out, "nothing is undone while the pivot has, or may have, happened")
}

fn undoable(kind: &StepKind) -> bool {
    match kind {
        StepKind::Local { undo, .. } => undo.is_some(),
        StepKind::Remote(remote) => remote.undo.is_some(),
    }
}

/// Checks what holds in every world.
pub(super) fn check_world(model: &Model<'_>, world: &World) -> Result<(), Violation> {
    let state = model.state(world);
    check_ends(model, world, &state)?;
    let past = model.definition.pivot().is_some_and(|pivot| world.was_sent(pivot, Op::Do));
    hold(state.deadline.is_none() || !past, "the saga's deadline ends when its pivot's command is sent")?;
    let believes = state.steps.iter().zip(&world.fences).enumerate().all(|(step, (how, fence))| match how {
        StepState::Done(_) => matches!(fence, Fence::Done | Fence::Undone) || world.has_lost(step),
        StepState::NotDone | StepState::Undone => !fence.has_effect(),
        StepState::Issued => true,
    });
    hold(believes, "what the saga takes for done is done, and what it takes for undone has no effect")?;
    let unissued = &world.fences[state.steps.len()..];
    hold(unissued.iter().all(|fence| *fence == Fence::Absent), "what was never issued never happens")
}

fn check_ends(model: &Model<'_>, world: &World, state: &State) -> Result<(), Violation> {
    let steps = model.definition.steps();
    match &state.status {
        Status::Completed => {
            let all = (0..steps.len()).all(|step| world.fences[step] == Fence::Done || world.has_lost(step));
            hold(all && state.steps.len() == steps.len(), "completed means that every effect is there, for ever")?;
            hold(!world.late, "a saga without a pivot completes before its deadline")
        }
        Status::Compensated => {
            let pivot = model.definition.pivot();
            let mut effects = steps.iter().zip(&world.fences).enumerate();
            let none = effects.all(|(i, (step, fence))| {
                let must_not = undoable(&step.kind) || pivot.is_some_and(|pivot| i >= pivot);
                !must_not || !fence.has_effect()
            });
            hold(none, "compensated means that no effect is left, and none comes later")?;
            let excused = (0..steps.len())
                .find(|step| world.has_lost(*step) && world.knows(*step) && world.fences[*step] != Fence::Undone);
            hold(excused.is_none(), "what the saga knows to have happened is undone, or the saga is stuck")?;
            hold(state.failure.is_some(), "compensated has a reason")
        }
        Status::Stuck { open, why } => {
            hold(open.due.is_none(), "a stuck saga does nothing by itself")?;
            let role = match &steps[open.step].kind {
                StepKind::Remote(remote) => remote.role,
                StepKind::Local { .. } => StepRole::Compensable,
            };
            let truthful = match why {
                StuckWhy::PivotInDoubt { .. } => open.op == Op::Do && role == StepRole::Pivot,
                StuckWhy::NotDone { .. } => open.op == Op::Do && role == StepRole::Retriable,
                StuckWhy::NotUndone { .. } => open.op == Op::Undo,
                StuckWhy::Broken { .. } => true,
            };
            hold(truthful, "a stuck saga says why")
        }
        Status::Running { open } | Status::Compensating { open } => {
            hold(open.due.is_some(), "nothing waits that nobody will wake")?;
            let backward = matches!(state.status, Status::Compensating { .. });
            hold(backward == (open.op == Op::Undo), "running does, compensating undoes")?;
            hold(backward == state.failure.is_some(), "only what is undone has a reason")
        }
    }
}

/// Whether a saga waits for an operator, because a record that it needs was lost.
pub(super) fn needs_a_person(world: &World, state: &State) -> bool {
    match &state.status {
        Status::Stuck { open, .. } => open.op == Op::Undo && world.has_lost(open.step) && world.knows(open.step),
        _ => false,
    }
}

/// Checks a batch of two sagas one of which cannot be read: how many were decided and how many left.
pub(super) fn check_left(decided: usize, left: usize) -> Result<(), Violation> {
    hold(decided < 2, "a saga that cannot be read is left as it is")?;
    hold(decided + left == 2, "no saga of a batch is forgotten")
}

/// Checks the answer to a cancel.
pub(super) fn check_cancel(model: &Model<'_>, world: &World, verdict: Verdict) -> Result<(), Violation> {
    let state = model.state(world);
    let forward = !state.is_finished() && state.failure.is_none();
    let sent = model.definition.pivot().is_some_and(|pivot| world.was_sent(pivot, Op::Do));
    let rule = "a saga can be cancelled until its pivot's command is sent, and not after";
    hold(!forward || (verdict == Verdict::Taken) != sent, rule)
}

/// Checks what holds between a world and the next.
pub(super) fn check_step(model: &Model<'_>, before: &World, after: &World) -> Result<(), Violation> {
    let (was, is) = (model.state(before), model.state(after));
    hold(!was.is_finished() || before.state == after.state, "what has ended stays as it is")?;
    hold(was.failure.is_none() || was.failure == is.failure, "the reason does not change")
}

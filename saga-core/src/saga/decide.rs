//! The one transition function: `(definition, state, event, now) -> (state, effects)`. No I/O, no clock, no randomness;
//! the caller stores the result in one transaction.
//!
//! The rules, each held by the explorer and the property tests:
//! - A rejection means: certainly nothing happened. Everything else is in doubt.
//! - Every step whose command was issued and not rejected is undone, newest first, one after the other.
//! - A pivot in doubt neither goes on nor back: it is resent up to a cap, then the saga is stuck; it takes the reply
//!   whenever it comes.
//! - A cancel, and the saga's deadline, work until the pivot's command is issued; the open step is undone at once, as
//!   in doubt. A command that could not be built was not issued: there is nothing of it to undo.
//! - A deadline that has passed counts whatever comes next: a reply is taken for what it says, nothing new is begun.
//! - An undo says whether its step's success was taken.
//! - A saga is never `compensated` with an undo open, and never stuck without a reason.
//! - What does not answer the open command is ignored by name, and is no error.

use super::{
    definition::{Definition, Remote, RetryPolicy, StepKind, StepRole},
    moment,
    state::{
        Action, Answer, Effects, Event, FORMAT, Failure, FailureKind, Ignored, Naming, Open, Reply, Send, State,
        Status, StepState, StuckWhy, TimelineEntry, Verdict, Wait,
    },
};
use crate::{
    command::{Failed, Happened, Op, Why},
    id::{CommandId, CommandPlace, SagaId},
};
use serde_json::Value;
use std::time::Duration;
use time::OffsetDateTime;

/// The one run of a step that there is until an operator can retry with edited input.
const FIRST_OCCURRENCE: u32 = 0;

/// Begins a saga: its first step is issued.
pub fn start(definition: &Definition, saga: SagaId, naming: Naming, now: OffsetDateTime) -> (State, Effects) {
    let now = moment::cut(now);
    let state = State {
        saga,
        format: FORMAT,
        naming: Some(naming),
        steps: Vec::with_capacity(definition.steps().len()),
        status: Status::Completed,
        failure: None,
        deadline: definition.deadline().map(|deadline| moment::after(now, deadline)),
    };
    let mut decision = DecisionBuilder::new(definition, state, now);
    decision.advance_to(0);
    decision.taken()
}

/// What follows when `event` happens to `state` at `now`.
pub fn decide(definition: &Definition, state: &State, event: &Event, now: OffsetDateTime) -> (State, Effects) {
    let decision = DecisionBuilder::new(definition, state.clone(), moment::cut(now));
    match event {
        Event::Reply(reply) => decision.on_reply(reply),
        Event::Due => decision.on_due(),
        Event::Cancel { reason } => decision.on_cancel(reason),
        Event::Retry => decision.on_retry(),
        Event::LocalDone => decision.on_local_done(),
        Event::Broken { error } => decision.on_broken(error),
        Event::Unsent { error, deadline } => decision.on_unsent(error, *deadline),
    }
}

/// Whether `reply` answers the command that `state` waits for; if so, only its payload decides what follows.
///
/// # Errors
/// Why the reply moves nothing.
pub fn answers(definition: &Definition, state: &State, reply: &Reply) -> Result<Open, Ignored> {
    if let Some(open) = state.open()
        && open.wait != Wait::Local
        && open.attempt > 0
        && command_id(definition, state, open.step, open.op) == reply.command
    {
        let stale = reply.attempt != open.attempt || open.wait == Wait::Pause;
        return match reply.answer {
            Answer::Failed(_) if reply.attempt > open.attempt => Err(Ignored::Unknown),
            // A stuck saga waits for an operator: a failure adds nothing to what it knows.
            Answer::Failed(_) if stale || matches!(state.status, Status::Stuck { .. }) => Err(Ignored::Late),
            _ => Ok(*open),
        };
    }
    Err(why_ignored(definition, state, reply))
}

/// Classifies a reply that does not answer the open command: answered before, no longer waited for, or never asked.
fn why_ignored(definition: &Definition, state: &State, reply: &Reply) -> Ignored {
    for (step, how) in state.steps.iter().enumerate() {
        if !matches!(definition.steps()[step].kind, StepKind::Remote(_)) {
            continue;
        }
        if command_id(definition, state, step, Op::Do) == reply.command {
            return match (how, &reply.answer) {
                (StepState::Done(_), Answer::Succeeded(_)) | (StepState::NotDone, Answer::Rejected(_)) => {
                    Ignored::Duplicate
                }
                _ => Ignored::Late,
            };
        }
        if *how == StepState::Undone && command_id(definition, state, step, Op::Undo) == reply.command {
            return Ignored::Duplicate;
        }
    }
    Ignored::Unknown
}

/// The id of a step's command, as the saga derives it.
pub fn command_id(definition: &Definition, state: &State, step: usize, op: Op) -> CommandId {
    let step = definition.steps()[step].name.as_str();
    match &state.naming {
        None => CommandId::derive(state.saga, step, op, FIRST_OCCURRENCE),
        Some(Naming { orchestrator, nonce }) => {
            let (definition, saga, occurrence) = (definition.name(), state.saga, FIRST_OCCURRENCE);
            CommandPlace { orchestrator, definition, saga, step, op, occurrence }.derive_secretly(*nonce)
        }
    }
}

/// One decision in the making.
struct DecisionBuilder<'d> {
    definition: &'d Definition,
    state: State,
    now: OffsetDateTime,
    actions: Vec<Action>,
    timeline: Vec<TimelineEntry>,
}

impl<'d> DecisionBuilder<'d> {
    fn new(definition: &'d Definition, state: State, now: OffsetDateTime) -> Self {
        Self { definition, state, now, actions: Vec::new(), timeline: Vec::new() }
    }

    fn taken(self) -> (State, Effects) {
        (self.state, Effects { verdict: Verdict::Taken, actions: self.actions, timeline: self.timeline })
    }

    fn ignored(self, why: Ignored) -> (State, Effects) {
        (self.state, Effects { verdict: Verdict::Ignored(why), actions: self.actions, timeline: self.timeline })
    }

    // Events.

    fn on_reply(mut self, reply: &Reply) -> (State, Effects) {
        let open = match answers(self.definition, &self.state, reply) {
            Ok(open) => open,
            Err(why) => return self.ignored(why),
        };
        match (&reply.answer, open.op) {
            (Answer::Succeeded(value), Op::Do) => self.done(open.step, value.clone()),
            (Answer::Succeeded(_), Op::Undo) => self.undone(open.step),
            (Answer::Rejected(rejection), Op::Do) if self.role(open.step) != StepRole::Retriable => {
                self.state.steps[open.step] = StepState::NotDone;
                // A null rejection is none, or it would not come back from the database as it went there.
                let rejection = Some(rejection.clone()).filter(|rejection| !rejection.is_null());
                self.compensate(open.step, FailureKind::Rejected, rejection, None, None);
            }
            // Neither an undo nor a step after the pivot can be refused: the types say so, and the runner checks them.
            // If a participant refuses all the same, it did not do its work, and the engine tries again.
            (Answer::Rejected(_), _) => self.attempt_failed(open, &"refused, which it cannot be".into()),
            (Answer::Failed(failed), _) => self.attempt_failed(open, failed),
        }
        self.taken()
    }

    fn on_due(mut self) -> (State, Effects) {
        if let Some(open) = self.late() {
            self.cancel(&open, FailureKind::Deadline, None, None);
            return self.taken();
        }
        match self.state.open().copied() {
            Some(open) if open.due.is_some_and(|due| self.now >= due) => {
                if self.is_exhausted(&open) {
                    self.give_up(open, &Failed::new(Why::NoAnswer, "no answer"));
                } else {
                    self.issue_command(Open { attempt: open.attempt + 1, tries: open.tries + 1, ..open });
                }
                self.taken()
            }
            _ => self.ignored(Ignored::NotDue),
        }
    }

    fn on_cancel(mut self, reason: &str) -> (State, Effects) {
        if let Some(open) = self.cancellable() {
            self.cancel(&open, FailureKind::Cancelled, Some(reason.to_owned()), None);
            return self.taken();
        }
        let why = match (&self.state.status, &self.state.failure) {
            (Status::Completed | Status::Compensated, _) => Ignored::Finished,
            (_, Some(_)) => Ignored::AlreadyCompensating,
            (_, None) => Ignored::PastThePivot,
        };
        self.ignored(why)
    }

    fn on_retry(mut self) -> (State, Effects) {
        if let Some(open) = self.late() {
            self.cancel(&open, FailureKind::Deadline, None, None);
            return self.taken();
        }
        match self.state.status.clone() {
            Status::Stuck { open, .. } => {
                self.issue_command(Open { attempt: open.attempt + 1, tries: 1, ..open });
                self.taken()
            }
            Status::Completed | Status::Compensated => self.ignored(Ignored::Finished),
            Status::Running { .. } | Status::Compensating { .. } => self.ignored(Ignored::NotStuck),
        }
    }

    fn on_local_done(mut self) -> (State, Effects) {
        match self.state.open().copied() {
            Some(Open { wait: Wait::Local, step, op, .. }) => {
                self.timeline.push(TimelineEntry::Ran { step, op });
                match op {
                    Op::Do => self.done(step, Value::Null),
                    Op::Undo => self.undone(step),
                }
                self.taken()
            }
            _ => self.ignored(Ignored::NotLocal),
        }
    }

    fn on_broken(mut self, error: &str) -> (State, Effects) {
        match self.state.open().copied() {
            Some(open) if open.wait == Wait::Local => {
                self.attempt_failed(open, &error.into());
                self.taken()
            }
            _ => self.ignored(Ignored::NotLocal),
        }
    }

    fn on_unsent(mut self, error: &str, deadline: Option<OffsetDateTime>) -> (State, Effects) {
        match self.state.open().copied() {
            Some(open) => {
                self.state.deadline = deadline;
                let attempt = open.attempt.saturating_sub(1);
                self.stick(Open { attempt, ..open }, StuckWhy::Broken { error: error.to_owned() });
                self.taken()
            }
            None => self.ignored(Ignored::Finished),
        }
    }

    // Forward.

    fn done(&mut self, step: usize, reply: Value) {
        let late = self.late().is_some();
        self.state.steps[step] = StepState::Done(reply);
        match late {
            true => self.compensate(step, FailureKind::Deadline, None, None, None),
            false => self.advance_to(step + 1),
        }
    }

    fn advance_to(&mut self, step: usize) {
        if step == self.definition.steps().len() {
            self.state.status = Status::Completed;
            self.state.deadline = None;
            self.timeline.push(TimelineEntry::Completed);
            return;
        }
        self.state.steps.push(StepState::Issued);
        self.issue_first(step, Op::Do);
    }

    /// The open step, as long as the saga goes forward and its pivot's command is not issued.
    fn cancellable(&self) -> Option<Open> {
        let open = self.state.open()?;
        let past = self.definition.pivot().is_some_and(|pivot| self.state.issued() > pivot);
        (self.state.failure.is_none() && !past).then_some(*open)
    }

    // Backward.

    /// The open step, if the saga's deadline has passed while it could still be undone.
    fn late(&self) -> Option<Open> {
        let passed = self.state.deadline.is_some_and(|deadline| self.now >= deadline);
        self.cancellable().filter(|_| passed)
    }

    fn cancel(&mut self, open: &Open, kind: FailureKind, reason: Option<String>, why: Option<Why>) {
        if open.wait == Wait::Local || open.attempt == 0 {
            // The open step's effect failed and was rolled back, or its command was never sent.
            self.state.steps[open.step] = StepState::NotDone;
        }
        self.compensate(open.step, kind, None, reason, why);
    }

    fn compensate(
        &mut self,
        step: usize,
        kind: FailureKind,
        rejection: Option<Value>,
        reason: Option<String>,
        why: Option<Why>,
    ) {
        let step = self.definition.steps()[step].name.clone();
        self.state.failure = Some(Failure { step, kind, rejection, reason, why });
        self.state.deadline = None;
        self.timeline.push(TimelineEntry::Compensating { kind });
        self.undo_next();
    }

    fn undone(&mut self, step: usize) {
        self.state.steps[step] = StepState::Undone;
        self.undo_next();
    }

    /// Undoes the newest step that has, or may have, an effect; when there is none left, that is the end.
    fn undo_next(&mut self) {
        let steps = self.definition.steps();
        let newest = self.state.steps.iter().enumerate().rev().find(|(step, how)| {
            let undoable = match &steps[*step].kind {
                StepKind::Local { undo, .. } => undo.is_some(),
                StepKind::Remote(remote) => remote.undo.is_some(),
            };
            undoable && matches!(how, StepState::Issued | StepState::Done(_))
        });
        match newest.map(|(step, _)| step) {
            Some(step) => self.issue_first(step, Op::Undo),
            None => {
                self.state.status = Status::Compensated;
                self.timeline.push(TimelineEntry::Compensated);
            }
        }
    }

    // Attempts.

    fn issue_first(&mut self, step: usize, op: Op) {
        let wait = Wait::Reply;
        self.issue_command(Open { step, op, attempt: 1, tries: 1, wait, since: self.now, due: None });
    }

    /// Issues the command of `open`, or has its local effect run.
    fn issue_command(&mut self, mut open: Open) {
        let Open { step, op, attempt, tries, .. } = open;
        if self.definition.pivot() == Some(step) {
            self.state.deadline = None;
        }
        match self.remote(step) {
            None => {
                (open.wait, open.due) = (Wait::Local, None);
                self.actions.push(Action::RunLocal { step, op });
            }
            Some(remote) => {
                // Each attempt gives a silent participant more time, or resends would pile up in its topic.
                let patience = remote.deadline.saturating_add(self.pause_before(remote, op, step, tries));
                (open.wait, open.due) = (Wait::Reply, Some(self.later(patience)));
                let command = command_id(self.definition, &self.state, step, op);
                let undoes = self.undoes(step, op);
                self.actions.push(Action::Send(Send {
                    step,
                    op,
                    occurrence: FIRST_OCCURRENCE,
                    command,
                    undoes,
                    attempt,
                }));
                self.timeline.push(TimelineEntry::Sent { step, op, attempt });
            }
        }
        self.state.status = match op {
            Op::Do => Status::Running { open },
            Op::Undo => Status::Compensating { open },
        };
    }

    /// The command that an undo undoes, and what is known of it; `None` for a step's own command.
    fn undoes(&self, step: usize, op: Op) -> Option<(CommandId, Happened)> {
        let happened = match &self.state.steps[step] {
            StepState::Done(_) => Happened::Yes(()),
            StepState::Issued | StepState::NotDone | StepState::Undone => Happened::InDoubt,
        };
        (op == Op::Undo).then(|| (command_id(self.definition, &self.state, step, Op::Do), happened))
    }

    /// The pause that stood, or would have stood, before attempt `tries`.
    fn pause_before(&self, remote: &Remote, op: Op, step: usize, tries: u32) -> Duration {
        if tries < 2 { Duration::ZERO } else { remote.retry(op).pause(self.state.saga, step, tries - 1) }
    }

    /// The participant, or a local effect, reports a failure: the engine tries again after a pause.
    fn attempt_failed(&mut self, open: Open, failed: &Failed) {
        let error = &failed.reason;
        if self.late().is_some() {
            return self.cancel(&open, FailureKind::Deadline, Some(error.to_owned()), Some(failed.why));
        }
        match self.state.status {
            // A stuck saga's last attempt has now failed, which is nothing new: the saga stays as it is.
            Status::Stuck { .. } => {}
            _ if self.is_exhausted(&open) => self.give_up(open, failed),
            _ => {
                let pause = self.policy(open.step, open.op).pause(self.state.saga, open.step, open.tries);
                let until = self.later(pause);
                self.timeline.push(TimelineEntry::Pausing { until, error: Some(error.to_owned()) });
                let wait = if open.wait == Wait::Local { Wait::Local } else { Wait::Pause };
                let open = Open { wait, due: Some(until), ..open };
                self.state.status = match open.op {
                    Op::Do => Status::Running { open },
                    Op::Undo => Status::Compensating { open },
                };
            }
        }
    }

    fn is_exhausted(&self, open: &Open) -> bool {
        self.policy(open.step, open.op).is_exhausted(open.tries)
    }

    fn policy(&self, step: usize, op: Op) -> &'d RetryPolicy {
        match &self.definition.steps()[step].kind {
            StepKind::Remote(remote) => remote.retry(op),
            StepKind::Local { retry, .. } => retry,
        }
    }

    /// The last attempt failed: the saga is undone or stuck.
    fn give_up(&mut self, open: Open, failed: &Failed) {
        let last = || failed.reason.clone();
        match (open.op, self.role(open.step)) {
            _ if open.wait == Wait::Local => self.stick(open, StuckWhy::Broken { error: last() }),
            (Op::Undo, _) => self.stick(open, StuckWhy::NotUndone { error: last() }),
            (Op::Do, StepRole::Pivot) => self.stick(open, StuckWhy::PivotInDoubt { error: last() }),
            (Op::Do, StepRole::Retriable) => self.stick(open, StuckWhy::NotDone { error: last() }),
            (Op::Do, StepRole::Compensable) => {
                let reason = format!("{} in {} attempts", failed.reason, open.tries);
                self.compensate(open.step, FailureKind::Failed, None, Some(reason), Some(failed.why));
            }
        }
    }

    fn stick(&mut self, open: Open, why: StuckWhy) {
        self.timeline.push(TimelineEntry::Stuck(why.clone()));
        self.actions.clear();
        self.state.status = Status::Stuck { open: Open { due: None, ..open }, why };
    }

    fn remote(&self, step: usize) -> Option<&'d Remote> {
        match &self.definition.steps()[step].kind {
            StepKind::Remote(remote) => Some(remote),
            StepKind::Local { .. } => None,
        }
    }

    fn role(&self, step: usize) -> StepRole {
        self.remote(step).map_or(StepRole::Compensable, |remote| remote.role)
    }

    fn later(&self, by: Duration) -> OffsetDateTime {
        moment::after(self.now, by)
    }
}

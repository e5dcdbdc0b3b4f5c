//! A batch of commands through fences and handlers, in memory; one bulk write at its end.
//!
//! Nearly every batch is of commands that come for the first time and are not refused, so the participant assumes that.
//! It writes their fences once, at the end, with the commands' outcomes. It uses no savepoints, because only a refusal
//! would need one. If the assumption fails, the consumer runs the batch again, in a new transaction, with its fences
//! locked first and a savepoint per command.

use super::{
    entry::{CommandEntry, HandlerStart, Settlement},
    fence::{Fence, FenceCommands, FenceDecision, FenceKey, FenceRequest, UndoState},
    handler::CommandContext,
    queue::{self, IntentOrigin, IntentState, NewIntent},
    store,
};
use crate::{
    command::{Failed, Op, Outcome, Why},
    consumer::HandleError,
    envelope::{Headers, header},
    id::CommandId,
    outbox::{NewMessage, Tx},
};
use serde_json::Value;
use sqlx::Connection;
use std::collections::{BTreeMap, HashMap};
use tracing::{Instrument, Span};

/// A command that is to be handled.
pub(super) struct Incoming<'a> {
    pub(super) key: FenceKey,
    pub(super) asked: FenceRequest,
    pub(super) kind: &'static str,
    pub(super) entry: &'a dyn CommandEntry,
    pub(super) cx: CommandContext,
    pub(super) payload: &'a [u8],
    /// Trace context and correlation id, which the reply carries on.
    pub(super) trace: Headers,
    /// The span of its handler's log lines.
    pub(super) span: Span,
}

/// The fences of a batch, and what the batch changes.
pub(super) struct Work {
    loaded: HashMap<FenceKey, Fence>,
    /// Whether the fences are locked rows; otherwise the batch takes them for new, and makes them at its end.
    locked: bool,
    changes: Changes,
}

/// What a batch changes; written by [`Work::write_in`].
#[derive(Default)]
pub(super) struct Changes {
    fences: HashMap<FenceKey, Fence>,
    replies: Vec<NewMessage>,
    answered: Vec<(&'static str, Outcome)>,
    intents: Vec<NewIntent>,
    reopened: Vec<(CommandId, IntentOrigin)>,
    closed: Vec<CommandId>,
    /// Commands that the short way cannot take: refused, or not the first of their run.
    surprises: usize,
}

impl Work {
    /// Takes the fences of `commands` for new, to be made at the end; `None` if a command is an undo or a resend.
    pub(super) fn presume(commands: &[Incoming<'_>]) -> Option<Self> {
        let first = |command: &Incoming<'_>| command.cx.saga.op == Op::Do && command.cx.saga.attempt <= 1;
        commands.iter().all(first).then(|| {
            let loaded = commands.iter().map(|command| (command.key.clone(), Fence::new())).collect();
            Self { loaded, locked: false, changes: Changes::default() }
        })
    }

    /// Makes and locks, in sorted order, the fences of `commands`.
    ///
    /// # Errors
    /// The error of a command whose fence this build cannot read names its message: the others are handled without it.
    pub(super) async fn load_in(tx: &mut Tx<'_>, commands: &[Incoming<'_>]) -> Result<Self, HandleError> {
        let mut keys: BTreeMap<&FenceKey, FenceCommands> = BTreeMap::new();
        for command in commands {
            let known = FenceCommands::of(&command.cx);
            keys.entry(&command.key).and_modify(|others| *others = others.and(known)).or_insert(known);
        }
        let mut locked = store::lock_fences_in(tx, &keys).await?;
        for command in commands {
            if let Some(unreadable) = locked.unreadable.remove(&command.key) {
                return Err(HandleError::Failed(unreadable.into()).of(command.cx.message));
            }
        }
        Ok(Self::locked(locked.fences))
    }

    /// Uses fences that the caller has locked.
    pub(super) fn locked(loaded: HashMap<FenceKey, Fence>) -> Self {
        Self { loaded, locked: true, changes: Changes::default() }
    }

    /// Writes all that changed: a handful of statements, whatever the batch's size.
    ///
    /// # Errors
    /// [`HandleError::Again`] when a fence that was taken for new is not.
    pub(super) async fn write_in(self, tx: &mut Tx<'_>) -> Result<(), HandleError> {
        let Changes { fences, replies, answered, intents, reopened, closed, .. } = self.changes;
        if self.locked {
            store::write_fences_in(tx, &fences, &replies).await?;
        } else if !store::make_fences_in(tx, &fences, &replies).await? {
            return Err(HandleError::Again);
        }
        queue::insert_intents_in(tx, &intents).await?;
        queue::reopen_intents_in(tx, &reopened).await?;
        queue::delete_intents_in(tx, &closed).await?;
        // The replies are counted here and not where they are made: a batch that refuses something is made twice.
        answered.into_iter().for_each(|(kind, outcome)| count_reply(kind, outcome));
        Ok(())
    }
}

/// Runs `commands` in their order, without savepoints.
///
/// # Errors
/// [`HandleError::Again`] as soon as a command is refused: [`run_apart_in`] is for those.
pub(super) async fn run_together_in(
    tx: &mut Tx<'_>,
    commands: &[Incoming<'_>],
    work: &mut Work,
) -> Result<(), HandleError> {
    let Work { loaded, changes, .. } = work;
    for command in commands {
        let fence = changes.fence(loaded, command)?;
        let step = fence.next(command.asked);
        let begun = match step.runs() {
            Some(reply) => Some(begin_in(tx, command, &fence, reply).await?),
            None => None,
        };
        if begun.as_ref().is_some_and(HandlerStart::is_refusal) {
            return Err(HandleError::Again);
        }
        changes.apply(command, fence, step, begun)?;
    }
    Ok(())
}

/// Runs `commands` in their order, each handler in a savepoint, which a refusal rolls back. Returns how many commands
/// the short way cannot take.
pub(super) async fn run_apart_in(
    tx: &mut Tx<'_>,
    commands: &[Incoming<'_>],
    work: &mut Work,
) -> Result<usize, HandleError> {
    let Work { loaded, changes, .. } = work;
    for command in commands {
        let fence = changes.fence(loaded, command)?;
        let step = fence.next(command.asked);
        let begun = match step.runs() {
            Some(reply) => {
                let mut savepoint = tx.begin().await?;
                let begun = begin_in(&mut savepoint, command, &fence, reply).await?;
                if begun.is_refusal() {
                    savepoint.rollback().await?;
                } else {
                    savepoint.commit().await?;
                }
                Some(begun)
            }
            None => None,
        };
        changes.apply(command, fence, step, begun)?;
    }
    Ok(changes.surprises)
}

async fn begin_in(
    tx: &mut Tx<'_>,
    command: &Incoming<'_>,
    fence: &Fence,
    reply: Option<&[u8]>,
) -> Result<HandlerStart, HandleError> {
    let cx = CommandContext { undoes: command.undoes(fence), ..command.cx.clone() };
    let begun = command.entry.begin(tx, &cx, command.payload, reply).instrument(command.span.clone()).await;
    begun.map_err(|error| error.of(command.cx.message))
}

impl Changes {
    /// The command's fence as the batch has left it so far.
    fn fence(&self, loaded: &HashMap<FenceKey, Fence>, command: &Incoming<'_>) -> Result<Fence, HandleError> {
        let fence = self.fences.get(&command.key).or_else(|| loaded.get(&command.key)).cloned();
        // To take the fence for a new one would be to forget what was done.
        let fence = fence.ok_or_else(|| anyhow::anyhow!("the fence of step {:?} is not locked", command.key.step))?;
        let saga = &command.cx.saga;
        let other = |known: Option<CommandId>, said: CommandId| known.filter(|known| *known != said);
        let poison = |why: String| Err(HandleError::Poison(why).of(command.cx.message));
        if let Some(known) = other(fence.command(saga.op), saga.command) {
            let (command, step) = (saga.command, &saga.step);
            return poison(format!("command {command} of step {step:?} has the place of command {known}"));
        }
        if let Some(undoes) = saga.undoes
            && let Some(known) = other(fence.run_command, undoes)
        {
            let step = &saga.step;
            return poison(format!("the undo of step {step:?} undoes {undoes}, but {known} was done"));
        }
        Ok(fence)
    }

    fn apply(
        &mut self,
        command: &Incoming<'_>,
        mut fence: Fence,
        decision: FenceDecision,
        begun: Option<HandlerStart>,
    ) -> Result<(), HandleError> {
        let op = command.cx.saga.op;
        self.surprises += usize::from(op == Op::Do && decision != FenceDecision::Run);
        fence.note(op, command.cx.saga.command);
        match decision {
            FenceDecision::Run | FenceDecision::Undo(_) => match begun {
                Some(HandlerStart::Call(prepared)) => {
                    fence.calling(op);
                    self.intents.push(command.intent(IntentState::Open, Some(prepared), &fence));
                }
                Some(HandlerStart::Settled(settled)) => self.settle(command, &mut fence, &settled),
                None => return Err(HandleError::Failed(anyhow::anyhow!("a command that runs has begun"))),
            },
            FenceDecision::NothingToUndo => {
                self.settle(command, &mut fence, &Settlement::Done(command.entry.nothing_to_undo()?));
            }
            FenceDecision::Fail(reason) => {
                let (saga, failed) = (command.key.saga, command.cx.saga.command);
                tracing::warn!(%saga, command = %failed, step = command.key.step, %op, "a command fails: {reason}");
                self.settle(command, &mut fence, &Settlement::Failed(Failed::new(Why::RecordLost, reason)));
            }
            FenceDecision::Refuse => {
                fence.refuse();
                self.reply(command, Outcome::Rejected, br#"{"reason":"undone before it came"}"#.to_vec());
            }
            FenceDecision::Answer(outcome, reply) => self.reply(command, outcome, reply),
            FenceDecision::Ignore => {}
            FenceDecision::CallAgain => {
                fence.calling(op);
                self.reopened.push((command.cx.saga.command, command.origin(&fence)));
            }
            FenceDecision::Wait => {
                fence.undo = UndoState::Waiting;
                self.intents.push(command.intent(IntentState::Waiting, None, &fence));
            }
        }
        self.fences.insert(command.key.clone(), fence);
        Ok(())
    }

    fn settle(&mut self, command: &Incoming<'_>, fence: &mut Fence, settled: &Settlement) {
        self.closed.extend(fence.settle(command.cx.saga.op, settled));
        let (outcome, payload) = reply_of(settled);
        self.surprises += usize::from(outcome != Outcome::Succeeded);
        self.reply(command, outcome, payload);
    }

    fn reply(&mut self, command: &Incoming<'_>, outcome: Outcome, payload: Vec<u8>) {
        self.answered.push((command.kind, outcome));
        self.replies.push(reply(command.kind, &command.cx, &command.trace, outcome, payload));
    }
}

impl Incoming<'_> {
    /// The command that an undo undoes: the one that the fence has, or else the one that the orchestrator names.
    fn undoes(&self, fence: &Fence) -> Option<CommandId> {
        self.cx.undoes.map(|said| fence.run_command.unwrap_or(said))
    }

    fn origin(&self, fence: &Fence) -> IntentOrigin {
        IntentOrigin::new(&self.cx, self.undoes(fence), self.trace.clone())
    }

    fn intent(&self, state: IntentState, prepared: Option<Value>, fence: &Fence) -> NewIntent {
        NewIntent {
            command: self.cx.saga.command,
            key: self.key.clone(),
            stored: fence.stored,
            op: self.cx.saga.op,
            kind: self.kind,
            state,
            origin: self.origin(fence),
            payload: self.payload.to_vec(),
            prepared,
        }
    }
}

impl HandlerStart {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Settled(Settlement::Rejected(_) | Settlement::Failed(_)))
    }
}

/// Counts a reply, a moment before or after its commit.
pub(super) fn count_reply(kind: &str, outcome: Outcome) {
    metrics::counter!("participant_replies_total", "type" => kind.to_owned(), "outcome" => outcome.as_str())
        .increment(1);
}

/// The outcome and the payload of a reply that reports `settled`.
pub(super) fn reply_of(settled: &Settlement) -> (Outcome, Vec<u8>) {
    match settled {
        Settlement::Done(reply) => (Outcome::Succeeded, reply.clone()),
        Settlement::Rejected(rejection) => (Outcome::Rejected, rejection.clone()),
        Settlement::Failed(Failed { why, reason }) => {
            (Outcome::Failed, serde_json::json!({ "error": reason, "why": why }).to_string().into_bytes())
        }
    }
}

/// The reply to a command: to the topic it named, keyed by its saga, in its trace.
pub(super) fn reply(
    kind: &str,
    cx: &CommandContext,
    trace: &Headers,
    outcome: Outcome,
    payload: Vec<u8>,
) -> NewMessage {
    let mut saga = cx.saga.clone();
    saga.outcome = Some(outcome);
    (saga.undoes, saga.happened, saga.orchestrator) = (None, None, None);
    let topic = saga.reply_to.take().unwrap_or_default();
    let mut message = NewMessage::tombstone(&topic, &saga.saga.to_string(), &format!("{kind}.reply")).with_saga(&saga);
    message.payload = Some(payload);
    message.headers.insert(header::CONTENT_TYPE.into(), "application/json".into());
    message.headers.extend(trace.clone());
    message.headers.insert(header::CAUSATION_ID.into(), saga.command.to_string());
    message
}

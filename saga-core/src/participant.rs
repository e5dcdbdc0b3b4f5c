//! A participant: command, decide, reply; fenced, so that a duplicate gets the stored reply.
//!
//! ```text
//!   commands topic ──► consumer batch tx ┬─ fences locked in bulk, sorted, unless all are new
//!                                        ├─ handlers, in the batch's order
//!                                        ├─ fences written, replies appended to the outbox
//!                                        └─ intents of external effects (not called yet), commit
//!   intents ──► claim (tx) ──► call, no tx held ──► record + reply (tx) ──► an undo that waited goes on
//! ```
//!
//! Invariant: the effect of one run of a step happens at most once, and not at all once its undo has been taken. The
//! run's key is (orchestrator, definition, saga, step, occurrence). Only `succeeded` and `rejected` are final: the
//! participant stores their reply and sends it again.
//!
//! When the process dies before a batch's commit, nothing has happened and the batch comes again; after it the inbox
//! knows the messages. An external effect's intent outlives the process. The next process to claim it calls again under
//! the same idempotency key, and so learns what happened.
//!
//! | file | what it is |
//! |---|---|
//! | [`handler`] | what a service writes: traits, decisions, context |
//! | `fence` | pure: what a command may do in a fence's state |
//! | `entry` | a registered command type, without its type |
//! | `batch` | a batch of commands through fences and handlers |
//! | `store`, `queue` | the SQL of fences and of intents |
//! | [`intents`] | claims, calls and settles external effects |

mod batch;
mod entry;
mod fence;
pub mod handler;
pub mod intents;
mod queue;
mod store;
mod unsettled;

pub use crate::command::Happened;
pub use handler::{
    CommandContext, CommandHandler, Decision, ExternalEffect, ExternalUndo, Intent, Performed, Prepare, UndoHandler,
};
pub use intents::{IntentConfig, Intents};

use crate::{
    command::{Command, Failed, Never, Op, Why},
    consumer::{HandleError, Handler, Message, Unfit},
    envelope::{SagaHeaders, header},
    id::CommandId,
    outbox::{self, AppendError, Tx},
    topic,
};
use batch::{Incoming, Work};
use entry::{CommandEntry, External, ExternalUndoing, Plain, Settlement, Undoing};
use fence::{EffectPlace, FenceKey, FenceRequest, Namespace};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// Longest step, definition or topic name, in bytes.
const MAX_NAME: usize = 512;

/// What a service answers to the commands it knows; the [`Handler`] of its command topic.
///
/// ```
/// # use saga_core::{command::{Command, Done, Never}, topic::Topic};
/// # use serde::{Deserialize, Serialize};
/// # static INVENTORY: Topic = Topic::events("inventory.commands", 12);
/// # #[derive(Serialize, Deserialize)] struct ReserveStock { sku: String, quantity: i64 }
/// # #[derive(Serialize, Deserialize)] struct ReleaseStock { sku: String, quantity: i64 }
/// # #[derive(Serialize, Deserialize)] enum NotReserved { OutOfStock }
/// # impl Command for ReserveStock {
/// #     const TYPE: &'static str = "inventory.reserve.v1";
/// #     const TOPIC: &'static Topic = &INVENTORY;
/// #     type Reply = Done;
/// #     type Rejection = NotReserved;
/// # }
/// # impl Command for ReleaseStock {
/// #     const TYPE: &'static str = "inventory.release.v1";
/// #     const TOPIC: &'static Topic = &INVENTORY;
/// #     type Reply = Done;
/// #     type Rejection = Never;
/// # }
/// use saga_core::{
///     outbox::Tx,
///     participant::{CommandContext, CommandHandler, Decision, Happened, Participant, UndoHandler},
/// };
///
/// struct Reserve;
///
/// #[async_trait::async_trait]
/// impl CommandHandler<ReserveStock> for Reserve {
///     async fn decide(
///         &self,
///         tx: &mut Tx<'_>,
///         _: &CommandContext,
///         command: ReserveStock,
///     ) -> anyhow::Result<Decision<ReserveStock>> {
///         let taken = sqlx::query("update stock set free = free - $2 where sku = $1 and free >= $2")
///             .bind(&command.sku)
///             .bind(command.quantity)
///             .execute(&mut **tx)
///             .await?;
///         Ok(match taken.rows_affected() {
///             0 => Decision::Rejected(NotReserved::OutOfStock),
///             _ => Decision::Done(Done {}),
///         })
///     }
/// }
///
/// struct Release;
///
/// #[async_trait::async_trait]
/// impl UndoHandler<ReserveStock, ReleaseStock> for Release {
///     async fn undo(
///         &self,
///         tx: &mut Tx<'_>,
///         _: &CommandContext,
///         command: ReleaseStock,
///         _: Happened<Done>,
///     ) -> anyhow::Result<Decision<ReleaseStock>> {
///         sqlx::query("update stock set free = free + $2 where sku = $1")
///             .bind(&command.sku)
///             .bind(command.quantity)
///             .execute(&mut **tx)
///             .await?;
///         Ok(Decision::Done(Done {}))
///     }
/// }
///
/// let participant = Participant::new("inventory")
///     .on::<ReserveStock>(Reserve)
///     .on_undo::<ReserveStock, ReleaseStock>(Release);
/// ```
pub struct Participant {
    name: &'static str,
    entries: HashMap<&'static str, Box<dyn CommandEntry>>,
    /// Topics that replies may go to; `None`: any topic.
    reply_topics: Option<HashSet<String>>,
    /// Sources (`ce_source`) whose commands the participant takes; `None`: it takes the commands of every source.
    sources: Option<HashSet<String>>,
    wake: Arc<Notify>,
    /// Partitions whose next batch is handled the long way, because the last one failed, refused something or held a
    /// duplicate. A partition is also in this set while its batch runs, so that a retry takes the long way.
    one_by_one: Mutex<HashSet<(String, i32)>>,
}

impl Participant {
    /// A participant that knows no command yet. `name` appears in logs and metrics.
    pub fn new(name: &'static str) -> Self {
        let (entries, wake, one_by_one) = (HashMap::new(), Arc::new(Notify::new()), Mutex::default());
        Self { name, entries, reply_topics: None, sources: None, wake, one_by_one }
    }

    /// Sends replies to these topics and to no other. A command names the topic of its reply. So without a list, any
    /// sender of commands can have this participant write to every topic that it may write to.
    #[must_use]
    pub fn replies_to<T: Into<String>>(mut self, topics: impl IntoIterator<Item = T>) -> Self {
        self.reply_topics.get_or_insert_default().extend(topics.into_iter().map(Into::into));
        self
    }

    /// Takes commands of these sources (`ce_source`: the names of the orchestrators' outboxes), and of no others.
    #[must_use]
    pub fn takes_commands_of<T: Into<String>>(mut self, sources: impl IntoIterator<Item = T>) -> Self {
        self.sources.get_or_insert_default().extend(sources.into_iter().map(Into::into));
        self
    }

    /// Handles the command `C` within the batch's transaction.
    #[must_use]
    pub fn on<C: Command>(self, handler: impl CommandHandler<C>) -> Self {
        self.register(C::TYPE, Box::new(Plain::new(handler)))
    }

    /// Handles `Undo`, which takes back what `Do` did. Without a record that `Do` ran, the participant does not call
    /// the handler. Then the undo succeeds if the orchestrator is in doubt as well. It fails if the orchestrator took
    /// `Do`'s success: the record was lost, or was never here. Either way a `Do` that comes later is refused.
    #[must_use]
    pub fn on_undo<Do, Undo>(self, handler: impl UndoHandler<Do, Undo>) -> Self
    where
        Do: Command,
        Undo: Command<Rejection = Never, Reply: Default>,
    {
        self.register(Undo::TYPE, Box::new(Undoing::new(handler)))
    }

    /// Performs the command `C` outside the database, by intent. Needs [`Participant::intents`] to run.
    #[must_use]
    pub fn external<C: Command>(self, effect: impl ExternalEffect<C>) -> Self {
        self.register(C::TYPE, Box::new(External::new(effect)))
    }

    /// Performs `Undo` outside the database, by intent. Unlike that of [`Participant::on_undo`], its handler is also
    /// called where there is no record of `Do` and the orchestrator is in doubt. The record may be lost, and the effect
    /// not.
    #[must_use]
    pub fn external_undo<Do, Undo>(self, effect: impl ExternalUndo<Do, Undo>) -> Self
    where
        Do: Command,
        Undo: Command<Rejection = Never, Reply: Default>,
    {
        self.register(Undo::TYPE, Box::new(ExternalUndoing::new(effect)))
    }

    /// Runs this participant's intents with the default limits; see [`Intents::with_config`].
    pub fn intents(self: &Arc<Self>, pool: sqlx::PgPool) -> Intents {
        Intents::new(self.clone(), pool)
    }

    fn register(mut self, kind: &'static str, entry: Box<dyn CommandEntry>) -> Self {
        let before = self.entries.insert(kind, entry);
        assert!(before.is_none(), "participant {:?}: command type {kind:?} is registered twice", self.name);
        self
    }
}

impl Participant {
    fn one_by_one(&self) -> MutexGuard<'_, HashSet<(String, i32)>> {
        self.one_by_one.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The short way: no handler refuses, and no command comes twice. A handler may fail because its command came
    /// before, or its undo did: the long way finds out.
    async fn take_together_in(&self, tx: &mut Tx<'_>, commands: &[Incoming<'_>]) -> Result<(), HandleError> {
        let Some(mut work) = Work::presume(commands) else {
            let mut work = Work::load_in(tx, commands).await?;
            batch::run_together_in(tx, commands, &mut work).await?;
            return work.write_in(tx).await;
        };
        match batch::run_together_in(tx, commands, &mut work).await {
            Err(error) if error.is_fault() => Err(HandleError::Again),
            Err(error) => Err(error),
            Ok(()) => work.write_in(tx).await,
        }
    }

    /// What a command asks of its fence. An orchestrator whose command does not carry what it knows counts as in doubt.
    fn asked(&self, entry: &dyn CommandEntry, saga: &SagaHeaders) -> FenceRequest {
        let Op::Undo = saga.op else { return FenceRequest::Do };
        let undone = entry.undoes().and_then(|kind| self.entries.get(kind));
        let place = match undone {
            _ if entry.is_external() => EffectPlace::Outside,
            Some(undone) if undone.is_external() => EffectPlace::Outside,
            Some(_) => EffectPlace::Here,
            None => EffectPlace::Unknown,
        };
        FenceRequest::Undo(saga.happened.unwrap_or(Happened::InDoubt), place)
    }

    /// Refuses messages of sources that are not declared.
    fn knows_source(&self, message: &Message) -> Result<(), HandleError> {
        let source = &message.envelope.source;
        match &self.sources {
            Some(sources) if !sources.contains(source) => {
                let cure = "declare it for the topic, or add it to COMMAND_SOURCES, if it is an orchestrator's";
                let reason = format!("{} takes no commands of source {source:?}; {cure}", self.name);
                Err(HandleError::Several(vec![Unfit::undeclared(message.envelope.id, reason)]))
            }
            _ => Ok(()),
        }
    }

    /// Reads a command, or says why it can never be handled. A type that this build does not know may be of a build
    /// that is being rolled out. Such a command is tried again, and its saga's orchestrator resends it.
    fn parse<'a>(&'a self, message: &'a Message) -> Result<Incoming<'a>, HandleError> {
        let envelope = &message.envelope;
        let poison = |reason: String| HandleError::Poison(reason);
        let Some((kind, entry)) = self.entries.get_key_value(envelope.kind.as_str()) else {
            let unknown = anyhow::anyhow!("{} does not know the command type {:?}", self.name, envelope.kind);
            return Err(HandleError::Failed(unknown));
        };
        let saga = envelope.saga.clone().ok_or_else(|| poison("the command has no saga headers".into()))?;
        if saga.op != entry.op() {
            return Err(poison(format!("ce_sagaop is {:?}, but {kind} is a command of {:?}", saga.op, entry.op())));
        }
        // PostgreSQL's text cannot hold a NUL, and an index entry has a maximum size.
        let texts = [Some(&saga.step), Some(&saga.definition), saga.reply_to.as_ref(), saga.orchestrator.as_ref()];
        if texts.into_iter().flatten().any(|text| text.contains('\0') || text.len() > MAX_NAME) {
            return Err(poison(format!("a saga header holds a NUL or more than {MAX_NAME} bytes")));
        }
        match saga.reply_to.as_deref() {
            None | Some("") => return Err(poison(format!("header `{}` is missing", header::REPLY_TO))),
            // No handler may run whose answer cannot be sent: its effect would be repeated for ever.
            Some(topic) if !topic::is_legal_name(topic) => {
                return Err(poison(format!("header `{}` names no topic that can be replied to", header::REPLY_TO)));
            }
            Some(topic) if self.reply_topics.as_ref().is_some_and(|topics| !topics.contains(topic)) => {
                let name = self.name;
                return Err(poison(format!("header `{}`: {name} does not reply to topic {topic:?}", header::REPLY_TO)));
            }
            Some(_) => {}
        }
        let occurrence = i32::try_from(saga.occurrence).map_err(|_| poison("occurrence is out of range".into()))?;
        let payload = message.payload.as_deref().ok_or_else(|| poison("a command with no payload".into()))?;
        let trace = [
            (header::TRACEPARENT, envelope.traceparent.as_deref()),
            (header::TRACESTATE, envelope.tracestate.as_deref()),
            (header::CORRELATION_ID, envelope.correlation_id()),
        ];
        // An orchestrator that does not name the undone command derives its id by the first derivation.
        let derived = || CommandId::derive(saga.saga, &saga.step, Op::Do, saga.occurrence);
        let undoes = (saga.op == Op::Undo).then(|| saga.undoes.unwrap_or_else(derived));
        Ok(Incoming {
            asked: self.asked(entry.as_ref(), &saga),
            key: FenceKey { saga: saga.saga, step: saga.step.clone(), occurrence, namespace: Namespace::of(&saga) },
            kind,
            entry: entry.as_ref(),
            cx: CommandContext { saga, message: envelope.id, undoes },
            payload,
            span: message.span(),
            trace: trace.into_iter().filter_map(|(name, value)| Some((name.into(), value?.to_owned()))).collect(),
        })
    }
}

impl Handler for Participant {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        let (mut commands, mut unfit) = (Vec::with_capacity(batch.len()), Vec::new());
        for message in batch {
            match self.knows_source(message).and_then(|()| self.parse(message)) {
                Ok(command) => commands.push(command),
                Err(HandleError::Several(stranger)) => unfit.extend(stranger),
                Err(error) => unfit.push(Unfit::poison(message.envelope.id, error)?),
            }
        }
        HandleError::unfit(unfit)?;
        let here = (batch[0].at.topic.clone(), batch[0].at.partition);
        // The partition stays in the set until the batch has ended well: any failure, even a panic, may be due to what
        // the short way assumes.
        if !self.one_by_one().insert(here.clone()) {
            let mut work = Work::load_in(tx, &commands).await?;
            let surprises = batch::run_apart_in(tx, &commands, &mut work).await?;
            work.write_in(tx).await?;
            if surprises == 0 {
                self.one_by_one().remove(&here);
            }
            return Ok(());
        }
        self.take_together_in(tx, &commands).await?;
        self.one_by_one().remove(&here);
        Ok(())
    }

    // True: the last statement is the participant's own, and every batch has it: every command leaves its mark on a
    // fence.
    fn ends_with_a_statement(&self) -> bool {
        true
    }

    /// Answers commands that were given up, so that the orchestrator does not wait in vain. A command that could not be
    /// answered before it ran, or comes from an undeclared source, gets no answer here either.
    async fn gave_up(&self, tx: &mut Tx<'_>, messages: &[(&Message, &str)]) -> Result<(), AppendError> {
        let reply = |(message, reason): &(&Message, &str)| {
            self.knows_source(message).ok()?;
            let command = self.parse(message).ok()?;
            let failed = Failed::new(Why::GivenUp, &format!("{} gave the command up: {reason}", self.name));
            let (outcome, payload) = batch::reply_of(&Settlement::Failed(failed));
            batch::count_reply(command.kind, outcome);
            Some(batch::reply(command.kind, &command.cx, &command.trace, outcome, payload))
        };
        outbox::append_in(tx, &messages.iter().filter_map(reply).collect::<Vec<_>>()).await
    }

    fn committed(&self) {
        self.wake.notify_one();
    }
}

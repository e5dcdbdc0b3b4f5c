//! The engine: definitions and local effects bound together, and what a service asks of them.
//!
//! No engine owns a saga: any number of engines work on one database. A method whose name ends in `_in` takes the
//! caller's transaction. If the process dies before the caller's commit, nothing of the call has happened.

pub use super::error::{CancelError, Cancelled, EngineError, EngineErrors, RetryError, StartError};
use super::{
    backlog::{BacklogPatience, WAIT_MAX},
    batch::{BatchError, SagaBatch},
    definition::{Definition, Saga},
    loaded_saga::{LoadedSaga, PendingEvent},
    local::{LocalEffect, LocalError},
    log::LogEvent,
    runner::ReplyHandler,
    starts::Starts,
    state::{Event, FORMAT, Ignored, Verdict},
    store::{self, Known, Locked, Row},
    timers_health::TimersHealth,
};
use crate::{
    consumer::Unfit,
    envelope::Envelope,
    id::SagaId,
    outbox::Tx,
    reason::reason as text,
    transaction::{Bound, Transaction},
};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

/// Upper bound for one transaction of the engine's own. When it expires, the engine gives up the transaction and its
/// connection. A database host that vanished sends no error, and the operating system notices only after about 15
/// minutes. The bound is far above what any of these transactions takes. It is also above the 10 s for which PostgreSQL
/// lets an idle transaction hold locks.
const ATTEMPT_MAX: Bound = Bound::new(Duration::from_secs(30));

/// A saga that this replica cannot read, and therefore leaves alone.
pub(super) struct Unread {
    pub(super) locked: Box<Locked>,
    /// What is wrong with its row; `None` where the replica does not have its definition.
    pub(super) flaw: Option<String>,
}

/// Runs the sagas of one service.
pub struct Engine {
    pool: PgPool,
    reply_topic: String,
    /// Sources (`ce_source`) whose replies the engine takes; `None`: it takes the replies of every source.
    sources: Option<BTreeSet<String>>,
    definitions: BTreeMap<(String, u32), Arc<Definition>>,
    locals: BTreeMap<String, Arc<dyn LocalEffect>>,
    turned: BTreeMap<String, Arc<dyn LocalEffect>>,
    known: Known,
    starts: Starts,
    timers_health: TimersHealth,
    patience: BacklogPatience,
    bound: Bound,
}

/// Puts an [`Engine`] together.
#[must_use = "an engine is built when `.build()` is called"]
pub struct EngineBuilder {
    pool: PgPool,
    reply_topic: String,
    sources: Option<BTreeSet<String>>,
    definitions: Vec<Arc<Definition>>,
    locals: BTreeMap<String, Arc<dyn LocalEffect>>,
    turned: BTreeMap<String, Arc<dyn LocalEffect>>,
    patience: BacklogPatience,
    bound: Bound,
}

impl Engine {
    /// An engine over `pool` whose participants answer on `reply_topic`.
    pub fn builder(pool: PgPool, reply_topic: impl Into<String>) -> EngineBuilder {
        EngineBuilder {
            pool,
            reply_topic: reply_topic.into(),
            sources: None,
            definitions: Vec::new(),
            locals: BTreeMap::new(),
            turned: BTreeMap::new(),
            patience: BacklogPatience::new(WAIT_MAX),
            bound: ATTEMPT_MAX,
        }
    }

    /// Cancels a saga in the caller's transaction; the answer is final once that commits. Call it before locking
    /// business rows: sagas are locked first everywhere.
    ///
    /// # Errors
    /// When this engine does not know the saga's definition, cannot read its row, or the database returns an error.
    pub async fn cancel_in(&self, tx: &mut Tx<'_>, id: SagaId, reason: &str) -> Result<Cancelled, CancelError> {
        let Some(locked) = store::load_in(tx, &[id]).await?.pop() else { return Ok(Cancelled::Unknown) };
        let (definition, row) = self.read(locked)?;
        let reason = text(reason);
        let event = Event::Cancel { reason: reason.clone() };
        let cancel = PendingEvent { event, what: LogEvent::Cancel { reason }, cause: None, kind: None, flaw: None };
        Ok(match self.decide_one_in(tx, definition, row, cancel).await? {
            Verdict::Taken => Cancelled::Accepted,
            Verdict::Ignored(Ignored::AlreadyCompensating) => Cancelled::AlreadyCancelling,
            Verdict::Ignored(Ignored::PastThePivot) => Cancelled::TooLate,
            Verdict::Ignored(_) => Cancelled::Finished,
        })
    }

    /// Locks a saga's row in the caller's transaction, so that nothing happens to it until that ends.
    ///
    /// # Errors
    /// When the database returns an error.
    pub async fn lock_in(&self, tx: &mut Tx<'_>, id: SagaId) -> Result<(), sqlx::Error> {
        store::load_in(tx, &[id]).await.map(drop)
    }

    /// Gives a stuck saga a fresh start, in a transaction of its own. `expected` is the revision that the operator saw.
    ///
    /// # Errors
    /// When the saga is not what the operator saw, or the database returns an error.
    pub async fn retry(&self, id: SagaId, expected: i32, reason: &str, actor: &str) -> Result<(), RetryError> {
        self.within(self.retry_once(id, expected, reason, actor)).await
    }

    async fn retry_once(&self, id: SagaId, expected: i32, reason: &str, actor: &str) -> Result<(), RetryError> {
        let mut tx = self.begin().await?;
        let locked = store::load_in(&mut tx, &[id]).await?.pop().ok_or(RetryError::Unknown(id))?;
        if locked.revision != expected {
            return Err(RetryError::Revision { expected, found: locked.revision });
        }
        let (definition, row) = self.read(locked)?;
        let status = row.state.status.as_str();
        let what = LogEvent::Retry { reason: text(reason), actor: text(actor) };
        let retry = PendingEvent { event: Event::Retry, what, cause: None, kind: None, flaw: None };
        match self.decide_one_in(&mut tx, definition, row, retry).await? {
            Verdict::Taken => {}
            Verdict::Ignored(_) => return Err(RetryError::NotStuck(status.to_owned())),
        }
        Ok(tx.commit().await?)
    }

    /// The handler of replies: give it to the consumer of the reply topic.
    pub fn handler(self: &Arc<Self>) -> ReplyHandler {
        ReplyHandler { engine: Arc::clone(self) }
    }

    async fn decide_one_in(
        &self,
        tx: &mut Tx<'_>,
        definition: Arc<Definition>,
        row: Row,
        event: PendingEvent<'_>,
    ) -> Result<Verdict, sqlx::Error> {
        let loaded = LoadedSaga::new(definition, row, VecDeque::from([event]));
        let mut batch = SagaBatch::new(self, vec![loaded]);
        batch.run_in(tx).await.map_err(BatchError::into_database)?;
        let verdict = batch.sagas.first().and_then(|loaded| loaded.verdicts.first()).copied();
        verdict.ok_or(sqlx::Error::RowNotFound)
    }

    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(super) fn reply_topic(&self) -> &str {
        &self.reply_topic
    }

    /// Whether replies of the message's source are taken.
    pub(super) fn knows_source(&self, envelope: &Envelope) -> Result<(), Unfit> {
        let source = &envelope.source;
        match &self.sources {
            Some(sources) if !sources.contains(source) => {
                let cure = "declare it for the topic, or add it to REPLY_SOURCES, if it is a participant's";
                let reason = format!("no replies of source {source:?} are taken; {cure}");
                Err(Unfit::undeclared(envelope.id, reason))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn known(&self) -> &Known {
        &self.known
    }

    pub(super) fn local(&self, name: &str) -> Result<&dyn LocalEffect, LocalError> {
        let effect = self.locals.get(name).map(AsRef::as_ref);
        effect.ok_or_else(|| LocalError::Failed(anyhow::anyhow!("the local effect `{name}` is not bound")))
    }

    /// The effect that the service bound for sagas of this definition that have begun to be undone; `None`: it bound
    /// none.
    pub(super) fn turned(&self, definition: &str) -> Option<&dyn LocalEffect> {
        self.turned.get(definition).map(AsRef::as_ref)
    }

    /// Pairs a saga with the definition that it began with. Only a replica with exactly that definition reads the
    /// state: what another build wrote may look alike and mean something else.
    pub(super) fn read(&self, locked: Locked) -> Result<(Arc<Definition>, Row), Unread> {
        let Some(definition) = self.find(&locked.definition, locked.version, &locked.fingerprint) else {
            return Err(Unread { locked: Box::new(locked), flaw: None });
        };
        match locked.read() {
            Ok(row) => Ok((definition, row)),
            Err(error) => Err(Unread { flaw: Some(error.to_string()), locked: Box::new(locked) }),
        }
    }

    pub(super) fn find(&self, name: &str, version: i32, fingerprint: &str) -> Option<Arc<Definition>> {
        let version = u32::try_from(version).ok()?;
        let definition = self.definitions.get(&(name.to_owned(), version))?;
        let known = (1..=FORMAT).any(|format| definition.fingerprint_of_format(format) == fingerprint);
        known.then(|| Arc::clone(definition))
    }

    pub(super) fn same<I>(&self, saga: &Saga<I>) -> Result<&Arc<Definition>, StartError> {
        let defined = self.definitions.get(&(saga.name().to_owned(), saga.version()));
        match defined {
            Some(defined) if defined.fingerprint() == saga.fingerprint() => Ok(defined),
            _ => Err(StartError::Undefined(saga.name().to_owned(), saga.version())),
        }
    }

    pub(super) fn timers_health(&self) -> &TimersHealth {
        &self.timers_health
    }

    pub(super) fn starts(&self) -> &Starts {
        &self.starts
    }

    pub(super) fn patience(&self) -> &BacklogPatience {
        &self.patience
    }

    /// The bound of each transaction of the engine's own.
    pub(super) fn bound(&self) -> Bound {
        self.bound
    }

    /// Begins a transaction of the engine's own.
    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        Transaction::begin(&self.pool, self.bound).await
    }

    /// Begins a transaction of the engine's own whose statements wait for a lock no longer than `lock`.
    pub(super) async fn begin_waiting(&self, lock: Duration) -> Result<Transaction, sqlx::Error> {
        Transaction::begin(&self.pool, self.bound.with_lock(self.bound.lock().min(lock))).await
    }

    /// Gives `work` up when it takes too long. The pool rolls its connection back, or closes it if it does not answer.
    pub(super) async fn within<T, E: From<sqlx::Error>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.bound.within(work).await
    }
}

impl EngineBuilder {
    /// Adds a definition; [`EngineBuilder::build`] checks it.
    pub fn define<I>(mut self, saga: &Saga<I>) -> Self {
        self.definitions.push(saga.shared());
        self
    }

    /// Takes replies of these sources (`ce_source`: the names of the participants' outboxes), and of no others. Without
    /// this call the engine takes the replies of every source.
    pub fn takes_replies_of<T: Into<String>>(mut self, sources: impl IntoIterator<Item = T>) -> Self {
        self.sources.get_or_insert_default().extend(sources.into_iter().map(Into::into));
        self
    }

    /// Binds a local effect to its name.
    pub fn local(mut self, name: &str, effect: impl LocalEffect) -> Self {
        self.locals.insert(name.to_owned(), Arc::new(effect));
        self
    }

    /// Runs `effect` for sagas of the definition `saga` that have begun to be undone, in the transaction in which that
    /// began. So the service can say so at once. Sagas whose undo also ends in that transaction are left out: their
    /// undo effects say it. The effect is news and no step: when it fails by its own fault, the engine logs that and
    /// the sagas go on.
    pub fn turned(mut self, saga: &str, effect: impl LocalEffect) -> Self {
        self.turned.insert(saga.to_owned(), Arc::new(effect));
        self
    }

    /// Upper bound for one transaction of the engine's own (default 30 s): a start by itself, a batch of due sagas, a
    /// retry. When it expires, the engine gives up the transaction and does not use its connection again.
    pub fn attempt_max(mut self, attempt_max: Duration) -> Self {
        self.bound = Bound::new(attempt_max);
        self
    }

    /// How long timers wait at most for a partition of the reply topic to be read (default 5 min). The engine must not
    /// resend or undo what was answered in time. A partition that is read as usual delays no timer.
    pub fn wait_for_replies(mut self, max: Duration) -> Self {
        self.patience = BacklogPatience::new(max);
        self
    }

    /// The engine, if every definition is sound and every local effect that they name is bound.
    ///
    /// # Errors
    /// With every mistake, not only the first.
    pub fn build(self) -> Result<Arc<Engine>, EngineErrors> {
        let Self { pool, reply_topic, sources, definitions, locals, turned, patience, bound } = self;
        let (mut errors, mut defined, mut known) = (Vec::new(), BTreeMap::new(), Known::default());
        for definition in definitions {
            errors.extend(definition.check().into_iter().map(EngineError::Definition));
            errors.extend(
                definition.local_effects().filter(|name| !locals.contains_key(*name)).map(|name| {
                    EngineError::UnboundLocal { saga: definition.name().to_owned(), effect: name.to_owned() }
                }),
            );
            for format in 1..=FORMAT {
                known.definitions.push(definition.name().to_owned());
                known.versions.push(version_of(&definition));
                known.fingerprints.push(definition.fingerprint_of_format(format));
            }
            let key = (definition.name().to_owned(), definition.version());
            if let Some(twice) = defined.insert(key, definition) {
                errors.push(EngineError::DefinedTwice(twice.name().to_owned(), twice.version()));
            }
        }
        if errors.is_empty() {
            let (starts, timers_health) = (Starts::default(), TimersHealth::of(&reply_topic));
            Ok(Arc::new(Engine {
                pool,
                reply_topic,
                sources,
                definitions: defined,
                locals,
                turned,
                known,
                starts,
                timers_health,
                patience,
                bound,
            }))
        } else {
            Err(EngineErrors(errors))
        }
    }
}

pub(super) fn version_of(definition: &Definition) -> i32 {
    i32::try_from(definition.version()).unwrap_or(i32::MAX)
}

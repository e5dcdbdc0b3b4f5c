//! The engine: definitions and local effects bound together, and what a service asks of them.
//!
//! Nobody owns a saga: any number of engines work on one database. What has to be atomic takes the caller's transaction,
//! and says so in its name; when the process dies before the caller's commit, it was never asked.

pub use super::error::{CancelError, Cancelled, EngineError, EngineErrors, RetryError, StartError};
use super::{
    backlog::{Patience, WAIT_MAX},
    batch::{Batch, BatchError},
    case::{Case, Incident},
    definition::{Definition, Saga},
    local::{LocalEffect, LocalError},
    log::What,
    runner::ReplyHandler,
    starts::Starts,
    state::{Event, FORMAT, Ignored, Verdict},
    store::{self, Known, Locked, Row},
    trouble::Trouble,
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

/// After so long a transaction of the engine's own is given up and its connection with it: the database's machine may be
/// gone without a word, which the operating system notices after a quarter of an hour. Far longer than any of them takes,
/// and than PostgreSQL lets another transaction hold locks while it does nothing (10 s).
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
    /// Whose replies are taken; everybody's without a list.
    sources: Option<BTreeSet<String>>,
    definitions: BTreeMap<(String, u32), Arc<Definition>>,
    locals: BTreeMap<String, Arc<dyn LocalEffect>>,
    turned: BTreeMap<String, Arc<dyn LocalEffect>>,
    known: Known,
    starts: Starts,
    trouble: Trouble,
    patience: Patience,
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
    patience: Patience,
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
            patience: Patience::new(WAIT_MAX),
            bound: ATTEMPT_MAX,
        }
    }

    /// Cancels a saga in the caller's transaction; the answer is final once that commits. Call it before locking
    /// business rows: sagas are locked first everywhere.
    ///
    /// # Errors
    /// When this engine does not know the saga's definition, or the database says no.
    pub async fn cancel_in(&self, tx: &mut Tx<'_>, id: SagaId, reason: &str) -> Result<Cancelled, CancelError> {
        let Some(locked) = store::load(tx, &[id]).await?.pop() else { return Ok(Cancelled::Unknown) };
        let (definition, row) = self.read(locked)?;
        let reason = text(reason);
        let event = Event::Cancel { reason: reason.clone() };
        let cancel = Incident { event, what: What::Cancel { reason }, cause: None, flaw: None };
        Ok(match self.decide_one(tx, definition, row, cancel).await? {
            Verdict::Taken => Cancelled::Accepted,
            Verdict::Ignored(Ignored::AlreadyCompensating) => Cancelled::AlreadyCancelling,
            Verdict::Ignored(Ignored::PastThePivot) => Cancelled::TooLate,
            Verdict::Ignored(_) => Cancelled::Finished,
        })
    }

    /// Locks a saga's row in the caller's transaction, so that nothing happens to it until that ends.
    ///
    /// # Errors
    /// When the database says no.
    pub async fn lock_in(&self, tx: &mut Tx<'_>, id: SagaId) -> Result<(), sqlx::Error> {
        store::load(tx, &[id]).await.map(drop)
    }

    /// Gives a stuck saga a fresh start, in a transaction of its own. `expected` is the revision that the operator saw.
    ///
    /// # Errors
    /// When the saga is not what the operator saw, or the database says no.
    pub async fn retry(&self, id: SagaId, expected: i32, reason: &str, actor: &str) -> Result<(), RetryError> {
        self.within(self.retry_once(id, expected, reason, actor)).await
    }

    async fn retry_once(&self, id: SagaId, expected: i32, reason: &str, actor: &str) -> Result<(), RetryError> {
        let mut tx = self.begin().await?;
        let locked = store::load(&mut tx, &[id]).await?.pop().ok_or(RetryError::Unknown(id))?;
        if locked.revision != expected {
            return Err(RetryError::Version { expected, found: locked.revision });
        }
        let (definition, row) = self.read(locked)?;
        let status = row.state.status.as_str();
        let what = What::Retry { reason: text(reason), actor: text(actor) };
        let retry = Incident { event: Event::Retry, what, cause: None, flaw: None };
        match self.decide_one(&mut tx, definition, row, retry).await? {
            Verdict::Taken => {}
            Verdict::Ignored(_) => return Err(RetryError::NotStuck(status.to_owned())),
        }
        Ok(tx.commit().await?)
    }

    /// What takes the replies: give it to the consumer of the reply topic.
    pub fn handler(self: &Arc<Self>) -> ReplyHandler {
        ReplyHandler { engine: Arc::clone(self) }
    }

    async fn decide_one(
        &self,
        tx: &mut Tx<'_>,
        definition: Arc<Definition>,
        row: Row,
        incident: Incident<'_>,
    ) -> Result<Verdict, sqlx::Error> {
        let case = Case::new(definition, row, VecDeque::from([incident]));
        let mut batch = Batch::new(self, vec![case]);
        batch.run(tx).await.map_err(BatchError::into_database)?;
        let verdict = batch.cases.first().and_then(|case| case.verdicts.first()).copied();
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

    /// What hears that sagas of this definition have begun to be undone.
    pub(super) fn turned(&self, definition: &str) -> Option<&dyn LocalEffect> {
        self.turned.get(definition).map(AsRef::as_ref)
    }

    /// A saga with the definition that it began with. The state is read only by a replica that has that very one: what
    /// another build wrote may look alike and mean something else.
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
        let known = (1..=FORMAT).any(|format| definition.fingerprint_in(format) == fingerprint);
        known.then(|| Arc::clone(definition))
    }

    pub(super) fn same<I>(&self, saga: &Saga<I>) -> Result<&Arc<Definition>, StartError> {
        let defined = self.definitions.get(&(saga.name().to_owned(), saga.version()));
        match defined {
            Some(defined) if defined.fingerprint() == saga.fingerprint() => Ok(defined),
            _ => Err(StartError::Undefined(saga.name().to_owned(), saga.version())),
        }
    }

    pub(super) fn trouble(&self) -> &Trouble {
        &self.trouble
    }

    pub(super) fn starts(&self) -> &Starts {
        &self.starts
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Of each transaction of the engine's own.
    pub(super) fn bound(&self) -> Bound {
        self.bound
    }

    /// A transaction of the engine's own.
    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        Transaction::begin(&self.pool, self.bound).await
    }

    /// Likewise, one whose statements wait for a lock no longer than this.
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
    /// Adds a definition.
    pub fn define<I>(mut self, saga: &Saga<I>) -> Self {
        self.definitions.push(saga.shared());
        self
    }

    /// Replies of these sources (`ce_source`: what the participants' outboxes are called) are taken, and of no other.
    pub fn takes_replies_of<T: Into<String>>(mut self, sources: impl IntoIterator<Item = T>) -> Self {
        self.sources.get_or_insert_default().extend(sources.into_iter().map(Into::into));
        self
    }

    /// Binds a local effect to its name.
    pub fn local(mut self, name: &str, effect: impl LocalEffect) -> Self {
        self.locals.insert(name.to_owned(), Arc::new(effect));
        self
    }

    /// Runs `effect` for sagas of the definition `saga` that have begun to be undone, in the transaction in which they have, so that
    /// the service can say so at once. Not for those that are undone within that transaction, whose undo effects say it. It is
    /// news, and no step: where it fails by its own fault, that is logged, and the sagas go on.
    pub fn turned(mut self, saga: &str, effect: impl LocalEffect) -> Self {
        self.turned.insert(saga.to_owned(), Arc::new(effect));
        self
    }

    /// How long a transaction of the engine's own may take (30 s): a start by itself, a batch of due sagas, a retry. One that
    /// is not done by then is given up, and its connection is not used again.
    pub fn attempt_max(mut self, attempt_max: Duration) -> Self {
        self.bound = Bound::new(attempt_max);
        self
    }

    /// How long timers wait at most for a partition of the reply topic to be read (5 min): what was answered in time must not be
    /// resent or undone. A partition that is read as usual holds nobody up.
    pub fn wait_for_replies(mut self, max: Duration) -> Self {
        self.patience = Patience::new(max);
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
                known.fingerprints.push(definition.fingerprint_in(format));
            }
            let key = (definition.name().to_owned(), definition.version());
            if let Some(twice) = defined.insert(key, definition) {
                errors.push(EngineError::DefinedTwice(twice.name().to_owned(), twice.version()));
            }
        }
        if errors.is_empty() {
            let (starts, trouble) = (Starts::default(), Trouble::of(&reply_topic));
            Ok(Arc::new(Engine {
                pool,
                reply_topic,
                sources,
                definitions: defined,
                locals,
                turned,
                known,
                starts,
                trouble,
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

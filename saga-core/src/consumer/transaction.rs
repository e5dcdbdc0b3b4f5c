//! One batch, one transaction: lock, inbox, handler, commit.
//!
//! ```text
//!  begin + advisory lock (group, topic, partition)       with the last batch's commit, where that was just before
//!  inbox rows of what is new        duplicates fall out, what waits behind a parked record is parked behind it
//!  handler                          business writes, outbox rows
//!  dead letters of what is refused
//!  commit + a hint to the relay + the next begin         and only then, elsewhere: the offset
//! ```
//!
//! The lock keeps apart a worker that lost its partition without noticing and the partition's new worker. Each works
//! through contiguous records under it, so the order along a key holds, whichever of them gets it first. A process that
//! dies before the commit has done nothing; one that dies after it finds its messages in the inbox.

use super::{
    ConsumerConfig, HandleError, Handler, Message,
    dead_letter::{self, DeadLetter},
    failure::{AttemptFailure, RecordFault},
    parking::{self, Parked},
    record::{Poison, RecordBatch, RecordOrigin, arrival, hash},
};
use crate::{
    clock::{self, DatabaseClock},
    fail_point::fail_point,
    id::MessageId,
    inbox::{self, Delivery, InboxPlace},
    outbox::{self, Next, Tx, has_one_to_spare},
    panics::panic_text,
    trace,
    transaction::{Bound, Transaction},
};
use futures::FutureExt;
use sqlx::{AssertSqlSafe, PgPool};
use std::{
    borrow::Cow,
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tracing::Instrument;

/// The most links of one span: what a batch of many traces shows.
const LINKS_MAX: usize = 32;

/// The divisor of an attempt's time that yields how long it may wait for a lock.
const LOCK_PART: u32 = 10;

/// Everything that the transactions of one partition have in common.
pub(super) struct PartitionContext<H> {
    pub(super) pool: PgPool,
    pub(super) handler: Arc<H>,
    pub(super) config: Arc<ConsumerConfig>,
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) clock: Arc<DatabaseClock>,
    /// How long the server lets a transaction of the handler be silent.
    pub(super) silence: Duration,
    /// The stage of the attempt that is under way.
    pub(super) stage: watch::Sender<Stage>,
    pub(super) prefetched: PrefetchedTx,
}

/// The stage of an attempt, also when it was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The attempt has no transaction yet: the pool may have no connection to spare.
    Beginning,
    /// The consumer's own statements run.
    Ours,
    /// The handler is at work.
    Handling,
}

/// A partition that is always busy gives its connection back now and then, for the pool to check its age.
const KEPT_MAX: Duration = Duration::from_secs(60);

/// How long a transaction that began before there was a batch for it is kept; then it is given back, connection and
/// all. `now()` in it is not much older. So long it looks `idle in transaction`. It holds the partition's lock and
/// nothing else: no snapshot, no transaction id.
const PREFETCHED_MAX: Duration = Duration::from_millis(100);

/// A transaction that has begun, under the partition's lock.
struct PartitionTx {
    tx: Tx<'static>,
    began: Instant,
    /// When the pool lent the connection.
    borrowed: Instant,
}

/// The next transaction, where it began in the round trip that committed the last one. To give the connection back, to
/// get it again, and to begin would be three more round trips.
#[derive(Default)]
pub(super) struct PrefetchedTx(Mutex<Option<PartitionTx>>);

impl PrefetchedTx {
    fn take(&self) -> Option<PartitionTx> {
        // A transaction that is too old is dropped, and so is its lock, which the next transaction waits for.
        self.lock().take().filter(|open| clock::monotonic() < open.began + PREFETCHED_MAX)
    }

    fn keep(&self, open: PartitionTx) {
        *self.lock() = Some(open);
    }

    /// Until when the transaction may wait for a batch, if there is one.
    pub(super) fn until(&self) -> Option<Instant> {
        self.lock().as_ref().map(|open| open.began + PREFETCHED_MAX)
    }

    /// Gives the transaction back, before a wait that takes longer.
    pub(super) fn give_back(&self) {
        let open = self.lock().take();
        drop(open);
    }

    fn lock(&self) -> MutexGuard<'_, Option<PartitionTx>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: Handler> PartitionContext<H> {
    pub(super) fn place(&self) -> InboxPlace<'_> {
        InboxPlace { consumer: &self.config.group, topic: &self.topic, partition: self.partition }
    }

    /// How long a record waits that failed its attempt number `attempts`.
    pub(super) fn delay(&self, attempts: u32, offset: i64) -> Duration {
        self.config.backoff.delay(attempts.max(1), offset.cast_unsigned())
    }

    /// The bounds of a transaction. Its wait for a lock is short: all records of the partition wait with the one that
    /// waits.
    pub(super) fn bound(&self) -> Bound {
        Bound::new(self.config.attempt_timeout).with_lock(self.config.attempt_timeout / LOCK_PART)
    }

    /// Begins a transaction for a statement of our own, without the partition's lock.
    pub(super) async fn brief(&self) -> Result<Transaction, AttemptFailure> {
        let tx = Transaction::begin(&self.pool, self.bound()).await.map_err(AttemptFailure::of_begin)?;
        self.stage.send_replace(Stage::Ours);
        Ok(tx)
    }

    /// Takes the transaction that has begun ahead, if there is one: another would wait for its lock.
    async fn begin(&self) -> Result<PartitionTx, AttemptFailure> {
        let open = match self.prefetched.take() {
            Some(open) => open,
            None => {
                let begun = self.pool.begin_with(AssertSqlSafe(self.begin_and("pg_advisory_xact_lock"))).await;
                let (tx, began) = (begun.map_err(AttemptFailure::of_begin)?, clock::monotonic());
                PartitionTx { tx, began, borrowed: began }
            }
        };
        self.stage.send_replace(Stage::Ours);
        Ok(open)
    }

    /// Commits, and tells the relay if there is something for it. Begins the next transaction while the pool has
    /// connections to spare: a task that waits for one gets it at the end of a batch. A failure gives the connection
    /// back, and the pool takes care of it.
    async fn commit(&self, PartitionTx { tx, borrowed, .. }: PartitionTx, tell: bool) -> Result<(), sqlx::Error> {
        let young = clock::monotonic().saturating_duration_since(borrowed) < KEPT_MAX;
        let begin = (has_one_to_spare(&self.pool) && young && !self.pool.is_closed())
            .then(|| self.begin_and("pg_try_advisory_xact_lock"));
        if let Some(tx) = outbox::commit_and_begin(tx, Next { tell, begin: begin.as_deref() }).await? {
            self.prefetched.keep(PartitionTx { tx, began: clock::monotonic(), borrowed });
        }
        Ok(())
    }

    /// The SQL that begins, and takes the lock of the partition, in one round trip. The isolation is read committed: a
    /// worker that has waited for the lock sees what was done under it. The server ends a session that falls silent,
    /// which would otherwise hold the lock for ever.
    fn begin_and(&self, lock: &str) -> String {
        let InboxPlace { consumer, topic, partition } = self.place();
        let key = hash(format!("{consumer}/{topic}/{partition}").as_bytes());
        // The bound is one that PostgreSQL takes: not 0, which means none.
        let silent = self.config.attempt_timeout.as_millis().clamp(1, i32::MAX.unsigned_abs().into());
        self.bound().begin_sql(&format!(
            "case when current_setting('idle_in_transaction_session_timeout') = '0'
                  then set_config('idle_in_transaction_session_timeout', '{silent}', true) end,
             {lock}({key})"
        ))
    }

    /// Handles what is new in `batch`; returns how many messages that were, of those that the inbox remembers. Messages
    /// that the handler called poison before are dead-lettered.
    pub(super) async fn take(&self, batch: &RecordBatch) -> Result<usize, AttemptFailure> {
        let group = &self.config.group;
        fail_point!("consumer.before-begin", group, batch.sagas());
        let mut open = self.begin().await?;
        let tx = &mut open.tx;
        let arrivals = batch.arrivals(&self.config, self.clock.now());
        let deliveries = match arrivals.is_empty() {
            true => Vec::new(),
            false => inbox::receive_in(tx, self.place(), &arrivals).await?,
        };
        fail_point!("consumer.after-inbox", group, batch.sagas());
        let held = pick(batch, &deliveries, Delivery::Held);
        if !held.messages.is_empty() {
            parking::hold_in(tx, self.place(), &held).await?;
        }
        let fresh = deliveries.iter().filter(|&&delivery| delivery == Delivery::Fresh).count();
        let given_up = if fresh == batch.messages.len() && batch.poison.is_empty() {
            self.handle_in(tx, &batch.messages).await?;
            Vec::new()
        } else {
            let RecordBatch { messages, origins, .. } = pick(batch, &deliveries, Delivery::Fresh);
            let fresh = messages.into_iter().zip(origins).map(|(message, origin)| (message, origin, 1));
            self.handle_without_poison_in(tx, &batch.poison, fresh).await?
        };
        if !batch.refused.is_empty() {
            dead_letter::append_in(tx, group, batch.refused.iter().map(DeadLetter::refused)).await?;
        }
        fail_point!("consumer.before-commit", group, batch.sagas());
        self.commit(open, fresh > 0 || !batch.refused.is_empty()).await?;
        fail_point!("consumer.after-commit", group, batch.sagas());
        if fresh > 0 {
            self.handler.committed();
        }
        self.count("fresh", fresh);
        self.count("held", held.messages.len());
        self.count_duplicates(deliveries.len() - fresh - held.messages.len());
        given_up.iter().for_each(|class| self.count_dead_letters(class, 1));
        batch.refused.iter().for_each(|refused| self.count_dead_letters(refused.class, 1));
        let remembered = arrivals.iter().zip(&deliveries).filter(|(arrival, _)| arrival.remembered);
        Ok(remembered.filter(|&(_, &delivery)| delivery == Delivery::Fresh).count())
    }

    /// Handles `fresh` (with the number of the attempt) without its poison, which is dead-lettered; returns the classes
    /// of that.
    async fn handle_without_poison_in(
        &self,
        tx: &mut Tx<'_>,
        poison: &Poison,
        fresh: impl Iterator<Item = (Message, RecordOrigin, u32)>,
    ) -> Result<Vec<Cow<'static, str>>, AttemptFailure> {
        let fresh: Vec<_> = fresh.collect();
        let mut named: HashMap<MessageId, usize> = HashMap::new();
        fresh.iter().for_each(|(message, ..)| *named.entry(message.envelope.id).or_default() += 1);
        // An id that several messages have names none of them.
        let is_poison = |id: MessageId| poison.contains_key(&id) && named[&id] == 1;
        let (given_up, fresh): (Vec<_>, Vec<_>) =
            fresh.into_iter().partition(|(message, ..)| is_poison(message.envelope.id));
        let messages: Vec<_> = fresh.into_iter().map(|(message, ..)| message).collect();
        self.handle_in(tx, &messages).await?;
        let letters = given_up.iter().filter_map(|(message, origin, attempts)| {
            Some((message, origin, poison.get(&message.envelope.id)?, *attempts))
        });
        self.dead_letter_in(tx, &letters.collect::<Vec<_>>()).await?;
        let classes = given_up.iter().filter_map(|(message, ..)| poison.get(&message.envelope.id));
        Ok(classes.map(|fault| fault.class.clone()).collect())
    }

    /// Parks a record that failed, unless another worker handled it meanwhile.
    pub(super) async fn park(
        &self,
        single: &RecordBatch,
        attempts: u32,
        fault: &RecordFault,
    ) -> Result<(), AttemptFailure> {
        let mut tx = self.begin().await?.tx;
        for message in &single.messages {
            let delay = self.delay(attempts, message.at.offset);
            parking::park_in(&mut tx, self.place(), single, attempts, delay, fault).await?;
            let saga = message.envelope.saga.as_ref();
            // The ids stand here once more: with `RUST_LOG=warn` there are no spans.
            message.span().in_scope(|| {
                tracing::warn!(
                    group = self.config.group,
                    topic = self.topic,
                    partition = self.partition,
                    offset = message.at.offset,
                    message_id = %message.envelope.id,
                    saga = saga.map(|saga| tracing::field::display(saga.saga)),
                    saga_type = saga.map(|saga| saga.definition.as_str()),
                    class = %fault.class,
                    reason = fault.reason,
                    attempts,
                    "parked, with the records of its key behind it"
                );
            });
        }
        tx.commit().await?;
        self.count("parked", single.messages.len());
        Ok(())
    }

    /// Gives up a record that was tried `attempts` times.
    pub(super) async fn give_up(
        &self,
        single: &RecordBatch,
        attempts: u32,
        fault: &RecordFault,
    ) -> Result<(), AttemptFailure> {
        let mut tx = self.begin().await?.tx;
        let deliveries =
            inbox::receive_in(&mut tx, self.place(), &single.arrivals(&self.config, self.clock.now())).await?;
        let held = pick(single, &deliveries, Delivery::Held);
        parking::hold_in(&mut tx, self.place(), &held).await?;
        let fresh = pick(single, &deliveries, Delivery::Fresh);
        let letters = fresh.messages.iter().zip(&fresh.origins);
        let letters: Vec<_> = letters.map(|(message, origin)| (message, origin, fault, attempts)).collect();
        self.dead_letter_in(&mut tx, &letters).await?;
        outbox::commit(tx, &self.pool).await?;
        self.count_dead_letters(&fault.class, fresh.messages.len());
        Ok(())
    }

    /// Handles a parked record: it leaves, and the next of its lane is due.
    pub(super) async fn retry(&self, parked: &Parked) -> Result<(), AttemptFailure> {
        let mut tx = self.begin().await?.tx;
        self.handle_parked_in(&mut tx, vec![parked.clone()], &Poison::new()).await?;
        outbox::commit(tx, &self.pool).await?;
        self.handler.committed();
        Ok(())
    }

    /// Handles the first `limit` records that wait in a lane; returns how many those were. Nothing is counted, so where
    /// one fails all of them are left as they were.
    pub(super) async fn drain(&self, lane: i64, limit: usize, poison: &Poison) -> Result<usize, AttemptFailure> {
        let mut tx = self.begin().await?.tx;
        let parked = parking::lane_in(&mut tx, self.place(), lane, limit).await?;
        let drained = parked.len();
        let given_up = self.handle_parked_in(&mut tx, parked, poison).await?;
        outbox::commit(tx, &self.pool).await?;
        self.handler.committed();
        given_up.iter().for_each(|class| self.count_dead_letters(class, 1));
        Ok(drained)
    }

    /// Gives up a parked record; the next of its lane is due.
    pub(super) async fn give_up_parked(
        &self,
        parked: &Parked,
        attempts: u32,
        fault: &RecordFault,
    ) -> Result<(), AttemptFailure> {
        let mut tx = self.begin().await?.tx;
        if inbox::record_in(&mut tx, &self.config.group, &[arrival(&parked.message, &self.config, self.clock.now())])
            .await?[0]
        {
            self.dead_letter_in(&mut tx, &[(&parked.message, &parked.origin, fault, attempts)]).await?;
        }
        parking::leave_in(&mut tx, self.place(), &[parked.id], parked.lane).await?;
        outbox::commit(tx, &self.pool).await?;
        self.count_dead_letters(&fault.class, 1);
        Ok(())
    }

    /// Dead-letters records that were tried so often, and lets the handler answer them.
    async fn dead_letter_in(
        &self,
        tx: &mut Tx<'_>,
        given_up: &[(&Message, &RecordOrigin, &RecordFault, u32)],
    ) -> Result<(), AttemptFailure> {
        if given_up.is_empty() {
            return Ok(());
        }
        let letters = given_up
            .iter()
            .map(|(message, origin, fault, attempts)| DeadLetter::failed(message, origin, fault, *attempts));
        dead_letter::append_in(tx, &self.config.group, letters).await?;
        let said: Vec<_> = given_up.iter().map(|(message, _, fault, _)| (*message, fault.reason.as_str())).collect();
        Ok(self.handler.gave_up(tx, &said).await?)
    }

    async fn handle_parked_in(
        &self,
        tx: &mut Tx<'_>,
        parked: Vec<Parked>,
        poison: &Poison,
    ) -> Result<Vec<Cow<'static, str>>, AttemptFailure> {
        let Some(lane) = parked.first().map(|first| first.lane) else { return Ok(Vec::new()) };
        let now = self.clock.now();
        let arrivals: Vec<_> = parked.iter().map(|parked| arrival(&parked.message, &self.config, now)).collect();
        let fresh = inbox::record_in(tx, &self.config.group, &arrivals).await?;
        let ids: Vec<_> = parked.iter().map(|parked| parked.id).collect();
        let fresh = parked.into_iter().zip(fresh).filter(|(_, fresh)| *fresh);
        let fresh = fresh.map(|(parked, _)| (parked.message, parked.origin, parked.attempts + 1));
        let given_up = self.handle_without_poison_in(tx, poison, fresh).await?;
        parking::leave_in(tx, self.place(), &ids, lane).await?;
        Ok(given_up)
    }

    /// Runs the handler within the span that its logs and its messages belong to. A panic is the record's fault.
    async fn handle_in(&self, tx: &mut Tx<'_>, messages: &[Message]) -> Result<(), AttemptFailure> {
        let span = match messages {
            [] => return Ok(()),
            [message] => message.span(),
            many => {
                let offset = many[0].at.offset;
                let span = tracing::info_span!(
                    "batch",
                    group = self.config.group,
                    topic = self.topic,
                    partition = self.partition,
                    offset,
                    messages = many.len()
                );
                many.iter().take(LINKS_MAX).for_each(|message| trace::link_to(&span, &message.envelope));
                span
            }
        };
        metrics::histogram!("consumer_batch_messages", "group" => self.config.group.clone())
            .record(f64::from(u32::try_from(messages.len()).unwrap_or(u32::MAX)));
        let began = clock::monotonic();
        self.stage.send_replace(Stage::Handling);
        let handled = AssertUnwindSafe(self.handler.handle(tx, messages)).catch_unwind().instrument(span).await;
        let mut handled = handled.unwrap_or_else(|panic| {
            Err(HandleError::Failed(anyhow::anyhow!("the handler panicked: {}", panic_text(panic.as_ref()))))
        });
        // A handler may swallow an error of the database. Then the transaction is aborted, PostgreSQL answers its
        // commit with a rollback, and sqlx calls that a success. This statement fails there.
        if handled.is_ok() && !self.handler.ends_with_a_statement() {
            handled = sqlx::query("select 1").execute(&mut **tx).await.map(drop).map_err(HandleError::from);
        }
        self.stage.send_replace(Stage::Ours);
        let taken = clock::monotonic().saturating_duration_since(began);
        handled.map_err(|error| AttemptFailure::of_handler(error, taken, self.silence))
    }

    fn count(&self, outcome: &'static str, messages: usize) {
        metrics::counter!("consumer_messages_total", "group" => self.config.group.clone(),
            "topic" => self.topic.clone(), "outcome" => outcome)
        .increment(messages as u64);
    }

    pub(super) fn count_duplicates(&self, messages: usize) {
        metrics::counter!("inbox_duplicates_total", "consumer" => self.config.group.clone(),
            "topic" => self.topic.clone())
        .increment(messages as u64);
    }

    fn count_dead_letters(&self, class: &str, messages: usize) {
        metrics::counter!("dlt_messages_total", "group" => self.config.group.clone(), "topic" => self.topic.clone(),
            "class" => class.to_owned())
        .increment(messages as u64);
    }
}

fn pick(batch: &RecordBatch, deliveries: &[Delivery], wanted: Delivery) -> RecordBatch {
    let mut picked = RecordBatch::default();
    for (n, _) in deliveries.iter().enumerate().filter(|(_, delivery)| **delivery == wanted) {
        picked.messages.push(batch.messages[n].clone());
        picked.origins.push(batch.origins[n].clone());
    }
    picked
}

//! Kafka records to batches, and one transaction per batch.
//!
//! ```text
//!  record -> buffer of its partition -> batch = transaction: lock, inbox, handler, commit -> offset
//!                                          | a record fails
//!                                          v
//!                                     parked, the records of its key behind it; everything else flows on
//!                                          | the last attempt fails, or trying is pointless
//!                                          v
//!                                     <topic>.dlt, through the outbox
//! ```
//!
//! What holds: a message is handled once, whatever dies when; messages of one key are handled in order; no record stops
//! its partition. A process that dies leaves at most one open transaction per partition, which the database rolls back.
//! Its offsets are behind its work, which the inbox makes up for. It also leaves a mark: the next worker notes its
//! first batches before it tries them, because one of their records may have killed the process. If the process dies in
//! a noted batch, the next worker takes its records one by one, each attempt counted.
//!
//! A service implements [`Handler`] and runs it:
//!
//! ```no_run
//! use saga_core::{consumer::{Consumer, ConsumerConfig, HandleError, Handler, Message}, outbox::Tx};
//! use std::sync::Arc;
//!
//! struct Prices;
//!
//! impl Handler for Prices {
//!     async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
//!         for message in batch {
//!             sqlx::query("insert into price (item, value) values ($1, $2)
//!                          on conflict (item) do update set value = excluded.value")
//!                 .bind(&message.key)
//!                 .bind(&message.payload)
//!                 .execute(&mut **tx)
//!                 .await?;
//!         }
//!         Ok(())
//!     }
//! }
//!
//! # async fn run(pool: sqlx::PgPool, stop: tokio_util::sync::CancellationToken) -> Result<(), saga_core::consumer::ConsumerError> {
//! let config = ConsumerConfig::new("localhost:9092", "shop-prices", ["prices"]);
//! Consumer::new(config, pool, Arc::new(Prices)).run(stop).await
//! # }
//! ```

mod buffer;
mod claim;
mod client;
mod config;
mod dead_letter;
mod ends;
mod failure;
mod group_offsets;
mod health;
mod offsets;
mod parking;
mod partition_progress;
mod patience;
mod poll;
mod portion;
mod reach;
mod reading;
mod record;
mod refusal;
mod rereading;
mod retries;
mod transaction;
mod worker;

pub use config::{ConsumerConfig, TooOld};
pub use dead_letter::dead_letter_header;
pub use health::ConsumerHealth;
pub use rereading::{Reread, Rereading, RereadingError};

use crate::{
    envelope::Envelope,
    id::MessageId,
    inbox,
    outbox::{AppendError, Tx},
    trace,
    transaction::{Bound, Transaction},
};
use rdkafka::error::KafkaError;
use sqlx::PgPool;
use std::{future::Future, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How often inbox partitions are made ahead; they are made for two weeks.
const UPKEEP_EVERY: Duration = Duration::from_secs(3600);
/// How often parked records are counted and the database's clock is read; also how soon failed upkeep is tried again.
const GAUGE_EVERY: Duration = Duration::from_secs(15);

/// Reads topics as a member of a group; a [`Handler`] handles the new messages.
pub struct Consumer<H> {
    config: Arc<ConsumerConfig>,
    pool: PgPool,
    handler: Arc<H>,
    health: Arc<health::HealthState>,
}

impl<H: Handler> Consumer<H> {
    /// Nothing happens before [`Consumer::run`]. `pool` should have a connection for each partition that is read.
    pub fn new(config: ConsumerConfig, pool: PgPool, handler: Arc<H>) -> Self {
        let health = Arc::new(health::HealthState::new(&config.group, &config.brokers, &pool));
        Self { config: Arc::new(config), pool, handler, health }
    }

    /// A handle for readiness to ask.
    pub fn health(&self) -> ConsumerHealth {
        ConsumerHealth(Arc::clone(&self.health))
    }

    /// Runs until `stop` is cancelled, then finishes the open transactions within a bound. When a broker or the
    /// database is away, the consumer waits.
    ///
    /// # Errors
    /// When the client is misconfigured or broken for good; the process should end and be started again.
    pub async fn run(self, stop: CancellationToken) -> Result<(), ConsumerError> {
        tokio::select! {
            ended = self.poll(&stop) => ended,
            never = upkeep(&self.pool, &self.config, &self.health) => match never {},
            never = ends::keep_looking(&self.config, &self.health) => match never {},
        }
    }

    /// Polls with one client after another: a client that cannot go on is replaced.
    async fn poll(&self, stop: &CancellationToken) -> Result<(), ConsumerError> {
        loop {
            let (config, handler) = (Arc::clone(&self.config), Arc::clone(&self.handler));
            let poll = poll::Poll::new(config, self.pool.clone(), handler, Arc::clone(&self.health))?;
            if poll.run(stop).await? == poll::Polled::ToTheEnd {
                return Ok(());
            }
        }
    }
}

/// Makes inbox partitions ahead, counts what is parked, and reads the database's clock.
async fn upkeep(pool: &PgPool, config: &ConsumerConfig, health: &health::HealthState) -> std::convert::Infallible {
    let bound = Bound::new(config.attempt_timeout);
    let mut made: Option<std::time::Instant> = None;
    loop {
        let now = crate::clock::monotonic();
        if made.is_none_or(|made| now.saturating_duration_since(made) > UPKEEP_EVERY) {
            match bound.within(inbox::add_partitions(pool, config.horizon)).await {
                Ok(_) => made = Some(now),
                // Partitions exist two weeks ahead, so an outage now does no harm. At first start the worker makes
                // them.
                Err(error) => tracing::debug!(%error, "inbox partitions could not be made"),
            }
        }
        let counted = async { parking::count(Transaction::begin(pool, bound).await?, &config.group).await };
        let asked = crate::clock::monotonic();
        if let Ok(counts) = bound.within(counted).await {
            health.clock.heard(counts.time, asked);
            health.parked(counts);
        }
        tokio::time::sleep(GAUGE_EVERY).await;
    }
}

/// Why a consumer ended.
#[derive(Debug, thiserror::Error)]
pub enum ConsumerError {
    /// The settings are wrong, or the client library cannot go on.
    #[error("the Kafka consumer cannot go on")]
    Kafka(#[from] KafkaError),
    /// A bug of this crate.
    #[error("a partition's worker panicked")]
    WorkerPanicked,
    /// A test's fail point ended the consumer.
    #[error("a fail point let the consumer die")]
    Crashed,
}

/// A record as a handler sees it.
#[derive(Debug, Clone)]
pub struct Message {
    /// The decoded headers.
    pub envelope: Envelope,
    /// The record's key; `None`: the record has none.
    pub key: Option<Vec<u8>>,
    /// The record's value; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// The record's place in Kafka.
    pub at: Coordinates,
}

impl Message {
    /// A span for work on this message: it continues the message's trace, and its ids are on every line logged within.
    /// The runtime enters it for a batch of one; a handler that works message by message enters one for each.
    pub fn span(&self) -> tracing::Span {
        let envelope = &self.envelope;
        let saga = envelope.saga.as_ref();
        let span = tracing::info_span!(
            "message",
            message_id = %envelope.id,
            kind = envelope.kind,
            subject = envelope.subject,
            saga = saga.map(|saga| tracing::field::display(saga.saga)),
            saga_type = saga.map(|saga| saga.definition.as_str()),
            saga_step = saga.map(|saga| saga.step.as_str()),
            correlation_id = envelope.correlation_id(),
            topic = self.at.topic,
            partition = self.at.partition,
            offset = self.at.offset
        );
        trace::continue_from(&span, envelope);
        span
    }
}

/// Where a record stands in Kafka.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Coordinates {
    /// The name of the topic.
    pub topic: String,
    /// The partition's number, from 0.
    pub partition: i32,
    /// The record's offset in the partition.
    pub offset: i64,
}

/// What a consumer does with the messages that its inbox has not seen.
pub trait Handler: Send + Sync + 'static {
    /// Handles `batch` (never empty, in partition order) in `tx`; the runtime commits. A business refusal is a reply,
    /// never an `Err`. May be called again with the same messages after an error: everything it did is rolled back.
    /// `tx` is read committed, and may have begun 0.1 s before the batch was there: `now()` is the time when it did.
    ///
    /// # Errors
    /// [`HandleError`] says what becomes of the batch: it is repeated, searched for a culprit, or a message is dead-lettered.
    fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> impl Future<Output = Result<(), HandleError>> + Send;

    /// Whether `handle`, if it has done anything, ends with a statement in `tx` whose error it returns. If not, the
    /// runtime sends one before the commit, to find out whether an error was swallowed on the way.
    fn ends_with_a_statement(&self) -> bool {
        false
    }

    /// Whether another part waits for what this handler reads, as the saga timers wait for replies. Then each
    /// partition's consumer records in `inbox_partition.read_until`, every few seconds, until when it has been read.
    fn says_how_far_it_read(&self) -> bool {
        false
    }

    /// Called with messages that are given up, each with the reason, in the transaction that dead-letters them, so that
    /// the handler can answer them. It must not fail because of anything in such a message.
    ///
    /// # Errors
    /// An error rolls the transaction back: the messages are given up again later.
    fn gave_up(
        &self,
        _tx: &mut Tx<'_>,
        _messages: &[(&Message, &str)],
    ) -> impl Future<Output = Result<(), AppendError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Called after the batch's commit, to wake the tasks that work on what was written.
    fn committed(&self) {}
}

/// A handler like the first, which calls the second after each commit. Any other wrapper of a handler has to pass on
/// every method of the trait: those with a default are easily forgotten.
#[derive(Debug)]
pub struct Then<H, F>(pub H, pub F);

impl<H: Handler, F: Fn() + Send + Sync + 'static> Handler for Then<H, F> {
    fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> impl Future<Output = Result<(), HandleError>> + Send {
        self.0.handle(tx, batch)
    }

    fn ends_with_a_statement(&self) -> bool {
        self.0.ends_with_a_statement()
    }

    fn says_how_far_it_read(&self) -> bool {
        self.0.says_how_far_it_read()
    }

    fn gave_up(
        &self,
        tx: &mut Tx<'_>,
        messages: &[(&Message, &str)],
    ) -> impl Future<Output = Result<(), AppendError>> + Send {
        self.0.gave_up(tx, messages)
    }

    fn committed(&self) {
        self.0.committed();
        (self.1)();
    }
}

/// Why a batch was not handled.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// The database refused. Serialization failures, deadlocks and outages are repeated and count nothing. A missing
    /// table or right stops the partition until it is there. A message that waits for another transaction's lock is set
    /// aside until it has it, without an attempt. Anything else counts as an attempt.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// The message can never work, in this build or in a later one: undecodable. Dead-lettered at once.
    #[error("{0}")]
    Poison(String),
    /// The message did not work this time: counted, retried with back-off, then dead-lettered.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
    /// Several messages of the batch can never work: dead-lettered together, and the others are handled without them.
    /// Made by [`HandleError::unfit`].
    #[error("{} messages of the batch cannot be handled; the first: {}", .0.len(), .0.first().map_or("", |first| first.reason.as_str()))]
    Several(Vec<Unfit>),
    /// An error of one message of the batch; made by [`HandleError::of`].
    #[error("message {message}: {error}")]
    Of {
        /// The id of that message.
        message: MessageId,
        /// The error that it caused.
        error: Box<HandleError>,
    },
    /// Nothing is wrong with the messages: roll back, and hand them in again at once. Counts nothing. For a handler
    /// that takes a batch the short way first and has found out that this batch needs the long one.
    #[error("the batch is to be handled again")]
    Again,
}

/// The class of a message whose source is not declared for its topic.
pub const UNDECLARED_SOURCE: &str = "undeclared-source";
/// The class of a reply to a saga that does not exist.
pub const NO_SAGA: &str = "no-saga";

/// A message that can never be handled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// The id of the message.
    pub message: MessageId,
    /// The kind of flaw, in one word: `x-error-class` of its dead letter.
    pub class: &'static str,
    /// The flaw, in words.
    pub reason: String,
}

impl Unfit {
    /// Takes a message whose error is poison. Any other error is returned, with the id of its message.
    ///
    /// # Errors
    /// Any error but poison, with the name of its message.
    pub fn poison(message: MessageId, error: HandleError) -> Result<Self, HandleError> {
        match error {
            HandleError::Poison(reason) => Ok(Self { message, class: failure::POISON, reason }),
            error => Err(error.of(message)),
        }
    }

    /// Takes a message whose source is not declared for its topic.
    pub(crate) fn undeclared(message: MessageId, reason: String) -> Self {
        Self { message, class: UNDECLARED_SOURCE, reason }
    }
}

impl HandleError {
    /// The error of a batch in which these messages can never be handled. The handler finds them in one look through
    /// the batch, so that each costs its own dead letter and no attempt at the whole.
    ///
    /// # Errors
    /// If there are any.
    pub fn unfit(mut unfit: Vec<Unfit>) -> Result<(), Self> {
        match &mut unfit[..] {
            [] => Ok(()),
            [one] if one.class == failure::POISON => Err(Self::Poison(std::mem::take(&mut one.reason)).of(one.message)),
            _ => Err(Self::Several(unfit)),
        }
    }

    /// Names the message that caused this error. Only that message is then set aside, and the rest of its batch is
    /// handled together. Without a name, the runtime searches for the culprit by halving the batch.
    #[must_use]
    pub fn of(self, message: MessageId) -> Self {
        match self {
            named @ (Self::Of { .. } | Self::Again) => named,
            error => Self::Of { message, error: Box::new(error) },
        }
    }

    /// The message that the error names, and the error itself.
    pub(crate) fn parts(self) -> (Option<MessageId>, Self) {
        match self {
            Self::Of { message, error } => (Some(message), error.parts().1),
            error => (None, error),
        }
    }
}

/// A message that can never be published is the handler's fault; any other error is the database's.
impl From<AppendError> for HandleError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Database(error) => Self::Database(error),
            invalid @ AppendError::Invalid { .. } => Self::Failed(invalid.into()),
        }
    }
}

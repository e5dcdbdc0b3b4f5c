//! The settings of a consumer.

use crate::retry::Backoff;
use std::time::Duration;

/// The settings of one consumer. [`ConsumerConfig::new`] has the values for production. The fields are open to tests
/// and to services that measured something better.
#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    /// The consumer group; also the name under which the inbox knows this consumer.
    pub group: String,
    /// The names of the topics that the consumer reads.
    pub topics: Vec<String>,
    /// The brokers' addresses, as in `bootstrap.servers`.
    pub brokers: String,
    /// The most records of one transaction. More amortises better and makes one lost lock or one bad record dearer. A
    /// batch is what has arrived, so at low load this waits for nothing.
    pub batch_max: usize,
    /// The records of one partition that may wait for its worker before the partition is paused (or 16 MiB of them, if
    /// that is less). The partition is resumed at half, so half of this should last until the next fetch arrives.
    pub buffer: usize,
    /// The upper bound of one transaction, handler included; PostgreSQL ends its statements a little later. A batch
    /// whose handler needs longer is halved until it fits. A single record whose handler needs longer has failed its
    /// attempt. While the database does not answer, the attempt is repeated on another connection and counts nothing.
    /// Choose a value well above what your slowest record needs. A tenth of it is how long a statement waits for a
    /// lock: a record that waits longer is parked. It is tried until it has the lock, and no attempt is spent. The
    /// server ends a session of ours that is silent for so long, unless the pool says otherwise.
    pub attempt_timeout: Duration,
    /// How often a record is tried before it is dead-lettered.
    pub attempts: u32,
    /// How long a record that failed waits for its next attempt.
    pub backoff: Backoff,
    /// After so long without a heartbeat, the partitions of a process go to another one. A process that died has to
    /// wait as long for its own. Not less than the brokers' `group.min.session.timeout.ms`.
    pub session_timeout: Duration,
    /// How long the inbox remembers. Not less than the retention of the topics: otherwise records are refused that
    /// Kafka still delivers.
    pub horizon: Duration,
    /// What becomes of a message older than the inbox remembers.
    pub too_old: TooOld,
}

/// What becomes of a message that is older than the inbox remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooOld {
    /// The message is dead-lettered: the inbox cannot tell whether it was handled before.
    DeadLetter,
    /// The message is handled, each time that it comes. For topics that are kept for ever (compacted ones) and handlers
    /// that are idempotent by themselves, for which the last value wins.
    Handle,
}

impl ConsumerConfig {
    /// The settings for production: 500 records a transaction, 8 attempts within about two minutes and a half, 14 days
    /// of memory.
    pub fn new<T: Into<String>>(brokers: &str, group: &str, topics: impl IntoIterator<Item = T>) -> Self {
        Self {
            group: group.into(),
            topics: topics.into_iter().map(Into::into).collect(),
            brokers: brokers.into(),
            batch_max: 500,
            buffer: 10_000,
            attempt_timeout: Duration::from_secs(60),
            attempts: 8,
            backoff: Backoff::doubling(Duration::from_secs(1), Duration::from_secs(60)),
            session_timeout: Duration::from_secs(6),
            horizon: Duration::from_secs(14 * 24 * 3600),
            too_old: TooOld::DeadLetter,
        }
    }

    /// Replaces the session timeout.
    #[must_use]
    pub fn with_session_timeout(self, session_timeout: Duration) -> Self {
        Self { session_timeout, ..self }
    }
}

//! The relay's settings and their defaults.

use crate::budget;
use saga_core::service::config::DatabasePlace;
use sqlx::postgres::PgConnectOptions;
use std::{fmt, time::Duration};

/// The default length of a lease, after which a stand-by takes over from an owner that was killed. Longer than a long
/// pause of a healthy process.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(10);

/// The default bound of a statement that reads the outbox. It reads a bounded number of rows, from a cold disk if need
/// be.
pub const DEFAULT_READING: Duration = Duration::from_secs(30);

/// How long resolved parked rows are kept by default, so that an operator can still see how each one ended.
pub const RESOLVED_KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// The default time after which rows that no broker has taken are stuck, and their topic is set apart while others
/// flow. Longer than a change of a partition's leader usually takes.
pub const STUCK_AFTER: Duration = Duration::from_secs(5);

/// The default time for which a topic stays set apart after its last refusal: each refusal costs a producer.
pub const SET_APART_FOR: Duration = Duration::from_secs(60);

/// The default compression of record batches: cheap, and headers repeat themselves.
pub const COMPRESSION: &str = "lz4";

/// The settings of the whole process.
#[derive(Debug, Clone)]
pub struct RelaySettings {
    /// The outboxes to publish.
    pub outboxes: Vec<OutboxSettings>,
    /// `bootstrap.servers`.
    pub kafka_brokers: String,
    /// Whether an outbox without a position begins with what is committed from now on.
    pub from_now: bool,
    /// Whether an outbox that was published under another name begins from its first row.
    pub publish_again: bool,
    /// How long a lease lasts; at least 2 s in the binary.
    pub lease: Duration,
    /// The bound of statements that read the outbox, which is not the lease's.
    pub reading: Duration,
    /// Parked rows that are resolved (published, or discarded and gone from the outbox) are deleted after so long.
    pub resolved_kept: Duration,
    /// After how long rows that no broker takes are stuck; their topic is then set apart.
    pub stuck_after: Duration,
    /// How long a topic stays set apart after Kafka has refused a row of it.
    pub set_apart_for: Duration,
    /// Bytes of rows that the process may hold, for all outboxes.
    pub held: usize,
    /// `compression.type`.
    pub compression: String,
}

/// The settings of one outbox.
#[derive(Clone)]
pub struct OutboxSettings {
    /// The name: `ce_source` of its messages, and the key of its position.
    pub name: String,
    /// The database that has the outbox.
    pub database: PgConnectOptions,
}

impl fmt::Debug for OutboxSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, database } = self;
        f.debug_struct("OutboxSettings").field("name", name).field("database", &DatabasePlace(database)).finish()
    }
}

impl RelaySettings {
    /// Settings with all defaults.
    pub fn new(kafka_brokers: impl Into<String>, outboxes: Vec<OutboxSettings>) -> Self {
        Self {
            held: budget::default(outboxes.len()),
            outboxes,
            kafka_brokers: kafka_brokers.into(),
            from_now: false,
            publish_again: false,
            lease: DEFAULT_LEASE,
            reading: DEFAULT_READING,
            resolved_kept: RESOLVED_KEPT,
            stuck_after: STUCK_AFTER,
            set_apart_for: SET_APART_FOR,
            compression: COMPRESSION.to_owned(),
        }
    }
}

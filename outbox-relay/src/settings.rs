//! What the relay needs to know.

use crate::budget;
use saga_core::service::config::Place;
use sqlx::postgres::PgConnectOptions;
use std::{fmt, time::Duration};

/// A lease is this long: the time after which a stand-by takes over from an owner that was killed. Longer than a
/// long pause of a healthy process.
pub const LEASE: Duration = Duration::from_secs(10);

/// A statement that reads the outbox takes so long at most. It reads a bounded number of rows, from a cold disk if need
/// be.
pub const READING: Duration = Duration::from_secs(30);

/// Parked rows that are resolved are kept for so long, so that an operator can still see how each one ended.
pub const RESOLVED_KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Rows that no broker has taken for so long are stuck, and their topic is set apart while others flow. Longer than a
/// change of a partition's leader usually takes.
pub const STUCK_AFTER: Duration = Duration::from_secs(5);

/// A topic that refuses rows stays set apart until it has refused none for so long: each refusal costs a producer.
pub const SET_APART_FOR: Duration = Duration::from_secs(60);

/// Compression of record batches: cheap, and headers repeat themselves.
pub const COMPRESSION: &str = "lz4";

/// The relay's settings.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What to publish.
    pub outboxes: Vec<OutboxSettings>,
    /// `bootstrap.servers`.
    pub kafka_brokers: String,
    /// An outbox without a position begins with what is committed from now on.
    pub from_now: bool,
    /// An outbox that was published under another name begins from its first row.
    pub publish_again: bool,
    /// How long a lease is.
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

/// One outbox.
#[derive(Clone)]
pub struct OutboxSettings {
    /// Its name.
    pub name: String,
    /// The database that it is in.
    pub database: PgConnectOptions,
}

impl fmt::Debug for OutboxSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, database } = self;
        f.debug_struct("OutboxSettings").field("name", name).field("database", &Place(database)).finish()
    }
}

impl Settings {
    /// With the defaults.
    pub fn new(kafka_brokers: impl Into<String>, outboxes: Vec<OutboxSettings>) -> Self {
        Self {
            held: budget::default(outboxes.len()),
            outboxes,
            kafka_brokers: kafka_brokers.into(),
            from_now: false,
            publish_again: false,
            lease: LEASE,
            reading: READING,
            resolved_kept: RESOLVED_KEPT,
            stuck_after: STUCK_AFTER,
            set_apart_for: SET_APART_FOR,
            compression: COMPRESSION.to_owned(),
        }
    }
}

//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.
//!
//! In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`snapshot`], [`position`] | how far the outbox is published: two snapshots, and an id between them |
//! | `row`, [`budget`] | a row of the outbox; how many bytes of rows this process holds |
//! | `read` | which rows come next, page by page |
//! | `record` | what the outbox's database knows of publishing: progress, topics that are set apart, parked rows |
//! | `lease`, `anchor`, [`moved`], `epoch` | which replica publishes; whether the position holds in this database; what to run when it does not; what ids count in |
//! | [`outbox`], `upkeep`, `owner_error` | one outbox in this process; its partitions and resolved rows; why an owner stopped |
//! | `publish` | pages to Kafka, in order, many rows in flight; parked rows that are tried again |
//! | `own` | one owner's time; how a process comes to it, and what ends it |
//! | `control`, `loops`, `pending`, `progress`, `metric` | what operators want, and what they see |
//! | `database`, `topics`, `brokers` | bounded conversations with the outbox's database; questions to Kafka's brokers; whether they answer |
//! | [`settings`], [`config`] | what it needs to know |
//! | [`admin`], [`app`] | HTTP for operators; the parts put together |

#![warn(clippy::missing_errors_doc)]

pub mod admin;
mod anchor;
pub mod app;
mod brokers;
pub mod budget;
pub mod config;
mod control;
mod database;
mod epoch;
mod lease;
mod loops;
mod metric;
pub mod moved;
pub mod outbox;
mod own;
mod owner_error;
mod pending;
pub mod position;
mod progress;
mod publish;
mod read;
mod record;
mod row;
pub mod settings;
pub mod snapshot;
mod topics;
mod upkeep;

use outbox::Outbox;
pub use settings::{OutboxSettings, RelaySettings};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The relay: its outboxes, each with a task of its own.
#[derive(Clone)]
pub struct Relay {
    outboxes: Arc<[Arc<Outbox>]>,
    budget: Arc<budget::Budget>,
}

impl Relay {
    /// Makes the relay, which connects to nothing yet.
    ///
    /// # Errors
    /// librdkafka does not accept the settings.
    pub fn new(settings: &RelaySettings) -> Result<Self, rdkafka::error::KafkaError> {
        metric::describe();
        let budget = budget::Budget::new(settings.held, settings.outboxes.len());
        let made = settings.outboxes.iter().map(|outbox| Outbox::new(settings, outbox, &budget).map(Arc::new));
        let outboxes: Result<Vec<_>, _> = made.collect();
        Ok(Self { outboxes: outboxes?.into(), budget })
    }

    /// The outboxes, in the order of the settings.
    pub fn outboxes(&self) -> &[Arc<Outbox>] {
        &self.outboxes
    }

    /// Bytes of rows that are held now, and the most that ever were.
    pub fn held(&self) -> (usize, usize) {
        self.budget.held()
    }

    /// Publishes until `stop`; then hands over what it owns. A failing outbox is tried again and stops no other.
    pub async fn run(&self, stop: CancellationToken) {
        let running = self.outboxes.iter().map(|outbox| own::supervisor::supervise(outbox.clone(), stop.clone()));
        futures::future::join_all(running).await;
    }
}

/// Publishes until `stop`, without admin endpoints: for benches, tests, and programs that embed the relay.
///
/// ```no_run
/// use outbox_relay::{OutboxSettings, RelaySettings};
///
/// # async fn embedded() -> Result<(), Box<dyn std::error::Error>> {
/// let database = "postgres://orders@localhost/orders".parse()?;
/// let settings = RelaySettings::new("localhost:9092", vec![OutboxSettings { name: "orders".into(), database }]);
/// Ok(outbox_relay::run(settings, tokio_util::sync::CancellationToken::new()).await?)
/// # }
/// ```
///
/// # Errors
/// The same as of [`Relay::new`].
pub async fn run(settings: RelaySettings, stop: CancellationToken) -> Result<(), rdkafka::error::KafkaError> {
    Relay::new(&settings)?.run(stop).await;
    Ok(())
}

//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.
//!
//! In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`snapshot`], [`position`] | how far the outbox is published: two snapshots, and an id between them |
//! | `window`, `cursor` | which rows come next: the outbox between two snapshots, by id |
//! | `reader`, `nudges` | reads ahead, page by page |
//! | `stream`, `set_apart`, `shared` | the main stream; one for each topic that is set apart; what they share |
//! | `session` | one producer's life in a stream: the fate of each row, sending, and how a topic comes back (`asks`) |
//! | [`budget`] | how many bytes of rows this process holds |
//! | `record`, `producer`, `brokers` | a row as a record; the producer; whether the brokers answer |
//! | `flight`, `in_flight` | a page on its way; all that is on its way, and what Kafka acknowledged |
//! | `commit`, `batch_log` | records progress under the lease |
//! | `refusal`, `parking`, `pause`, `retry`, `retrying` | rows and topics that Kafka refuses |
//! | `anchor`, [`moved`], `epoch` | whether the position holds in this database; what to run when it does not; what ids count in |
//! | `lease`, [`outbox`], `owner`, `turns`, `supervisor` | which replica publishes; one outbox in this process; one owner's time; turns of owning; panics |
//! | `control`, `pending`, `gauges`, `metric`, `loops` | what operators want, and what they see |
//! | `upkeep` | partitions made ahead, resolved rows deleted |
//! | `database` | conversations with the outbox's database, each of them bounded |
//! | [`settings`], [`config`] | what it needs to know |
//! | [`admin`], [`app`] | HTTP for operators; the parts put together |

pub mod admin;
mod anchor;
pub mod app;
mod asks;
mod batch_log;
mod brokers;
pub mod budget;
mod commit;
pub mod config;
mod control;
mod cursor;
mod database;
mod epoch;
mod flight;
mod gauges;
mod in_flight;
mod lease;
mod loops;
mod metric;
pub mod moved;
mod nudges;
pub mod outbox;
mod owner;
mod owner_error;
mod parking;
mod pause;
mod pending;
pub mod position;
mod producer;
mod progress;
mod reader;
mod record;
mod refusal;
mod retry;
mod retrying;
mod row;
mod session;
mod set_apart;
pub mod settings;
mod shared;
pub mod snapshot;
mod stream;
mod supervisor;
mod topics;
mod turns;
mod upkeep;
mod window;

use outbox::Outbox;
pub use settings::{OutboxSettings, Settings};
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
    pub fn new(settings: &Settings) -> Result<Self, rdkafka::error::KafkaError> {
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
        let running = self.outboxes.iter().map(|outbox| supervisor::supervise(outbox.clone(), stop.clone()));
        futures::future::join_all(running).await;
    }
}

/// Publishes until `stop`, without admin endpoints: for benches, tests, and programs that embed the relay.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<(), rdkafka::error::KafkaError> {
    Relay::new(&settings)?.run(stop).await;
    Ok(())
}

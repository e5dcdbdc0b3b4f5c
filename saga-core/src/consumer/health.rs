//! Whether a consumer does its work: what health asks.
//!
//! [`Outage`] reports outages. What an operator has to set right (a missing table or right, clocks that differ) is kept
//! here for each partition that waits for it, and logged once for each.

use super::parking::Counts;
use crate::{
    clock::{self, DatabaseClock},
    outage::Outage,
};
use rdkafka::Statistics;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A consumer that has not polled for this long is stuck.
const POLL_MAX: Duration = Duration::from_secs(10);

/// A record may wait so long for a lock before health says so.
const LOCKED_MAX: Duration = Duration::from_secs(120);

/// What health asks. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHealth(pub(super) Arc<Pulse>);

impl ConsumerHealth {
    /// Fine, or why not. Fine means: a broker is connected, the consumer is a member of the group and polls, Kafka refuses it
    /// nothing, and its database answers. No partition waits for an operator, no record waits for a lock for two minutes, and
    /// the host's clock is the database's.
    ///
    /// # Errors
    /// In words, when it is not.
    pub fn check(&self) -> Result<(), String> {
        self.0.check_client()?;
        self.0.kafka.check()?;
        if let Some(reason) = self.0.lock().refused.clone() {
            return Err(reason);
        }
        self.0.database.check()?;
        if let Some(((topic, partition), reason)) = self.0.lock().waiting.first_key_value() {
            return Err(format!("partition {partition} of {topic} waits until this is set right: {reason}"));
        }
        if let Some(reason) = self.0.lock().locked.clone() {
            return Err(reason);
        }
        self.0.clock.check()?;
        if self.0.lock().assigned { Ok(()) } else { Err("no partitions have been assigned yet".into()) }
    }
}

/// The state behind [`ConsumerHealth`].
pub(super) struct Pulse {
    group: String,
    pub(super) kafka: Arc<Outage>,
    database: Arc<Outage>,
    pub(super) clock: Arc<DatabaseClock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    polled: Option<Instant>,
    assigned: bool,
    /// The partitions that wait for an operator, and what for.
    waiting: BTreeMap<(String, i32), String>,
    /// What Kafka refuses until an operator acts.
    refused: Option<String>,
    /// What records that are parked have been waiting for too long.
    locked: Option<String>,
}

impl Pulse {
    pub(super) fn new(group: &str, brokers: &str, pool: &sqlx::PgPool) -> Self {
        let database = Outage::of_database(pool);
        Self {
            group: group.into(),
            kafka: Outage::of_kafka(brokers),
            clock: DatabaseClock::of(database.dependency()),
            database,
            state: Mutex::default(),
        }
    }

    /// Takes what was counted of the consumer's parked records.
    pub(super) fn parked(&self, counts: Counts) {
        #[allow(clippy::cast_precision_loss)]
        let gauge = |name: &'static str, count: i64| {
            metrics::gauge!(name, "consumer" => self.group.clone()).set(count as f64);
        };
        gauge("inbox_parked", counts.parked);
        gauge("inbox_parked_locked", counts.locked);
        self.lock().locked = counts.longest.filter(|(_, since)| *since > LOCKED_MAX).map(|(reason, since)| {
            format!(
                "parked records that wait for locks: {}; the first, since {} s ago, {reason}",
                counts.locked,
                since.as_secs()
            )
        });
    }

    fn check_client(&self) -> Result<(), String> {
        match self.lock().polled {
            None => Err("it has not started".into()),
            Some(at) if clock::monotonic().saturating_duration_since(at) > POLL_MAX => {
                Err(format!("no poll for more than {} s", POLL_MAX.as_secs()))
            }
            Some(_) => Ok(()),
        }
    }

    pub(super) fn polled(&self) {
        self.lock().polled = Some(clock::monotonic());
    }

    pub(super) fn assigned(&self) {
        self.lock().assigned = true;
    }

    pub(super) fn lost(&self) {
        self.lock().assigned = false;
    }

    /// Takes what the client library says of its brokers and partitions.
    pub(super) fn statistics(&self, statistics: &Statistics) {
        self.connected(statistics.brokers.values().any(|broker| broker.state == "UP"));
        for (topic, statistics) in &statistics.topics {
            for (partition, statistics) in &statistics.partitions {
                if statistics.consumer_lag >= 0 {
                    #[allow(clippy::cast_precision_loss)]
                    self.lag(topic, *partition).set(statistics.consumer_lag as f64);
                }
            }
        }
    }

    /// Partitions are somebody else's now, and so is telling their lag.
    pub(super) fn gone(&self, partitions: &[(String, i32)]) {
        partitions.iter().for_each(|(topic, partition)| self.lag(topic, *partition).set(0.0));
    }

    fn lag(&self, topic: &str, partition: i32) -> metrics::Gauge {
        metrics::gauge!("consumer_lag", "group" => self.group.clone(), "topic" => topic.to_owned(),
            "partition" => partition.to_string())
    }

    pub(super) fn connected(&self, connected: bool) {
        match connected {
            true => self.kafka.working(),
            false => self.kafka.failing("no broker can be reached"),
        }
    }

    /// Kafka refuses something until an operator acts.
    pub(super) fn refused(&self, reason: String) {
        let mut state = self.lock();
        if state.refused.as_ref() != Some(&reason) {
            tracing::error!(
                group = self.group,
                reason,
                "the consumer waits until this is set right; nothing is given up"
            );
            state.refused = Some(reason);
        }
    }

    pub(super) fn is_refused(&self) -> bool {
        self.lock().refused.is_some()
    }

    /// Kafka refuses nothing any more.
    pub(super) fn served(&self) {
        if self.lock().refused.take().is_some() {
            tracing::info!(group = self.group, "the consumer goes on: what Kafka refused was set right");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one partition's worker reports. When it is dropped, the partition no longer waits here.
pub(super) struct Report {
    pub(super) pulse: Arc<Pulse>,
    pub(super) partition: (String, i32),
}

impl Report {
    /// The database cannot be used.
    pub(super) fn fails(&self, reason: &str) {
        self.pulse.database.failing(reason);
    }

    /// An operator has to set this right; nothing is counted or given up meanwhile.
    pub(super) fn is_misconfigured(&self, reason: &str) {
        let known = self.pulse.lock().waiting.insert(self.partition.clone(), reason.to_owned());
        if known.as_deref() != Some(reason) {
            let ((topic, partition), group) = (&self.partition, &self.pulse.group);
            tracing::error!(
                group,
                topic,
                partition,
                reason,
                "the partition waits until this is set right; nothing is given up"
            );
        }
    }

    /// The database did what it was asked.
    pub(super) fn works(&self) {
        self.pulse.database.working();
        if self.pulse.lock().waiting.remove(&self.partition).is_some() {
            let ((topic, partition), group) = (&self.partition, &self.pulse.group);
            tracing::info!(group, topic, partition, "the partition goes on: what it waited for was set right");
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.pulse.lock().waiting.remove(&self.partition);
    }
}

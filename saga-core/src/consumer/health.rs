//! Whether a consumer does its work: what readiness asks, and outages said once.

use crate::clock;
use rdkafka::Statistics;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A consumer that has not polled for this long is stuck.
const POLL_MAX: Duration = Duration::from_secs(10);

/// What readiness asks. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHealth(pub(super) Arc<Pulse>);

impl ConsumerHealth {
    /// Fine, or why not: connected to a broker, a member of the group, polling, and its database answers.
    ///
    /// # Errors
    /// In words, when it is not.
    pub fn check(&self) -> Result<(), String> {
        let state = self.0.lock();
        match &*state {
            State { polled: None, .. } => Err("it has not started".into()),
            State { polled: Some(at), .. } if clock::monotonic().saturating_duration_since(*at) > POLL_MAX => {
                Err(format!("no poll for more than {} s", POLL_MAX.as_secs()))
            }
            State { connected: Some(false), .. } => Err("no Kafka broker can be reached".into()),
            State { database: Some(reason), .. } => Err(format!("the database: {reason}")),
            State { assigned: false, .. } => Err("no partitions have been assigned yet".into()),
            _ => Ok(()),
        }
    }
}

/// The state behind [`ConsumerHealth`].
pub(super) struct Pulse {
    group: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    polled: Option<Instant>,
    /// Unknown until the first statistics.
    connected: Option<bool>,
    assigned: bool,
    /// Why the database does not answer.
    database: Option<String>,
}

impl Pulse {
    pub(super) fn new(group: &str) -> Self {
        Self { group: group.into(), state: Mutex::default() }
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
        let before = self.lock().connected.replace(connected);
        match (before, connected) {
            (None | Some(true), false) => {
                tracing::warn!(group = self.group, "no Kafka broker can be reached; waiting until one can");
            }
            (Some(false), true) => tracing::info!(group = self.group, "Kafka is there again"),
            (None | Some(true), true) | (Some(false), false) => {}
        }
    }

    pub(super) fn database_fails(&self, reason: &str) {
        if self.lock().database.replace(reason.to_owned()).is_none() {
            tracing::warn!(
                group = self.group,
                reason,
                "the database refused for now; the batch is repeated until it does not"
            );
        }
    }

    pub(super) fn database_answers(&self) {
        if self.lock().database.take().is_some() {
            tracing::info!(group = self.group, "the database answers again");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Whether a consumer does its work: what health asks.
//!
//! [`Outage`] reports outages. Faults that an operator has to set right (a missing table, clocks that differ) are kept
//! here for each partition, and logged once. The consumer's offset is compared here with each partition's end. That
//! shows what waits, since when it has not moved, and when the client has to be made anew.

mod reporter;

pub(super) use reporter::Reporter;

use super::{
    buffer::Buffer,
    ends::Ends,
    group_offsets::{Rewind, Start},
    parking::{ParkedCounts, Untried},
    partition_progress::{EndCheck, PartitionProgress, RestartPolicy},
    reach::Reach,
};
use crate::{
    clock::{self, DatabaseClock},
    outage::Outage,
    part::{Cause, HealthIssue, PartReport, WaitingWork},
};
use rdkafka::Statistics;
use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use tokio::sync::{Notify, watch};

/// A consumer that has not polled for this long is stuck.
const POLL_MAX: Duration = Duration::from_secs(10);
/// A group has given its members their partitions after so long, or there are none for this consumer.
const ASSIGNED_MAX: Duration = Duration::from_secs(30);

/// The health of one consumer. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHealth(pub(super) Arc<HealthState>);

impl ConsumerHealth {
    /// Fine, or why not. Fine means: a broker is connected, and the consumer is a member of the group and polls. Kafka
    /// refuses it nothing, its topics are there, and its database answers. No partition waits for an operator, and no
    /// record waits for a lock for two minutes. The host's clock agrees with the database's.
    ///
    /// # Errors
    /// In words, when it is not.
    pub fn check(&self) -> Result<(), String> {
        self.0.issue().map_or(Ok(()), |issue| Err(issue.reason))
    }

    /// What stands in the consumer's way, and what waits for it.
    pub fn report(&self) -> PartReport {
        PartReport { issue: self.0.issue(), waiting: self.0.waiting() }
    }

    /// Whether the consumer's topics have, or had, records: `None` until that is known.
    pub fn ever_had_records(&self) -> Option<bool> {
        let state = self.0.lock();
        let ends = state.places.values().map(|place| place.end);
        ends.fold(None, |any, end| Some(any.unwrap_or(false) || end? > 0))
    }
}

/// The state behind [`ConsumerHealth`].
pub(super) struct HealthState {
    group: String,
    pub(super) kafka: Arc<Outage>,
    database: Arc<Outage>,
    pub(super) clock: Arc<DatabaseClock>,
    state: Mutex<State>,
    /// The polling task is to make its client anew.
    anew: Notify,
}

#[derive(Default)]
struct State {
    began: Option<Instant>,
    polled: Option<Instant>,
    assigned: bool,
    /// The partitions that wait for an operator, and what for.
    waiting: BTreeMap<(String, i32), (HealthIssue, Instant)>,
    /// What Kafka refuses until an operator acts.
    refused: Option<HealthIssue>,
    /// The lock that parked records have been waiting for too long.
    locked: Option<HealthIssue>,
    /// What is wrong with topics, by their names.
    topics: BTreeMap<String, HealthIssue>,
    /// The partitions that are read here.
    places: BTreeMap<(String, i32), PartitionProgress>,
    /// Partitions that are to be read on from elsewhere than the group's offset.
    rewinds: BTreeMap<(String, i32), Rewind>,
    reach: Reach,
    /// The client is to be made anew, and has not been yet.
    ends: bool,
    restarts: RestartPolicy,
    /// The end of a partition is not known, for too long.
    unseen: Option<HealthIssue>,
    /// Why partitions that are assigned are not read.
    untaken: Option<HealthIssue>,
    /// The parked record that was due for longest, or unreadable, at the last look.
    untried: Option<i64>,
    /// Set when one record was that at two looks.
    forgotten: Option<HealthIssue>,
}

impl HealthState {
    pub(super) fn new(group: &str, brokers: &str, pool: &sqlx::PgPool) -> Self {
        let database = Outage::of_database(pool);
        Self {
            group: group.into(),
            kafka: Outage::of_kafka(brokers),
            clock: DatabaseClock::of(database.dependency()),
            database,
            state: Mutex::default(),
            anew: Notify::new(),
        }
    }

    /// Takes what was counted of the consumer's parked records.
    pub(super) fn parked(&self, counts: ParkedCounts) {
        #[allow(clippy::cast_precision_loss)]
        let gauge = |name: &'static str, count: i64| {
            metrics::gauge!(name, "consumer" => self.group.clone()).set(count as f64);
        };
        gauge("inbox_parked", counts.parked);
        gauge("inbox_parked_locked", counts.locked);
        gauge("inbox_parked_untried", counts.untried.as_ref().map_or(0, |untried| untried.count));
        let mut state = self.lock();
        state.locked = counts.waits_for_locks();
        // After an outage many records are due for long, and each look sees another one first.
        let before = std::mem::replace(&mut state.untried, counts.untried.as_ref().map(|untried| untried.id));
        let again = counts.untried.filter(|untried| before == Some(untried.id));
        state.forgotten = again.as_ref().map(Untried::issue);
    }

    fn issue(&self) -> Option<HealthIssue> {
        let client = self.client_issue().or_else(|| self.kafka.issue());
        let client = client.or_else(|| self.lock().refused.clone()).or_else(|| self.database.issue());
        client.or_else(|| self.partition_issue()).or_else(|| {
            let skewed = self.clock.check().err();
            skewed.map(|reason| HealthIssue::new(Cause::ClockSkew, reason)).or_else(|| self.assignment_issue())
        })
    }

    fn client_issue(&self) -> Option<HealthIssue> {
        match self.lock().polled {
            None => Some(HealthIssue::new(Cause::Starting, "it has not started")),
            Some(at) if clock::monotonic().saturating_duration_since(at) > POLL_MAX => {
                Some(HealthIssue::new(Cause::Fault, format!("no poll for more than {} s", POLL_MAX.as_secs())))
            }
            Some(_) => None,
        }
    }

    fn partition_issue(&self) -> Option<HealthIssue> {
        let state = self.lock();
        let waiting = state.waiting.iter().next().map(|((topic, partition), (issue, since))| HealthIssue {
            cause: issue.cause,
            reason: format!("partition {partition} of {topic} waits until this is set right: {}", issue.reason),
            since: Some(*since),
        });
        let waiting = waiting.or_else(|| state.topics.values().next().cloned()).or_else(|| state.unseen.clone());
        let waiting = waiting.or_else(|| state.untaken.clone());
        waiting.or_else(|| state.locked.clone()).or_else(|| state.forgotten.clone())
    }

    fn assignment_issue(&self) -> Option<HealthIssue> {
        let state = self.lock();
        let waits = state.began.map(|began| clock::monotonic().saturating_duration_since(began)).unwrap_or_default();
        let cause = if waits < ASSIGNED_MAX { Cause::Starting } else { Cause::Unassigned };
        (!state.assigned).then(|| HealthIssue::new(cause, "no partitions have been assigned yet"))
    }

    /// Since when the partition that stands still for longest does so, and how much waits in all of them.
    fn waiting(&self) -> Option<WaitingWork> {
        let state = self.lock();
        let waiting: Vec<WaitingWork> = state.places.values().filter_map(|place| place.waiting).collect();
        let still_since = waiting.iter().map(|waiting| waiting.still_since).min()?;
        let items = waiting.iter().filter_map(|waiting| waiting.items).sum();
        let oldest: Option<OffsetDateTime> = waiting.iter().filter_map(|waiting| waiting.oldest).min();
        Some(WaitingWork { items: Some(items), oldest, still_since })
    }

    /// A new client begins: the group gives it its partitions.
    pub(super) fn begins(&self, now: Instant) {
        let mut state = self.lock();
        (state.began, state.ends) = (Some(now), false);
        state.reach.begins();
    }

    pub(super) fn polled(&self) {
        self.lock().polled = Some(clock::monotonic());
    }

    /// Does work that is bounded and takes longer than a poll may.
    pub(super) async fn busy<T>(&self, work: impl Future<Output = T>) -> T {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = second.tick() => self.polled(),
            }
        }
    }

    pub(super) fn assigned(&self) {
        self.lock().assigned = true;
    }

    /// Partitions that were assigned are read, or are not, for the reason in `but`.
    pub(super) fn takes(&self, but: Option<&str>) {
        let mut state = self.lock();
        let since = state.untaken.take().and_then(|untaken| untaken.since).or_else(|| Some(clock::monotonic()));
        state.untaken = but.map(|why| {
            let reason = format!("the brokers do not say where the group has come to in its partitions: {why}");
            HealthIssue { since, ..HealthIssue::new(Cause::KafkaAway, reason) }
        });
    }

    pub(super) fn lost(&self) {
        self.lock().assigned = false;
    }

    /// A partition is read here from now on.
    pub(super) fn reads(
        &self,
        topic: &str,
        partition: i32,
        buffer: Arc<Buffer>,
        done: watch::Receiver<i64>,
        start: &Start,
    ) {
        self.lock().places.insert((topic.to_owned(), partition), PartitionProgress::new(buffer, done, start));
    }

    /// The partitions that are read here, whose ends the brokers are asked for now.
    pub(super) fn asks(&self) -> Vec<(String, i32)> {
        let mut state = self.lock();
        state.places.values_mut().for_each(|place| place.reached = place.fetched);
        state.places.keys().cloned().collect()
    }

    /// Compares what the brokers said with what was reached before they were asked.
    pub(super) fn compare(&self, ends: Ends, now: Instant) {
        let away = self.kafka.issue().is_some();
        let mut state = self.lock();
        let State { places, restarts, refused, rewinds, .. } = &mut *state;
        let mut anew = None;
        for (partition, (_, end)) in ends.ranges {
            let Some(place) = places.get_mut(&partition) else { continue };
            let found = place.compare(end, now);
            restarts.moves(&partition, place.done(), place.waiting.is_none());
            // A new client cannot help while Kafka is away, refuses, or has trouble with the topic.
            let waits = away || refused.is_some() || ends.issues.contains_key(&partition.0);
            let why = match found {
                EndCheck::Shrunk if !away => {
                    rewinds.insert(partition.clone(), Rewind { of: place.id.clone(), tail: Some((end, place.read())) });
                    "it ends before what was read of it"
                }
                EndCheck::Wedged if !waits && restarts.ends(&partition, place.done(), now) => {
                    "there are records that the client does not fetch"
                }
                _ => continue,
            };
            anew = Some((partition, why));
        }
        state.topics = ends.issues;
        let is_cut_off = state.reach.answered_another(now);
        drop(state);
        self.missed(ends.missed);
        if is_cut_off {
            self.make_anew(None, None, "the brokers answer another client, and this one reaches none");
        }
        if let Some(((topic, partition), why)) = anew {
            self.make_anew(Some(&topic), Some(partition), why);
        }
    }

    /// The brokers did not answer where the partitions end: what was known of those stays.
    pub(super) fn unanswered(&self, partitions: Vec<(String, i32)>, reason: &str) {
        self.lock().reach.unanswered();
        self.missed(partitions.into_iter().map(|partition| (partition, reason.to_owned())).collect());
    }

    /// Takes note of the partitions whose ends the brokers did not say, and why: what was known of those stays.
    pub(super) fn missed(&self, partitions: BTreeMap<(String, i32), String>) {
        let mut state = self.lock();
        let mut unseen = None;
        for (partition, reason) in partitions {
            let missed = state.places.get_mut(&partition).is_some_and(PartitionProgress::misses);
            if missed && unseen.is_none() {
                let (topic, partition) = partition;
                unseen = Some(format!("the brokers do not say where partition {partition} of {topic} ends: {reason}"));
            }
        }
        state.unseen = unseen.map(|reason| match state.unseen.take() {
            Some(known) => HealthIssue { reason, ..known },
            None => HealthIssue { since: Some(clock::monotonic()), ..HealthIssue::new(Cause::KafkaAway, reason) },
        });
    }

    /// The client logs which topic is there under this name, and which one was there before as far as it knows. When it
    /// is another one than the one that was read, its records have not been read. A record that comes twice changes
    /// nothing.
    pub(super) fn topic_is(&self, topic: &str, was: Option<&str>, is: &str) {
        let mut state = self.lock();
        let State { places, rewinds, .. } = &mut *state;
        let mut why = None;
        for (partition, place) in places.iter().filter(|((of, _), _)| of == topic) {
            let known = place.id.as_ref().map(|id| id.topic.as_str()).or(was);
            if known == Some(is) && place.id.is_some() {
                continue;
            }
            // Where no id was known, the group's offset shows whether it is of this topic.
            why = Some(if known.is_some() { "it was deleted and made again" } else { "its id was not known" });
            if known.is_some() {
                rewinds.insert(partition.clone(), Rewind { of: place.id.clone(), tail: None });
            }
        }
        drop(state);
        if let Some(why) = why {
            self.make_anew(Some(topic), None, why);
        }
    }

    /// Has the polling task make its client anew.
    pub(super) fn make_anew(&self, topic: Option<&str>, partition: Option<i32>, why: &str) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.ends, true) {
            return;
        }
        state.restarts.made_anew(clock::monotonic());
        drop(state);
        metrics::counter!("consumer_made_anew_total", "group" => self.group.clone()).increment(1);
        tracing::warn!(group = self.group, topic, partition, why, "the client is made anew");
        self.anew.notify_one();
    }

    /// Waits until the client has to be made anew.
    pub(super) async fn anew(&self) {
        self.anew.notified().await;
    }

    /// The part of a partition that was read and is no longer there.
    pub(super) fn rewind(&self, topic: &str, partition: i32) -> Option<Rewind> {
        self.lock().rewinds.get(&(topic.to_owned(), partition)).cloned()
    }

    /// The partition is read on from where it has to be.
    pub(super) fn rewound(&self, topic: &str, partition: i32) {
        self.lock().rewinds.remove(&(topic.to_owned(), partition));
    }

    /// Takes what the client library says of its brokers and partitions.
    pub(super) fn statistics(&self, statistics: &Statistics) {
        self.connected(statistics.brokers.values().any(|broker| broker.state == "UP"));
        let mut state = self.lock();
        for (topic, statistics) in &statistics.topics {
            for (partition, statistics) in &statistics.partitions {
                if let Some(place) = state.places.get_mut(&(topic.clone(), *partition)) {
                    place.fetched = statistics.next_offset;
                }
                if statistics.consumer_lag >= 0 {
                    #[allow(clippy::cast_precision_loss)]
                    self.lag(topic, *partition).set(statistics.consumer_lag as f64);
                }
            }
        }
    }

    /// Other members have these partitions now, and report their lag.
    pub(super) fn gone(&self, partitions: &[(String, i32)]) {
        let mut state = self.lock();
        for (topic, partition) in partitions {
            self.lag(topic, *partition).set(0.0);
            state.places.remove(&(topic.clone(), *partition));
        }
    }

    /// The client is gone, and with it all its partitions.
    pub(super) fn all_gone(&self) {
        let held: Vec<_> = self.lock().places.keys().cloned().collect();
        self.gone(&held);
        self.lost();
    }

    fn lag(&self, topic: &str, partition: i32) -> metrics::Gauge {
        metrics::gauge!("consumer_lag", "group" => self.group.clone(), "topic" => topic.to_owned(),
            "partition" => partition.to_string())
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected_at(connected, clock::monotonic());
    }

    pub(super) fn connected_at(&self, connected: bool, now: Instant) {
        self.lock().reach.connected(connected, now);
        match connected {
            true => self.kafka.working(),
            false => self.kafka.failing("no broker can be reached"),
        }
    }

    /// Kafka refuses something until an operator acts.
    pub(super) fn refused(&self, cause: Cause, reason: String) {
        let issue = HealthIssue::new(cause, reason);
        let mut state = self.lock();
        if state.refused.as_ref().is_none_or(|refused| refused.reason != issue.reason) {
            tracing::error!(
                group = self.group,
                reason = issue.reason,
                "the consumer waits until this is set right; nothing is given up"
            );
            let since = Some(clock::monotonic());
            state.refused = Some(HealthIssue { since, ..issue });
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

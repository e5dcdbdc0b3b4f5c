//! How far a partition is, compared with where it ends: what waits in it, and when its client has to be made anew.

use super::{
    buffer::Buffer,
    group_offsets::{Start, TopicId},
};
use crate::part::{Movement, WaitingWork};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// A client that has fetched nothing for so long, although there are records and room for them, is made anew.
const WEDGED_AFTER: Duration = Duration::from_secs(10);
/// How long a client that was made anew is given before it is made anew again: it has to join the group. The time
/// doubles each time that a new client did not help, as all other partitions of the member wait meanwhile.
const ANEW_EVERY: Duration = Duration::from_secs(30);
const ANEW_EVERY_MAX: Duration = Duration::from_secs(3600);
/// How many looks in succession may fail before health reports that a partition's end is not known.
const MISSES_MAX: u32 = 5;

/// How far one partition is.
pub(super) struct PartitionProgress {
    buffer: Arc<Buffer>,
    /// The offset after the records that are done; negative until one is.
    done: watch::Receiver<i64>,
    /// The partition's topic when reading it began; `None` where that is not known.
    pub(super) id: Option<TopicId>,
    /// The offset that the client fetches next; negative while it does not know.
    pub(super) fetched: i64,
    /// The value of `fetched` before the brokers were asked for the partition's end. No partition ends before that,
    /// unless it lost its tail.
    pub(super) reached: i64,
    pub(super) end: Option<i64>,
    /// The movement of what is done, and of what is fetched while nothing is in hand.
    movement: Movement<(i64, Option<i64>)>,
    pub(super) waiting: Option<WaitingWork>,
    /// How often in succession it was not known where the partition ends.
    misses: u32,
}

/// What a comparison found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EndCheck {
    /// Nothing is wrong that the client does not cope with.
    Fine,
    /// The partition ends before what was read of it.
    Shrunk,
    /// There are records and room for them, and the client does not fetch.
    Wedged,
}

impl PartitionProgress {
    pub(super) fn new(buffer: Arc<Buffer>, done: watch::Receiver<i64>, start: &Start) -> Self {
        Self {
            buffer,
            done,
            id: start.id.clone(),
            fetched: -1,
            reached: -1,
            end: None,
            movement: Movement::default(),
            waiting: None,
            misses: 0,
        }
    }

    pub(super) fn done(&self) -> i64 {
        *self.done.borrow()
    }

    /// How far the partition has been read: no offset beyond that is of this process.
    pub(super) fn read(&self) -> i64 {
        self.done().max(self.fetched).max(self.buffer.reached().0.unwrap_or_default())
    }

    pub(super) fn compare(&mut self, end: i64, now: Instant) -> EndCheck {
        self.misses = 0;
        self.end = Some(end);
        let (pushed, oldest) = self.buffer.reached();
        let done = self.done();
        let in_hand = pushed.map_or(0, |pushed| pushed.saturating_sub(done.max(0)).max(0));
        let unfetched = if self.fetched < 0 { end } else { (end - self.fetched).max(0) };
        if in_hand == 0 && unfetched == 0 {
            self.movement.rests();
            self.waiting = None;
            return if self.reached > end { EndCheck::Shrunk } else { EndCheck::Fine };
        }
        // Records that only arrive are not done: those that trickle in behind one that hangs move nothing.
        let fetched = (in_hand == 0).then_some(self.fetched);
        let still_since = self.movement.waits_at((done, fetched), now);
        let items = u64::try_from(unfetched).unwrap_or_default();
        let items = items.saturating_add(u64::try_from(if done < 0 { 0 } else { in_hand }).unwrap_or_default());
        self.waiting = Some(WaitingWork { items: Some(items.max(1)), oldest, still_since });
        let still = now.saturating_duration_since(still_since);
        if in_hand == 0 && still >= WEDGED_AFTER { EndCheck::Wedged } else { EndCheck::Fine }
    }

    /// The brokers did not answer where the partition ends: what was known of it stays. Returns whether that has been
    /// so for too long.
    pub(super) fn misses(&mut self) -> bool {
        self.misses = self.misses.saturating_add(1);
        self.misses >= MISSES_MAX
    }
}

/// Whether a client that does not fetch is made anew.
#[derive(Default)]
pub(super) struct RestartPolicy {
    last: Option<Instant>,
    restarted: BTreeMap<(String, i32), RestartedPartition>,
}

/// A partition for which a client was made anew.
struct RestartedPartition {
    /// The offset after what was done then.
    done: i64,
    until: Instant,
    pause: Duration,
}

impl RestartPolicy {
    /// The partition moves again, or nothing waits in it.
    pub(super) fn moves(&mut self, partition: &(String, i32), done: i64, rests: bool) {
        if self.restarted.get(partition).is_some_and(|restarted| rests || done > restarted.done) {
            self.restarted.remove(partition);
        }
    }

    /// Whether the client is made anew now, because it does not fetch this partition.
    pub(super) fn ends(&mut self, partition: &(String, i32), done: i64, now: Instant) -> bool {
        let before = self.restarted.get(partition);
        if self.last.is_some_and(|last| now < last + ANEW_EVERY)
            || before.is_some_and(|restarted| now < restarted.until)
        {
            return false;
        }
        let pause = before.map_or(ANEW_EVERY, |restarted| (restarted.pause * 2).min(ANEW_EVERY_MAX));
        self.restarted.insert(partition.clone(), RestartedPartition { done, until: now + pause, pause });
        self.last = Some(now);
        true
    }

    /// A client was made anew for another reason.
    pub(super) fn made_anew(&mut self, now: Instant) {
        self.last = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        buffer::PushResult,
        ends::Ends,
        group_offsets::Rewind,
        health::{ConsumerHealth, HealthState},
        record::Raw,
    };
    use super::*;
    use crate::{
        clock,
        part::{Cause, HealthIssue},
    };
    use futures::FutureExt;
    use rdkafka::{
        Statistics,
        statistics::{Broker, Partition, Topic},
    };

    fn begins_in(topic: &str) -> Start {
        Start { id: Some(TopicId { cluster: "c".into(), topic: topic.into() }), ..Start::default() }
    }

    /// Reads partition 0 of `t`, whose id is `a`, up to `done`.
    fn state(done: i64) -> Arc<HealthState> {
        let pool = sqlx::PgPool::connect_lazy("postgres://nobody@localhost/places").unwrap();
        let state = HealthState::new("group", "localhost:1", &pool);
        let start = begins_in("a");
        state.reads("t", 0, Arc::new(Buffer::new(4, || {})), watch::channel(done).1, &start);
        Arc::new(state)
    }

    fn ends(end: i64, issue: Option<HealthIssue>) -> Ends {
        let mut ends = Ends::default();
        ends.ranges.insert(("t".into(), 0), (0, end));
        ends.issues.extend(issue.map(|issue| ("t".into(), issue)));
        ends
    }

    #[tokio::test]
    async fn a_client_is_not_replaced_for_what_an_operator_has_to_set_right() {
        let (state, start) = (state(-1), clock::monotonic());
        let after = |seconds| start + Duration::from_secs(seconds);
        let anew = || state.anew().now_or_never().is_some();
        state.refused(Cause::KafkaForbidden, "no Read".into());
        for seconds in [0, 20, 40] {
            state.compare(ends(10, None), after(seconds));
            assert!(!anew(), "it is refused");
        }
        state.served();
        let missing = || Some(HealthIssue::new(Cause::Leaderless, "no leader"));
        state.compare(ends(10, missing()), after(60));
        assert!(!anew(), "another partition has no leader");
        state.compare(ends(10, None), after(80));
        assert!(anew());
    }

    #[tokio::test]
    async fn a_client_that_alone_reaches_no_broker_is_replaced() {
        let pool = sqlx::PgPool::connect_lazy("postgres://nobody@localhost/places").unwrap();
        // Brokers of its own: an outage of Kafka is one for all consumers of a process.
        let (state, start) = (HealthState::new("group", "localhost:2", &pool), clock::monotonic());
        let replaced = (0..20).map(|n| start + Duration::from_secs(n)).find(|&now| {
            state.connected_at(false, now);
            state.compare(ends(5, None), now);
            state.anew().now_or_never().is_some()
        });
        assert_eq!(replaced, Some(start + Duration::from_secs(10)));
    }

    #[tokio::test]
    async fn a_topic_under_another_id_replaces_its_client_once() {
        let state = state(5);
        let anew = || state.anew().now_or_never().is_some();
        state.topic_is("t", None, "a");
        state.topic_is("another", Some("a"), "b");
        assert!(!anew());
        state.topic_is("t", Some("a"), "b");
        assert!(anew());
        state.topic_is("t", Some("a"), "b");
        assert!(!anew(), "that client is on its way out");
        assert!(state.rewind("t", 0).is_some() && state.rewind("another", 0).is_none());
    }

    #[tokio::test]
    async fn a_topic_of_unknown_id_that_is_made_again_is_read_from_its_begin() {
        let state = state(5);
        state.reads("u", 0, Arc::new(Buffer::new(4, || {})), watch::channel(5).1, &Start::default());
        // A new client logs this of each topic: it does not know which one it was before.
        state.topic_is("u", None, "a");
        assert!(state.anew().now_or_never().is_some() && state.rewind("u", 0).is_none());
        state.begins(clock::monotonic());
        state.topic_is("u", Some("a"), "b");
        assert!(state.anew().now_or_never().is_some());
        assert_eq!(state.rewind("u", 0), Some(Rewind { of: None, tail: None }));
    }

    #[tokio::test]
    async fn while_a_client_is_replaced_health_says_that_it_starts() {
        let (state, now) = (state(5), clock::monotonic());
        let health = ConsumerHealth(Arc::clone(&state));
        let issue = || health.report().issue.unwrap();
        assert_eq!(issue().reason, "it has not started");
        let polled = async {
            while issue().reason == "it has not started" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), state.busy(polled)).await.unwrap();
        state.begins(now.checked_sub(Duration::from_secs(60)).unwrap());
        assert_eq!(issue().cause, Cause::Unassigned);
        state.begins(now);
        assert_eq!(issue().cause, Cause::Starting);
    }

    #[tokio::test]
    async fn ends_that_stay_unknown_are_a_trouble_and_what_waited_still_waits() {
        let (state, now) = (state(5), clock::monotonic());
        let health = ConsumerHealth(Arc::clone(&state));
        state.polled();
        state.assigned();
        state.compare(ends(10, None), now);
        let missed = || [(("t".to_owned(), 0), "timed out".to_owned())].into();
        (1..MISSES_MAX).for_each(|_| state.missed(missed()));
        assert!(health.report().issue.is_none() && health.report().waiting.is_some());
        state.missed(missed());
        let report = health.report();
        assert!(report.issue.unwrap().reason.contains("where partition 0 of t ends: timed out"));
        assert!(report.waiting.is_some());
        state.compare(ends(10, None), now);
        assert!(health.report().issue.is_none());
    }

    /// Statistics in which the client fetches `next_offset` next of the first partitions of `t`.
    fn fetched(partitions: i32, next_offset: i64) -> Statistics {
        let mut said = Statistics::default();
        said.brokers.insert("b".into(), Broker { state: "UP".into(), ..Broker::default() });
        let partition = |partition| Partition { partition, next_offset, ..Partition::default() };
        let partitions = (0..partitions).map(|n| (n, partition(n))).collect();
        said.topics.insert("t".into(), Topic { partitions, ..Topic::default() });
        said
    }

    #[tokio::test]
    async fn records_that_keep_arriving_do_not_hide_that_none_is_done() {
        let (state, start) = (state(5), clock::monotonic());
        let buffer = Arc::new(Buffer::new(1_000, || {}));
        let (done, is_done) = watch::channel(5);
        state.reads("t", 0, Arc::clone(&buffer), is_done, &Start::default());
        let still_since = |seconds: u32| {
            let (offset, now) = (6 + i64::from(seconds), start + Duration::from_secs(seconds.into()));
            let mut record = Raw::default();
            record.offset = offset - 1;
            assert_eq!(buffer.push(record), PushResult::Accepted);
            state.statistics(&fetched(1, offset));
            state.compare(ends(offset, None), now);
            let waiting = ConsumerHealth(Arc::clone(&state)).report().waiting.expect("records are in hand");
            waiting.still_since.duration_since(start).as_secs()
        };
        assert_eq!([0, 20, 40].map(still_since), [0; 3], "one arrives at each look, and none is done");
        done.send_replace(7);
        assert_eq!(still_since(50), 50);
    }

    #[tokio::test]
    async fn only_the_partition_that_lost_its_tail_is_read_again() {
        let (state, now) = (state(10), clock::monotonic());
        let start = begins_in("a");
        state.reads("t", 1, Arc::new(Buffer::new(4, || {})), watch::channel(10).1, &start);
        state.statistics(&fetched(2, 10));
        state.asks();
        state.compare(ends(8, None), now);
        assert!(state.anew().now_or_never().is_some());
        assert_eq!(state.rewind("t", 0).unwrap().tail, Some((8, 10)));
        assert_eq!(state.rewind("t", 1), None);
    }

    #[test]
    fn a_client_that_it_does_not_help_to_replace_is_replaced_ever_more_rarely() {
        let (start, partition) = (clock::monotonic(), ("t".to_owned(), 0));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut restarts = RestartPolicy::default();
        let replaced: Vec<u64> = (0..1000).filter(|second| restarts.ends(&partition, 5, at(*second))).collect();
        assert_eq!(replaced, [0, 30, 90, 210, 450, 930]);
        // Offsets that were done before do not count, those done since then do.
        restarts.moves(&partition, 5, false);
        assert!(!restarts.ends(&partition, 5, at(1000)));
        restarts.moves(&partition, 6, false);
        assert!(restarts.ends(&partition, 6, at(1000)));
    }
}

//! All that is on its way to Kafka: one queue of pages and marks, in the order in which they are to be recorded.
//!
//! A row counts as published only with its delivery report. Reports come in order within a partition and in no order
//! across them. So a page is complete when all its rows are, and progress is what lies before the first row that is
//! not.

use crate::{
    budget::Held,
    position::Position,
    publish::flight::{Flight, FlightKind, RowDecisions, RowState},
    record::commit::Recordable,
};
use rdkafka::types::RDKafkaErrorCode;
use saga_core::clock;
use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// The most rows of a page, as bits of a delivery tag.
const ROW_BITS: u32 = 20;

/// The number of one row in flight: it travels through librdkafka as a bare number, so that a report allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeliveryTag(pub(crate) usize);

impl DeliveryTag {
    pub(crate) fn new(flight: usize, row: usize) -> Self {
        debug_assert!(row < 1 << ROW_BITS);
        Self(flight << ROW_BITS | row)
    }

    fn flight(self) -> usize {
        self.0 >> ROW_BITS
    }

    pub(crate) fn row(self) -> usize {
        self.0 & ((1 << ROW_BITS) - 1)
    }
}

/// The queue, which the sender and the producer's polling thread share.
#[derive(Default)]
pub(crate) struct InFlight {
    queue: Mutex<Queue>,
    /// Rows that the producer has and that are neither acknowledged nor refused.
    sent: AtomicUsize,
    /// Whether each report wakes the sender, and not only the last one of a page.
    eager: AtomicBool,
    /// Signals that a page is complete, or that a row was refused.
    pub(crate) changed: Notify,
}

#[derive(Default)]
struct Queue {
    /// The number of the first of `flights`.
    first: usize,
    flights: VecDeque<Flight>,
    rows: usize,
    refused: Vec<(DeliveryTag, RDKafkaErrorCode)>,
    /// For each topic, the earliest open row, and since when it has been that one.
    earliest: HashMap<String, (DeliveryTag, Instant)>,
    /// The room of flights that were given up: the producer has their rows until it is gone, and this goes with it.
    given_up: Vec<Held>,
}

/// A row that Kafka refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RefusedRow {
    pub(crate) id: i64,
    pub(crate) topic: String,
    pub(crate) code: RDKafkaErrorCode,
}

/// Rows that the producer has had for too long.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// The topics of these rows.
    pub(crate) topics: BTreeSet<String>,
    /// Whether Kafka has acknowledged rows of other topics that were sent later.
    pub(crate) others_flow: bool,
}

impl Queue {
    fn flight(&mut self, number: usize) -> Option<&mut Flight> {
        number.checked_sub(self.first).and_then(|at| self.flights.get_mut(at))
    }

    /// For each topic, the row that the producer has had for longest, and when it got it.
    fn earliest(&self) -> Vec<(String, DeliveryTag, Instant)> {
        let mut found: Vec<(String, DeliveryTag, Instant)> = Vec::new();
        let mut topics = HashSet::new();
        for (at, flight) in self.flights.iter().enumerate() {
            // Only the first row of a topic in one flight is looked up.
            let mut seen = vec![false; flight.topics.len()];
            for (index, row) in flight.rows[..flight.given].iter().enumerate() {
                if row.state != RowState::Open || std::mem::replace(&mut seen[row.topic], true) {
                    continue;
                }
                let topic = &flight.topics[row.topic];
                if topics.insert(topic) {
                    found.push((topic.clone(), DeliveryTag::new(self.first + at, index), flight.given_at));
                }
            }
        }
        found
    }

    /// Sets the state of a row; returns whether its flight is complete with it.
    fn settle(&mut self, tag: DeliveryTag, state: RowState) -> bool {
        let Some(flight) = self.flight(tag.flight()) else { return false };
        let row = &mut flight.rows[tag.row()];
        if row.state != RowState::Open {
            return false;
        }
        row.state = state;
        flight.open -= 1;
        flight.open == 0
    }
}

/// The remains of a queue that is given up.
#[derive(Default)]
pub(crate) struct GivenUp {
    /// The first page's acknowledged beginning, which may still be recorded, and the position behind it.
    pub(crate) beginning: Option<(Recordable, Option<Position>)>,
    /// Rows behind that which were acknowledged all the same, by topic.
    pub(crate) beyond: HashMap<String, HashSet<i64>>,
}

impl InFlight {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a flight that is about to be sent; returns its number. It is not complete before it is sealed: its last
    /// row may be acknowledged while the sender still has it in hand.
    pub(crate) fn open(&self, flight: Flight) -> usize {
        let mut queue = self.queue();
        queue.rows += flight.rows.len();
        queue.flights.push_back(flight);
        queue.first + queue.flights.len() - 1
    }

    /// Seals a flight: the sender is done with it, whether or not it came to its end.
    pub(crate) fn seal(&self, number: usize, decided: RowDecisions) {
        let mut queue = self.queue();
        if let Some(flight) = queue.flight(number) {
            flight.decided = decided;
            flight.sealed = true;
            if flight.open == 0 {
                self.changed.notify_one();
            }
        }
    }

    /// Puts a mark behind all that is in flight.
    pub(crate) fn mark(&self, progress: Recordable) {
        let number = self.open(Flight::empty(FlightKind::Mark(progress)));
        self.seal(number, RowDecisions::default());
    }

    /// Takes the first flight if it is complete.
    pub(crate) fn take_complete(&self) -> Option<Flight> {
        let mut queue = self.queue();
        queue.flights.front().filter(|flight| flight.open == 0 && flight.sealed)?;
        let flight = queue.flights.pop_front()?;
        queue.first += 1;
        queue.rows -= flight.rows.len();
        Some(flight)
    }

    /// How many rows are in flight.
    pub(crate) fn rows(&self) -> usize {
        self.queue().rows
    }

    /// Adds room that the flight of a row takes.
    pub(crate) fn hold(&self, tag: DeliveryTag, held: Held) {
        if let Some(flight) = self.queue().flight(tag.flight()) {
            match &mut flight.held {
                Some(room) => room.join(held),
                room @ None => *room = Some(held),
            }
        }
    }

    /// Sets whether every report wakes the sender, or only a complete page does.
    pub(crate) fn set_eager(&self, eager: bool) {
        self.eager.store(eager, Ordering::SeqCst);
    }

    /// Counts a row that the producer is about to get.
    pub(crate) fn sending(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes a row out of the count that the producer did not take.
    pub(crate) fn not_sent(&self) {
        self.sent.fetch_sub(1, Ordering::SeqCst);
    }

    /// Records that the producer gave a row up because the session wanted that.
    pub(crate) fn purged(&self) {
        self.sent.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify_one();
    }

    /// Records that the sender has gone through the first `rows` rows of a flight.
    pub(crate) fn given(&self, number: usize, rows: usize) {
        if let Some(flight) = self.queue().flight(number) {
            (flight.given, flight.given_at) = (rows, clock::monotonic());
        }
    }

    /// The topics of which the producer has had the same row as the earliest for longer than `patience`. A topic that
    /// is slow is none of them: its earliest row is another from one look to the next.
    pub(crate) fn stuck(&self, patience: Duration) -> Stuck {
        self.stuck_at(clock::monotonic(), patience)
    }

    fn stuck_at(&self, now: Instant, patience: Duration) -> Stuck {
        let mut queue = self.queue();
        let mut stuck = Stuck::default();
        let mut given_at: Option<Instant> = None;
        let mut earliest = HashMap::new();
        for (topic, tag, given) in queue.earliest() {
            let since = match queue.earliest.get(&topic) {
                Some((before, since)) if *before == tag => *since,
                Some(_) => now,
                None => given,
            };
            if now.saturating_duration_since(since) >= patience {
                given_at = Some(given_at.map_or(given, |at| at.min(given)));
                stuck.topics.insert(topic.clone());
            }
            earliest.insert(topic, (tag, since));
        }
        queue.earliest = earliest;
        let Some(given_at) = given_at else { return stuck };
        stuck.others_flow = queue.flights.iter().filter(|flight| flight.given_at >= given_at).any(|flight| {
            let acknowledged = flight.rows.iter().filter(|row| row.state == RowState::Acknowledged);
            acknowledged.into_iter().any(|row| !stuck.topics.contains(&flight.topics[row.topic]))
        });
        stuck
    }

    /// How many rows of other topics than these the producer has.
    pub(crate) fn sent_besides(&self, topics: &BTreeSet<String>) -> usize {
        let queue = self.queue();
        let of = |flight: &Flight| {
            let open = flight.rows[..flight.given].iter().filter(|row| row.state == RowState::Open);
            open.filter(|row| !topics.contains(&flight.topics[row.topic])).count()
        };
        queue.flights.iter().map(of).sum()
    }

    /// How many rows the producer has.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }

    /// Records that Kafka has acknowledged the row.
    pub(crate) fn delivered(&self, tag: DeliveryTag) {
        let complete = self.queue().settle(tag, RowState::Acknowledged);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        if complete || self.eager.load(Ordering::SeqCst) {
            self.changed.notify_one();
        }
    }

    /// Records that the row needs nothing more, and that the producer does not get it.
    pub(crate) fn passed(&self, tag: DeliveryTag) {
        self.settled(tag, RowState::Passed);
    }

    /// Records that Kafka acknowledged the row in an earlier session.
    pub(crate) fn known(&self, tag: DeliveryTag) {
        self.settled(tag, RowState::Known);
    }

    fn settled(&self, tag: DeliveryTag, state: RowState) {
        if self.queue().settle(tag, state) {
            self.changed.notify_one();
        }
    }

    /// Records that Kafka refused the row, in a report.
    pub(crate) fn failed(&self, tag: DeliveryTag, code: RDKafkaErrorCode) {
        self.refused_at_once(tag, code);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify_one();
    }

    /// Records that the producer refused the row on the spot.
    pub(crate) fn refused_at_once(&self, tag: DeliveryTag, code: RDKafkaErrorCode) {
        self.queue().refused.push((tag, code));
    }

    /// How many refusals are recorded.
    pub(crate) fn refusals(&self) -> usize {
        self.queue().refused.len()
    }

    /// The rows of the outbox that were refused, the earliest first.
    pub(crate) fn refused(&self) -> Vec<RefusedRow> {
        let mut queue = self.queue();
        let mut refused = queue.refused.clone();
        refused.sort_unstable_by_key(|(tag, _)| *tag);
        let of = |(tag, code): (DeliveryTag, RDKafkaErrorCode)| {
            let flight = queue.flight(tag.flight()).filter(|flight| flight.is_page())?;
            let row = &flight.rows[tag.row()];
            Some(RefusedRow { id: row.id, topic: flight.topics[row.topic].clone(), code })
        };
        refused.into_iter().filter_map(of).collect()
    }

    /// The first row that was refused, and its error. The id is `None` if its flight is gone.
    pub(crate) fn failure(&self) -> Option<(Option<i64>, RDKafkaErrorCode)> {
        let mut queue = self.queue();
        let (tag, code) = *queue.refused.iter().min_by_key(|(tag, _)| *tag)?;
        Some((queue.flight(tag.flight()).map(|flight| flight.rows[tag.row()].id), code))
    }

    /// Whether the row needs nothing more.
    pub(crate) fn is_done(&self, tag: DeliveryTag) -> bool {
        self.queue().flight(tag.flight()).is_none_or(|flight| flight.rows[tag.row()].state != RowState::Open)
    }

    /// Gives up all that is in flight. Reports that come later change nothing.
    pub(crate) fn give_up(&self) -> GivenUp {
        let mut queue = self.queue();
        let mut left = GivenUp::default();
        queue.first += queue.flights.len();
        queue.rows = 0;
        for (at, mut flight) in std::mem::take(&mut queue.flights).into_iter().enumerate() {
            queue.given_up.extend(flight.held.take());
            let settled = flight.rows.iter().take_while(|row| row.state != RowState::Open).count();
            let prefix = if at == 0 { settled } else { 0 };
            for row in flight.rows.iter().skip(prefix).filter(|row| row.is_acknowledged()) {
                left.beyond.entry(flight.topics[row.topic].clone()).or_default().insert(row.id);
            }
            if prefix > 0 {
                let beginning = flight.cut(prefix);
                let position = beginning.position();
                left.beginning = Some((beginning.into_recordable(), position));
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Snapshot;
    use proptest::prelude::*;

    fn page(ids: impl IntoIterator<Item = i64>) -> Flight {
        let ids: Vec<i64> = ids.into_iter().collect();
        let to = ids.last().copied().unwrap_or(0);
        let what = FlightKind::Page { only_topic: None, base: Snapshot::initial(), target: Snapshot::initial(), to };
        Flight::new(what, ids.into_iter().map(|id| (id, if id % 2 == 0 { "even" } else { "odd" })))
    }

    /// The first and last ids of the complete pages, as they are recorded.
    fn recorded(in_flight: &InFlight) -> Vec<(i64, i64)> {
        let mut recorded = Vec::new();
        while let Some(flight) = in_flight.take_complete() {
            if let Recordable::Rows(stretch) = flight.into_recordable() {
                recorded.push((stretch.entry.from_id, stretch.entry.to_id));
            }
        }
        recorded
    }

    #[test]
    fn a_page_is_complete_when_its_last_row_is_and_the_sender_has_let_go_of_it() {
        let in_flight = InFlight::default();
        let first = in_flight.open(page([1, 2]));
        in_flight.seal(first, RowDecisions::default());
        let second = in_flight.open(page([3]));
        in_flight.delivered(DeliveryTag::new(second, 0));
        in_flight.delivered(DeliveryTag::new(first, 1));
        in_flight.delivered(DeliveryTag::new(first, 1));
        assert_eq!(recorded(&in_flight), []);
        in_flight.passed(DeliveryTag::new(first, 0));
        assert_eq!(recorded(&in_flight), [(1, 2)], "the sender still has the second in hand");
        in_flight.seal(second, RowDecisions::default());
        assert_eq!(recorded(&in_flight), [(3, 3)]);
    }

    #[test]
    fn three_pages_whose_first_send_fails_are_given_up_without_a_panic() {
        let in_flight = InFlight::default();
        // The sender fails in the middle of the first page, and lets go of it.
        let first = in_flight.open(page([1, 2, 3]));
        in_flight.delivered(DeliveryTag::new(first, 0));
        in_flight.failed(DeliveryTag::new(first, 1), RDKafkaErrorCode::InvalidRecord);
        in_flight.seal(first, RowDecisions::default());
        for ids in [[4, 5], [6, 7]] {
            let number = in_flight.open(page(ids));
            in_flight.delivered(DeliveryTag::new(number, 1));
        }
        assert_eq!(in_flight.failure(), Some((Some(2), RDKafkaErrorCode::InvalidRecord)));
        let left = in_flight.give_up();
        let Some((Recordable::Rows(beginning), Some(at))) = left.beginning else { panic!("the first row is recorded") };
        assert_eq!((beginning.entry.from_id, beginning.entry.to_id, at.after), (1, 1, 1));
        assert_eq!(left.beyond, HashMap::from([("odd".to_owned(), HashSet::from([5, 7]))]));
        in_flight.delivered(DeliveryTag::new(first, 1));
        assert!(recorded(&in_flight).is_empty(), "a late report changes nothing");
    }

    #[test]
    fn refused_rows_are_named_with_their_topics_the_earliest_first() {
        let in_flight = InFlight::default();
        let number = in_flight.open(page(0..9));
        in_flight.failed(DeliveryTag::new(number, 5), RDKafkaErrorCode::InvalidRecord);
        in_flight.failed(DeliveryTag::new(number, 4), RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(in_flight.failure(), Some((Some(4), RDKafkaErrorCode::MessageSizeTooLarge)));
        let named: Vec<(i64, String)> = in_flight.refused().into_iter().map(|row| (row.id, row.topic)).collect();
        assert_eq!(named, [(4, "even".to_owned()), (5, "odd".to_owned())]);
    }

    #[test]
    fn rows_are_stuck_by_topic_and_whether_others_flow_is_told_from_later_ones() {
        let in_flight = InFlight::default();
        let first = in_flight.open(page([1, 2, 3]));
        in_flight.given(first, 2);
        let stuck = |topics: &[&str], others_flow| Stuck {
            topics: topics.iter().map(ToString::to_string).collect(),
            others_flow,
        };
        assert_eq!(in_flight.stuck(Duration::MAX), Stuck::default(), "they have not been there for long");
        assert_eq!(in_flight.stuck(Duration::ZERO), stuck(&["even", "odd"], false));
        in_flight.delivered(DeliveryTag::new(first, 1));
        assert_eq!(in_flight.stuck(Duration::ZERO), stuck(&["odd"], true));
        assert_eq!(in_flight.sent_besides(&BTreeSet::from(["even".to_owned()])), 1);
        assert_eq!(in_flight.sent_besides(&BTreeSet::from(["odd".to_owned()])), 0);
    }

    #[test]
    fn a_topic_that_is_slow_is_not_stuck() {
        let in_flight = InFlight::default();
        let flight = in_flight.open(page([2, 4, 5]));
        in_flight.given(flight, 3);
        let patience = Duration::from_secs(5);
        let looked_at = |seconds| {
            let now = clock::monotonic() + Duration::from_secs(seconds);
            in_flight.stuck_at(now, patience).topics.into_iter().collect::<Vec<_>>()
        };
        assert!(looked_at(4).is_empty());
        in_flight.delivered(DeliveryTag::new(flight, 0));
        assert_eq!(looked_at(8), ["odd"], "the other has got further");
        assert_eq!(looked_at(12), ["odd"]);
        assert_eq!(looked_at(14), ["even", "odd"]);
    }

    #[test]
    fn what_was_known_to_be_acknowledged_is_known_after_the_next_failure_too() {
        let in_flight = InFlight::default();
        let first = in_flight.open(page([1, 2, 3]));
        in_flight.known(DeliveryTag::new(first, 1));
        in_flight.failed(DeliveryTag::new(first, 0), RDKafkaErrorCode::InvalidRecord);
        in_flight.seal(first, RowDecisions::default());
        assert_eq!(in_flight.give_up().beyond, HashMap::from([("even".to_owned(), HashSet::from([2]))]));
    }

    /// Pages of some rows, and the order in which their rows are reported; `false` is a refusal.
    fn flights() -> impl Strategy<Value = (Vec<usize>, Vec<(usize, usize, bool)>)> {
        prop::collection::vec(0_usize..6, 1..8).prop_flat_map(|pages| {
            let rows: Vec<(usize, usize)> =
                pages.iter().enumerate().flat_map(|(page, rows)| (0..*rows).map(move |row| (page, row))).collect();
            let reports = Just(rows).prop_shuffle().prop_flat_map(|rows| {
                let all = rows.len();
                (Just(rows), prop::collection::vec(prop::bool::weighted(0.95), all), 0..=all).prop_map(
                    |(rows, good, reported)| {
                        rows.into_iter().zip(good).map(|((p, r), g)| (p, r, g)).take(reported).collect()
                    },
                )
            });
            (Just(pages), reports)
        })
    }

    proptest! {
        /// Reports in any order, failures anywhere: what is recorded is a prefix without a gap, and what is remembered
        /// is acknowledged and behind it.
        #[test]
        fn the_recorded_prefix_never_passes_a_row_that_is_not_acknowledged((pages, reports) in flights()) {
            let in_flight = InFlight::default();
            let ids: Vec<Vec<i64>> = pages
                .iter()
                .scan(0, |last, rows| {
                    let ids: Vec<i64> = (0..*rows).map(|_| { *last += 1; *last }).collect();
                    Some(ids)
                })
                .collect();
            for ids in &ids {
                let number = in_flight.open(page(ids.iter().copied()));
                in_flight.seal(number, RowDecisions::default());
            }
            let mut acknowledged = HashSet::new();
            let mut prefix = 0;
            for (page, row, good) in reports {
                let tag = DeliveryTag::new(page, row);
                if good {
                    acknowledged.insert(ids[page][row]);
                    in_flight.delivered(tag);
                } else {
                    in_flight.failed(tag, RDKafkaErrorCode::InvalidRecord);
                }
                for (from, to) in recorded(&in_flight) {
                    prop_assert_eq!(from, prefix + 1);
                    prefix = to;
                }
                prop_assert!((1..=prefix).all(|id| acknowledged.contains(&id)));
            }
            let left = in_flight.give_up();
            if let Some((Recordable::Rows(beginning), _)) = left.beginning {
                prop_assert_eq!(beginning.entry.from_id, prefix + 1);
                prefix = beginning.entry.to_id;
            }
            prop_assert!((1..=prefix).all(|id| acknowledged.contains(&id)));
            let beyond: HashSet<i64> = acknowledged.into_iter().filter(|id| *id > prefix).collect();
            prop_assert_eq!(left.beyond.into_values().flatten().collect::<HashSet<_>>(), beyond);
        }
    }
}

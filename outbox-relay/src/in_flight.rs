//! What is on its way to Kafka: one queue of pages and marks, in the order in which they are to be recorded.
//!
//! A row counts as published only with its delivery report. Reports come in order within a partition and in no order
//! across them, so a page is complete when all its rows are, and progress is what lies before the first that is not.

use crate::{
    batch_log::Entry,
    commit::{Progress, Stretch},
    parking::Park,
    pause::LeftBehind,
    position::Page,
    snapshot::Snapshot,
};
use rdkafka::types::RDKafkaErrorCode;
use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use time::OffsetDateTime;
use tokio::sync::Notify;

/// Rows of a page at most, as bits of a ticket.
const ROW_BITS: u32 = 20;

/// Names one row in flight: it travels through librdkafka as a bare number, so that a report allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) usize);

impl Ticket {
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

/// The queue. The sender and the producer's polling thread share it.
#[derive(Default)]
pub(crate) struct InFlight {
    queue: Mutex<Queue>,
    /// Rows that the producer has and that are neither acknowledged nor refused.
    sent: AtomicUsize,
    /// Whether each report wakes the sender, and not only the last one of a page.
    eager: AtomicBool,
    /// A page is complete, or a row was refused.
    pub(crate) changed: Notify,
}

#[derive(Default)]
struct Queue {
    /// The number of the first of `flights`.
    first: usize,
    flights: VecDeque<Flight>,
    rows: usize,
    bytes: usize,
    failure: Option<(Ticket, RDKafkaErrorCode)>,
}

impl Queue {
    fn flight(&mut self, number: usize) -> Option<&mut Flight> {
        number.checked_sub(self.first).and_then(|at| self.flights.get_mut(at))
    }

    /// Sets what became of a row; tells whether its flight is complete with it.
    fn settle(&mut self, ticket: Ticket, state: State) -> bool {
        let Some(flight) = self.flight(ticket.flight()) else { return false };
        let row = &mut flight.rows[ticket.row()];
        if row.state != State::Open {
            return false;
        }
        row.state = state;
        flight.open -= 1;
        flight.open == 0
    }
}

/// What became of a row in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Acknowledged,
    /// Kafka does not get it from this page.
    Passed,
}

/// A row in flight.
struct Sent {
    id: i64,
    /// Its index in the flight's topics.
    topic: usize,
    state: State,
}

/// A page that is being sent, or a mark between two pages.
pub(crate) struct Flight {
    what: What,
    rows: Vec<Sent>,
    topics: Vec<String>,
    open: usize,
    /// The sender has no row of it in hand any more.
    sealed: bool,
    bytes: usize,
    decided: Decided,
}

enum What {
    /// Rows of the outbox, and where they stand.
    Page { lane: Option<Arc<str>>, base: Snapshot, target: Snapshot },
    /// Something that is true as soon as all before it is.
    Mark(Progress),
}

/// What the sender decided while it went through a page, by index of the row.
#[derive(Default)]
pub(crate) struct Decided {
    pub(crate) parked: Vec<(usize, Park)>,
    pub(crate) left_behind: Vec<(usize, LeftBehind)>,
    /// When the first row was written that goes to Kafka.
    pub(crate) oldest: Option<OffsetDateTime>,
}

/// What a queue leaves behind that is given up.
#[derive(Default)]
pub(crate) struct GivenUp {
    /// What may still be recorded: the first page's acknowledged beginning.
    pub(crate) beginning: Option<Progress>,
    /// Rows behind that which were acknowledged all the same.
    pub(crate) beyond: HashSet<i64>,
    /// How many rows were in flight.
    pub(crate) rows: usize,
}

impl InFlight {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A flight is about to be sent; returns its number. It is not complete before it is sealed: its last row may be
    /// acknowledged while the sender still has it in hand.
    pub(crate) fn open(&self, flight: Flight) -> usize {
        let mut queue = self.queue();
        queue.rows += flight.rows.len();
        queue.bytes += flight.bytes;
        queue.flights.push_back(flight);
        queue.first + queue.flights.len() - 1
    }

    /// The sender is done with the flight, whether or not it came to its end.
    pub(crate) fn seal(&self, number: usize, decided: Decided) {
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
    pub(crate) fn mark(&self, progress: Progress) {
        let number = self.open(Flight::empty(What::Mark(progress)));
        self.seal(number, Decided::default());
    }

    /// Takes the first flight if it is complete.
    pub(crate) fn take_complete(&self) -> Option<Flight> {
        let mut queue = self.queue();
        queue.flights.front().filter(|flight| flight.open == 0 && flight.sealed)?;
        let flight = queue.flights.pop_front()?;
        queue.first += 1;
        queue.rows -= flight.rows.len();
        queue.bytes -= flight.bytes;
        Some(flight)
    }

    /// Whether it holds less than so many rows and bytes.
    pub(crate) fn has_room(&self, rows: usize, bytes: usize) -> bool {
        let queue = self.queue();
        queue.rows < rows && queue.bytes < bytes
    }

    /// From here on every report wakes the sender, or only a complete page does.
    pub(crate) fn set_eager(&self, eager: bool) {
        self.eager.store(eager, Ordering::SeqCst);
    }

    /// The producer is about to get a row.
    pub(crate) fn sending(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
    }

    /// The producer did not take it.
    pub(crate) fn not_sent(&self) {
        self.sent.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many rows the producer has.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }

    /// Kafka has acknowledged the row.
    pub(crate) fn delivered(&self, ticket: Ticket) {
        let complete = self.queue().settle(ticket, State::Acknowledged);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        if complete || self.eager.load(Ordering::SeqCst) {
            self.changed.notify_one();
        }
    }

    /// The row needs nothing more, and the producer does not get it.
    pub(crate) fn passed(&self, ticket: Ticket) {
        if self.queue().settle(ticket, State::Passed) {
            self.changed.notify_one();
        }
    }

    /// Kafka refused the row. The earliest of several is kept: with the gap-free guarantee it is the culprit's batch.
    pub(crate) fn failed(&self, ticket: Ticket, code: RDKafkaErrorCode) {
        let mut queue = self.queue();
        if queue.failure.is_none_or(|(earliest, _)| ticket < earliest) {
            queue.failure = Some((ticket, code));
        }
        drop(queue);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify_one();
    }

    /// The refused row, and how it was refused. No row is named if its flight is gone.
    pub(crate) fn failure(&self) -> Option<(Option<i64>, RDKafkaErrorCode)> {
        let mut queue = self.queue();
        let (ticket, code) = queue.failure?;
        Some((queue.flight(ticket.flight()).map(|flight| flight.rows[ticket.row()].id), code))
    }

    /// Whether the row needs nothing more.
    pub(crate) fn is_done(&self, ticket: Ticket) -> bool {
        self.queue().flight(ticket.flight()).is_none_or(|flight| flight.rows[ticket.row()].state != State::Open)
    }

    /// Gives up all that is in flight. Reports that come later change nothing.
    pub(crate) fn give_up(&self) -> GivenUp {
        let mut queue = self.queue();
        let mut left = GivenUp { rows: queue.rows, ..GivenUp::default() };
        queue.first += queue.flights.len();
        (queue.rows, queue.bytes) = (0, 0);
        for (at, flight) in std::mem::take(&mut queue.flights).into_iter().enumerate() {
            let settled = flight.rows.iter().take_while(|row| row.state != State::Open).count();
            let prefix = if at == 0 { settled } else { 0 };
            let beyond = flight.rows.iter().skip(prefix).filter(|row| row.state == State::Acknowledged);
            left.beyond.extend(beyond.map(|row| row.id));
            if prefix > 0 {
                left.beginning = Some(flight.cut(prefix).into_progress());
            }
        }
        left
    }
}

impl Flight {
    /// A page. It keeps of each row what a report needs.
    pub(crate) fn of(page: &Page) -> Self {
        let what = What::Page { lane: page.lane.clone(), base: page.base.clone(), target: page.target.clone() };
        Self::new(what, page.rows.iter().map(|row| (row.id(), row.topic(), row.bytes())))
    }

    fn empty(what: What) -> Self {
        Self::new(what, [])
    }

    /// Of rows with these ids, topics and sizes.
    fn new<'a>(what: What, rows: impl IntoIterator<Item = (i64, &'a str, usize)>) -> Self {
        let mut topics: Vec<String> = Vec::new();
        let (mut topic, mut bytes) = (0, 0);
        let mut of_topic = |name: &str| {
            // Neighbours are mostly of one topic.
            if topics.get(topic).is_none_or(|last| last != name) {
                topic = topics.iter().position(|known| known == name).unwrap_or(topics.len());
                if topic == topics.len() {
                    topics.push(name.to_owned());
                }
            }
            topic
        };
        let rows: Vec<Sent> = rows
            .into_iter()
            .map(|(id, name, size)| {
                bytes += size;
                Sent { id, topic: of_topic(name), state: State::Open }
            })
            .collect();
        Self { what, open: rows.len(), rows, topics, sealed: false, bytes, decided: Decided::default() }
    }

    /// It is one of the reader's pages.
    pub(crate) fn is_page(&self) -> bool {
        matches!(self.what, What::Page { .. })
    }

    /// When the first row was written that went to Kafka.
    pub(crate) fn oldest(&self) -> Option<OffsetDateTime> {
        self.decided.oldest
    }

    /// How many rows went to which topic.
    pub(crate) fn published(&self) -> Vec<(&str, u64)> {
        let mut published: Vec<(&str, u64)> = self.topics.iter().map(|topic| (topic.as_str(), 0)).collect();
        for row in self.rows.iter().filter(|row| row.state == State::Acknowledged) {
            published[row.topic].1 += 1;
        }
        published.retain(|(_, rows)| *rows > 0);
        published
    }

    /// Only its first rows.
    fn cut(mut self, rows: usize) -> Self {
        self.rows.truncate(rows);
        self.decided.parked.retain(|(index, _)| *index < rows);
        self.decided.left_behind.retain(|(index, _)| *index < rows);
        self
    }

    pub(crate) fn into_progress(self) -> Progress {
        let (lane, base, target) = match self.what {
            What::Page { lane, base, target } => (lane, base, target),
            What::Mark(progress) => return progress,
        };
        let (Some(from), Some(to)) = (self.rows.first(), self.rows.last()) else { return Progress::Nothing };
        let rows = i32::try_from(self.rows.len()).expect("a page has few rows");
        Progress::Rows(Stretch {
            lane,
            entry: Entry { base, target, from_id: from.id, to_id: to.id, rows },
            parked: self.decided.parked.into_iter().map(|(_, park)| park).collect(),
            left_behind: self.decided.left_behind.into_iter().map(|(_, left)| left).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(ids: impl IntoIterator<Item = i64>) -> Flight {
        let what = What::Page { lane: None, base: Snapshot::initial(), target: Snapshot::initial() };
        Flight::new(what, ids.into_iter().map(|id| (id, "orders.events", 1)))
    }

    /// The ids of the pages that are complete, as they are recorded.
    fn recorded(in_flight: &InFlight) -> Vec<(i64, i64)> {
        let mut recorded = Vec::new();
        while let Some(flight) = in_flight.take_complete() {
            if let Progress::Rows(stretch) = flight.into_progress() {
                recorded.push((stretch.entry.from_id, stretch.entry.to_id));
            }
        }
        recorded
    }

    #[test]
    fn a_page_is_complete_when_its_last_row_is_and_the_sender_has_let_go_of_it() {
        let in_flight = InFlight::default();
        let first = in_flight.open(page([1, 2]));
        in_flight.seal(first, Decided::default());
        let second = in_flight.open(page([3]));
        in_flight.delivered(Ticket::new(second, 0));
        in_flight.delivered(Ticket::new(first, 1));
        in_flight.delivered(Ticket::new(first, 1));
        assert_eq!(recorded(&in_flight), []);
        in_flight.passed(Ticket::new(first, 0));
        assert_eq!(recorded(&in_flight), [(1, 2)], "the sender still has the second in hand");
        in_flight.seal(second, Decided::default());
        assert_eq!(recorded(&in_flight), [(3, 3)]);
    }

    #[test]
    fn three_pages_whose_first_send_fails_are_given_up_without_a_panic() {
        let in_flight = InFlight::default();
        // The sender fails in the middle of the first page, and lets go of it.
        let first = in_flight.open(page([1, 2, 3]));
        in_flight.delivered(Ticket::new(first, 0));
        in_flight.failed(Ticket::new(first, 1), RDKafkaErrorCode::InvalidRecord);
        in_flight.seal(first, Decided::default());
        for ids in [[4, 5], [6, 7]] {
            let number = in_flight.open(page(ids));
            in_flight.delivered(Ticket::new(number, 1));
        }
        assert_eq!(in_flight.failure(), Some((Some(2), RDKafkaErrorCode::InvalidRecord)));
        let left = in_flight.give_up();
        let Some(Progress::Rows(beginning)) = left.beginning else { panic!("the first row is recorded") };
        assert_eq!((beginning.entry.from_id, beginning.entry.to_id), (1, 1));
        assert_eq!((left.beyond, left.rows), (HashSet::from([5, 7]), 7));
        in_flight.delivered(Ticket::new(first, 1));
        assert!(recorded(&in_flight).is_empty(), "a late report changes nothing");
    }

    #[test]
    fn the_earliest_failure_is_kept() {
        let in_flight = InFlight::default();
        let number = in_flight.open(page(0..9));
        (0..3).for_each(|_| in_flight.sending());
        in_flight.failed(Ticket::new(number, 5), RDKafkaErrorCode::InvalidRecord);
        in_flight.failed(Ticket::new(number, 3), RDKafkaErrorCode::MessageSizeTooLarge);
        in_flight.failed(Ticket::new(number, 7), RDKafkaErrorCode::InvalidRecord);
        assert_eq!(in_flight.failure(), Some((Some(3), RDKafkaErrorCode::MessageSizeTooLarge)));
    }

    /// Pages of some rows, and the order in which their rows are reported; `false` is a refusal.
    fn flights() -> impl Strategy<Value = (Vec<usize>, Vec<(usize, usize, bool)>)> {
        prop::collection::vec(0_usize..6, 1..8).prop_flat_map(|pages| {
            let rows: Vec<(usize, usize)> =
                pages.iter().enumerate().flat_map(|(page, rows)| (0..*rows).map(move |row| (page, row))).collect();
            let reports = Just(rows).prop_shuffle().prop_flat_map(|rows| {
                let all = rows.len();
                (Just(rows), prop::collection::vec(prop::bool::weighted(0.95), all), 0..=all).prop_map(
                    |(rows, good, told)| rows.into_iter().zip(good).map(|((p, r), g)| (p, r, g)).take(told).collect(),
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
                in_flight.seal(number, Decided::default());
            }
            let mut acknowledged = HashSet::new();
            let mut prefix = 0;
            for (page, row, good) in reports {
                let ticket = Ticket::new(page, row);
                if good {
                    acknowledged.insert(ids[page][row]);
                    in_flight.delivered(ticket);
                } else {
                    in_flight.failed(ticket, RDKafkaErrorCode::InvalidRecord);
                }
                for (from, to) in recorded(&in_flight) {
                    prop_assert_eq!(from, prefix + 1);
                    prefix = to;
                }
                prop_assert!((1..=prefix).all(|id| acknowledged.contains(&id)));
            }
            let left = in_flight.give_up();
            if let Some(Progress::Rows(beginning)) = left.beginning {
                prop_assert_eq!(beginning.entry.from_id, prefix + 1);
                prefix = beginning.entry.to_id;
            }
            prop_assert!((1..=prefix).all(|id| acknowledged.contains(&id)));
            let beyond: HashSet<i64> = acknowledged.into_iter().filter(|id| *id > prefix).collect();
            prop_assert_eq!(left.beyond, beyond);
        }
    }
}

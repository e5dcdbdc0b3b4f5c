//! One page on its way to Kafka, or a mark between two pages: its rows, the state of each, and what to record of it.

use crate::{
    budget::Held,
    position::Position,
    read::cursor::Page,
    record::{
        batch_log::BatchLogEntry,
        commit::{FinishedRows, Recordable},
        parking::RowToPark,
        pause::LeftBehind,
    },
    snapshot::Snapshot,
};
use saga_core::clock;
use std::{sync::Arc, time::Instant};
use time::OffsetDateTime;

/// The state of a row in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowState {
    Open,
    Acknowledged,
    /// Kafka had acknowledged the row before, and does not get it again.
    Known,
    /// Kafka does not get the row from this page.
    Passed,
}

/// A row in flight.
pub(crate) struct RowInFlight {
    pub(crate) id: i64,
    /// Its index in the flight's topics.
    pub(crate) topic: usize,
    pub(crate) state: RowState,
}

impl RowInFlight {
    pub(crate) fn is_acknowledged(&self) -> bool {
        matches!(self.state, RowState::Acknowledged | RowState::Known)
    }
}

/// A page that is being sent, or a mark between two pages.
pub(crate) struct Flight {
    pub(crate) what: FlightKind,
    pub(crate) rows: Vec<RowInFlight>,
    pub(crate) topics: Vec<String>,
    pub(crate) open: usize,
    /// How many of its rows the sender has gone through, and when it went through the last of these.
    pub(crate) given: usize,
    pub(crate) given_at: Instant,
    /// Whether the sender has let go of all its rows.
    pub(crate) sealed: bool,
    pub(crate) held: Option<Held>,
    pub(crate) decided: RowDecisions,
}

pub(crate) enum FlightKind {
    /// Rows of the outbox, and their place in it.
    Page { only_topic: Option<Arc<str>>, base: Snapshot, target: Snapshot, to: i64 },
    /// Something that becomes true as soon as all before it is.
    Mark(Recordable),
}

/// What the sender decided while it went through a page, by index of the row.
#[derive(Default)]
pub(crate) struct RowDecisions {
    pub(crate) parked: Vec<(usize, RowToPark)>,
    pub(crate) left_behind: Vec<(usize, LeftBehind)>,
    /// When the first row that goes to Kafka was written; `None` while none does.
    pub(crate) oldest: Option<OffsetDateTime>,
}

impl Flight {
    /// Makes a flight of a page. It keeps what a report needs of each row, and the room of all.
    pub(crate) fn of(page: &mut Page) -> Self {
        let (only_topic, base, target) = (page.only_topic.clone(), page.base.clone(), page.target.clone());
        let what = FlightKind::Page { only_topic, base, target, to: page.to };
        let flight = Self::new(what, page.rows.iter().map(|row| (row.id(), row.topic())));
        Self { held: page.held.take(), ..flight }
    }

    pub(crate) fn empty(what: FlightKind) -> Self {
        Self::new(what, [])
    }

    /// Makes a flight of rows with these ids and topics.
    pub(crate) fn new<'a>(what: FlightKind, rows: impl IntoIterator<Item = (i64, &'a str)>) -> Self {
        let mut topics: Vec<String> = Vec::new();
        let mut topic = 0;
        let mut of_topic = |name: &str| {
            // Neighbouring rows are mostly of one topic.
            if topics.get(topic).is_none_or(|last| last != name) {
                topic = topics.iter().position(|known| known == name).unwrap_or(topics.len());
                if topic == topics.len() {
                    topics.push(name.to_owned());
                }
            }
            topic
        };
        let rows: Vec<RowInFlight> = rows
            .into_iter()
            .map(|(id, name)| RowInFlight { id, topic: of_topic(name), state: RowState::Open })
            .collect();
        let (open, given_at) = (rows.len(), clock::monotonic());
        Self {
            what,
            rows,
            topics,
            open,
            given: 0,
            given_at,
            sealed: false,
            held: None,
            decided: RowDecisions::default(),
        }
    }

    /// Whether it is one of the reader's pages.
    pub(crate) fn is_page(&self) -> bool {
        matches!(self.what, FlightKind::Page { .. })
    }

    /// The position behind the flight, if it is a page.
    pub(crate) fn position(&self) -> Option<Position> {
        let FlightKind::Page { base, target, to, .. } = &self.what else { return None };
        Some(Position { base: base.clone(), target: target.clone(), after: *to })
    }

    /// When the first row that went to Kafka was written; `None` if none did.
    pub(crate) fn oldest(&self) -> Option<OffsetDateTime> {
        self.decided.oldest
    }

    /// How many rows went to each topic; topics without rows are left out.
    pub(crate) fn published(&self) -> Vec<(&str, u64)> {
        let mut published: Vec<(&str, u64)> = self.topics.iter().map(|topic| (topic.as_str(), 0)).collect();
        for row in self.rows.iter().filter(|row| row.state == RowState::Acknowledged) {
            published[row.topic].1 += 1;
        }
        published.retain(|(_, rows)| *rows > 0);
        published
    }

    /// Cuts the flight to its first `rows` rows.
    pub(crate) fn cut(mut self, rows: usize) -> Self {
        self.rows.truncate(rows);
        if let (FlightKind::Page { to, .. }, Some(last)) = (&mut self.what, self.rows.last()) {
            *to = last.id;
        }
        self.decided.parked.retain(|(index, _)| *index < rows);
        self.decided.left_behind.retain(|(index, _)| *index < rows);
        self
    }

    pub(crate) fn into_recordable(self) -> Recordable {
        let (only_topic, base, target, to) = match self.what {
            FlightKind::Page { only_topic, base, target, to } => (only_topic, base, target, to),
            FlightKind::Mark(progress) => return progress,
        };
        let Some(from_id) = self.rows.first().map(|row| row.id) else {
            // A stretch without rows moves a topic's position; the main stream's is moved by the next rows.
            let Some(topic) = only_topic else { return Recordable::Nothing };
            return Recordable::Advanced(topic, Position { base, target, after: to });
        };
        let rows = i32::try_from(self.rows.len()).expect("a page has few rows");
        Recordable::Rows(FinishedRows {
            only_topic,
            entry: BatchLogEntry { base, target, from_id, to_id: to, rows },
            parked: self.decided.parked.into_iter().map(|(_, park)| park).collect(),
            left_behind: self.decided.left_behind.into_iter().map(|(_, left)| left).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::pause::PauseCause;

    fn page(only_topic: Option<&str>, to: i64) -> FlightKind {
        let (base, target) = ("5:5:".parse().unwrap(), "10:10:".parse().unwrap());
        FlightKind::Page { only_topic: only_topic.map(Arc::from), base, target, to }
    }

    fn position(after: i64) -> Position {
        Position { base: "5:5:".parse().unwrap(), target: "10:10:".parse().unwrap(), after }
    }

    #[test]
    fn a_flight_names_each_topic_once_and_counts_what_went_to_it() {
        let mut flight = Flight::new(page(None, 5), [(1, "a"), (2, "b"), (3, "b"), (4, "a"), (5, "c")]);
        assert_eq!((flight.topics.join(","), flight.open), (String::from("a,b,c"), 5));
        let states = [RowState::Acknowledged, RowState::Known, RowState::Acknowledged, RowState::Acknowledged];
        flight.rows.iter_mut().zip(states).for_each(|(row, state)| row.state = state);
        flight.rows[4].state = RowState::Passed;
        assert_eq!(flight.published(), [("a", 2), ("b", 1)]);
        assert_eq!(flight.rows.iter().filter(|row| row.is_acknowledged()).count(), 4);
    }

    #[test]
    fn a_flight_that_is_cut_ends_at_its_last_row_and_forgets_what_was_decided_behind() {
        let mut flight = Flight::new(page(None, 99), [(10, "a"), (20, "b"), (30, "a")]);
        let park = |id| RowToPark { id, reason: String::from("too large"), blocked_by: None, bytes: 1 };
        flight.decided.parked = vec![(0, park(10)), (2, park(30))];
        let (topic, reason) = (String::from("b"), String::from("gone"));
        let left = LeftBehind { topic, cause: PauseCause::Missing, reason, position: position(19) };
        flight.decided.left_behind = vec![(1, left)];
        assert_eq!(flight.position(), Some(position(99)));

        let cut = flight.cut(2);
        assert_eq!(cut.position(), Some(position(20)));
        let Recordable::Rows(rows) = cut.into_recordable() else { panic!("it has rows") };
        assert_eq!((rows.entry.from_id, rows.entry.to_id, rows.entry.rows), (10, 20, 2));
        assert_eq!(rows.parked.iter().map(|park| park.id).collect::<Vec<_>>(), [10]);
        assert_eq!(rows.left_behind.len(), 1);
    }

    #[test]
    fn a_page_without_rows_moves_a_topics_position_and_not_the_main_streams() {
        assert!(matches!(Flight::empty(page(None, 40)).into_recordable(), Recordable::Nothing));
        let advanced = Flight::empty(page(Some("t"), 40)).into_recordable();
        assert!(matches!(advanced, Recordable::Advanced(topic, at) if &*topic == "t" && at == position(40)));
    }

    #[test]
    fn a_mark_is_no_page_and_is_recorded_as_it_is() {
        let at = position(3);
        let mark = Flight::empty(FlightKind::Mark(Recordable::Advanced("t".into(), at.clone())));
        assert!(!mark.is_page() && mark.position().is_none() && mark.published().is_empty());
        assert!(matches!(mark.into_recordable(), Recordable::Advanced(_, found) if found == at));
    }
}

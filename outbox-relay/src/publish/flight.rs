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

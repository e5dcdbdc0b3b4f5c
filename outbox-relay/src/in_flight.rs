//! What is on its way, in order: pages of rows, and marks between them.

use crate::{
    batch_log::Entry,
    commit::{Progress, Stretch},
    parking::Park,
    pause::LeftBehind,
    position::Page,
    row::Row,
    snapshot::Snapshot,
    tracker::Ticket,
};
use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};
use time::OffsetDateTime;

/// Pages and marks, in the order in which they are to be recorded. Runs parallel to the tracker's pages.
#[derive(Default)]
pub(crate) struct InFlight {
    flights: VecDeque<Flight>,
    pub(crate) rows: usize,
    pub(crate) bytes: usize,
}

impl InFlight {
    pub(crate) fn push(&mut self, flight: Flight) {
        self.rows += flight.ids.len();
        self.bytes += flight.bytes;
        self.flights.push_back(flight);
    }

    pub(crate) fn pop(&mut self) -> Option<Flight> {
        let flight = self.flights.pop_front()?;
        self.rows -= flight.ids.len();
        self.bytes -= flight.bytes;
        Some(flight)
    }

    /// Which row a ticket names.
    pub(crate) fn id(&self, ticket: Ticket) -> Option<i64> {
        let flight = self.flights.iter().find(|flight| flight.number == Some(ticket.page()))?;
        flight.ids.get(ticket.row()).copied()
    }

    /// Gives up: what of it may be recorded (the first page's acknowledged beginning), and which rows behind that were
    /// acknowledged all the same.
    pub(crate) fn give_up(self, acknowledged: &[Vec<bool>]) -> (Option<Progress>, HashSet<i64>) {
        let mut beyond = HashSet::new();
        let mut beginning = None;
        for (at, (flight, rows)) in self.flights.into_iter().zip(acknowledged).enumerate() {
            let prefix = if at == 0 { rows.iter().take_while(|&&done| done).count() } else { 0 };
            for (index, id) in flight.ids.iter().enumerate().skip(prefix) {
                if rows[index] && !flight.not_sent.contains(&index) {
                    beyond.insert(*id);
                }
            }
            if prefix > 0 {
                beginning = Some(flight.cut(prefix).into_progress());
            }
        }
        (beginning, beyond)
    }
}

/// A page that was sent, or a mark.
pub(crate) struct Flight {
    mark: Option<Progress>,
    number: Option<usize>,
    lane: Option<Arc<str>>,
    base: Snapshot,
    target: Snapshot,
    ids: Vec<i64>,
    bytes: usize,
    /// By index of the row.
    pub(crate) parked: Vec<(usize, Park)>,
    pub(crate) left_behind: Vec<(usize, LeftBehind)>,
    /// Rows that Kafka did not get from this page.
    pub(crate) not_sent: Vec<usize>,
    /// How many rows went to which topic.
    pub(crate) topics: Vec<(String, u64)>,
    /// When the first of them was written.
    pub(crate) oldest: Option<OffsetDateTime>,
}

impl Flight {
    pub(crate) fn of(page: &Page, number: usize) -> Self {
        Self {
            mark: None,
            number: Some(number),
            lane: page.lane.clone(),
            base: page.base.clone(),
            target: page.target.clone(),
            ids: page.rows.iter().map(Row::id).collect(),
            bytes: page.rows.iter().map(|row| row.size().unwrap_or(0)).sum(),
            parked: Vec::new(),
            left_behind: Vec::new(),
            not_sent: Vec::new(),
            topics: Vec::new(),
            oldest: None,
        }
    }

    pub(crate) fn mark(progress: Progress) -> Self {
        Self {
            mark: Some(progress),
            number: None,
            lane: None,
            base: Snapshot::initial(),
            target: Snapshot::initial(),
            ids: Vec::new(),
            bytes: 0,
            parked: Vec::new(),
            left_behind: Vec::new(),
            not_sent: Vec::new(),
            topics: Vec::new(),
            oldest: None,
        }
    }

    /// And not a mark.
    pub(crate) fn is_page(&self) -> bool {
        self.mark.is_none()
    }

    /// Counts a row that goes to Kafka.
    pub(crate) fn sending(&mut self, row: &Row) {
        self.oldest.get_or_insert_with(|| row.created_at());
        match self.topics.last_mut() {
            Some((topic, count)) if topic == row.topic() => *count += 1,
            _ => match self.topics.iter_mut().find(|(topic, _)| topic == row.topic()) {
                Some((_, count)) => *count += 1,
                None => self.topics.push((row.topic().to_owned(), 1)),
            },
        }
    }

    /// Only its first rows.
    fn cut(mut self, rows: usize) -> Self {
        self.ids.truncate(rows);
        self.parked.retain(|(index, _)| *index < rows);
        self.left_behind.retain(|(index, _)| *index < rows);
        self
    }

    pub(crate) fn into_progress(self) -> Progress {
        let (Some(&from_id), Some(&to_id), None) = (self.ids.first(), self.ids.last(), &self.mark) else {
            return self.mark.unwrap_or(Progress::Nothing);
        };
        let rows = i32::try_from(self.ids.len()).expect("a page has few rows");
        Progress::Rows(Stretch {
            lane: self.lane,
            entry: Entry { base: self.base, target: self.target, from_id, to_id, rows },
            parked: self.parked.into_iter().map(|(_, park)| park).collect(),
            left_behind: self.left_behind.into_iter().map(|(_, left)| left).collect(),
        })
    }
}

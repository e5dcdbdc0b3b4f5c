//! What Kafka has acknowledged: pages in flight, and the prefix of them that is complete.
//!
//! A row counts as published only with its delivery report. Reports come in order within a partition and in no order
//! across them, so a page is complete when all its rows are, and progress is what lies before the first that is not.

use rdkafka::types::RDKafkaErrorCode;
use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tokio::sync::Notify;

/// Rows of a page at most, as bits of a ticket.
const ROW_BITS: u32 = 20;

/// Names one row in flight: it travels through librdkafka as a bare number, so that a report allocates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) usize);

impl Ticket {
    pub(crate) fn new(page: usize, row: usize) -> Self {
        debug_assert!(row < 1 << ROW_BITS);
        Self(page << ROW_BITS | row)
    }

    pub(crate) fn page(self) -> usize {
        self.0 >> ROW_BITS
    }

    pub(crate) fn row(self) -> usize {
        self.0 & ((1 << ROW_BITS) - 1)
    }
}

/// Shared between the sender and the producer's polling thread.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    pages: Mutex<Pages>,
    /// Rows that the producer has and that are neither acknowledged nor refused.
    sent: AtomicUsize,
    /// Whether somebody waits for single rows, not only for whole pages.
    eager: AtomicBool,
    /// A page is complete, or a row was refused.
    pub(crate) changed: Notify,
}

#[derive(Debug, Default)]
struct Pages {
    /// The number of the first page in `open`.
    first: usize,
    open: VecDeque<Acknowledged>,
    failure: Option<(Ticket, RDKafkaErrorCode)>,
}

#[derive(Debug)]
struct Acknowledged {
    rows: Vec<bool>,
    missing: usize,
    sealed: bool,
}

impl Tracker {
    fn pages(&self) -> std::sync::MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A page of `rows` rows is about to be sent; tells its number. It is not complete before it is sealed: its last row
    /// may be acknowledged while the sender still has it in hand.
    pub(crate) fn open(&self, rows: usize) -> usize {
        let mut pages = self.pages();
        pages.open.push_back(Acknowledged { rows: vec![false; rows], missing: rows, sealed: false });
        pages.first + pages.open.len() - 1
    }

    /// All of the page is sent.
    pub(crate) fn seal(&self, number: usize) {
        let mut pages = self.pages();
        let at = number.checked_sub(pages.first);
        if let Some(page) = at.and_then(|at| pages.open.get_mut(at)) {
            page.sealed = true;
            if page.missing == 0 {
                self.changed.notify_one();
            }
        }
    }

    /// From here on every row rings, or only whole pages do.
    pub(crate) fn set_eager(&self, eager: bool) {
        self.eager.store(eager, Ordering::SeqCst);
    }

    /// The producer is about to get a row.
    pub(crate) fn sending(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
    }

    /// It did not take it.
    pub(crate) fn not_sent(&self) {
        self.sent.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many rows the producer has.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }

    /// The row is acknowledged.
    pub(crate) fn delivered(&self, ticket: Ticket) {
        self.done(ticket);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        if self.eager.load(Ordering::SeqCst) {
            self.changed.notify_one();
        }
    }

    /// The row needs nothing more.
    pub(crate) fn done(&self, ticket: Ticket) {
        let mut pages = self.pages();
        let Some(page) = ticket.page().checked_sub(pages.first).and_then(|at| pages.open.get_mut(at)) else { return };
        if !std::mem::replace(&mut page.rows[ticket.row()], true) {
            page.missing -= 1;
            if page.missing == 0 {
                self.changed.notify_one();
            }
        }
    }

    /// The row was refused. The earliest of several is kept: with the gap-free guarantee it is the culprit's batch.
    pub(crate) fn failed(&self, ticket: Ticket, code: RDKafkaErrorCode) {
        let mut pages = self.pages();
        if pages.failure.is_none_or(|(earliest, _)| ticket < earliest) {
            pages.failure = Some((ticket, code));
        }
        drop(pages);
        self.sent.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify_one();
    }

    pub(crate) fn failure(&self) -> Option<(Ticket, RDKafkaErrorCode)> {
        self.pages().failure
    }

    /// How many pages at the front are complete; they are forgotten.
    pub(crate) fn take_complete(&self) -> usize {
        let mut pages = self.pages();
        let complete = pages.open.iter().take_while(|page| page.missing == 0 && page.sealed).count();
        pages.open.drain(..complete);
        pages.first += complete;
        complete
    }

    /// Whether a row of the last opened page is acknowledged.
    pub(crate) fn is_done(&self, ticket: Ticket) -> bool {
        let pages = self.pages();
        ticket.page().checked_sub(pages.first).is_none_or(|at| pages.open.get(at).is_some_and(|p| p.rows[ticket.row()]))
    }

    /// Which rows of the open pages are acknowledged, page by page.
    pub(crate) fn acknowledged(&self) -> Vec<Vec<bool>> {
        self.pages().open.iter().map(|page| page.rows.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_prefix_of_complete_pages_is_progress() {
        let tracker = Tracker::default();
        let (a, b) = (tracker.open(2), tracker.open(1));
        tracker.seal(a);
        tracker.done(Ticket::new(b, 0));
        tracker.done(Ticket::new(a, 1));
        tracker.done(Ticket::new(a, 1));
        assert_eq!(tracker.take_complete(), 0);
        assert_eq!(tracker.acknowledged(), [vec![false, true], vec![true]]);
        tracker.done(Ticket::new(a, 0));
        assert_eq!(tracker.take_complete(), 1, "the second is still in the sender's hands");
        tracker.seal(b);
        assert_eq!(tracker.take_complete(), 1);
        assert_eq!(tracker.open(0), 2);
        tracker.seal(2);
        assert_eq!(tracker.take_complete(), 1);
    }

    #[test]
    fn the_earliest_failure_is_kept() {
        let tracker = Tracker::default();
        tracker.open(9);
        (0..3).for_each(|_| tracker.sending());
        tracker.failed(Ticket::new(0, 5), RDKafkaErrorCode::InvalidRecord);
        tracker.failed(Ticket::new(0, 3), RDKafkaErrorCode::MessageSizeTooLarge);
        tracker.failed(Ticket::new(0, 7), RDKafkaErrorCode::InvalidRecord);
        assert_eq!(tracker.failure(), Some((Ticket::new(0, 3), RDKafkaErrorCode::MessageSizeTooLarge)));
    }
}

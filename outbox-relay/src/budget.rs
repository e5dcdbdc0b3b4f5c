//! How many bytes of rows this process may hold: one budget for all outboxes and all their streams.
//!
//! ```text
//!  budget = an area for each stream + a place for one large row + the common rest
//! ```
//!
//! A stream takes room before it reads rows. It gives the room back when Kafka has acknowledged them, or when the
//! producer that has them is gone. A stream takes at most as much of the common rest as it leaves free for others, and
//! it never waits for the rest. What the rest does not give, the stream takes in its own area, for which it waits only
//! until rows of its own are gone. So no stream waits for the rows of another, of this outbox or of another one. A row
//! may be too large for an area, while the rest has no room for it. Then it waits for the one place for large rows; a
//! row in that place waits for Kafka only. A row that is larger than that place exceeds the budget alone.

use crate::row::{INLINE_BYTES, OVERHEAD_BYTES};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Bytes that a stream can always take at once when it holds no others: some hundred small rows, or one that comes with
/// its page.
pub(crate) const LEAST_BYTES: usize = 2 << 20;
/// A stream's own area: for rows that are read, and for what these still lack.
const AREA_BYTES: usize = 2 * LEAST_BYTES;
/// The place for one row that is too large for an area.
const LARGE_ROW_BYTES: usize = 16 << 20;
/// Topics of one outbox that are set apart and publish at once; others wait for their turn. Each has a producer, with
/// threads of its own.
const TOPICS_AT_ONCE: usize = 8;
/// Streams of one outbox: the main stream, the retries, and topics that are set apart.
const STREAMS_PER_OUTBOX: usize = TOPICS_AT_ONCE + 2;
/// The default budget; where there are many outboxes, at least the second value for each.
const DEFAULT_BYTES: usize = 256 << 20;
const DEFAULT_BYTES_PER_OUTBOX: usize = 64 << 20;
/// What a row takes at most that comes with its page.
pub(crate) const ROW_BYTES_MAX: usize = INLINE_BYTES + OVERHEAD_BYTES;

/// The least budget for so many outboxes: without a common rest.
pub const fn least(outboxes: usize) -> usize {
    LARGE_ROW_BYTES + outboxes * STREAMS_PER_OUTBOX * AREA_BYTES
}

/// The default budget for so many outboxes.
pub fn default(outboxes: usize) -> usize {
    DEFAULT_BYTES.max(DEFAULT_BYTES_PER_OUTBOX * outboxes)
}

/// The budget of a process.
#[derive(Debug)]
pub(crate) struct Budget {
    /// What is common to all streams.
    rest: usize,
    now: Mutex<Now>,
    /// The place for large rows: one holder at a time, whose row finds no room in the rest.
    large: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Now {
    held: usize,
    most: usize,
    of_rest: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize, outboxes: usize) -> Arc<Self> {
        let rest = bytes.saturating_sub(least(outboxes));
        Arc::new(Self { rest, now: Mutex::default(), large: Arc::new(Semaphore::new(1)) })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are held now, and the most that ever were.
    pub(crate) fn held(&self) -> (usize, usize) {
        let now = self.now();
        (now.held, now.most)
    }
}

impl Now {
    fn add(&mut self, bytes: usize) {
        self.held += bytes;
        self.most = self.most.max(self.held);
        crate::metric::bytes_held(self.held);
    }

    fn remove(&mut self, bytes: usize) {
        self.held -= bytes;
        crate::metric::bytes_held(self.held);
    }
}

/// The areas of one outbox's streams.
#[derive(Debug)]
pub(crate) struct Areas {
    budget: Arc<Budget>,
    pub(crate) main: Arc<Area>,
    pub(crate) retries: Arc<Area>,
    turns: Arc<Semaphore>,
}

impl Areas {
    pub(crate) fn new(budget: &Arc<Budget>) -> Self {
        let area = || Arc::new(Area::new(budget.clone(), None));
        let turns = Arc::new(Semaphore::new(TOPICS_AT_ONCE));
        Self { budget: budget.clone(), main: area(), retries: area(), turns }
    }

    /// The area of a topic that is set apart, when it is its turn.
    pub(crate) async fn topic(&self) -> Arc<Area> {
        let turn = self.turns.clone().acquire_owned().await.ok();
        Arc::new(Area::new(self.budget.clone(), turn))
    }
}

/// One stream's part of the budget: its own area, and what it has of the common rest.
#[derive(Debug)]
pub(crate) struct Area {
    budget: Arc<Budget>,
    mine: Mutex<Mine>,
    freed: Notify,
    /// Held until the last of this topic's rows is gone; then it is another topic's turn.
    _turn: Option<OwnedSemaphorePermit>,
}

#[derive(Debug, Default)]
struct Mine {
    own: usize,
    of_rest: usize,
    waits: bool,
}

impl Area {
    fn new(budget: Arc<Budget>, turn: Option<OwnedSemaphorePermit>) -> Self {
        Self { budget, mine: Mutex::default(), freed: Notify::new(), _turn: turn }
    }

    fn mine(&self) -> MutexGuard<'_, Mine> {
        self.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room in the common rest, if the stream leaves as much of it free as it then has; `None` otherwise.
    pub(crate) fn try_take(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        let (mut now, mut mine) = (self.budget.now(), self.mine());
        let free = self.budget.rest - now.of_rest;
        if bytes > 0 && mine.of_rest + 2 * bytes > free {
            return None;
        }
        mine.of_rest += bytes;
        now.of_rest += bytes;
        now.add(bytes);
        Some(Held { area: self.clone(), own: 0, of_rest: bytes, large: None })
    }

    fn try_own(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        let (mut now, mut mine) = (self.budget.now(), self.mine());
        if mine.own + bytes > AREA_BYTES {
            return None;
        }
        mine.own += bytes;
        now.add(bytes);
        Some(Held { area: self.clone(), own: bytes, of_rest: 0, large: None })
    }

    /// Takes room for `most` bytes in the common rest, or for `least` as soon as the stream's own rows leave it. One
    /// part of the stream waits here at a time.
    pub(crate) async fn take(self: &Arc<Self>, most: usize, least: usize) -> Held {
        if least > LEAST_BYTES {
            return self.take_alone(least).await;
        }
        loop {
            if let Some(held) = self.try_take(most).or_else(|| self.try_own(least)) {
                return held;
            }
            let _waiting = Waiting::of(self);
            self.freed.notified().await;
        }
    }

    /// Takes room for one row, in the common rest or in the place for large rows.
    pub(crate) async fn take_alone(self: &Arc<Self>, bytes: usize) -> Held {
        if let Some(held) = self.try_take(bytes) {
            return held;
        }
        let place = self.budget.large.clone().acquire_owned().await.ok();
        self.budget.now().add(bytes);
        Held { area: self.clone(), own: 0, of_rest: 0, large: Some(Large { _place: place, bytes }) }
    }

    /// Whether the stream reads nothing more until rows of its own are gone.
    pub(crate) fn is_full(&self) -> bool {
        self.mine().waits
    }
}

/// While it exists, the stream waits for room.
struct Waiting<'a>(&'a Area);

impl<'a> Waiting<'a> {
    fn of(area: &'a Area) -> Self {
        area.mine().waits = true;
        Self(area)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.mine().waits = false;
    }
}

/// Bytes that a stream may hold, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    area: Arc<Area>,
    own: usize,
    of_rest: usize,
    large: Option<Large>,
}

#[derive(Debug)]
struct Large {
    _place: Option<OwnedSemaphorePermit>,
    bytes: usize,
}

impl Held {
    /// All bytes that this holds.
    pub(crate) fn bytes(&self) -> usize {
        self.own + self.of_rest + self.large.as_ref().map_or(0, |large| large.bytes)
    }

    /// Gives back all but `bytes`.
    pub(crate) fn keep(&mut self, bytes: usize) {
        drop(self.split(self.bytes().saturating_sub(bytes)));
    }

    /// Splits off `bytes`, or all if there are fewer; those of the common rest first. A large row's bytes stay
    /// together.
    pub(crate) fn split(&mut self, bytes: usize) -> Self {
        let of_rest = bytes.min(self.of_rest);
        let own = (bytes - of_rest).min(self.own);
        self.of_rest -= of_rest;
        self.own -= own;
        Self { area: self.area.clone(), own, of_rest, large: None }
    }

    /// Joins two holds of the same stream.
    pub(crate) fn join(&mut self, mut other: Self) {
        debug_assert!(Arc::ptr_eq(&self.area, &other.area));
        self.own += std::mem::take(&mut other.own);
        self.of_rest += std::mem::take(&mut other.of_rest);
        self.large = self.large.take().or(other.large.take());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (mut now, mut mine) = (self.area.budget.now(), self.area.mine());
        now.remove(self.bytes());
        now.of_rest -= self.of_rest;
        mine.of_rest -= self.of_rest;
        mine.own -= self.own;
        drop((now, mine));
        self.area.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const MIB: usize = 1 << 20;

    /// A budget with `rest` bytes of a common rest, and the areas of an outbox.
    fn areas(rest: usize) -> (Arc<Budget>, Areas) {
        let budget = Budget::new(least(1) + rest, 1);
        let areas = Areas::new(&budget);
        (budget, areas)
    }

    #[tokio::test]
    async fn a_stream_takes_of_the_rest_no_more_than_it_leaves_free() {
        let (budget, areas) = areas(100 * MIB);
        let mut half: Vec<Held> = std::iter::from_fn(|| areas.main.try_take(10 * MIB)).collect();
        assert_eq!(half.len(), 5);
        let quarter: Vec<Held> = std::iter::from_fn(|| areas.retries.try_take(5 * MIB)).collect();
        assert_eq!(quarter.len(), 5);
        assert_eq!(budget.held(), (75 * MIB, 75 * MIB));
        half.truncate(1);
        drop(quarter);
        assert_eq!(budget.held(), (10 * MIB, 75 * MIB));
        assert!(areas.main.try_take(10 * MIB).is_some());
    }

    #[tokio::test]
    async fn a_stream_waits_for_its_own_rows_only_whatever_others_hold() {
        let (_, areas) = areas(0);
        let others = [areas.retries.take(MIB, LEAST_BYTES).await, areas.retries.take(MIB, LEAST_BYTES).await];
        let mine = [areas.main.take(MIB, LEAST_BYTES).await, areas.main.take(MIB, LEAST_BYTES).await];
        let mut more = Box::pin(areas.main.take(MIB, LEAST_BYTES));
        assert!(more.as_mut().now_or_never().is_none() && areas.main.is_full());
        drop(others);
        assert!(more.as_mut().now_or_never().is_none());
        drop(mine);
        assert_eq!(more.now_or_never().unwrap().bytes(), LEAST_BYTES);
        assert!(!areas.main.is_full());
    }

    #[tokio::test]
    async fn one_row_that_is_too_large_for_an_area_is_held_at_a_time() {
        let (budget, areas) = areas(0);
        let first = areas.main.take_alone(300 * MIB).await;
        assert_eq!(budget.held().0, 300 * MIB);
        let mut second = Box::pin(areas.retries.take(5 * MIB, 5 * MIB));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert_eq!(second.now_or_never().unwrap().bytes(), 5 * MIB);
        assert_eq!(budget.held().0, 0);
    }

    #[tokio::test]
    async fn room_is_given_back_in_parts_and_a_topics_turn_with_the_last() {
        let (budget, areas) = areas(100 * MIB);
        let mut turns: Vec<Arc<Area>> = Vec::new();
        for _ in 0..TOPICS_AT_ONCE {
            turns.push(areas.topic().await);
        }
        let area = turns.pop().unwrap();
        let mut held = area.take(20 * MIB, LEAST_BYTES).await;
        held.keep(8 * MIB);
        let mut page = held.split(3 * MIB);
        page.join(area.take(MIB, MIB).await);
        assert_eq!((held.bytes(), page.bytes(), budget.held().0), (5 * MIB, 4 * MIB, 9 * MIB));
        drop((area, held));
        assert!(areas.topic().now_or_never().is_none());
        drop(page);
        assert!(areas.topic().now_or_never().is_some());
        assert_eq!(budget.held(), (0, 20 * MIB));
    }

    #[test]
    fn the_least_budget_has_room_for_each_stream_and_the_default_for_a_common_rest() {
        assert_eq!([least(1), least(2), least(6)], [56 * MIB, 96 * MIB, 256 * MIB]);
        assert_eq!([default(1), default(4), default(5)], [256 * MIB, 256 * MIB, 320 * MIB]);
    }

    #[tokio::test]
    async fn a_large_rows_room_is_split_off_by_nothing_and_goes_with_what_it_joins() {
        let (budget, areas) = areas(0);
        let mut row = areas.main.take_alone(300 * MIB).await;
        assert_eq!(row.split(5 * MIB).bytes(), 0);
        row.keep(MIB);
        assert_eq!(row.bytes(), 300 * MIB);
        let mut page = areas.main.take(MIB, MIB).await;
        page.join(row);
        assert_eq!((page.bytes(), budget.held().0), (301 * MIB, 301 * MIB));
        drop(page);
        assert_eq!(budget.held(), (0, 301 * MIB));
    }
}

//! How far a partition is, compared with where it ends: what waits in it, and when its client has to be made anew.

use super::{buffer::Buffer, standing::Start};
use crate::part::{Movement, Waiting};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// A client that has fetched nothing for so long, although there are records and room for them, is made anew.
const WEDGED_AFTER: Duration = Duration::from_secs(10);
/// A client that was made anew is given so long before it is again: it has to join the group. Twice as long each time that it did
/// not help, as all other partitions of the member wait meanwhile.
const ANEW_EVERY: Duration = Duration::from_secs(30);
const ANEW_EVERY_MAX: Duration = Duration::from_secs(3600);
/// So many looks in succession fail before health says that a partition's end is not known.
const MISSES_MAX: u32 = 5;

/// How far one partition is.
pub(super) struct Place {
    buffer: Arc<Buffer>,
    /// The offset after what is done; negative until something is.
    done: watch::Receiver<i64>,
    /// The id of its topic when reading it began.
    pub(super) id: Option<String>,
    /// The offset that the client fetches next; negative while it does not know.
    pub(super) fetched: i64,
    /// The same, before the brokers were asked where the partition ends: no partition ends before that, unless it lost its tail.
    pub(super) reached: i64,
    pub(super) end: Option<i64>,
    movement: Movement<(i64, i64)>,
    pub(super) waiting: Option<Waiting>,
    /// How often in succession it was not known where the partition ends.
    misses: u32,
}

/// What a comparison found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing that the client will not cope with.
    Fine,
    /// The partition ends before what was read of it.
    Shrunk,
    /// There are records and room for them, and the client does not fetch.
    Wedged,
}

impl Place {
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

    pub(super) fn compare(&mut self, end: i64, now: Instant) -> Found {
        self.misses = 0;
        self.end = Some(end);
        let (pushed, oldest) = self.buffer.reached();
        let done = self.done();
        let in_hand = pushed.map_or(0, |pushed| pushed.saturating_sub(done.max(0)).max(0));
        let unfetched = if self.fetched < 0 { end } else { (end - self.fetched).max(0) };
        if in_hand == 0 && unfetched == 0 {
            self.movement.rests();
            self.waiting = None;
            return if self.reached > end { Found::Shrunk } else { Found::Fine };
        }
        let still_since = self.movement.waits_at((done, self.fetched), now);
        let items = u64::try_from(unfetched).unwrap_or_default();
        let items = items.saturating_add(u64::try_from(if done < 0 { 0 } else { in_hand }).unwrap_or_default());
        self.waiting = Some(Waiting { items: Some(items.max(1)), oldest, still_since });
        let still = now.saturating_duration_since(still_since);
        if in_hand == 0 && still >= WEDGED_AFTER { Found::Wedged } else { Found::Fine }
    }

    /// Where it ends was asked and not answered: what was known of it stays. Whether that has been so for too long.
    pub(super) fn misses(&mut self) -> bool {
        self.misses = self.misses.saturating_add(1);
        self.misses >= MISSES_MAX
    }
}

/// Whether a client that does not fetch is made anew.
#[derive(Default)]
pub(super) struct Patience {
    last: Option<Instant>,
    wedged: BTreeMap<(String, i32), Wedge>,
}

/// A partition for which a client was made anew.
struct Wedge {
    /// What was done of it then.
    done: i64,
    until: Instant,
    pause: Duration,
}

impl Patience {
    /// The partition moves again, or nothing waits in it.
    pub(super) fn moves(&mut self, partition: &(String, i32), done: i64, rests: bool) {
        if self.wedged.get(partition).is_some_and(|wedge| rests || done > wedge.done) {
            self.wedged.remove(partition);
        }
    }

    /// Whether the client is made anew now, because it does not fetch this partition.
    pub(super) fn ends(&mut self, partition: &(String, i32), done: i64, now: Instant) -> bool {
        let before = self.wedged.get(partition);
        if self.last.is_some_and(|last| now < last + ANEW_EVERY) || before.is_some_and(|wedge| now < wedge.until) {
            return false;
        }
        let pause = before.map_or(ANEW_EVERY, |wedge| (wedge.pause * 2).min(ANEW_EVERY_MAX));
        self.wedged.insert(partition.clone(), Wedge { done, until: now + pause, pause });
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
    use super::*;
    use crate::clock;

    #[test]
    fn a_client_that_it_does_not_help_to_replace_is_replaced_ever_more_rarely() {
        let (start, partition) = (clock::monotonic(), ("t".to_owned(), 0));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut patience = Patience::default();
        let replaced: Vec<u64> = (0..1000).filter(|second| patience.ends(&partition, 5, at(*second))).collect();
        assert_eq!(replaced, [0, 30, 90, 210, 450, 930]);
        // What was done before does not count, what is done since then does.
        patience.moves(&partition, 5, false);
        assert!(!patience.ends(&partition, 5, at(1000)));
        patience.moves(&partition, 6, false);
        assert!(patience.ends(&partition, 6, at(1000)));
    }

    #[test]
    fn what_waits_is_still_said_to_wait_while_its_end_is_not_known() {
        let buffer = Arc::new(Buffer::new(4, || {}));
        let mut place = Place::new(buffer, watch::channel(0).1, &Start::default());
        place.compare(10, clock::monotonic());
        let misses: Vec<bool> = (0..5).map(|_| place.misses()).collect();
        assert_eq!(misses, [false, false, false, false, true]);
        assert!(place.waiting.is_some());
        place.compare(10, clock::monotonic());
        assert!(!place.misses());
    }
}

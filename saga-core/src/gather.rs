//! Decides when an unusually small set waits 1 ms for more members: only while sets follow one another closely, and
//! only if this one is less than half as large as usual.
//!
//! What is taken together goes on together. A set that is apart by a fraction of a millisecond stays apart at every hop
//! behind this one: a transaction, a page and a request of its own. A fifth of all batches had one message. Many were
//! split off where a producer sent the first of many before it had the others (measured). Where all sets are about as
//! small as this one, none waits. Where a large set comes now and then, small ones behind it wait for a while, and get
//! nothing for it.

use std::time::{Duration, Instant};

/// How long a set waits; a timer makes it one or two milliseconds.
pub(crate) const SET_WAIT: Duration = Duration::from_millis(1);

/// Sets follow one another when they begin within this.
const DENSE_WITHIN: Duration = Duration::from_millis(100);

/// A set is much smaller when it is less than this part of the usual.
const SMALL_PART: usize = 2;

/// How many of the last sets make up what is usual.
const LAST_SETS: usize = 8;

/// What is known of the sets before this one.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    /// A moving average of the last sets' sizes, times [`LAST_SETS`].
    usual: usize,
    /// When the last set began; `None` before the first.
    last: Option<Instant>,
}

impl Gathering {
    /// Whether a set that has `size` members at `now` waits for more.
    pub(crate) fn waits(&self, size: usize, now: Instant) -> bool {
        let dense = self.last.is_some_and(|last| now.saturating_duration_since(last) < DENSE_WITHIN);
        dense && size * SMALL_PART * LAST_SETS < self.usual
    }

    /// Records that a set of `size` members begins.
    pub(crate) fn begins(&mut self, size: usize, now: Instant) {
        // The average is rounded down, so that in doubt no set waits.
        self.usual = self.usual - self.usual.div_ceil(LAST_SETS) + size;
        self.last = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(sizes: &[usize], now: Instant) -> Gathering {
        let mut gathering = Gathering::default();
        sizes.iter().for_each(|&size| gathering.begins(size, now));
        gathering
    }

    #[test]
    fn a_set_that_is_much_smaller_than_usual_waits_and_one_that_is_not_does_not() {
        let now = Instant::now();
        let gathering = after(&[30; 20], now);
        assert_eq!([1, 10, 16, 30, 60].map(|size| gathering.waits(size, now)), [true, true, false, false, false]);
    }

    #[test]
    fn nothing_waits_where_sets_are_small_or_none_came_for_a_while() {
        let now = Instant::now();
        assert!(!after(&[], now).waits(1, now));
        assert!(!after(&[1; 20], now).waits(1, now));
        assert!(!after(&[2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2], now).waits(1, now));
        assert!(!after(&[30; 20], now).waits(1, now + DENSE_WITHIN));
    }

    #[test]
    fn what_is_usual_is_forgotten() {
        let now = Instant::now();
        let sizes = [vec![500; 20], vec![1; 60]].concat();
        assert!(!after(&sizes, now).waits(1, now));
    }
}

//! When a set waits a moment for more: while sets follow one another, and it is much smaller than they are.
//!
//! Whatever is taken together goes on together: a set that is apart by a fraction of a millisecond is a transaction, a page
//! and a request of its own at every hop behind this one. A fifth of all batches had one message, and many were split off
//! where a producer sent the first of many before it had the others (measured). Where all sets are about as small as this
//! one nobody waits; where a large one comes now and then, small ones behind it wait for a while, and get nothing for it.

use std::time::{Duration, Instant};

/// How long it waits; a timer makes it one or two milliseconds.
pub(crate) const MOMENT: Duration = Duration::from_millis(1);

/// Sets follow one another when they begin within this.
const DENSE: Duration = Duration::from_millis(100);

/// A set is much smaller when it is less than this part of the usual.
const PART: usize = 2;

/// How many of the last sets make up what is usual.
const LAST: usize = 8;

/// The sets before.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    /// A moving average of their sizes, times [`LAST`].
    usual: usize,
    /// When the last of them began.
    last: Option<Instant>,
}

impl Gathering {
    /// Whether a set that has `size` members at `now` waits for more.
    pub(crate) fn waits(&self, size: usize, now: Instant) -> bool {
        let dense = self.last.is_some_and(|last| now.saturating_duration_since(last) < DENSE);
        dense && size * PART * LAST < self.usual
    }

    /// A set of `size` members begins.
    pub(crate) fn begins(&mut self, size: usize, now: Instant) {
        // Rounded so that a mean that is not whole counts as less: when in doubt, nobody waits.
        self.usual = self.usual - self.usual.div_ceil(LAST) + size;
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
        assert!(!after(&[30; 20], now).waits(1, now + DENSE));
    }

    #[test]
    fn what_is_usual_is_forgotten() {
        let now = Instant::now();
        let sizes = [vec![500; 20], vec![1; 60]].concat();
        assert!(!after(&sizes, now).waits(1, now));
    }
}

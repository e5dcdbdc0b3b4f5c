//! How many records the next attempt takes.
//!
//! A portion is all records that there are, as long as nothing is wrong. A portion that needs longer than its bound is
//! halved until one fits. That size is kept until half the bound would do for twice as many. The culprit of a fault
//! that names no message is searched for by halves (by eighths, if it waits for a lock). Once the first half is
//! handled, the culprit is in the second. A culprit that is found is tried as a single record, counted, and the rest is
//! one portion again.

use super::failure::Remedy;
use std::time::Duration;

/// The number of parts into which the records with the culprit are divided. An attempt that fails by waiting for a lock
/// takes far longer than one that succeeds, so there are to be few of them.
const FEW_PARTS: usize = 2;
const MANY_PARTS: usize = 8;

/// What the next attempt takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Portion {
    /// Take so many records, in one transaction.
    Together(usize),
    /// Take the first record alone, its attempt counted.
    Alone,
}

/// What is known of the records that come next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portions {
    max: usize,
    /// The most records that were handled within the bound.
    fits: usize,
    /// The number of records before the suspects, which are to be handled first.
    before: usize,
    /// The number of records behind those, one of which is the culprit. 0: none is known.
    suspects: usize,
    parts: usize,
    /// The number of records handled since the last culprit.
    gap: usize,
    /// The most records of a portion where culprits lie close together: one that reaches much further than the next
    /// culprit is in vain.
    reach: usize,
}

impl Portions {
    /// Portions of at most `max` records.
    pub(super) fn new(max: usize) -> Self {
        let max = max.max(1);
        Self { max, fits: max, before: 0, suspects: 0, parts: FEW_PARTS, gap: usize::MAX, reach: usize::MAX }
    }

    /// The most records that a portion takes now.
    pub(super) fn most(&self) -> usize {
        self.fits.min(self.reach)
    }

    /// Whether portions are small because larger ones took too long.
    pub(super) fn is_slow(&self) -> bool {
        self.fits < self.max
    }

    /// Chooses what to take of `waiting` records.
    pub(super) fn next(&self, waiting: usize) -> Portion {
        if waiting == 0 {
            return Portion::Together(0);
        }
        if self.before > 0 {
            return Portion::Together(self.before.min(self.fits).min(waiting));
        }
        match self.suspects {
            0 if self.reach == 1 => Portion::Alone,
            0 => Portion::Together(self.most().min(waiting)),
            1 => Portion::Alone,
            suspects => Portion::Together((suspects / self.parts).max(1).min(self.fits).min(waiting)),
        }
    }

    /// The first `size` records are handled; that took `took`, of `bound`.
    pub(super) fn handled(&mut self, size: usize, took: Duration, bound: Duration) {
        if took < bound / 4 && size >= self.fits {
            self.fits = self.fits.saturating_mul(2).min(self.max);
        }
        self.gap = self.gap.saturating_add(size);
        self.reach = self.reach.max(self.gap.saturating_mul(2));
        let beyond = size.saturating_sub(self.before);
        self.before = self.before.saturating_sub(size);
        self.suspects = self.suspects.saturating_sub(beyond);
    }

    /// The first `size` records were not handled; `culprit` records come before the culprit, if that is known.
    pub(super) fn failed(&mut self, size: usize, remedy: Remedy, culprit: Option<usize>) {
        self.parts = if remedy == Remedy::Wait { MANY_PARTS } else { FEW_PARTS };
        (self.before, self.suspects) = match (culprit, remedy) {
            (Some(before), _) => (before, 1),
            (None, Remedy::Smaller) if size > 1 => {
                self.fits = size / 2;
                (0, 0)
            }
            (None, _) => (0, size),
        };
    }

    /// Takes over the size that fitted elsewhere.
    pub(super) fn fit_like(&mut self, other: &Self) {
        self.fits = other.fits;
    }

    /// The first record, the culprit, is out of the way.
    pub(super) fn set_aside(&mut self) {
        self.reach = self.gap.saturating_mul(2).max(1);
        (self.before, self.suspects, self.gap) = (0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BOUND: Duration = Duration::from_secs(1);

    /// Handles `count` records, of which `bad` fail and each takes `each`. Returns the sizes that were tried, and the
    /// records that were tried alone.
    fn handle(
        portions: &mut Portions,
        count: usize,
        bad: &BTreeSet<usize>,
        each: Duration,
    ) -> (Vec<usize>, Vec<usize>) {
        let (mut done, mut sizes, mut alone) = (0, Vec::new(), Vec::new());
        while done < count {
            assert!(sizes.len() < 20 * count, "it does not end: {portions:?}");
            match portions.next(count - done) {
                Portion::Alone => {
                    sizes.push(1);
                    alone.push(done);
                    match bad.contains(&done) {
                        true => portions.set_aside(),
                        false => portions.handled(1, each, BOUND),
                    }
                    done += 1;
                }
                Portion::Together(size) => {
                    assert!((1..=count - done).contains(&size), "{portions:?}");
                    sizes.push(size);
                    let took = each * u32::try_from(size).unwrap();
                    if took > BOUND {
                        portions.failed(size, Remedy::Smaller, None);
                    } else if bad.range(done..done + size).next().is_some() {
                        portions.failed(size, Remedy::Retry, None);
                    } else {
                        portions.handled(size, took, BOUND);
                        done += size;
                    }
                }
            }
        }
        (sizes, alone)
    }

    #[test]
    fn one_culprit_in_five_hundred_costs_eleven_attempts_more_at_most() {
        for culprit in 0..500 {
            let mut portions = Portions::new(500);
            let (sizes, alone) = handle(&mut portions, 500, &BTreeSet::from([culprit]), Duration::ZERO);
            assert!(sizes.len() <= 12, "{culprit}: {sizes:?}");
            assert!(alone.contains(&culprit) && alone.len() <= 2, "{culprit}: {alone:?}");
        }
    }

    #[test]
    fn where_all_fail_hardly_any_attempt_is_in_vain() {
        let (sizes, alone) = handle(&mut Portions::new(500), 500, &(0..500).collect(), Duration::ZERO);
        // But for the attempts that find the first culprit, and the second.
        assert_eq!((sizes.len(), alone.len()), (518, 500), "{sizes:?}");
    }

    #[test]
    fn what_takes_too_long_is_halved_until_it_fits_and_the_size_is_remembered() {
        let mut portions = Portions::new(200);
        let slow = Duration::from_millis(20);
        let (sizes, alone) = handle(&mut portions, 200, &BTreeSet::new(), slow);
        assert_eq!(sizes, [200, 100, 50, 50, 50, 50], "a second is enough for fifty");
        assert!(alone.is_empty() && portions.is_slow());
        assert_eq!(handle(&mut portions, 200, &BTreeSet::new(), slow).0, [50; 4]);
        let (sizes, _) = handle(&mut portions, 400, &BTreeSet::new(), Duration::from_micros(1));
        assert_eq!(sizes, [50, 100, 200, 50], "and it grows back");
        assert!(!portions.is_slow());
    }

    #[test]
    fn a_record_that_waits_for_a_lock_among_many_is_found_within_five_waits() {
        for waits_at in 0..500 {
            let (mut portions, mut waits, mut done) = (Portions::new(500), 0, 0);
            loop {
                match portions.next(500 - done) {
                    Portion::Alone if done == waits_at => break,
                    Portion::Alone => {
                        portions.handled(1, Duration::ZERO, BOUND);
                        done += 1;
                    }
                    Portion::Together(size) if done + size <= waits_at => {
                        portions.handled(size, Duration::ZERO, BOUND);
                        done += size;
                    }
                    Portion::Together(size) => {
                        waits += 1;
                        portions.failed(size, Remedy::Wait, (size == 1).then_some(0));
                    }
                }
            }
            assert!(waits < 5, "{waits_at}: {waits}, and once more alone");
        }
    }

    #[test]
    fn a_culprit_that_is_named_is_alone_at_once_and_what_is_around_it_together() {
        let mut portions = Portions::new(500);
        portions.failed(500, Remedy::Retry, Some(300));
        assert_eq!(portions.next(500), Portion::Together(300));
        portions.handled(300, Duration::ZERO, BOUND);
        assert_eq!(portions.next(200), Portion::Alone);
        portions.set_aside();
        assert_eq!(portions.next(199), Portion::Together(199));
    }

    proptest! {
        #[test]
        fn every_record_is_handled_or_tried_alone_and_each_culprit_is_cheap(
            count in 1_usize..600,
            bad in proptest::collection::btree_set(0_usize..600, 0..6),
            micros in 0_u64..1_500,
        ) {
            let bad: BTreeSet<_> = bad.into_iter().filter(|bad| *bad < count).collect();
            let (sizes, alone) = handle(&mut Portions::new(500), count, &bad, Duration::from_micros(micros));
            prop_assert!(bad.iter().all(|bad| alone.contains(bad)));
            let whole = count.div_ceil(500);
            prop_assert!(sizes.len() <= whole + 22 * bad.len() + 12, "{sizes:?}");
        }
    }
}

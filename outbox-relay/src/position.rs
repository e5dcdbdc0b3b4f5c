//! How far an outbox is read and published: two snapshots, and an id between them.
//!
//! All rows that are visible in `base` are published. Of the rows that are visible in `target` and not in `base`, those
//! up to `after` are. So a row that commits late, with however low an id, is never taken for published.
//!
//! When the process dies, a new owner starts from the last position that was recorded in the batch log.

use crate::snapshot::{NotASnapshot, Snapshot};

/// The point that reading has reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The snapshot whose visible rows are all published.
    pub base: Snapshot,
    /// The snapshot up to which rows are being published: those visible in it and not in `base`.
    pub target: Snapshot,
    /// The id up to which those rows are published; the rows behind it are still to come.
    pub after: i64,
}

impl Position {
    /// The position before the first row.
    pub fn initial() -> Self {
        Self { base: Snapshot::initial(), target: Snapshot::initial(), after: 0 }
    }

    /// The position at which all that `snapshot` sees is published.
    pub fn at(snapshot: Snapshot) -> Self {
        Self { base: snapshot.clone(), target: snapshot, after: 0 }
    }

    /// Whether all that is published at `other`, an earlier or later position of the same stream, is published here.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        let same = self.base == other.base && self.target == other.target;
        same && self.after >= other.after || self.base.includes(&other.target)
    }

    /// The id up to which rows of the window that ends with `target` are published here; `None`: none of them.
    pub(crate) fn limit(&self, target: &Snapshot) -> Option<i64> {
        if self.base.includes(target) {
            return Some(i64::MAX);
        }
        self.target.includes(target).then_some(self.after)
    }
}

/// Reading the outbox failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// PostgreSQL returned an error, or is away.
    #[error("reading the outbox: {0}")]
    Database(#[from] sqlx::Error),
    /// A snapshot in the batch log, or from the server, does not parse.
    #[error(transparent)]
    Snapshot(#[from] NotASnapshot),
}

impl ReadError {
    /// The database's error, if the cause is the database.
    pub(crate) fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Database(error) => Some(error),
            Self::Snapshot(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(base: &str, target: &str, after: i64) -> Position {
        Position { base: base.parse().unwrap(), target: target.parse().unwrap(), after }
    }

    #[test]
    fn a_position_includes_an_earlier_one_and_no_window_that_it_has_not_finished() {
        let at = position("5:5:", "10:10:", 7);
        for (other, included) in [
            (position("5:5:", "10:10:", 7), true),
            (position("5:5:", "10:10:", 3), true),
            (position("5:5:", "10:10:", 8), false),
            (position("2:2:", "5:5:", 900), true),
            (position("2:2:", "6:6:", 1), false),
            (Position::initial(), true),
            (position("10:10:", "12:12:", 0), false),
        ] {
            assert_eq!(at.includes(&other), included, "{other:?}");
        }
    }

    #[test]
    fn a_position_whose_base_misses_a_straggler_does_not_include_one_that_saw_it() {
        let base_without_8 = position("8:12:8", "20:20:", 5);
        assert!(!base_without_8.includes(&position("5:5:", "10:10:", 1)));
        assert!(base_without_8.includes(&position("5:5:", "8:10:8", 1)));
    }

    #[test]
    fn a_window_is_published_whole_in_part_or_not_at_all() {
        let at = position("10:10:", "20:20:", 7);
        let limit = |target: &str| at.limit(&target.parse().unwrap());
        assert_eq!([limit("5:5:"), limit("10:10:")], [Some(i64::MAX); 2]);
        assert_eq!(limit("20:20:"), Some(7));
        assert_eq!([limit("20:21:"), limit("30:30:")], [None; 2]);
    }
}

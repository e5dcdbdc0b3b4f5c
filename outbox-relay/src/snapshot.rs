//! PostgreSQL's snapshots as values: what was committed at a moment. Pure.
//!
//! `xmin:xmax:xip`: everything below `xmax` had ended, except the transactions in `xip`; nothing from `xmax` on had.
//! Aborted transactions count as ended too, which is harmless: their rows are never visible to anyone.
//!
//! ```
//! use outbox_relay::snapshot::Snapshot;
//!
//! // Transaction 100 was running when 102 had ended already.
//! let published: Snapshot = "100:103:100".parse().unwrap();
//! assert!(published.sees(102) && !published.sees(100));
//!
//! let later: Snapshot = "103:103:".parse().unwrap();
//! assert!(later.includes(&published) && later.sees(100));
//! ```

use std::{fmt, str::FromStr};

/// What was committed at one moment, as `pg_current_snapshot()` returns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    xip: Vec<u64>,
}

impl Snapshot {
    /// The snapshot before everything: no transaction is visible in it.
    pub fn initial() -> Self {
        Self { xmin: 1, xmax: 1, xip: Vec::new() }
    }

    /// Whether it is the snapshot before everything.
    pub fn is_initial(&self) -> bool {
        self.xmax == 1
    }

    /// Whether it sees all that `other` sees.
    pub fn includes(&self, other: &Self) -> bool {
        other.xmax <= self.xmax && self.xip.iter().all(|&xid| !other.sees(xid))
    }

    /// Whether the transaction had ended at this snapshot.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmax && (xid < self.xmin || self.xip.binary_search(&xid).is_err())
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, xid) in self.xip.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{xid}")?;
        }
        Ok(())
    }
}

/// A text that is no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a snapshot (xmin:xmax:xip,…)")]
pub struct NotASnapshot(String);

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || -> Option<Self> {
            let mut parts = text.splitn(3, ':');
            let xmin = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let list = parts.next()?;
            let mut xip: Vec<u64> = match list {
                "" => Vec::new(),
                list => list.split(',').map(|xid| xid.parse().ok()).collect::<Option<_>>()?,
            };
            xip.sort_unstable();
            Some(Self { xmin, xmax, xip })
        };
        parse().ok_or_else(|| NotASnapshot(text.to_owned()))
    }
}

/// The transactions that ended between two snapshots, in a form in which an index can find their rows. That form is one
/// range with exceptions, and a few single ones that were running at the first snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The range's first transaction id.
    pub from: u64,
    /// The first transaction id behind the range.
    pub to: u64,
    /// Transactions in the range that were still running at the second snapshot.
    pub running: Vec<u64>,
    /// Transactions below the range that ran at the first snapshot and had ended by the second.
    pub stragglers: Vec<u64>,
}

impl Span {
    /// The transactions that `target` sees and `base` does not.
    pub fn between(base: &Snapshot, target: &Snapshot) -> Self {
        Self {
            from: base.xmax,
            to: target.xmax,
            running: target.xip.iter().copied().filter(|&xid| xid >= base.xmax).collect(),
            stragglers: base.xip.iter().copied().filter(|&xid| target.sees(xid)).collect(),
        }
    }
}

/// Transaction ids as PostgreSQL reads them.
pub(crate) fn texts(xids: &[u64]) -> Vec<String> {
    xids.iter().map(u64::to_string).collect()
}

impl Snapshot {
    /// Transactions that were running at this snapshot.
    pub fn running(&self) -> &[u64] {
        &self.xip
    }

    /// The first transaction id that had not been given out.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A snapshot, and one taken later: what had ended stays ended.
    fn pair() -> impl Strategy<Value = (Snapshot, Snapshot)> {
        (1_u64..40, 0_u64..40, proptest::collection::vec(any::<(bool, bool)>(), 80)).prop_map(|(xmax, more, state)| {
            let running = |xmax: u64, still: fn(&(bool, bool)) -> bool| -> Vec<u64> {
                (1..xmax).filter(|&xid| still(&state[usize::try_from(xid).unwrap()])).collect()
            };
            let of = |xmax: u64, xip: Vec<u64>| Snapshot { xmin: xip.first().copied().unwrap_or(xmax), xmax, xip };
            let base = of(xmax, running(xmax, |s| s.0));
            let later: Vec<u64> = (1..xmax + more)
                .filter(|&xid| {
                    let (first, second) = state[usize::try_from(xid).unwrap()];
                    second && (first || xid >= xmax)
                })
                .collect();
            (base, of(xmax + more, later))
        })
    }

    proptest! {
        #[test]
        fn a_span_holds_exactly_what_the_target_sees_and_the_base_does_not((base, target) in pair()) {
            let span = Span::between(&base, &target);
            for xid in 1..100 {
                let wanted = target.sees(xid) && !base.sees(xid);
                let found = (xid >= span.from && xid < span.to && !span.running.contains(&xid))
                    || span.stragglers.contains(&xid);
                prop_assert_eq!(wanted, found, "{} between {} and {}", xid, &base, &target);
            }
        }

        #[test]
        fn a_snapshot_survives_its_text((_, snapshot) in pair()) {
            prop_assert_eq!(snapshot.to_string().parse::<Snapshot>().unwrap(), snapshot);
        }
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        for text in ["", "1:2", "a:2:", "1:2:3,", "1:2:x"] {
            assert_eq!(text.parse::<Snapshot>(), Err(NotASnapshot(text.to_owned())));
        }
    }
}

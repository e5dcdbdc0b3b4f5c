//! Timers wait for replies that are in the topic already.
//!
//! After an outage every wait is over at once, while the replies that came in time are still in the topic. So the
//! engine decides a saga's timer only when its partition of the reply topic is read far enough. Far enough is the end
//! of the partition as it was when the timer was due. The partition's consumer records this in the database every few
//! seconds, so that any replica knows. A partition that was read lately delays no timer, and the timers of other
//! partitions go on. When a partition stays behind for minutes, its timers go on as well; the engine logs and counts
//! that.
//!
//! An outage may leave many sagas that have to wait, and the timers look five times a second. So while nothing changes,
//! the timers look at passed-over sagas only every few seconds. In between they look at those that have become due
//! since.

use super::engine::Engine;
use crate::{clock, id::SagaId, outbox::Tx, topic::key_hash};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;

/// A partition that was read to its end within this time is not behind. A few times the pause between two such
/// readings.
const READ_LATELY: Duration = Duration::from_secs(10);
/// How long timers wait for a partition, by default.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);

/// How long the timers leave passed-over sagas alone, while the same partitions are behind as far as before.
const PASS_OVER: Duration = Duration::from_secs(5);

/// Which partitions this process has seen behind, and since when.
#[derive(Debug)]
pub(super) struct BacklogPatience {
    pub(super) max: Duration,
    behind: Mutex<HashMap<i32, Since>>,
    passed: Mutex<Option<Passed>>,
}

/// A look that left nothing to do except what has to wait.
#[derive(Debug)]
struct Passed {
    backlog: Backlog,
    at: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Since {
    at: Instant,
    given_up: bool,
}

/// How far the reply topic's partitions are known to be read.
#[derive(Debug, Clone, Default)]
pub(super) struct Backlog {
    /// The number of the reply topic's partitions; at least 1.
    pub(super) partitions: i32,
    /// The partitions that are behind and that timers wait for.
    pub(super) behind: Vec<i32>,
    /// Until when each partition in `behind` has been read, in the same order.
    pub(super) read_until: Vec<OffsetDateTime>,
    /// What was due at this time or before has been passed over a moment ago; `None`: nothing is skipped.
    pub(super) passed: Option<OffsetDateTime>,
    /// The database's time when it was asked for this.
    asked: Option<OffsetDateTime>,
}

impl Backlog {
    /// Whether a saga's timer that is due at `due` has to wait.
    pub(super) fn holds(&self, saga: SagaId, due: Option<OffsetDateTime>) -> bool {
        let partition = key_hash(saga.to_string().as_bytes()) % self.partitions.max(1);
        let behind = self.behind.iter().position(|behind| *behind == partition);
        behind.is_some_and(|at| due.is_some_and(|due| due > self.read_until[at]))
    }
}

impl BacklogPatience {
    pub(super) fn new(max: Duration) -> Self {
        Self { max, behind: Mutex::default(), passed: Mutex::default() }
    }

    /// Called before a look: sets the time up to which the look skips what it passed over a moment ago.
    fn pass_over(&self, backlog: &mut Backlog, now: Instant) {
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |before: &Backlog| (&before.behind, &before.read_until) == (&backlog.behind, &backlog.read_until);
        let lately = |passed: &Passed| now.saturating_duration_since(passed.at) < PASS_OVER;
        if !passed.as_ref().is_some_and(|passed| same(&passed.backlog) && lately(passed)) {
            *passed = None;
        }
        backlog.passed = passed.as_ref().and_then(|passed| passed.backlog.asked);
    }

    /// Called after a look that took everything it may take: remembers what the look passed over.
    pub(super) fn has_passed_over(&self, backlog: &Backlog) {
        if backlog.behind.is_empty() {
            return;
        }
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        // Passed-over sagas keep the time of the first look that saw them.
        let at = passed.take().map_or_else(clock::monotonic, |passed| passed.at);
        *passed = Some(Passed { backlog: backlog.clone(), at });
    }

    /// Says of each partition that is behind whether timers still wait for it.
    fn waits(&self, behind: &[i32], now: Instant) -> Vec<bool> {
        let mut known = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|partition, _| behind.contains(partition));
        let waits = behind.iter().map(|partition| {
            let since = known.entry(*partition).or_insert_with(|| {
                tracing::info!(partition, "the saga timers of a partition wait until the replies in it are read");
                Since { at: now, given_up: false }
            });
            let waits = now.saturating_duration_since(since.at) < self.max;
            if !waits && !std::mem::replace(&mut since.given_up, true) {
                metrics::counter!("saga_timers_not_waiting_total").increment(1);
                tracing::error!(
                    partition,
                    waited = ?self.max,
                    "the replies of a partition are not read; the timers of its sagas go on all the same, and may resend or undo \
                     what has been answered; look at the consumer of the reply topic"
                );
            }
            waits
        });
        waits.collect()
    }
}

impl Engine {
    /// The partitions of the reply topic that timers have to wait for.
    pub(super) async fn read_backlog_in(&self, tx: &mut Tx<'_>) -> sqlx::Result<Backlog> {
        let found: Vec<(i32, Option<OffsetDateTime>, bool, OffsetDateTime)> = sqlx::query_as(
            "select partition, max(read_until),
                    coalesce(max(read_until) < clock_timestamp() - make_interval(secs => $2), false), clock_timestamp()
               from inbox_partition as p
              where topic = $1 and owner is not distinct from reader
                -- A topic that was made again may have fewer partitions: no worker reads the others any more. Those that it
                -- has are taken within a minute, or read on by a build that records no topic's id.
                and not exists (select from (select topic_id, taken_at
                                               from inbox_partition
                                              where topic = $1 and topic_id is not null
                                              order by taken_at desc
                                              limit 1) as newest
                                 where newest.topic_id <> p.topic_id and p.read_until < newest.taken_at
                                   and newest.taken_at < clock_timestamp() - interval '1 minute')
              group by partition",
        )
        .bind(self.reply_topic())
        .bind(clock::seconds(READ_LATELY))
        .fetch_all(&mut **tx)
        .await?;
        let partitions = found.iter().map(|(partition, ..)| partition + 1).max().unwrap_or(1);
        let asked = found.iter().map(|(.., asked)| *asked).min();
        let behind: Vec<_> = found.into_iter().filter(|(_, _, behind, _)| *behind).collect();
        let numbers: Vec<i32> = behind.iter().map(|(partition, ..)| *partition).collect();
        let waits = self.patience().waits(&numbers, clock::monotonic());
        let waited_for = behind.into_iter().zip(waits).filter(|(_, waits)| *waits);
        let (behind, read_until) =
            waited_for.filter_map(|((partition, until, ..), _)| Some((partition, until?))).unzip();
        let mut backlog = Backlog { partitions, behind, read_until, passed: None, asked };
        self.patience().pass_over(&mut backlog, clock::monotonic());
        Ok(backlog)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_stays_behind_is_waited_for_within_a_bound() {
        let (patience, start) = (BacklogPatience::new(Duration::from_secs(300)), clock::monotonic());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(patience.waits(&[1, 2], at(0)), [true, true]);
        assert_eq!(patience.waits(&[2], at(200)), [true]);
        assert_eq!(patience.waits(&[1, 2], at(301)), [true, false], "1 was read meanwhile, and is behind anew");
        assert_eq!(patience.waits(&[1, 2], at(600)), [true, false]);
    }

    #[test]
    fn what_was_due_before_the_partition_was_read_waits_for_nothing() {
        let saga = SagaId::new();
        let partition = key_hash(saga.to_string().as_bytes()) % 3;
        let (read, second) = (OffsetDateTime::UNIX_EPOCH, time::Duration::SECOND);
        let backlog =
            |behind| Backlog { partitions: 3, behind: vec![behind], read_until: vec![read], ..Backlog::default() };
        assert!(backlog(partition).holds(saga, Some(read + second)));
        assert!(!backlog(partition).holds(saga, Some(read)));
        assert!(!backlog((partition + 1) % 3).holds(saga, Some(read + second)));
    }

    #[test]
    fn what_was_passed_over_is_looked_at_again_after_a_while_or_when_it_is_read() {
        let (patience, start) = (BacklogPatience::new(Duration::from_secs(300)), clock::monotonic());
        let asked = |seconds| OffsetDateTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let backlog = |seconds, read| Backlog {
            partitions: 1,
            behind: vec![0],
            read_until: vec![read],
            passed: None,
            asked: Some(asked(seconds)),
        };
        let look = |mut backlog: Backlog, now| {
            patience.pass_over(&mut backlog, now);
            patience.has_passed_over(&backlog);
            backlog.passed
        };
        assert_eq!(look(backlog(1, asked(0)), start), None);
        assert_eq!(look(backlog(2, asked(0)), start), Some(asked(1)));
        assert_eq!(look(backlog(3, asked(0)), start), Some(asked(2)));
        assert_eq!(look(backlog(4, asked(0)), clock::monotonic() + PASS_OVER), None, "after a while");
        assert_eq!(look(backlog(5, asked(1)), clock::monotonic()), None, "when it has been read further");
        assert_eq!(look(Backlog { partitions: 1, ..Backlog::default() }, clock::monotonic()), None);
    }
}

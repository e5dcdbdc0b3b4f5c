//! The rows that wait in an outbox and the topics that are set apart, as the last look saw them: for health, on every
//! replica, whichever publishes.

use crate::{pending::Pending, position::Position};
use saga_core::{
    clock::{self, DatabaseClock},
    part::{Cause, HealthIssue, LookFailures, Movement, STALLED_AFTER, WaitingWork},
};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// An outbox's progress, as far as it is known.
#[derive(Default)]
pub(crate) struct OutboxProgress(Mutex<OutboxSeen>);

#[derive(Default)]
struct OutboxSeen {
    /// The mark is the number of the batch that was recorded last.
    movement: Movement<i64>,
    waiting: Option<WaitingWork>,
    issue: Option<HealthIssue>,
    looks: LookFailures,
    /// Topics that catch up; the mark is how far each has come.
    catching_up: HashMap<String, Movement<Option<Position>>>,
}

impl OutboxProgress {
    /// The trouble of topics that have rows, and what waits for the main stream.
    pub(crate) fn get(&self) -> (Option<HealthIssue>, Option<WaitingWork>) {
        let known = self.lock();
        (known.looks.issue().or_else(|| known.issue.clone()), known.waiting)
    }

    /// Records a look that failed: what was known before stands.
    pub(crate) fn missed(&self, why: &HealthIssue) {
        self.lock().looks.missed(why);
    }

    /// Records a look at what waits and what is set apart.
    pub(crate) fn is(&self, pending: &Pending, clock: &DatabaseClock) {
        self.is_at(pending, clock, clock::monotonic());
    }

    fn is_at(&self, pending: &Pending, clock: &DatabaseClock, now: Instant) {
        let mut known = self.lock();
        known.looks.seen();
        let hang = known.hang(pending, now);
        known.issue = issue(pending, hang, clock);
        if pending.main == 0 || pending.whole {
            known.movement.rests();
            known.waiting = None;
            return;
        }
        let still_since = known.movement.waits(pending.n);
        let items = u64::try_from(pending.rows).ok();
        known.waiting = Some(WaitingWork { items, oldest: pending.oldest, still_since });
    }

    fn lock(&self) -> MutexGuard<'_, OutboxSeen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OutboxSeen {
    /// The troubles of topics that should catch up with the main stream, have rows, and get no further.
    fn hang(&mut self, pending: &Pending, now: Instant) -> Vec<HealthIssue> {
        let behind = pending.behind.iter().filter(|behind| !pending.whole && behind.rows > 0 && behind.paused.resuming);
        let behind: Vec<_> = behind.collect();
        self.catching_up.retain(|topic, _| behind.iter().any(|behind| behind.paused.topic == *topic));
        let stalled = behind.into_iter().filter_map(|behind| {
            let movement = self.catching_up.entry(behind.paused.topic.clone()).or_default();
            let since = movement.waits_at(behind.paused.position.clone(), now);
            let still = now.saturating_duration_since(since);
            let (rows, topic, seconds) = (behind.rows, &behind.paused.topic, still.as_secs());
            let reason =
                format!("{rows} rows of topic {topic:?} wait that catches up, and nothing moved for {seconds} s");
            (still >= STALLED_AFTER)
                .then(|| HealthIssue { since: Some(since), ..HealthIssue::new(Cause::Stalled, reason) })
        });
        stalled.collect()
    }
}

/// The trouble of topics whose rows wait for something else than their turn.
fn issue(pending: &Pending, hang: Vec<HealthIssue>, clock: &DatabaseClock) -> Option<HealthIssue> {
    if pending.whole {
        return (pending.rows > 0).then(|| HealthIssue::new(Cause::Paused, "an operator paused the whole outbox"));
    }
    let waits = pending.behind.iter().filter(|behind| behind.rows > 0 && !behind.paused.resuming);
    let mut issues: Vec<HealthIssue> = waits
        .map(|behind| {
            let issue = behind.paused.issue(clock);
            HealthIssue { reason: format!("{} {}", behind.rows, issue.reason), ..issue }
        })
        .chain(hang)
        .collect();
    // Trouble that no operator wanted comes first.
    issues.sort_by_key(|issue| issue.cause == Cause::Paused);
    HealthIssue::all(issues)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pending::Behind,
        record::pause::{PauseCause, Paused},
    };
    use std::time::Duration;

    /// A topic with rows that an operator has resumed; `after` is how far it has come.
    fn behind(after: i64, rows: i64) -> Pending {
        let position = Some(Position { after, ..Position::initial() });
        let (topic, reason) = (String::from("back"), String::from("for a while"));
        let paused_at = clock::now();
        let paused = Paused { topic, cause: PauseCause::Operator, reason, paused_at, resuming: true, position };
        Pending { rows, behind: vec![Behind { paused, rows }], ..Pending::default() }
    }

    #[test]
    fn a_topic_that_catches_up_is_stalled_when_it_gets_no_further_and_not_before() {
        let (progress, clock, start) = (OutboxProgress::default(), DatabaseClock::of("catches_up"), clock::monotonic());
        let cause = |after, rows, seconds| {
            progress.is_at(&behind(after, rows), &clock, start + Duration::from_secs(seconds));
            progress.get().0.map(|issue| issue.cause)
        };
        assert_eq!([cause(1, 9, 0), cause(1, 9, 29), cause(2, 8, 35), cause(2, 8, 64)], [None; 4]);
        assert_eq!(cause(2, 8, 65), Some(Cause::Stalled));
        assert!(progress.get().0.unwrap().reason.contains("\"back\""));
        assert_eq!([cause(3, 7, 66), cause(3, 0, 100), cause(3, 1, 101)], [None; 3], "without rows nothing waits");
    }

    #[test]
    fn an_outbox_that_cannot_be_looked_up_is_not_in_order() {
        let (progress, clock) = (OutboxProgress::default(), DatabaseClock::of("cannot_be_looked_up"));
        progress.is(&Pending::default(), &clock);
        let slow = HealthIssue::new(Cause::NoAnswer, "it takes too long");
        (0..3).for_each(|_| progress.missed(&slow));
        assert_eq!(progress.get().0.map(|issue| issue.cause), Some(Cause::NoAnswer));
        progress.is(&Pending::default(), &clock);
        assert_eq!(progress.get(), (None, None));
    }
}

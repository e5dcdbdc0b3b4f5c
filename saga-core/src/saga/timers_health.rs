//! Whether the saga timers do their work: what health asks, and what is logged once.
//!
//! An outage makes the timers fail, and so does what an operator has to set right (a missing table, a missing right).
//! One saga's own fault does not. Nothing survives the process.

use super::batch::BatchError;
use crate::{
    clock,
    error_class::{ErrorClass, in_words},
    outage::Outage,
    part::{Cause, LookFailures, Movement, PartReport, WaitingWork},
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use uuid::Uuid;

/// How long after the next try the timers still do not count as working.
const TRY_TAKES: Duration = Duration::from_secs(1);

/// Whether the timers do their work: what health asks of them. An error that an operator has to set right counts for as
/// long as the work that met it is put off.
#[derive(Debug)]
pub(super) struct TimersHealth {
    outage: Arc<Outage>,
    until: Mutex<Option<Instant>>,
    progress: Mutex<TimersProgress>,
}

/// How many put-off sagas are remembered: enough to know that some wait.
const REMEMBERED_MAX: usize = 1_000;

/// What was due and not decided at the last look.
#[derive(Debug, Default)]
struct TimersProgress {
    /// Sagas that this process decided. One saga that cannot be decided is no sign that none can.
    decided: u64,
    /// Sagas that could not be decided. They are not due while they are put off, but they wait.
    put_off: HashSet<Uuid>,
    movement: Movement<(u64, Option<Overdue>)>,
    waiting: Option<WaitingWork>,
    looks: LookFailures,
}

/// A saga, and since when it has been due.
pub(super) type Overdue = (Uuid, OffsetDateTime);

impl TimersHealth {
    pub(super) fn of(reply_topic: &str) -> Self {
        Self {
            outage: Outage::of(&format!("saga timers of {reply_topic}")),
            until: Mutex::default(),
            progress: Mutex::default(),
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        self.outage.check()
    }

    pub(super) fn report(&self) -> PartReport {
        let progress = self.progress();
        PartReport { issue: self.outage.issue().or_else(|| progress.looks.issue()), waiting: progress.waiting }
    }

    /// Counts due sagas that were decided.
    pub(super) fn decided(&self, sagas: usize) {
        self.progress().decided += sagas as u64;
    }

    /// Remembers sagas that could not be decided, and are put off.
    pub(super) fn puts_off(&self, sagas: impl IntoIterator<Item = Uuid>) {
        let mut progress = self.progress();
        let room = REMEMBERED_MAX.saturating_sub(progress.put_off.len());
        progress.put_off.extend(sagas.into_iter().take(room));
    }

    /// The remembered sagas that were put off; each may still wait.
    pub(super) fn were_put_off(&self) -> Vec<Uuid> {
        self.progress().put_off.iter().copied().collect()
    }

    /// Records a look: the saga that has been due for longest, and those of [`TimersHealth::were_put_off`] that still wait.
    pub(super) fn overdue(&self, oldest: Option<Overdue>, put_off: &[Overdue]) {
        let mut progress = self.progress();
        let progress = &mut *progress;
        progress.looks.seen();
        progress.put_off = put_off.iter().map(|(saga, _)| *saga).collect();
        let since = oldest.iter().chain(put_off).map(|(_, since)| *since).min();
        let Some(since) = since else {
            progress.movement.rests();
            progress.waiting = None;
            return;
        };
        // Another replica moves work, too, and then another saga is the oldest. While sagas are put off, a new oldest
        // saga proves nothing: they take turns.
        let mark = (progress.decided, oldest.filter(|_| put_off.is_empty()));
        let still_since = progress.movement.waits(mark);
        progress.waiting = Some(WaitingWork { items: None, oldest: Some(since), still_since });
    }

    /// Records a look that failed: what was known before stands.
    pub(super) fn missed(&self, error: &sqlx::Error) {
        self.progress().looks.missed(&error.into());
    }

    fn progress(&self) -> MutexGuard<'_, TimersProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is(&self, error: &sqlx::Error, wait: Duration) {
        self.stands_in_the_way(Cause::of(error), &in_words(error), wait);
    }

    fn stands_in_the_way(&self, cause: Cause, reason: &str, wait: Duration) {
        self.outage.failing_of(cause, reason);
        *self.until() = Some(clock::monotonic() + wait + TRY_TAKES);
    }

    pub(super) fn may_be(&self, error: &BatchError, wait: Duration) {
        if let Some(database) = error.database().filter(|error| error.class() == ErrorClass::Configuration) {
            self.stands_in_the_way(Cause::of_found(database), &error.to_string(), wait);
        }
    }

    pub(super) fn none_since(&self) {
        if self.until().is_none_or(|until| clock::monotonic() > until) {
            self.outage.working();
        }
    }

    fn until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn still_since(health: &TimersHealth) -> Option<Instant> {
        health.report().waiting.map(|waiting| waiting.still_since)
    }

    #[test]
    fn timers_move_when_they_decide_others_and_stand_still_when_all_are_put_off() {
        let (health, since) = (TimersHealth::of("timers_move"), clock::now());
        let [unknown, one, other] = [Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7()].map(|saga| (saga, since));
        health.overdue(Some(unknown), &[]);
        let begin = still_since(&health).expect("it waits");
        health.overdue(Some(unknown), &[]);
        assert_eq!(still_since(&health), Some(begin));
        health.decided(1);
        health.overdue(Some(unknown), &[]);
        assert!(still_since(&health) > Some(begin), "no replica knows the oldest, and others are decided");

        health.puts_off([one.0, other.0]);
        health.overdue(None, &[one, other]);
        let begin = still_since(&health).expect("nothing is due, and two wait");
        assert_eq!(health.report().waiting.unwrap().oldest, Some(since));
        for turn in [one, other] {
            health.overdue(Some(turn), &[one, other]);
            assert_eq!(still_since(&health), Some(begin), "they take turns, and none is decided");
        }
        health.overdue(None, &[]);
        assert_eq!((still_since(&health), health.were_put_off()), (None, vec![]));
    }
}

//! What waits in an outbox and what is set apart, as it was last looked up: what health tells, on every replica, whoever publishes.

use crate::pending::Pending;
use saga_core::{
    clock::DatabaseClock,
    part::{Cause, Movement, Trouble, Waiting},
};
use std::sync::{Mutex, PoisonError};

/// What is known of an outbox's progress.
#[derive(Default)]
pub(crate) struct Progress(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By the number of the batch that was recorded last.
    movement: Movement<i64>,
    waiting: Option<Waiting>,
    trouble: Option<Trouble>,
}

impl Progress {
    /// What stands in the way of topics that have rows, and what waits for the main stream.
    pub(crate) fn get(&self) -> (Option<Trouble>, Option<Waiting>) {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (known.trouble.clone(), known.waiting)
    }

    /// It was looked up.
    pub(crate) fn is(&self, pending: &Pending, clock: &DatabaseClock) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.trouble = trouble(pending, clock);
        if pending.main == 0 || pending.whole {
            known.movement.rests();
            known.waiting = None;
            return;
        }
        let still_since = known.movement.waits(pending.n);
        let items = u64::try_from(pending.rows).ok();
        known.waiting = Some(Waiting { items, oldest: pending.oldest, still_since });
    }
}

/// Of the topics whose rows wait for something else than their turn.
fn trouble(pending: &Pending, clock: &DatabaseClock) -> Option<Trouble> {
    if pending.whole {
        return (pending.rows > 0).then(|| Trouble::new(Cause::Paused, "an operator paused the whole outbox"));
    }
    let waits = pending.behind.iter().filter(|behind| behind.rows > 0 && !behind.paused.resuming);
    let mut troubles: Vec<Trouble> = waits
        .map(|behind| {
            let trouble = behind.paused.trouble(clock);
            Trouble { reason: format!("{} {}", behind.rows, trouble.reason), ..trouble }
        })
        .collect();
    // What an operator did not want comes first.
    troubles.sort_by_key(|trouble| trouble.cause == Cause::Paused);
    Trouble::all(troubles)
}

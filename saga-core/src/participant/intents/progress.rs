//! What waits to be performed, and since when nothing of it moves: what health tells of effects.

use super::Oldest;
use crate::{
    clock,
    part::{Cause, Movement, Report, STALLED_AFTER, Trouble, Waiting},
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// As it was last counted.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// How many were settled here. An intent that cannot be is no sign that none can.
    settled: u64,
    movement: Movement<(u64, Uuid)>,
    waiting: Option<Waiting>,
    /// What was said last of the intent that waits for longest.
    last_error: Option<String>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One was settled.
    pub(super) fn settled(&self) {
        self.lock().settled += 1;
    }

    /// This is the one that waits for longest.
    pub(super) fn counted(&self, oldest: Option<Oldest>) {
        let mut known = self.lock();
        let settled = known.settled;
        let Some((command, since, last_error, count)) = oldest else {
            *known = Known { settled, ..Known::default() };
            return;
        };
        let still_since = known.movement.waits((settled, command));
        known.waiting = Some(Waiting { items: u64::try_from(count).ok(), oldest: Some(since), still_since });
        known.last_error = last_error;
    }

    /// The trouble that is known, or that nothing moves, with what was said last; and what waits.
    pub(super) fn report(&self, trouble: Option<Trouble>) -> Report {
        let known = self.lock();
        let trouble = trouble.or_else(|| {
            let since = known.waiting?.still_since;
            let still = clock::monotonic().saturating_duration_since(since);
            let said = known.last_error.as_deref().unwrap_or("no answer yet");
            let reason = format!("no effect that waits was performed for {} s: {said}", still.as_secs());
            (still >= STALLED_AFTER).then(|| Trouble { since: Some(since), ..Trouble::new(Cause::Stalled, reason) })
        });
        Report { trouble, waiting: known.waiting }
    }
}

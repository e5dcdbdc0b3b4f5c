//! Whether the saga timers do their work: what health asks, and what is logged once.
//!
//! An outage, or what an operator has to set right (a missing table, a missing right), makes them fail; one saga's own fault does
//! not. Nothing survives the process.

use super::batch::BatchError;
use crate::{
    clock,
    error_class::{ErrorClass, classify, in_words},
    outage::Outage,
    part::{Cause, Movement, Report, Waiting},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use uuid::Uuid;

/// How long after the next try the timers are not said to work.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Whether the timers do their work: what health asks of them. An error that an operator has to set right counts for as long as
/// what it met is put off.
#[derive(Debug)]
pub(super) struct Trouble {
    outage: Arc<Outage>,
    until: Mutex<Option<Instant>>,
    progress: Mutex<Progress>,
}

/// What was due and not decided, when it was last counted.
#[derive(Debug, Default)]
struct Progress {
    movement: Movement<(Uuid, OffsetDateTime)>,
    waiting: Option<Waiting>,
}

impl Trouble {
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

    pub(super) fn report(&self) -> Report {
        let waiting = self.progress.lock().unwrap_or_else(PoisonError::into_inner).waiting;
        Report { trouble: self.outage.trouble(), waiting }
    }

    /// The saga that has been due for longest, and since when.
    pub(super) fn overdue(&self, oldest: Option<(Uuid, OffsetDateTime)>) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match oldest {
            None => *progress = Progress::default(),
            Some(mark) => {
                let still_since = progress.movement.waits(mark);
                progress.waiting = Some(Waiting { items: None, oldest: Some(mark.1), still_since });
            }
        }
    }

    pub(super) fn is(&self, error: &sqlx::Error, wait: Duration) {
        self.outage.failing_of(Cause::of(error), &in_words(error));
        *self.until() = Some(clock::monotonic() + wait + AFTERWARDS);
    }

    pub(super) fn may_be(&self, error: &BatchError, wait: Duration) {
        match error {
            BatchError::Database(error) if classify(error) == ErrorClass::Configuration => self.is(error, wait),
            _ => {}
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

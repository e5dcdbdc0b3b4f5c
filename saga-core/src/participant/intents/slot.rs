//! Slots for calls of intents that were called before: half of all, so that others go on beside them.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many slots are taken. All clones share one count.
#[derive(Debug, Clone, Default)]
pub(super) struct Slots(Arc<AtomicUsize>);

/// A slot for a call of an intent that was called before; free when dropped.
pub(super) struct Slot(Slots);

impl Slots {
    pub(super) fn take(&self) -> Slot {
        self.0.fetch_add(1, Ordering::Relaxed);
        Slot(self.clone())
    }

    pub(super) fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

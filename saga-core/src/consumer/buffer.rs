//! What has been polled of one partition and waits for its worker.

use super::record::Raw;
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// Most bytes of one partition that wait, and most of one batch: large records must not fill the memory by their number.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// Between the polling task and one worker. It never refuses a record: when it is full the partition is paused, which
/// takes effect with the next poll.
pub(super) struct Buffer {
    limit: usize,
    queue: Mutex<Queue>,
    arrived: Notify,
    drained: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Queue {
    records: VecDeque<Raw>,
    bytes: usize,
    paused: bool,
    /// Something came that the worker has not been told of.
    untold: bool,
}

/// What the polling task has to do after a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Room {
    /// Nothing.
    Left,
    /// Pause the partition.
    Full,
}

impl Buffer {
    /// For `limit` records. `drained` is called when a full buffer has room again.
    pub(super) fn new(limit: usize, drained: impl Fn() + Send + Sync + 'static) -> Self {
        Self { limit, queue: Mutex::default(), arrived: Notify::new(), drained: Box::new(drained) }
    }

    /// Takes a record; the worker hears of it with [`Buffer::announce`].
    pub(super) fn push(&self, record: Raw) -> Room {
        let mut queue = self.lock();
        queue.untold = true;
        queue.bytes += record.size();
        queue.records.push_back(record);
        let full = queue.records.len() >= self.limit || queue.bytes >= BYTES_MAX;
        let room = if full && !queue.paused { Room::Full } else { Room::Left };
        queue.paused |= full;
        room
    }

    /// Wakes the worker for what came since the last time. Once for everything that arrived together: a worker that is
    /// woken by the first record of a fetch makes a transaction of that one alone.
    pub(super) fn announce(&self) {
        if std::mem::take(&mut self.lock().untold) {
            self.arrived.notify_one();
        }
    }

    /// What has arrived, at most `max` records; waits for the first. Nothing is lost when this is cancelled.
    pub(super) async fn take(&self, max: usize) -> Vec<Raw> {
        loop {
            let mut taken = Vec::new();
            self.take_more(&mut taken, max.max(1));
            if !taken.is_empty() {
                return taken;
            }
            self.arrived.notified().await;
        }
    }

    /// Adds what has arrived, until there are `max` records; waits for nothing.
    pub(super) fn take_more(&self, taken: &mut Vec<Raw>, max: usize) {
        let mut bytes: usize = taken.iter().map(Raw::size).sum();
        let mut queue = self.lock();
        while taken.len() < max
            && bytes < BYTES_MAX
            && let Some(record) = queue.records.pop_front()
        {
            bytes += record.size();
            queue.bytes -= record.size();
            taken.push(record);
        }
        // Half: pausing throws away what was fetched ahead, so it should not happen at every record.
        let room = queue.records.len() <= self.limit / 2 && queue.bytes <= BYTES_MAX / 2;
        let resume = queue.paused && room;
        queue.paused &= !resume;
        drop(queue);
        if resume {
            (self.drained)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    #[tokio::test]
    async fn a_full_buffer_says_so_once_and_says_when_it_is_half_empty() {
        let drained = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&drained);
        let buffer = Buffer::new(4, move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let rooms: Vec<_> = (0..6).map(|_| buffer.push(Raw::default())).collect();
        assert_eq!(rooms, [Room::Left, Room::Left, Room::Left, Room::Full, Room::Left, Room::Left]);
        assert_eq!((buffer.take(3).await.len(), drained.load(Ordering::SeqCst)), (3, 0));
        assert_eq!((buffer.take(3).await.len(), drained.load(Ordering::SeqCst)), (3, 1));
        assert_eq!(buffer.push(Raw::default()), Room::Left);
        assert_eq!((buffer.take(3).await.len(), drained.load(Ordering::SeqCst)), (1, 1));
    }
}

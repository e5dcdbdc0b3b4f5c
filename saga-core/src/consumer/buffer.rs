//! Records that were polled of one partition and wait for its worker.

use super::record::Raw;
use crate::{
    clock,
    gather::{Gathering, SET_WAIT},
};
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};
use time::OffsetDateTime;
use tokio::sync::Notify;

/// The most bytes of one partition that wait, and the most of one batch: large records must not fill the memory by
/// their number.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// The buffer between the polling task and one worker. It never refuses a record: when it is full the partition is
/// paused, which takes effect with the next poll.
pub(super) struct Buffer {
    limit: usize,
    queue: Mutex<Queue>,
    arrived: Notify,
    drained: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Queue {
    records: VecDeque<Raw>,
    /// The offset after the last record that was pushed.
    next: Option<i64>,
    bytes: usize,
    paused: bool,
    /// Records came that the worker has not heard of.
    untold: bool,
}

/// What the polling task has to do after a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum PushResult {
    /// The buffer has room: nothing is to be done.
    Accepted,
    /// The buffer is full: the polling task pauses the partition.
    Full,
}

impl Buffer {
    /// Makes a buffer for `limit` records. `drained` is called when a full buffer has room again.
    pub(super) fn new(limit: usize, drained: impl Fn() + Send + Sync + 'static) -> Self {
        Self { limit, queue: Mutex::default(), arrived: Notify::new(), drained: Box::new(drained) }
    }

    /// Takes a record; the worker hears of it with [`Buffer::announce`].
    pub(super) fn push(&self, record: Raw) -> PushResult {
        let mut queue = self.lock();
        queue.untold = true;
        queue.bytes += record.size();
        queue.next = Some(record.offset.saturating_add(1));
        queue.records.push_back(record);
        let full = queue.records.len() >= self.limit || queue.bytes >= BYTES_MAX;
        let room = if full && !queue.paused { PushResult::Full } else { PushResult::Accepted };
        queue.paused |= full;
        room
    }

    /// Wakes the worker for what came since the last time, once for everything that arrived together. A worker that is
    /// woken by the first record of a fetch makes a transaction of that record alone.
    pub(super) fn announce(&self) {
        if std::mem::take(&mut self.lock().untold) {
            self.arrived.notify_one();
        }
    }

    /// The offset after the last record that came, and the time of the oldest that waits.
    pub(super) fn reached(&self) -> (Option<i64>, Option<OffsetDateTime>) {
        let queue = self.lock();
        (queue.next, queue.records.front().and_then(|record| record.timestamp))
    }

    /// Takes what has arrived, at most `max` records. Waits for the first, and a moment for more when those are far
    /// fewer than usual. Nothing is lost when this is cancelled.
    pub(super) async fn take(&self, max: usize, gathering: &mut Gathering) -> Vec<Raw> {
        loop {
            let waiting = self.lock().records.len();
            if waiting > 0 {
                if gathering.waits(waiting.min(max), clock::monotonic()) {
                    tokio::time::sleep(SET_WAIT).await;
                }
                let taken = self.take_now(max.max(1));
                gathering.begins(taken.len(), clock::monotonic());
                return taken;
            }
            self.arrived.notified().await;
        }
    }

    fn take_now(&self, max: usize) -> Vec<Raw> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        let mut queue = self.lock();
        while taken.len() < max
            && bytes < BYTES_MAX
            && let Some(record) = queue.records.pop_front()
        {
            bytes += record.size();
            queue.bytes -= record.size();
            taken.push(record);
        }
        // Half the limit: pausing throws away what was fetched ahead, so it should not happen at every record.
        let room = queue.records.len() <= self.limit / 2 && queue.bytes <= BYTES_MAX / 2;
        let resume = queue.paused && room;
        queue.paused &= !resume;
        drop(queue);
        if resume {
            (self.drained)();
        }
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
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
        assert_eq!(
            rooms,
            [
                PushResult::Accepted,
                PushResult::Accepted,
                PushResult::Accepted,
                PushResult::Full,
                PushResult::Accepted,
                PushResult::Accepted
            ]
        );
        let mut gathering = Gathering::default();
        assert_eq!((buffer.take(3, &mut gathering).await.len(), drained.load(Ordering::SeqCst)), (3, 0));
        assert_eq!((buffer.take(3, &mut gathering).await.len(), drained.load(Ordering::SeqCst)), (3, 1));
        assert_eq!(buffer.push(Raw::default()), PushResult::Accepted);
        assert_eq!((buffer.take(3, &mut gathering).await.len(), drained.load(Ordering::SeqCst)), (1, 1));
    }

    #[tokio::test]
    async fn far_fewer_records_than_usual_wait_a_moment_for_those_that_come_behind_them() {
        let buffer = Buffer::new(100, || {});
        let mut gathering = Gathering::default();
        // However long this process is kept from running, the last batch was not long ago.
        let late = clock::monotonic() + std::time::Duration::from_secs(3600);
        (0..20).for_each(|_| gathering.begins(10, late));
        let push = |_| assert_eq!(buffer.push(Raw::default()), PushResult::Accepted);

        push(0);
        let mut taking = Box::pin(buffer.take(10, &mut gathering));
        assert!(taking.as_mut().now_or_never().is_none());
        (1..12).for_each(push);
        assert_eq!(taking.await.len(), 10);

        (12..16).for_each(push);
        let taken = buffer.take(10, &mut gathering).now_or_never();
        assert_eq!(taken.map(|taken| taken.len()), Some(6), "more than half of what is usual does not wait");

        for _ in 0..60 {
            push(0);
            assert_eq!(buffer.take(10, &mut gathering).await.len(), 1);
        }
        push(0);
        assert!(buffer.take(10, &mut gathering).now_or_never().is_some(), "what is usual is told by what is taken");
    }
}

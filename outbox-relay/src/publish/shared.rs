//! The state that the streams of one outbox share, for one owner's time.
//!
//! A row that Kafka has acknowledged beyond what is recorded is remembered here, so that this process sends it once.
//! When the process dies, that is forgotten with it: the next owner sends the row again, with the same `ce_id`.

use crate::{
    budget::Areas,
    control::{Control, ControlWatch},
    database::Database,
    loops::Loops,
    position::{Position, ReadError},
    publish::{handover_requests::HandoverRequests, producer::Kafka},
    read::nudges::Nudges,
    record::{
        commit::{CommitError, Recordable},
        parking::BlockedLanes,
    },
    topics::Topics,
};
use saga_core::clock::DatabaseClock;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};
use time::OffsetDateTime;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The state that the streams of one outbox share.
pub(crate) struct Shared {
    pub(crate) outbox: String,
    /// The epoch that its rows' ids count in.
    pub(crate) epoch: Arc<str>,
    pub(crate) db: Database,
    /// Connections for statements that may read much.
    pub(crate) reading: Database,
    pub(crate) clock: Arc<DatabaseClock>,
    pub(crate) blocked: Arc<BlockedLanes>,
    pub(crate) kafka: Kafka,
    pub(crate) topics: Topics,
    pub(crate) loops: Arc<Loops>,
    /// How long no broker takes a row before it is stuck.
    pub(crate) stuck_after: Duration,
    /// How long a topic that has refused a row stays set apart.
    pub(crate) set_apart_for: Duration,
    pub(crate) control: watch::Receiver<Arc<Control>>,
    pub(crate) wanted: Weak<ControlWatch>,
    pub(crate) progress: mpsc::Sender<Recordable>,
    /// Wakes the recorder before its pause ends.
    pub(crate) hurry: Arc<Notify>,
    pub(crate) nudges: Arc<Nudges>,
    /// The main stream's position: it has sent, or passed over, all before.
    pub(crate) main: watch::Sender<Position>,
    pub(crate) handover_requests: HandoverRequests,
    /// Room for the rows of each stream.
    pub(crate) areas: Arc<Areas>,
    pub(crate) stop: CancellationToken,
    /// Rows that Kafka has acknowledged beyond what is recorded, by topic.
    pub(crate) acknowledged: Mutex<HashMap<String, HashSet<i64>>>,
    /// Topics that have come back since the main stream's session began, with the start of their pause: the last look
    /// at pauses may be a moment old.
    pub(crate) back: Mutex<HashMap<String, OffsetDateTime>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Remembers rows that Kafka has acknowledged.
    pub(crate) fn remember(&self, rows: HashMap<String, HashSet<i64>>) {
        let mut acknowledged = lock(&self.acknowledged);
        for (topic, ids) in rows {
            acknowledged.entry(topic).or_default().extend(ids);
        }
    }

    /// Whether Kafka has acknowledged the row; the answer is given once, when the row comes again.
    pub(crate) fn was_acknowledged(&self, topic: &str, id: i64) -> bool {
        let mut acknowledged = lock(&self.acknowledged);
        if acknowledged.is_empty() {
            return false;
        }
        let Some(ids) = acknowledged.get_mut(topic) else { return false };
        let was = ids.remove(&id);
        if ids.is_empty() {
            acknowledged.remove(topic);
        }
        was
    }

    /// Forgets the acknowledged rows of a topic that is gone.
    pub(crate) fn forget(&self, topic: &str) {
        lock(&self.acknowledged).remove(topic);
    }

    /// Records that the topic has come back into the main stream.
    pub(crate) fn has_come_back(&self, topic: &str, paused_at: OffsetDateTime) {
        lock(&self.back).insert(topic.to_owned(), paused_at);
    }

    /// Whether this pause of the topic is over.
    pub(crate) fn has_resumed(&self, topic: &str, paused_at: OffsetDateTime) -> bool {
        lock(&self.back).get(topic) == Some(&paused_at)
    }

    /// Forgets which topics have come back: a new session of the main stream begins.
    pub(crate) fn forget_those_back(&self) {
        lock(&self.back).clear();
    }

    /// Waits until everything before is recorded.
    pub(crate) async fn flush(&self) -> Result<(), CommitError> {
        let (flushed, recorded) = oneshot::channel();
        self.progress.send(Recordable::Flush(flushed)).await.map_err(|_| CommitError::Fenced)?;
        self.hurry.notify_one();
        recorded.await.map_err(|_| CommitError::Fenced)
    }

    /// Looks up what operators want now. The last look may be older than what was recorded since.
    pub(crate) async fn refresh(&self) -> Result<Arc<Control>, ReadError> {
        match self.wanted.upgrade() {
            Some(wanted) => self.db.ask(async |db| wanted.refresh(db).await).await,
            None => Ok(self.control.borrow().clone()),
        }
    }
}

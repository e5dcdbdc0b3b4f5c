//! An owner's time: from taking the lease to losing it, one session after another.
//!
//! When the process dies, the lease runs out, and whoever takes it next starts from the batch log.

use crate::{
    anchor::{AnchorError, anchor},
    batch_log,
    commit::{CommitError, Recorder},
    control::{self, Control, Wanted},
    lease::{Lease, LeaseError},
    outbox::Outbox,
    parking::Blocked,
    position::{Cursor, Position, ReadError},
    producer::Publisher,
    reader::Reader,
    record::RecordBuilder,
    retry::Retries,
    session::{Ended, Memory, Session},
};
use futures::FutureExt as _;
use saga_core::clock;
use std::{any::Any, collections::HashMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinError,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

/// Pages read ahead of the producer.
const PAGES_AHEAD: usize = 3;
/// Stretches that wait to be recorded. Small things; the limit is there so that there is one.
const UNRECORDED: usize = 1_024;
/// Between two producers, when one after the other fails.
const LONGEST_REBUILD_PAUSE: Duration = Duration::from_secs(5);

/// Why an owner is none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnerError {
    /// The lease is lost.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The position may not be followed here.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// Progress could not be recorded.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The outbox could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The database.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// librdkafka does not accept the configuration.
    #[error("the Kafka producer could not be made: {0}")]
    Producer(#[from] rdkafka::error::KafkaError),
    /// A session ended for a reason that the next one cannot cure.
    #[error("publishing stopped: {0}")]
    Session(String),
    /// A task of the owner's panicked.
    #[error("publishing stopped, by a fault in the relay itself: {what} ended: {why}")]
    Panicked {
        /// What the task does.
        what: &'static str,
        /// What it said.
        why: String,
    },
}

impl OwnerError {
    /// What the database said, if it is about the database.
    pub(crate) fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Commit(CommitError::Database(error))
            | Self::Read(ReadError::Database(error))
            | Self::Database(error) => Some(error),
            Self::Anchor(error) => error.database(),
            _ => None,
        }
    }
}

/// Publishes under `lease` until it is lost, something fails, or `stop`.
pub(crate) async fn own(outbox: &Outbox, lease: &Lease, stop: &CancellationToken) -> Result<(), OwnerError> {
    tokio::select! {
        biased;
        lost = lease.keep(&outbox.leases) => Err(lost.into()),
        // The lease is given back also after a panic, and the outbox tries again.
        ended = AssertUnwindSafe(publish(outbox, lease, stop)).catch_unwind() => ended.unwrap_or_else(|panic| {
            Err(OwnerError::Panicked { what: "publishing", why: message(&*panic) })
        }),
    }
}

async fn publish(outbox: &Outbox, lease: &Lease, stop: &CancellationToken) -> Result<(), OwnerError> {
    let system_identifier = anchor(outbox, lease).await?;
    if !wait_for_kafka(outbox, stop).await {
        return Ok(());
    }
    let first = outbox.db.ask(async |db| control::look(db, &outbox.name).await).await?;
    let (wanted, control) = Wanted::new(&outbox.name, first);
    let wanted = Arc::new(wanted);
    // When the looking ends, so does the channel.
    let weak = Arc::downgrade(&wanted);
    let looking = control::run(outbox.db.clone(), outbox.topics.clone(), wanted);
    let looking = AbortOnDropHandle::new(tokio::spawn(looking));
    let blocked = Arc::new(Blocked::default());
    let retries = Retries::new(outbox, lease.owner, blocked.clone(), control.clone());
    let mut retrying = AbortOnDropHandle::new(tokio::spawn(retries.run()));
    let mut memory = Memory::default();
    let mut limit = usize::MAX;
    let mut rebuild = Rebuild::default();
    loop {
        let publisher =
            Publisher::new(&outbox.name, &outbox.brokers, &outbox.compression, limit, outbox.status.brokers.clone())?;
        let now = match weak.upgrade() {
            // What was told last may be older than what the session before recorded.
            Some(wanted) => outbox.db.ask(async |db| wanted.refresh(db).await).await?,
            None => control.borrow().clone(),
        };
        let control = (blocked.clone(), now, control.clone());
        let session = session(outbox, lease, stop, system_identifier, publisher, memory, control);
        let (ended, left) = tokio::select! {
            ended = session => ended?,
            fault = &mut retrying => return joined("trying parked rows again", fault),
        };
        memory = left;
        match ended {
            Ended::Stopped => return Ok(()),
            Ended::SmallerBatches(bytes) => limit = limit.min(bytes),
            Ended::Stalled(topic) => warn!(outbox = outbox.name, topic, "the topic cannot catch up yet; others go on"),
            Ended::Refused { .. } => {
                warn!(outbox = outbox.name, reason = %ended, "the producer is rebuilt; rows are sent one at a time for a while");
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = rebuild.pause() => {}
                }
            }
            Ended::Commit(error) => return Err(error.into()),
            Ended::Read(error) => return Err(error.into()),
            Ended::Database(error) => return Err(error.into()),
            Ended::Control => {
                joined("looking up what operators want", looking.await)??;
                return Err(OwnerError::Session(ended.to_string()));
            }
            Ended::Reader => return Err(OwnerError::Session(ended.to_string())),
        }
    }
}

/// How long to wait before the next producer.
#[derive(Default)]
struct Rebuild {
    last: Option<std::time::Instant>,
    pause: Duration,
}

impl Rebuild {
    async fn pause(&mut self) {
        let now = clock::monotonic();
        let soon = self.last.is_some_and(|last| now.duration_since(last) < 2 * LONGEST_REBUILD_PAUSE);
        self.pause = if soon {
            (self.pause * 2).clamp(Duration::from_millis(20), LONGEST_REBUILD_PAUSE)
        } else {
            Duration::ZERO
        };
        self.last = Some(now);
        tokio::time::sleep(self.pause).await;
    }
}

/// Waits until a broker answers, and says so once; false when the process stops first.
async fn wait_for_kafka(outbox: &Outbox, stop: &CancellationToken) -> bool {
    let mut said = false;
    while !outbox.topics.reachable().await {
        if !said {
            warn!(outbox = outbox.name, brokers = outbox.brokers, "waiting for Kafka");
            outbox.status.problem("Kafka is not there");
            said = true;
        }
        tokio::select! {
            () = stop.cancelled() => return false,
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
    }
    if said {
        info!(outbox = outbox.name, "Kafka is there");
    }
    outbox.status.publishing();
    true
}

/// One producer's life, from reading the position to recording the last of it.
async fn session(
    outbox: &Outbox,
    lease: &Lease,
    stop: &CancellationToken,
    system_identifier: i64,
    publisher: Publisher,
    memory: Memory,
    (blocked, now, mut control): (Arc<Blocked>, Arc<Control>, watch::Receiver<Arc<Control>>),
) -> Result<(Ended, Memory), OwnerError> {
    let last = outbox.db.ask(async |db| batch_log::last(db, &outbox.name).await).await?;
    let (n, at) = last.map_or((0, Position::initial()), |last| (last.n, last.position));
    blocked.load(&outbox.db, &outbox.name, |_| true).await?;
    let paused = now.paused.iter().filter(|(_, p)| p.position.is_some()).map(|(topic, _)| topic.clone()).collect();
    let reader_control = control.clone();
    control.mark_changed();

    let (progress, recording) = mpsc::channel(UNRECORDED);
    let recorder =
        Recorder { db: outbox.db.clone(), outbox: outbox.name.clone(), owner: lease.owner, system_identifier, n };
    let mut recorder = AbortOnDropHandle::new(tokio::spawn(recorder.run(recording)));
    let (items, pages) = mpsc::channel(PAGES_AHEAD);
    let (pages_done, done) = watch::channel(0);
    let reader = Reader::new(Cursor::new(at.clone(), None), reader_control, items, done);
    let mut reader = AbortOnDropHandle::new(tokio::spawn(reader.run(outbox.reading.clone())));
    let mut session = Session {
        outbox: outbox.name.clone(),
        db: outbox.db.clone(),
        topics: outbox.topics.clone(),
        publisher,
        builder: RecordBuilder::new(&outbox.name, outbox.leases.clock.clone()),
        memory,
        blocked,
        paused,
        resumed: HashMap::new(),
        limits: HashMap::new(),
        at,
        control,
        progress,
        pages_done,
        stop: stop.clone(),
    };
    let ended = session.run(pages).await;
    // Reading first: what it reads from here on is of no use.
    let read =
        if matches!(ended, Ended::Reader) { joined("reading the outbox", (&mut reader).await) } else { Ok(Ok(())) };
    drop(reader);
    let memory = session.finish(&ended).await;
    joined("recording progress", (&mut recorder).await)??;
    read??;
    Ok((ended, memory))
}

/// What a task said at its end, unless it panicked.
fn joined<T>(what: &'static str, ended: Result<T, JoinError>) -> Result<T, OwnerError> {
    ended.map_err(|why| OwnerError::Panicked { what, why: why.to_string() })
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| String::from("it said nothing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panicked_is_an_error_that_says_which_and_why() {
        let ended = tokio::spawn(async { panic!("year 300000 has no calendar") }).await;
        let error = joined::<()>("reading the outbox", ended).unwrap_err().to_string();
        assert!(error.contains("reading the outbox") && error.contains("year 300000"), "{error}");
        assert!(joined("reading the outbox", tokio::spawn(async {}).await).is_ok());
    }
}

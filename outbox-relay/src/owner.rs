//! An owner's time, from taking the lease to losing it: the streams, and what they share.
//!
//! When the process dies, the lease runs out, and the next process to take it starts from the batch log.

use crate::{
    anchor::{AnchorError, Anchored, anchor},
    batch_log,
    commit::{CommitError, Progress, Recorder},
    control::{self, Control, Wanted},
    handover::Asks,
    lease::{Lease, LeaseError},
    nudges::Nudges,
    outbox::Outbox,
    parking::Blocked,
    position::{Position, ReadError},
    producer::Kafka,
    retry::Retries,
    set_apart,
    stream::{self, Shared},
};
use futures::FutureExt as _;
use saga_core::{
    error_class::is_pool_full,
    part::{Cause, Trouble},
};
use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinError,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

/// How many stretches may wait to be recorded. They are small; the limit only prevents endless growth.
const UNRECORDED: usize = 1_024;

/// Why an owner stopped publishing.
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
    /// The database returned an error.
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
        /// The task's work, in words.
        what: &'static str,
        /// The text of the panic.
        why: String,
    },
}

impl OwnerError {
    /// The trouble that the error is for the outbox.
    pub(crate) fn trouble(&self) -> Trouble {
        let cause = match (self.database(), self) {
            (Some(error), _) => Cause::of(error),
            (None, Self::Anchor(_)) => Cause::Moved,
            (None, Self::Lease(_)) => Cause::DatabaseAway,
            (None, _) => Cause::Fault,
        };
        match self.database() {
            Some(error) if is_pool_full(error) => Trouble::from(error),
            _ => Trouble::new(cause, self.to_string()),
        }
    }

    /// The database's error, if the cause is the database.
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

/// Publishes under `lease` until the lease is lost, something fails, or `stop`.
pub(crate) async fn own(outbox: &Outbox, lease: &Lease, stop: &CancellationToken) -> Result<(), OwnerError> {
    tokio::select! {
        biased;
        lost = lease.keep(&outbox.leases) => Err(lost.into()),
        // After a panic, too, the process gives the lease back, and the outbox tries again.
        ended = AssertUnwindSafe(publish(outbox, lease, stop)).catch_unwind() => ended.unwrap_or_else(|panic| {
            Err(OwnerError::Panicked { what: "publishing", why: message(&*panic) })
        }),
    }
}

async fn publish(outbox: &Outbox, lease: &Lease, stop: &CancellationToken) -> Result<(), OwnerError> {
    outbox.status.loops.clear();
    let Anchored { system_identifier, epoch } = anchor(outbox, lease).await?;
    if !wait_for_kafka(outbox, stop).await {
        return Ok(());
    }
    let first = outbox.db.ask(async |db| control::look(db, &outbox.name).await).await?;
    let last = outbox.db.ask(async |db| batch_log::last(db, &outbox.name).await).await?;
    let (n, at) = last.map_or((0, Position::initial()), |last| (last.n, last.position));
    let (wanted, control) = Wanted::new(&outbox.name, first);
    let wanted = Arc::new(wanted);
    // The channel ends when the looking ends.
    let weak = Arc::downgrade(&wanted);
    let loops = outbox.status.loops.clone();
    let looking = control::run(outbox.db.clone(), outbox.topics.clone(), loops, wanted);
    let mut looking = AbortOnDropHandle::new(tokio::spawn(looking));
    let (progress, recording) = mpsc::channel(UNRECORDED);
    let hurry = Arc::default();
    let (db, name, owner) = (outbox.db.clone(), outbox.name.clone(), lease.owner);
    let recorder = Recorder { db, outbox: name, owner, system_identifier, n, hurry: Arc::clone(&hurry) };
    let mut recorder = AbortOnDropHandle::new(tokio::spawn(recorder.run(recording)));
    let blocked = Arc::new(Blocked::default());
    let retries = Retries::new(outbox, lease.owner, epoch.clone(), blocked.clone(), control.clone());
    let mut retrying = AbortOnDropHandle::new(tokio::spawn(retries.run()));
    let shared = shared((outbox, epoch), blocked, stop, (control, weak), (progress, hurry), at.clone());
    let set_apart = AbortOnDropHandle::new(tokio::spawn(set_apart::run(shared.clone())));
    let ended = tokio::select! {
        biased;
        // These branches come first: the streams end because these tasks did.
        recorded = &mut recorder => return joined("recording progress", recorded)?.map_err(OwnerError::from),
        fault = &mut retrying => return joined("trying parked rows again", fault),
        looked = &mut looking => return joined("looking up what operators want", looked)?.map_err(OwnerError::from),
        ended = stream::run_main(&shared, at) => ended,
    };
    match ended {
        Ok(()) => joined("publishing topics that are set apart", set_apart.await)?,
        Err(_) => drop(set_apart),
    }
    drop(shared);
    // The recorder now has all progress.
    let recorded = joined("recording progress", recorder.await)?;
    // An error of the recorder's is the reason for the stream's.
    recorded?;
    ended
}

/// The state that the streams of the outbox share.
fn shared(
    (outbox, epoch): (&Outbox, Arc<str>),
    blocked: Arc<Blocked>,
    stop: &CancellationToken,
    (control, wanted): (watch::Receiver<Arc<Control>>, Weak<Wanted>),
    (progress, hurry): (mpsc::Sender<Progress>, Arc<Notify>),
    at: Position,
) -> Arc<Shared> {
    let kafka = Kafka {
        outbox: outbox.name.clone(),
        brokers: outbox.brokers.clone(),
        compression: outbox.compression.clone(),
        state: outbox.status.brokers.clone(),
    };
    Arc::new(Shared {
        outbox: outbox.name.clone(),
        epoch,
        db: outbox.db.clone(),
        reading: outbox.reading.clone(),
        clock: outbox.leases.clock.clone(),
        blocked,
        kafka,
        topics: outbox.topics.clone(),
        loops: outbox.status.loops.clone(),
        stuck_after: outbox.stuck_after,
        set_apart_for: outbox.set_apart_for,
        control,
        wanted,
        progress,
        hurry,
        nudges: Arc::new(Nudges::listen(outbox.db.options())),
        main: watch::channel(at).0,
        asks: Asks::default(),
        areas: outbox.areas.clone(),
        stop: stop.clone(),
        acknowledged: Mutex::default(),
        back: Mutex::default(),
    })
}

/// Waits until a broker answers, and logs that once; false when the process stops first.
async fn wait_for_kafka(outbox: &Outbox, stop: &CancellationToken) -> bool {
    let mut said = false;
    while !outbox.topics.reachable().await {
        if !said {
            warn!(outbox = outbox.name, brokers = outbox.brokers, "waiting for Kafka");
            outbox.status.kafka_is_away();
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

/// The result of a task, unless it panicked.
pub(crate) fn joined<T>(what: &'static str, ended: Result<T, JoinError>) -> Result<T, OwnerError> {
    ended.map_err(|why| OwnerError::Panicked { what, why: why.to_string() })
}

/// The text of a panic.
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

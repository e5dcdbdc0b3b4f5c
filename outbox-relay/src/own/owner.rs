//! An owner's time, from taking the lease to losing it: the streams, and what they share.
//!
//! When the process dies, the lease runs out, and the next process to take it starts from the batch log.

use crate::{
    anchor::{Anchored, anchor},
    control::{self, Control, ControlWatch},
    lease::Lease,
    outbox::Outbox,
    owner_error::{OwnerError, joined},
    position::Position,
    publish::{
        handover_requests::HandoverRequests, producer::Kafka, retry::Retries, set_apart, shared::Shared, stream,
    },
    read::nudges::Nudges,
    record::{
        batch_log,
        commit::{Recordable, Recorder},
        parking::BlockedLanes,
    },
};
use futures::FutureExt as _;
use saga_core::outage::Wait;
use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

/// How many stretches may wait to be recorded. They are small; the limit only prevents endless growth.
const UNRECORDED_MAX: usize = 1_024;

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
    let (wanted, control) = ControlWatch::new(&outbox.name, first);
    let wanted = Arc::new(wanted);
    // The channel ends when the looking ends.
    let weak = Arc::downgrade(&wanted);
    let loops = outbox.status.loops.clone();
    let looking = control::run(outbox.db.clone(), outbox.topics.clone(), loops, wanted);
    let mut looking = AbortOnDropHandle::new(tokio::spawn(looking));
    let (progress, recording) = mpsc::channel(UNRECORDED_MAX);
    let hurry = Arc::default();
    let (db, name, owner) = (outbox.db.clone(), outbox.name.clone(), lease.owner);
    let recorder = Recorder { db, outbox: name, owner, system_identifier, n, hurry: Arc::clone(&hurry) };
    let mut recorder = AbortOnDropHandle::new(tokio::spawn(recorder.run(recording)));
    let blocked = Arc::new(BlockedLanes::default());
    let retries = Retries::new(outbox, lease.owner, epoch.clone(), blocked.clone(), control.clone());
    let mut retrying = AbortOnDropHandle::new(tokio::spawn(retries.run()));
    let channels = Channels { control, wanted: weak, progress, hurry };
    let shared = shared(outbox, epoch, channels, blocked, stop, at.clone());
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

/// The streams' ways to what operators want, and to the recorder.
struct Channels {
    control: watch::Receiver<Arc<Control>>,
    wanted: Weak<ControlWatch>,
    progress: mpsc::Sender<Recordable>,
    hurry: Arc<Notify>,
}

/// The state that the streams of the outbox share.
fn shared(
    outbox: &Outbox,
    epoch: Arc<str>,
    channels: Channels,
    blocked: Arc<BlockedLanes>,
    stop: &CancellationToken,
    at: Position,
) -> Arc<Shared> {
    let Channels { control, wanted, progress, hurry } = channels;
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
        handover_requests: HandoverRequests::default(),
        areas: outbox.areas.clone(),
        stop: stop.clone(),
        acknowledged: Mutex::default(),
        back: Mutex::default(),
    })
}

/// Waits until a broker answers, and logs that once; false when the process stops first.
async fn wait_for_kafka(outbox: &Outbox, stop: &CancellationToken) -> bool {
    let wait = Wait::default();
    while !outbox.topics.reachable().await {
        if wait.begins() {
            warn!(outbox = outbox.name, brokers = outbox.brokers, "waiting for Kafka");
            outbox.status.kafka_is_away();
        }
        tokio::select! {
            () = stop.cancelled() => return false,
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
    }
    if wait.ends() {
        info!(outbox = outbox.name, "Kafka is there");
    }
    outbox.status.publishing();
    true
}

/// The text of a panic.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| String::from("it said nothing"))
}

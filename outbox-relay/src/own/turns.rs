//! The turns of this process at one outbox: it stands by, owns the outbox, stands by again. What happens to one outbox
//! stops no other.
//!
//! When the process dies as the owner, its lease runs out, and another process takes its turn.

use crate::{
    database::is_missing,
    lease::{Lease, LeaseError},
    metric,
    outbox::{Outbox, OutboxRole},
    own::{gauges, owner},
    owner_error::OwnerError,
};
use saga_core::{
    clock,
    error_class::{in_words, is_outage, is_pool_full},
    retry::Backoff,
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

/// The pause between two looks at a lease that another process has.
const STAND_BY_FOR: Duration = Duration::from_millis(500);
/// The pauses between two tries when something is wrong with the database.
const PAUSES: Backoff = Backoff::doubling(Duration::from_millis(100), Duration::from_secs(5)).exact();

/// Stands by, publishes, and stands by again, until `stop`.
pub(crate) async fn run(outbox: &Outbox, stop: &CancellationToken) {
    tokio::select! {
        () = take_turns(outbox, stop) => {}
        () = gauges::run(outbox) => {}
        () = outbox.upkeep.run() => {}
    }
}

async fn take_turns(outbox: &Outbox, stop: &CancellationToken) {
    let mut before = None;
    let mut tries = PublishTries::default();
    while !stop.is_cancelled() {
        let began = clock::monotonic();
        let pause = match run_once(outbox, &mut before, stop).await {
            Ok(LeaseTry::HeldElsewhere) => {
                tries.over();
                STAND_BY_FOR.min(outbox.leases.length / 4)
            }
            Ok(LeaseTry::Held) => {
                tries.over();
                Duration::ZERO
            }
            Err(error) => {
                outbox.status.set(OutboxRole::Failing, Some(error.issue()));
                tries.report(outbox, &error, began.elapsed())
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn run_once(
    outbox: &Outbox,
    before: &mut Option<Uuid>,
    stop: &CancellationToken,
) -> Result<LeaseTry, OwnerError> {
    let holder = holder();
    let taken = tokio::select! {
        () = stop.cancelled() => return Ok(LeaseTry::HeldElsewhere),
        taken = Lease::acquire(&outbox.leases, &outbox.name, &holder, *before) => taken?,
    };
    let Some(lease) = taken else {
        outbox.status.set(OutboxRole::StandingBy, None);
        metric::owner(&outbox.name, false);
        return Ok(LeaseTry::HeldElsewhere);
    };
    *before = Some(lease.owner);
    info!(outbox = outbox.name, owner = %lease.owner, "took the lease");
    outbox.status.publishing();
    metric::owner(&outbox.name, true);
    let ended = owner::own(outbox, &lease, stop).await;
    metric::owner(&outbox.name, false);
    match &ended {
        Err(OwnerError::Lease(LeaseError::TakenOver)) => {}
        _ => match lease.release(&outbox.leases).await {
            Ok(()) => info!(outbox = outbox.name, owner = %lease.owner, "gave the lease back"),
            // The lease then runs out.
            Err(error) => warn!(outbox = outbox.name, %error, "the lease could not be given back"),
        },
    }
    ended.map(|()| LeaseTry::Held)
}

enum LeaseTry {
    HeldElsewhere,
    Held,
}

/// The tries to publish: it reports an outage of this outbox, and decides how long to wait before the next try.
#[derive(Default)]
struct PublishTries {
    /// Failures one after the other.
    failures: u32,
}

impl PublishTries {
    /// Reports why publishing ended, after so long; returns the pause before the next try.
    fn report(&mut self, outbox: &Outbox, problem: &OwnerError, after: Duration) -> Duration {
        let database = problem.database();
        match database {
            Some(error) if is_outage(error) => outbox.leases.outage.failing(&problem.to_string()),
            Some(error) if is_pool_full(error) => outbox.outage.failing(&in_words(error)),
            Some(error) if is_missing(error) => outbox.outage.failing(&format!(
                "its tables are not there: start the service that makes them, or run `outbox-relay migrate` ({error})"
            )),
            _ => outbox.outage.failing(&problem.to_string()),
        }
        if after > PAUSES.max {
            self.over();
        }
        self.failures += 1;
        PAUSES.delay(self.failures, 0)
    }

    fn over(&mut self) {
        self.failures = 0;
    }
}

/// The name of this process in the lease, for people: host and process id.
fn holder() -> String {
    let host = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/etc/hostname").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty());
    format!("{}/{}", host.as_deref().unwrap_or("localhost"), std::process::id())
}

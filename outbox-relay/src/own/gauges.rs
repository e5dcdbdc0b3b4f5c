//! How far behind the outbox is, for as long as this process runs: on every replica, whichever publishes.
//!
//! Values of the owner alone would stay as they were when it lost the lease. Where no replica may publish, because the
//! position is another cluster's, there would be no values at all, just when they matter. A value that cannot be looked
//! up is shown as unknown (NaN).

use crate::{
    database::is_missing,
    metric,
    outbox::Outbox,
    pending::{self, Pending},
    position::ReadError,
};
use saga_core::{
    clock::DatabaseClock,
    error_class::is_outage,
    outage::Outage,
    part::{Cause, HealthIssue},
};
use std::time::Duration;

/// How often the gauges are set.
const SET_EVERY: Duration = Duration::from_secs(5);

/// Sets the gauges until the future is dropped.
pub(crate) async fn run(outbox: &Outbox) {
    let counting = Outage::of(&format!("what is pending in outbox {}", outbox.name));
    loop {
        match outbox.reading.ask(async |db| pending::of(db, &outbox.name).await).await {
            Ok(pending) => {
                show(&outbox.name, &pending, &outbox.leases.clock);
                outbox.status.progress.is(&pending, &outbox.leases.clock);
                counting.working();
            }
            Err(error) => {
                metric::pending_unknown(&outbox.name);
                outbox.status.progress.missed(&issue(&error));
                // Without the database or its tables nothing else works, and that is reported for the outbox.
                if !error.database().is_some_and(|error| is_outage(error) || is_missing(error)) {
                    counting.failing(&error.to_string());
                }
            }
        }
        if outbox.status.get().1.is_none() {
            outbox.outage.working();
        }
        tokio::time::sleep(SET_EVERY).await;
    }
}

/// Sets how far behind the outbox is.
#[allow(clippy::cast_precision_loss)]
fn show(outbox: &str, pending: &Pending, clock: &DatabaseClock) {
    let age = pending.oldest.map_or(0.0, |oldest| clock.since(oldest));
    metrics::gauge!("outbox_pending", "outbox" => outbox.to_owned()).set(pending.rows as f64);
    metrics::gauge!("outbox_oldest_pending_age_seconds", "outbox" => outbox.to_owned()).set(age);
    metrics::gauge!("outbox_parked", "outbox" => outbox.to_owned()).set(pending.parked as f64);
    metrics::gauge!("outbox_paused_topics", "outbox" => outbox.to_owned()).set(pending.paused as f64);
}

fn issue(error: &ReadError) -> HealthIssue {
    error.database().map_or_else(|| HealthIssue::new(Cause::Fault, error.to_string()), HealthIssue::from)
}

//! How far behind the outbox is, for as long as this process runs: on every replica, whichever publishes.
//!
//! Values of the owner alone would stay as they were when it lost the lease. Where no replica may publish, because the
//! position is another cluster's, there would be no values at all, just when they matter. A value that cannot be looked
//! up is shown as unknown (NaN).

use crate::{metric, outbox::Outbox, pending, position::ReadError};
use saga_core::{
    error_class::is_outage,
    outage::Outage,
    part::{Cause, Trouble},
};
use std::time::Duration;

/// How often the gauges are set.
const EVERY: Duration = Duration::from_secs(5);

/// Sets the gauges until the future is dropped.
pub(crate) async fn run(outbox: &Outbox) {
    let counting = Outage::of(&format!("what is pending in outbox {}", outbox.name));
    loop {
        match outbox.reading.ask(async |db| pending::of(db, &outbox.name).await).await {
            Ok(pending) => {
                metric::pending(&outbox.name, &pending, &outbox.leases.clock);
                outbox.status.progress.is(&pending, &outbox.leases.clock);
                counting.working();
            }
            Err(error) => {
                metric::pending_unknown(&outbox.name);
                outbox.status.progress.missed(&trouble(&error));
                // Without the database or its tables nothing else works, and that is reported for the outbox.
                if !error.database().is_some_and(|error| is_outage(error) || is_missing(error)) {
                    counting.failing(&error.to_string());
                }
            }
        }
        if outbox.status.get().1.is_none() {
            outbox.outage.working();
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn trouble(error: &ReadError) -> Trouble {
    error.database().map_or_else(|| Trouble::new(Cause::Fault, error.to_string()), Trouble::from)
}

/// Whether the error means that the service has not made its tables yet.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| matches!(&*code, "42P01" | "42883"))
}

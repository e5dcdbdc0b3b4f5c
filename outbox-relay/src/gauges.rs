//! How far behind the outbox is, for as long as this process runs: on every replica, whoever publishes.
//!
//! What an owner told would stay as it was when it lost the lease, and where nobody may publish (the position is another
//! cluster's) nobody would tell at all, just when it matters. What cannot be looked up is told as unknown (NaN).

use crate::{
    database::{Database, DatabaseClock},
    metric, pending,
};
use std::time::Duration;
use tracing::{debug, warn};

/// How often they are set.
const EVERY: Duration = Duration::from_secs(5);

/// Sets the gauges until it is dropped.
pub(crate) async fn run(db: &Database, outbox: &str, clock: &DatabaseClock) {
    let mut told = true;
    loop {
        match db.ask(async |db| pending::of(db, outbox).await).await {
            Ok(pending) => {
                metric::pending(outbox, &pending, clock);
                told = true;
            }
            Err(error) => {
                metric::pending_unknown(outbox);
                // While the tables or the database are not there this is so each time.
                if std::mem::replace(&mut told, false) {
                    warn!(outbox, %error, "what is pending cannot be counted");
                } else {
                    debug!(outbox, %error, "what is pending still cannot be counted");
                }
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

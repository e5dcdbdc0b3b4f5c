//! Looks after the tables of an outbox, for as long as this process runs: whichever process publishes, and whether Kafka is
//! there or not. Two replicas that do it at once disturb each other no more than a lock that is not to be had.
//!
//! When the process dies in between, the next round of any replica goes on.

use crate::{database::Database, gauges::is_missing};
use saga_core::{error_class::is_outage, outage::Outage};
use std::time::Duration;
use tracing::info;

/// How often partitions are looked after. One holds ten million rows, and a whole one is kept ahead.
const EVERY: Duration = Duration::from_secs(30);
/// After a lock was not to be had.
const AGAIN: Duration = Duration::from_secs(3);
/// Calls that a partition takes at most: a check is added, validated, and used.
const STEPS: usize = 4;
/// Resolved rows that one statement deletes: it holds their locks, and a discard may wait for one.
const DELETED_AT_ONCE: i64 = 500;

/// Looks after the tables until it is dropped. Parked rows that are resolved are kept for `kept`.
pub(crate) async fn run(db: &Database, outbox: &str, kept: Duration) {
    let upkeep = Outage::of(&format!("upkeep of outbox {outbox}"));
    loop {
        let done = async {
            add_partitions(db, outbox).await?;
            delete_resolved(db, outbox, kept).await
        };
        let pause = match done.await {
            Ok(()) => {
                upkeep.working();
                EVERY
            }
            // Other parts meet it too, and report it.
            Err(error) if is_outage(&error) || is_missing(&error) => EVERY / 10,
            Err(error) => {
                upkeep.failing(&error.to_string());
                AGAIN
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn add_partitions(db: &Database, outbox: &str) -> Result<(), sqlx::Error> {
    for _ in 0..STEPS {
        let made: Option<String> =
            db.ask(async |db| sqlx::query_scalar("select outbox_add_partition()").fetch_one(db).await).await?;
        if let Some(partition) = made {
            info!(outbox, partition, "made the outbox's next partition");
            break;
        }
    }
    Ok(())
}

/// Deletes parked rows that were resolved long ago. What was discarded stays as long as the row in the outbox does: nothing
/// else tells that it was not published.
async fn delete_resolved(db: &Database, outbox: &str, kept: Duration) -> Result<(), sqlx::Error> {
    let mut rows = 0;
    loop {
        let deleted = db.ask(async |db| delete_some(db, outbox, kept).await).await?;
        rows += deleted;
        if deleted == 0 {
            break;
        }
    }
    if rows > 0 {
        info!(outbox, rows, "deleted parked rows that were resolved long ago");
    }
    Ok(())
}

async fn delete_some(db: &mut sqlx::PgConnection, outbox: &str, kept: Duration) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query(
        "delete from outbox_parked
          where outbox = $1
            and id in (select id
                         from outbox_parked as parked
                        where outbox = $1 and status <> 'parked' and resolved_at < statement_timestamp() - $2
                          and retry_requested_at is null
                          and (status = 'published' or not exists (select from outbox where outbox.id = parked.id))
                        order by resolved_at
                        limit $3)",
    )
    .bind(outbox)
    .bind(kept)
    .bind(DELETED_AT_ONCE)
    .execute(db)
    .await?;
    Ok(deleted.rows_affected())
}

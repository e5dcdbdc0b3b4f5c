//! Looks after the tables of an outbox, for as long as this process runs: whichever process publishes, and whether
//! Kafka is there or not. Two replicas that do it at once only delay each other by a lock.
//!
//! When the process dies in between, the next round of any replica goes on.

use crate::{
    database::{Database, is_missing},
    metric,
};
use saga_core::{
    error_class::{is_outage, lock_wait},
    outage::Outage,
};
use sqlx::{PgConnection, postgres::PgConnectOptions};
use std::{sync::Arc, time::Duration};
use tracing::info;

/// How often the upkeep looks at partitions. One holds ten million rows, and a whole one is kept ahead.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The pause after a lock that could not be taken.
const LOCKED_PAUSE: Duration = Duration::from_secs(3);
/// The most calls that a partition takes: a check is added, validated, and used, and the ids go on in the partition.
const STEPS_MAX: usize = 5;
/// Half of a partition: with less ahead, the upkeep had time to make one and something is wrong.
const LEAST_AHEAD: i64 = 5_000_000;
/// The bound of a check's validation, which reads all of the overflow, however large; it blocks no other statement. All
/// other statements are short.
const VALIDATION_MAX: Duration = Duration::from_secs(3_600);
/// How many resolved rows one statement deletes: it holds their locks, and a discard may wait for one.
const DELETED_AT_ONCE: i64 = 500;

/// The upkeep of one outbox.
pub(crate) struct Upkeep {
    outbox: String,
    db: Database,
    validating: Database,
    /// How long resolved parked rows are kept.
    resolved_kept: Duration,
    /// The outage of the upkeep: rows overflow, or soon will, or the upkeep cannot do its work.
    pub(crate) outage: Arc<Outage>,
}

impl Upkeep {
    /// Makes the upkeep, which connects to nothing yet. A conversation may take `patience`.
    pub(crate) fn new(
        place: &str,
        outbox: &str,
        options: PgConnectOptions,
        patience: Duration,
        kept: Duration,
    ) -> Self {
        Self {
            outbox: outbox.to_owned(),
            db: Database::new(options.clone(), 1, patience),
            validating: Database::new(options, 1, VALIDATION_MAX),
            resolved_kept: kept,
            outage: Outage::of(&format!("upkeep of {place}")),
        }
    }

    /// Looks after the tables until the future is dropped.
    pub(crate) async fn run(&self) {
        loop {
            let pause = match self.run_once().await {
                Ok(pause) => pause,
                // Other parts meet this error too, and report it.
                Err(error) if is_outage(&error) || is_missing(&error) => {
                    metric::ids_ahead(&self.outbox, None);
                    LOOK_EVERY / 10
                }
                Err(error) => {
                    self.outage.failing(&error.to_string());
                    LOCKED_PAUSE
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Does one round; returns how long to rest.
    async fn run_once(&self) -> Result<Duration, sqlx::Error> {
        let added = self.add_partitions().await;
        let ahead: i64 =
            self.db.ask(async |db| sqlx::query_scalar("select outbox_ids_ahead()").fetch_one(db).await).await?;
        metric::ids_ahead(&self.outbox, Some(ahead));
        if ahead < LEAST_AHEAD || added.as_ref().is_err_and(|error| lock_wait(error).is_some()) {
            let blocking = self.db.ask(blocking).await?;
            self.outage.failing(&late(ahead, added.err(), &blocking));
            return Ok(LOCKED_PAUSE);
        }
        added?;
        self.delete_resolved().await?;
        self.outage.working();
        Ok(LOOK_EVERY)
    }

    async fn add_partitions(&self) -> Result<(), sqlx::Error> {
        for _ in 0..STEPS_MAX {
            let db = if self.db.ask(is_to_validate).await? { &self.validating } else { &self.db };
            let made: Option<String> =
                db.ask(async |db| sqlx::query_scalar("select outbox_add_partition()").fetch_one(db).await).await?;
            if let Some(partition) = made {
                info!(outbox = self.outbox, partition, "made the outbox's next partition");
            }
        }
        Ok(())
    }

    /// Deletes parked rows that were resolved long ago. A discarded row stays as long as the row in the outbox does: no
    /// other record shows that it was not published.
    async fn delete_resolved(&self) -> Result<(), sqlx::Error> {
        let mut rows = 0;
        loop {
            let deleted = self.db.ask(async |db| delete_some(db, &self.outbox, self.resolved_kept).await).await?;
            rows += deleted;
            if deleted == 0 {
                break;
            }
        }
        if rows > 0 {
            info!(outbox = self.outbox, rows, "deleted parked rows that were resolved long ago");
        }
        Ok(())
    }
}

/// The text for health when partitions are late.
fn late(ahead: i64, error: Option<sqlx::Error>, blocking: &[String]) -> String {
    let mut said = match ahead {
        0 => String::from("rows go to outbox_overflow, for no partition is there for them"),
        ahead => format!("{ahead} ids are left in the outbox's partitions; then rows go to outbox_overflow"),
    };
    if let Some(error) = error {
        said.push_str(&format!(". The next partition is not made: {error}"));
    }
    if !blocking.is_empty() {
        said.push_str(&format!(
            ". Locks on the outbox are held by {}: let them end, or pg_terminate_backend",
            blocking.join(", ")
        ));
    }
    said
}

/// Whether the next call reads all of the overflow.
async fn is_to_validate(db: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select
                          from pg_constraint
                         where conrelid = 'outbox_overflow'::regclass and conname ~ '^outbox_ahead_' and not convalidated)",
    )
    .fetch_one(db)
    .await
}

/// The transactions that have locked what a new partition needs, the longest first. A vacuum has no name.
async fn blocking(db: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select format('process %s (%s, in its transaction for %s s)', pid, name, age)
           from (select a.pid, coalesce(nullif(a.application_name, ''), a.backend_type, 'unnamed') as name,
                        coalesce(extract(epoch from clock_timestamp() - a.xact_start)::integer::text, 'unknown') as age,
                        a.xact_start
                   from pg_stat_activity as a
                  where a.pid <> pg_backend_pid()
                    and exists (select
                                  from pg_locks as lock
                                 where lock.pid = a.pid and lock.granted
                                   and lock.database = (select oid from pg_database where datname = current_database())
                                   and (lock.relation = 'outbox_overflow'::regclass
                                        or lock.relation = 'outbox'::regclass
                                           and lock.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')))
                  order by a.xact_start nulls last
                  limit 3) as blocking",
    )
    .fetch_all(db)
    .await
}

async fn delete_some(db: &mut PgConnection, outbox: &str, kept: Duration) -> Result<u64, sqlx::Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_partitions_say_how_many_ids_are_left_why_and_what_is_in_the_way() {
        assert_eq!(late(0, None, &[]), "rows go to outbox_overflow, for no partition is there for them");
        let blocking = ["7 (psql)".to_owned(), "9 (dump)".to_owned()];
        assert_eq!(
            late(120, Some(sqlx::Error::PoolClosed), &blocking),
            "120 ids are left in the outbox's partitions; then rows go to outbox_overflow. The next partition is not made: \
             attempted to acquire a connection on a closed pool. Locks on the outbox are held by 7 (psql), 9 (dump): let \
             them end, or pg_terminate_backend"
        );
    }
}

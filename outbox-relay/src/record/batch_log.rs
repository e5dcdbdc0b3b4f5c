//! The log of what has been published, in the outbox's own database; its last entry is the position.
//!
//! An entry is written only for rows that Kafka acknowledged, in order, without a gap, and only by the holder of the
//! lease. When the process dies before the entry, its rows are published again (same `ce_id`); never skipped.

use crate::{position::Position, snapshot::Snapshot};
use sqlx::PgConnection;
use uuid::Uuid;

/// The last entry of the log.
#[derive(Debug, Clone)]
pub(crate) struct LastEntry {
    pub(crate) n: i64,
    pub(crate) position: Position,
    pub(crate) system_identifier: i64,
}

/// The identifier of the cluster that this connection is to. Transaction ids mean something only within it.
pub(crate) async fn system_identifier(db: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select system_identifier from pg_control_system()").fetch_one(db).await
}

/// Where the outbox stands; `None` before its first entry.
pub(crate) async fn last(db: &mut PgConnection, outbox: &str) -> Result<Option<LastEntry>, crate::position::ReadError> {
    let found: Option<(i64, String, String, i64, i64)> = sqlx::query_as(
        "select n, base::text, target::text, to_id, system_identifier
           from outbox_batch
          where outbox = $1
          order by n desc
          limit 1",
    )
    .bind(outbox)
    .fetch_optional(db)
    .await?;
    let Some((n, base, target, after, system_identifier)) = found else { return Ok(None) };
    let position = Position { base: base.parse()?, target: target.parse()?, after };
    Ok(Some(LastEntry { n, position, system_identifier }))
}

/// An entry to be written.
#[derive(Debug, Clone)]
pub(crate) struct BatchLogEntry {
    pub(crate) base: Snapshot,
    pub(crate) target: Snapshot,
    pub(crate) from_id: i64,
    pub(crate) to_id: i64,
    pub(crate) rows: i32,
}

/// Appends what one commit records, as one entry behind entry `n`, if `owner` still holds the lease; false: the owner
/// is fenced. The log grows by commits, however many pages each covers.
///
/// The lease row is locked until the caller's transaction ends. So no other process takes over between the check and
/// the commit; the primary key on `n` would catch even that.
pub(crate) async fn append(
    db: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    system_identifier: i64,
    n: i64,
    entries: &[BatchLogEntry],
) -> Result<bool, sqlx::Error> {
    let Some(last) = entries.last() else { return Ok(true) };
    // The ids of one window may all be lower than those of the window before.
    let from_id = entries.iter().map(|entry| entry.from_id).min().unwrap_or(last.from_id).min(last.to_id);
    let rows = entries.iter().fold(0_i32, |rows, entry| rows.saturating_add(entry.rows));
    let written = sqlx::query(
        "insert into outbox_batch (outbox, n, base, target, from_id, to_id, rows, owner, system_identifier)
         select lease.outbox, $4 + 1, $5::text::pg_snapshot, $6::text::pg_snapshot, $7, $8, $9, lease.owner, $3
           from (select outbox, owner from outbox_lease where outbox = $1 and owner = $2 for share) as lease",
    )
    .bind(outbox)
    .bind(owner)
    .bind(system_identifier)
    .bind(n)
    .bind(last.base.to_string())
    .bind(last.target.to_string())
    .bind(from_id)
    .bind(last.to_id)
    .bind(rows)
    .execute(db)
    .await?;
    Ok(written.rows_affected() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::{service::messaging_migrations, testkit::TestDatabase};

    #[tokio::test]
    async fn what_one_commit_records_of_many_pages_is_one_entry_at_the_last_of_them() {
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let owner = Uuid::new_v4();
        sqlx::query("insert into outbox_lease values ('orders', $1, '', now(), now(), now() + interval '1 hour')")
            .bind(owner)
            .execute(&database.pool)
            .await
            .unwrap();
        let entry = |from_id, to_id| BatchLogEntry {
            base: "5:5:".parse().unwrap(),
            target: format!("{to_id}:{to_id}:").parse().unwrap(),
            from_id,
            to_id,
            rows: 10,
        };
        let mut db = database.pool.acquire().await.unwrap();
        // A straggler's window may lie below the one before.
        let pages = [entry(101, 110), entry(111, 120), entry(11, 20)];
        assert!(append(&mut db, "orders", owner, 4711, 0, &pages).await.unwrap());
        let last = last(&mut db, "orders").await.unwrap().unwrap();
        assert_eq!((last.n, last.position.after, last.position.target.to_string()), (1, 20, "20:20:".to_owned()));
        let (entries, rows): (i64, i64) =
            sqlx::query_as("select count(*), sum(rows) from outbox_batch").fetch_one(&database.pool).await.unwrap();
        assert_eq!((entries, rows), (1, 30));
        assert!(!append(&mut db, "orders", Uuid::new_v4(), 4711, 1, &pages).await.unwrap(), "fenced");
    }
}

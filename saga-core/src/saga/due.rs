//! The SQL of time: which sagas are due, and how many wait.
//!
//! `saga_due` is the index that the timers walk. The time in a row may be too early, never too late: the replica that
//! claims a saga reads the due time in its state.

use super::{
    backlog::Backlog,
    store::{Due, Known, Locked, SagaUpdate, heard},
    timers_health::Overdue,
};
use crate::{clock, id::SagaId, outbox::Tx, topic::key_hash};
use std::time::Duration;
use uuid::Uuid;

/// Locks and loads up to `limit` sagas that are due, the longest overdue first, and leaves out rows that another
/// transaction has locked. The query uses `statement_timestamp()`: no index can answer `clock_timestamp()`, which
/// changes while the statement runs. The query passes over what the backlog holds. An expression does that, and no
/// join, so that the index still gives the order. The query also skips what the last look passed over
/// ([`Backlog::passed`]). The due time that counts is the one in the state: the row was read again when it was locked.
pub(super) async fn claim_in(
    tx: &mut Tx<'_>,
    known: &Known,
    backlog: &Backlog,
    limit: i64,
) -> sqlx::Result<Vec<Locked>> {
    let asked = clock::monotonic();
    let rows = sqlx::query(
        "with locked as materialized (
             select s.saga_id, s.definition, s.version, s.fingerprint, s.revision, s.state, s.armed_at, s.input
               from saga_due d
               join saga s on s.saga_id = d.saga_id
               join unnest($1::text[], $2::int[], $3::text[]) as k(definition, version, fingerprint)
                 on k.definition = s.definition and k.version = s.version and k.fingerprint = s.fingerprint
              where d.due_at <= statement_timestamp() and d.due_at > coalesce($8::timestamptz, '-infinity')
                and coalesce(d.due_at <= ($6::timestamptz[])[array_position($5::int[], d.key_hash % $7)], true)
              order by d.due_at
              limit $4
                for update of s skip locked
         )
         select locked.*, clock_timestamp() as now from locked",
    )
    .bind(&known.definitions)
    .bind(&known.versions)
    .bind(&known.fingerprints)
    .bind(limit)
    .bind(&backlog.behind)
    .bind(&backlog.read_until)
    .bind(backlog.partitions.max(1))
    .bind(backlog.passed)
    .try_map(Locked::new)
    .fetch_all(&mut **tx)
    .await?;
    Ok(heard(rows, asked))
}

/// The hash that says which partition a saga's replies come from: the saga's id is their key.
pub(super) fn key_hash_of(saga: SagaId) -> i32 {
    key_hash(saga.to_string().as_bytes())
}

/// Keeps `saga_due` in step: writes the rows of sagas whose time or status has changed.
pub(super) async fn rearm_in(tx: &mut Tx<'_>, changes: &[SagaUpdate<'_>]) -> sqlx::Result<()> {
    let set: Vec<&SagaUpdate<'_>> = changes.iter().filter(|c| c.due == Due::Set).collect();
    if set.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "insert into saga_due as d (saga_id, definition, version, status, due_at, key_hash)
         select *
           from unnest($1::uuid[], $2::text[], $3::int[], $4::text[], $5::timestamptz[], $6::int[])
             on conflict (saga_id) do update set status = excluded.status, due_at = excluded.due_at",
    )
    .bind(set.iter().map(|c| c.state.saga.0).collect::<Vec<Uuid>>())
    .bind(set.iter().map(|c| c.definition).collect::<Vec<&str>>())
    .bind(set.iter().map(|c| c.version).collect::<Vec<i32>>())
    .bind(set.iter().map(|c| c.state.status.as_str()).collect::<Vec<&str>>())
    .bind(set.iter().map(|c| c.armed_at).collect::<Vec<_>>())
    .bind(set.iter().map(|c| key_hash_of(c.state.saga)).collect::<Vec<i32>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// What the gauges show.
#[derive(Debug)]
pub(super) struct SagaCounts {
    /// Sagas that have not ended, by definition and status.
    pub(super) active: Vec<(String, String, i64)>,
    /// Sagas that are due, and wait for a replica that knows their definitions.
    pub(super) overdue: i64,
    /// Replies that wait for a replica that knows their saga's definition.
    pub(super) undecided: i64,
}

/// Counts sagas that have not ended. The timers take known sagas at once when they are due, so `overdue` reads few
/// rows.
pub(super) async fn count_in(tx: &mut Tx<'_>, known: &Known) -> sqlx::Result<SagaCounts> {
    let active = sqlx::query_as("select definition, status, count(*) from saga_due group by definition, status");
    let active = active.fetch_all(&mut **tx).await?;
    let overdue = sqlx::query_scalar(
        "select count(*)
           from saga_due d
           join saga s on s.saga_id = d.saga_id
          where d.due_at <= statement_timestamp()
            and not exists (select
                              from unnest($1::text[], $2::int[], $3::text[]) as k(definition, version, fingerprint)
                             where k.definition = s.definition
                               and k.version = s.version
                               and k.fingerprint = s.fingerprint)",
    )
    .bind(&known.definitions)
    .bind(&known.versions)
    .bind(&known.fingerprints)
    .fetch_one(&mut **tx)
    .await?;
    let undecided = sqlx::query_scalar("select count(*) from saga_undecided").fetch_one(&mut **tx).await?;
    Ok(SagaCounts { active, overdue, undecided })
}

/// The saga that has been due for longest, whichever replica can decide it, and since when.
pub(super) async fn oldest_in(tx: &mut Tx<'_>) -> sqlx::Result<Option<Overdue>> {
    sqlx::query_as(
        "select saga_id, due_at from saga_due where due_at <= statement_timestamp() order by due_at, saga_id limit 1",
    )
    .fetch_optional(&mut **tx)
    .await
}

/// Which of these sagas, put off or not, should have been decided by now, and since when.
pub(super) async fn overdue_in(tx: &mut Tx<'_>, sagas: &[Uuid]) -> sqlx::Result<Vec<Overdue>> {
    sqlx::query_as("select saga_id, armed_at from saga where saga_id = any($1) and armed_at <= statement_timestamp()")
        .bind(sagas)
        .fetch_all(&mut **tx)
        .await
}

/// Sagas that are due, without a lock: for taking them one by one.
pub(super) async fn due_ids_in(
    tx: &mut Tx<'_>,
    known: &Known,
    backlog: &Backlog,
    limit: i64,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar(
        "select d.saga_id
           from saga_due d
           join saga s on s.saga_id = d.saga_id
           join unnest($1::text[], $2::int[], $3::text[]) as k(definition, version, fingerprint)
             on k.definition = s.definition and k.version = s.version and k.fingerprint = s.fingerprint
          where d.due_at <= statement_timestamp() and d.due_at > coalesce($8::timestamptz, '-infinity')
            and coalesce(d.due_at <= ($6::timestamptz[])[array_position($5::int[], d.key_hash % $7)], true)
          order by d.due_at
          limit $4",
    )
    .bind(&known.definitions)
    .bind(&known.versions)
    .bind(&known.fingerprints)
    .bind(limit)
    .bind(&backlog.behind)
    .bind(&backlog.read_until)
    .bind(backlog.partitions.max(1))
    .bind(backlog.passed)
    .fetch_all(&mut **tx)
    .await
}

/// Makes sagas due again after `wait`, whatever their states say.
pub(super) async fn put_off_in(tx: &mut Tx<'_>, sagas: &[SagaId], wait: Duration) -> sqlx::Result<()> {
    sqlx::query("update saga_due set due_at = clock_timestamp() + make_interval(secs => $2) where saga_id = any($1)")
        .bind(sagas.iter().map(|saga| saga.0).collect::<Vec<_>>())
        .bind(clock::seconds(wait))
        .execute(&mut **tx)
        .await
        .map(drop)
}

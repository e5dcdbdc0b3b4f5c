//! The SQL of `inbox_partition`: which worker has a partition, and what it is trying that its process may die of.
//!
//! A process that dies leaves `clean` unset. One death is not yet a record's fault, so the next worker notes its first
//! batches before it tries them. When the process dies during a batch that was noted, each of its records is tried
//! alone, and counted before. A worker that stops in good order takes back what it has noted, and the attempt that it
//! has counted and not decided.

use crate::{inbox::InboxPlace, transaction::Transaction};
use sqlx::Row;
use std::{ops::Range, time::Duration};
use time::OffsetDateTime;
use uuid::Uuid;

/// What a row of `inbox_partition` held before this worker took the partition, and what the database says of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClaimedPartition {
    /// The worker before let go in good order, or there was none. If `false`, its process may have died of one of its
    /// records.
    pub(super) clean: bool,
    /// What was noted last before it was tried.
    pub(super) noted: Option<NotedBatch>,
    /// The time by the database's clock.
    pub(super) time: OffsetDateTime,
    /// How long the server lets a transaction be silent, unless the transaction says otherwise. 0: for ever.
    pub(super) silence: Duration,
}

/// What was noted last before it was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotedBatch {
    /// The offset of the record that was tried alone, or of the last one of a batch.
    offset: i64,
    /// The number of the attempt at a single record. 0: a batch was noted.
    attempts: i32,
}

impl NotedBatch {
    /// The offsets of the records that may have killed the process. The records before them survived: a record is tried
    /// alone when all before it in its partition is done. (A batch begins where what is done ends.)
    pub(super) fn suspects(self) -> Range<i64> {
        let end = self.offset.saturating_add(1);
        if self.attempts > 0 { self.offset..end } else { i64::MIN..end }
    }
}

/// An attempt at a single record that is counted, and not yet decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CountedAttempt {
    /// At the record that `inbox_partition` names.
    Fresh,
    /// At a parked record.
    Parked {
        /// The id of its row in `inbox_parked`.
        id: i64,
    },
}

/// Takes the partition for `owner`. Notes about another topic of the same name are forgotten: their offsets mean
/// nothing in the topic with this id.
pub(super) async fn claim(
    mut tx: Transaction,
    place: InboxPlace<'_>,
    owner: Uuid,
    topic_id: Option<&str>,
) -> Result<ClaimedPartition, sqlx::Error> {
    let row = sqlx::query(
        "with before as (
             select clean, case when topic_id <> $5 then null else record_offset end as record_offset, attempts
               from inbox_partition
              where consumer = $1 and topic = $2 and partition = $3
         ), taken as (
             insert into inbox_partition as p (consumer, topic, partition, owner, reader, topic_id)
             values ($1, $2, $3, $4, $4, $5)
                 on conflict (consumer, topic, partition)
                 do update set owner = excluded.owner, reader = excluded.reader, clean = false, taken_at = now(),
                               topic_id = coalesce(excluded.topic_id, p.topic_id),
                               generation = p.generation + case when p.topic_id <> excluded.topic_id then 1 else 0 end,
                               attempts = case when p.topic_id <> excluded.topic_id then 0 else p.attempts end,
                               record_offset = case when p.topic_id <> excluded.topic_id then null else p.record_offset end
         )
         select coalesce(clean, true) as clean, record_offset, attempts, clock_timestamp() as time,
                extract(epoch from current_setting('idle_in_transaction_session_timeout')::interval)::float8 as silence
           from (values (1)) as always left join before on true",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .bind(topic_id)
    .fetch_one(&mut **tx)
    .await?;
    tx.commit_quietly().await?;
    let noted = row.try_get::<Option<i64>, _>("record_offset")?.zip(row.try_get("attempts")?);
    Ok(ClaimedPartition {
        clean: row.try_get("clean")?,
        noted: noted.map(|(offset, attempts)| NotedBatch { offset, attempts }),
        time: row.try_get("time")?,
        silence: Duration::try_from_secs_f64(row.try_get("silence")?).unwrap_or_default(),
    })
}

/// Records that `owner` let go in good order. Its process did not die of what it had, so the batch that it noted is
/// forgotten. An attempt that is not decided did not happen. Nothing is done if another worker has taken the partition.
pub(super) async fn release(
    mut tx: Transaction,
    place: InboxPlace<'_>,
    owner: Uuid,
    undecided: Option<CountedAttempt>,
) -> Result<(), sqlx::Error> {
    let released = sqlx::query(
        "update inbox_partition
            set clean = true, attempts = greatest(attempts - $5, 0),
                record_offset = case when attempts > $5 then record_offset end
          where consumer = $1 and topic = $2 and partition = $3 and owner = $4",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .bind(i32::from(undecided == Some(CountedAttempt::Fresh)))
    .execute(&mut **tx)
    .await?;
    if let (Some(CountedAttempt::Parked { id }), 1) = (undecided, released.rows_affected()) {
        sqlx::query(
            "update inbox_parked set attempts = attempts - 1, next_attempt_at = clock_timestamp() where id = $1",
        )
        .bind(id)
        .execute(&mut **tx)
        .await?;
    }
    tx.commit_quietly().await
}

/// Counts an attempt at the record at `offset`, before it is made, and returns its number.
pub(super) async fn count_attempt(mut tx: Transaction, place: InboxPlace<'_>, offset: i64) -> Result<u32, sqlx::Error> {
    let attempts: i32 = sqlx::query_scalar(
        "update inbox_partition
            set attempts = case when record_offset = $4 then attempts + 1 else 1 end, record_offset = $4
          where consumer = $1 and topic = $2 and partition = $3
         returning attempts",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(offset)
    .fetch_one(&mut **tx)
    .await?;
    tx.commit_quietly().await?;
    Ok(attempts.unsigned_abs())
}

/// Notes that the records up to the one at `last` are about to be tried together. Nothing is done if another worker has
/// taken the partition.
pub(super) async fn note_batch(
    mut tx: Transaction,
    place: InboxPlace<'_>,
    owner: Uuid,
    last: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox_partition
            set record_offset = $5, attempts = 0
          where consumer = $1 and topic = $2 and partition = $3 and owner = $4",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .bind(last)
    .execute(&mut **tx)
    .await?;
    tx.commit_quietly().await
}

/// Asks the database for the time.
pub(super) async fn time(mut tx: Transaction) -> Result<OffsetDateTime, sqlx::Error> {
    let time = sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut **tx).await?;
    tx.commit_quietly().await?;
    Ok(time)
}

//! The SQL of `inbox_parked` and `inbox_partition`.
//!
//! A lane is what shares a key. Its first row has a time for its next attempt, the rows behind it have none; when the
//! first leaves, the next gets one, in the same transaction. So a lane is never without somebody who will wake it.

use super::{
    Coordinates, Message,
    failure::Fault,
    record::{Batch, lane, storable_headers},
};
use crate::{
    clock,
    envelope::{Envelope, Headers},
    inbox::Place,
    outbox::Tx,
};
use sqlx::{PgPool, Row, postgres::PgRow, types::Json};
use std::{collections::BTreeSet, ops::Range, time::Duration};
use time::OffsetDateTime;
use uuid::Uuid;

/// A parked record.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) id: i64,
    pub(super) attempts: u32,
    pub(super) lane: Option<i64>,
    pub(super) message: Message,
    pub(super) timestamp: Option<OffsetDateTime>,
}

/// What a partition's first due row says.
pub(super) enum Due {
    /// Nothing waits for a time.
    Nothing,
    /// The next attempt is not yet due.
    In(Duration),
    /// It is.
    Now(Box<Parked>),
}

/// What a row of `inbox_partition` said before we took the partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeftBehind {
    /// Whoever had it let go in good order, or nobody ever had it.
    Clean,
    /// Whoever had it may have died of one of its records, perhaps of what it had noted; or that is done by now.
    Unclean { noted: Option<Noted> },
}

/// What was noted last before it was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noted {
    /// The offset of the record that was tried alone, or of the last one of a batch.
    offset: i64,
    /// 0: it was a batch.
    attempts: i32,
}

impl Noted {
    /// The offsets of what may have killed. What is before them survived: a record is tried alone when all before it in its
    /// partition is done. (A batch begins where what is done ends.)
    pub(super) fn suspects(self) -> Range<i64> {
        let end = self.offset.saturating_add(1);
        if self.attempts > 0 { self.offset..end } else { i64::MIN..end }
    }
}

/// Takes the partition for `owner`.
pub(super) async fn claim(pool: &PgPool, place: Place<'_>, owner: Uuid) -> Result<LeftBehind, sqlx::Error> {
    let (clean, offset, attempts): (Option<bool>, Option<i64>, Option<i32>) = sqlx::query_as(
        "with before as (
             select clean, record_offset, attempts
               from inbox_partition
              where consumer = $1 and topic = $2 and partition = $3
         ), taken as (
             insert into inbox_partition (consumer, topic, partition, owner)
             values ($1, $2, $3, $4)
                 on conflict (consumer, topic, partition)
                 do update set owner = excluded.owner, clean = false, taken_at = now()
         )
         select before.* from (values (1)) as always left join before on true",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .fetch_one(pool)
    .await?;
    let noted = offset.zip(attempts).map(|(offset, attempts)| Noted { offset, attempts });
    Ok(if clean.unwrap_or(true) { LeftBehind::Clean } else { LeftBehind::Unclean { noted } })
}

/// Says that `owner` let go in good order; nothing if somebody else has taken the partition.
pub(super) async fn release(pool: &PgPool, place: Place<'_>, owner: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox_partition
            set clean = true
          where consumer = $1 and topic = $2 and partition = $3 and owner = $4",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .execute(pool)
    .await?;
    Ok(())
}

/// Counts an attempt at the record at `offset`, in a commit of its own, and says which it is.
pub(super) async fn count_attempt(pool: &PgPool, place: Place<'_>, offset: i64) -> Result<u32, sqlx::Error> {
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
    .fetch_one(pool)
    .await?;
    Ok(attempts.unsigned_abs())
}

/// Notes that the records up to the one at `last` are about to be tried together, in a commit of its own; nothing if
/// somebody else has taken the partition.
pub(super) async fn note_batch(pool: &PgPool, place: Place<'_>, owner: Uuid, last: i64) -> Result<(), sqlx::Error> {
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
    .execute(pool)
    .await?;
    Ok(())
}

/// Says again what was noted before `owner` took the partition: what it noted itself it has survived. What it counts stays.
pub(super) async fn withdraw(
    pool: &PgPool,
    place: Place<'_>,
    owner: Uuid,
    before: Option<Noted>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox_partition
            set record_offset = $5, attempts = $6
          where consumer = $1 and topic = $2 and partition = $3 and owner = $4 and attempts = 0",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(owner)
    .bind(before.map(|noted| noted.offset))
    .bind(before.map_or(0, |noted| noted.attempts))
    .execute(pool)
    .await?;
    Ok(())
}

/// Parks records behind what is parked of their keys. Where nothing is any more (a copy that was parked at another
/// partition has just left there), the first of them is due at once.
pub(super) async fn hold_in(tx: &mut Tx<'_>, place: Place<'_>, held: &Batch) -> Result<(), sqlx::Error> {
    insert(tx, place, held, 0, None, None).await?;
    let lanes: BTreeSet<i64> = held.messages.iter().filter_map(lane).collect();
    wake_in(tx, place, &Vec::from_iter(lanes)).await
}

/// Parks a record that failed, as the first of its lane.
pub(super) async fn park_in(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    failed: &Batch,
    attempts: u32,
    delay: Duration,
    fault: &Fault,
) -> Result<(), sqlx::Error> {
    insert(tx, place, failed, attempts, Some(delay), Some(fault)).await
}

async fn insert(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    batch: &Batch,
    attempts: u32,
    delay: Option<Duration>,
    fault: Option<&Fault>,
) -> Result<(), sqlx::Error> {
    let messages = &batch.messages;
    sqlx::query(
        "insert into inbox_parked (consumer, topic, partition, record_offset, lane, source, message_id, key, payload,
                                   headers, record_time, attempts, next_attempt_at, error_class, reason)
         select $1, $2, $3, r.record_offset, r.lane, r.source, r.message_id, r.key, r.payload,
                r.headers, r.record_time, $4,
                -- What has no lane waits behind nothing.
                coalesce(clock_timestamp() + make_interval(secs => $5), case when r.lane is null then clock_timestamp() end),
                $6, $7
           from unnest($8::bigint[], $9::bigint[], $10::text[], $11::uuid[], $12::bytea[], $13::bytea[], $14::jsonb[],
                       $15::timestamptz[])
                as r (record_offset, lane, source, message_id, key, payload, headers, record_time)
          order by r.message_id, r.source
             on conflict on constraint inbox_parked_message do nothing",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(attempts.cast_signed())
    .bind(delay.map(clock::seconds))
    .bind(fault.map(|fault| &fault.class))
    .bind(fault.map(|fault| &fault.reason))
    .bind(messages.iter().map(|message| message.at.offset).collect::<Vec<_>>())
    .bind(messages.iter().map(lane).collect::<Vec<_>>())
    .bind(messages.iter().map(|message| message.envelope.source.as_str()).collect::<Vec<_>>())
    .bind(messages.iter().map(|message| message.envelope.id.0).collect::<Vec<_>>())
    .bind(messages.iter().map(|message| message.key.as_deref()).collect::<Vec<_>>())
    .bind(messages.iter().map(|message| message.payload.as_deref()).collect::<Vec<_>>())
    .bind(messages.iter().map(|message| Json(storable_headers(&message.envelope))).collect::<Vec<_>>())
    .bind(&batch.timestamps)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The row of this partition whose attempt is due first.
pub(super) async fn next_due(pool: &PgPool, place: Place<'_>) -> Result<Due, sqlx::Error> {
    let row = sqlx::query(
        "select *, greatest(0, extract(epoch from next_attempt_at - clock_timestamp()))::float8 as wait
           from inbox_parked
          where consumer = $1 and topic = $2 and partition = $3 and next_attempt_at is not null
          order by next_attempt_at
          limit 1",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(Due::Nothing) };
    let wait = Duration::try_from_secs_f64(row.try_get("wait")?).unwrap_or_default();
    if wait.is_zero() { Ok(Due::Now(Box::new(read(&row)?))) } else { Ok(Due::In(wait)) }
}

/// Counts an attempt at a parked record, in a commit of its own, and sets the time of the one after it. `None` when the
/// row is gone.
pub(super) async fn count_retry(pool: &PgPool, id: i64, delay: Duration) -> Result<Option<u32>, sqlx::Error> {
    let attempts: Option<i32> = sqlx::query_scalar(
        "update inbox_parked
            set attempts = attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => $2)
          where id = $1 and next_attempt_at is not null
         returning attempts",
    )
    .bind(id)
    .bind(clock::seconds(delay))
    .fetch_optional(pool)
    .await?;
    Ok(attempts.map(i32::unsigned_abs))
}

/// Notes why a parked record failed this time.
pub(super) async fn note(pool: &PgPool, id: i64, fault: &Fault) -> Result<(), sqlx::Error> {
    sqlx::query("update inbox_parked set error_class = $2, reason = $3 where id = $1")
        .bind(id)
        .bind(&fault.class)
        .bind(&fault.reason)
        .execute(pool)
        .await?;
    Ok(())
}

/// The first rows of a lane, in order.
pub(super) async fn lane_in(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    lane: i64,
    limit: usize,
) -> Result<Vec<Parked>, sqlx::Error> {
    let rows = sqlx::query(
        "select *
           from inbox_parked
          where consumer = $1 and topic = $2 and partition = $3 and lane = $4
          order by record_offset
          limit $5",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(lane)
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(&mut **tx)
    .await?;
    rows.iter().map(read).collect()
}

/// Takes rows out, and makes what is now the first of their lane due at once.
pub(super) async fn leave_in(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    ids: &[i64],
    lane: Option<i64>,
) -> Result<(), sqlx::Error> {
    sqlx::query("delete from inbox_parked where id = any($1)").bind(ids).execute(&mut **tx).await?;
    wake_in(tx, place, lane.as_slice()).await
}

/// Makes the first row of each lane due at once, if it has no time.
async fn wake_in(tx: &mut Tx<'_>, place: Place<'_>, lanes: &[i64]) -> Result<(), sqlx::Error> {
    if lanes.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update inbox_parked
            set next_attempt_at = clock_timestamp()
          where id in (select distinct on (lane) id
                         from inbox_parked
                        where consumer = $1 and topic = $2 and partition = $3 and lane = any($4)
                        order by lane, record_offset)
            and next_attempt_at is null",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(lanes)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// How many records of a consumer are parked.
pub(super) async fn count(pool: &PgPool, consumer: &str) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select count(*) from inbox_parked where consumer = $1").bind(consumer).fetch_one(pool).await
}

fn read(row: &PgRow) -> Result<Parked, sqlx::Error> {
    let Json(headers) = row.try_get::<Json<Headers>, _>("headers")?;
    // They were an envelope when they were parked.
    let envelope = Envelope::decode(headers.iter().map(|(name, value)| (&**name, Some(value.as_bytes()))))
        .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(Parked {
        id: row.try_get("id")?,
        attempts: row.try_get::<i32, _>("attempts")?.unsigned_abs(),
        lane: row.try_get("lane")?,
        message: Message {
            envelope,
            key: row.try_get("key")?,
            payload: row.try_get("payload")?,
            at: Coordinates {
                topic: row.try_get("topic")?,
                partition: row.try_get("partition")?,
                offset: row.try_get("record_offset")?,
            },
        },
        timestamp: row.try_get("record_time")?,
    })
}

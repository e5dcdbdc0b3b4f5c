//! The SQL of `inbox_parked`.
//!
//! A lane holds the records that share a key, in the order of the topic. A topic that is made again goes on behind the
//! one that was deleted. A lane's first row has a time for its next attempt, the rows behind it have none. When the
//! first leaves, the next gets one, in the same transaction. So a lane always has a row that is tried.

use super::{
    Coordinates, Message,
    failure::{LOCKED, RecordFault, UNREADABLE},
    record::{RawHeaders, RecordBatch, RecordOrigin, lane},
};
use crate::{
    clock,
    envelope::{Envelope, Headers},
    inbox::InboxPlace,
    outbox::Tx,
    part::{Cause, HealthIssue},
    retry::Backoff,
    transaction::Transaction,
};
use sqlx::{Row, postgres::PgRow, types::Json};
use std::{collections::BTreeSet, time::Duration};
use time::OffsetDateTime;

/// How long a record may wait for a lock before health reports it.
const LOCKED_MAX: Duration = Duration::from_secs(120);
/// A record that has been due for so long, or that cannot be read and was parked so long ago, is one that nothing
/// tries.
const UNTRIED_MAX: Duration = Duration::from_secs(300);

/// A record that was parked, with its row.
#[derive(Debug, Clone)]
pub(super) struct Parked {
    pub(super) id: i64,
    pub(super) attempts: u32,
    pub(super) lane: Option<i64>,
    pub(super) message: Message,
    pub(super) origin: RecordOrigin,
}

/// What is due first in a partition.
pub(super) enum NextDue {
    /// No row has a time.
    Nothing,
    /// The next attempt is not yet due.
    In(Duration),
    /// The next attempt is due.
    Now(Box<Parked>),
    /// The next attempt is due, and this build cannot read the row.
    Unreadable {
        /// The id of the row.
        id: i64,
        /// Why this build cannot read the row.
        reason: String,
    },
}

/// Parks records behind the parked records of their keys. A key may have none any more: a copy that was parked at
/// another partition has just left there. Then the first of its records is due at once.
pub(super) async fn hold_in(tx: &mut Tx<'_>, place: InboxPlace<'_>, held: &RecordBatch) -> Result<(), sqlx::Error> {
    insert_in(tx, place, held, 0, None, None).await?;
    let lanes: BTreeSet<i64> = held.messages.iter().filter_map(lane).collect();
    wake_in(tx, place, &Vec::from_iter(lanes)).await
}

/// Parks a record that failed, as the first of its lane.
pub(super) async fn park_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    failed: &RecordBatch,
    attempts: u32,
    delay: Duration,
    fault: &RecordFault,
) -> Result<(), sqlx::Error> {
    insert_in(tx, place, failed, attempts, Some(delay), Some(fault)).await
}

async fn insert_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    batch: &RecordBatch,
    attempts: u32,
    delay: Option<Duration>,
    fault: Option<&RecordFault>,
) -> Result<(), sqlx::Error> {
    let messages = &batch.messages;
    sqlx::query(
        "insert into inbox_parked (consumer, topic, partition, record_offset, lane, source, message_id, key, payload,
                                   headers, record_time, attempts, next_attempt_at, error_class, reason, generation)
         select $1, $2, $3, r.record_offset, r.lane, r.source, r.message_id, r.key, r.payload,
                r.headers, r.record_time, $4,
                -- What has no lane waits behind nothing.
                coalesce(clock_timestamp() + make_interval(secs => $5), case when r.lane is null then clock_timestamp() end),
                $6, $7,
                coalesce((select generation from inbox_partition where consumer = $1 and topic = $2 and partition = $3), 0)
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
    .bind(batch.origins.iter().map(|origin| Json(origin.headers.stored())).collect::<Vec<_>>())
    .bind(batch.origins.iter().map(|origin| origin.timestamp).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The row of this partition whose attempt is due first.
pub(super) async fn next_due(mut tx: Transaction, place: InboxPlace<'_>) -> Result<NextDue, sqlx::Error> {
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
    .fetch_optional(&mut **tx)
    .await?;
    tx.commit_quietly().await?;
    let Some(row) = row else { return Ok(NextDue::Nothing) };
    let wait = Duration::try_from_secs_f64(row.try_get("wait")?).unwrap_or_default();
    if !wait.is_zero() {
        return Ok(NextDue::In(wait));
    }
    Ok(match read(&row) {
        Ok(parked) => NextDue::Now(Box::new(parked)),
        Err(error) => NextDue::Unreadable { id: row.try_get("id")?, reason: error.to_string() },
    })
}

/// Counts an attempt at a parked record, before it is made. Sets the time of the attempt after it, should the process
/// die of this one. `None` when the row is gone.
pub(super) async fn count_retry(mut tx: Transaction, id: i64, delay: Duration) -> Result<Option<u32>, sqlx::Error> {
    let attempts: Option<i32> = sqlx::query_scalar(
        "update inbox_parked
            set attempts = attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => $2)
          where id = $1 and next_attempt_at is not null
         returning attempts",
    )
    .bind(id)
    .bind(clock::seconds(delay))
    .fetch_optional(&mut **tx)
    .await?;
    tx.commit_quietly().await?;
    Ok(attempts.map(i32::unsigned_abs))
}

/// Notes why a parked record failed this time, and that it waits for `delay` from now on: the attempt may have taken
/// longer.
pub(super) async fn note(
    mut tx: Transaction,
    id: i64,
    delay: Duration,
    fault: &RecordFault,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox_parked
            set error_class = $2, reason = $3, next_attempt_at = clock_timestamp() + make_interval(secs => $4)
          where id = $1",
    )
    .bind(id)
    .bind(&fault.class)
    .bind(&fault.reason)
    .bind(clock::seconds(delay))
    .execute(&mut **tx)
    .await?;
    tx.commit_quietly().await
}

/// Notes that a parked record waits for a lock, and takes back the attempt that was counted for it. It is tried again
/// after half the time that it has been parked. So a lock that is held for hours costs the partition little, and one
/// that is soon let go of costs the record little.
pub(super) async fn note_wait(
    mut tx: Transaction,
    id: i64,
    backoff: &Backoff,
    fault: &RecordFault,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox_parked
            set attempts = greatest(attempts - 1, 0), error_class = $2, reason = $3,
                next_attempt_at = clock_timestamp() + least(make_interval(secs => $5),
                                    greatest(make_interval(secs => $4), (clock_timestamp() - parked_at) / 2))
          where id = $1",
    )
    .bind(id)
    .bind(&fault.class)
    .bind(&fault.reason)
    .bind(clock::seconds(backoff.first))
    .bind(clock::seconds(backoff.max))
    .execute(&mut **tx)
    .await?;
    tx.commit_quietly().await
}

/// The first rows of a lane, in order, up to one that this build cannot read.
pub(super) async fn lane_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    lane: i64,
    limit: usize,
) -> Result<Vec<Parked>, sqlx::Error> {
    let rows = sqlx::query(
        "select *
           from inbox_parked
          where consumer = $1 and topic = $2 and partition = $3 and lane = $4
          order by generation, record_offset
          limit $5",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(lane)
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(&mut **tx)
    .await?;
    Ok(rows.iter().map_while(|row| read(row).ok()).collect())
}

/// Takes rows out, and makes what is now the first of their lane due at once.
pub(super) async fn leave_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    ids: &[i64],
    lane: Option<i64>,
) -> Result<(), sqlx::Error> {
    sqlx::query("delete from inbox_parked where id = any($1)").bind(ids).execute(&mut **tx).await?;
    wake_in(tx, place, lane.as_slice()).await
}

/// Makes the first row of each lane due at once, if it has no time.
async fn wake_in(tx: &mut Tx<'_>, place: InboxPlace<'_>, lanes: &[i64]) -> Result<(), sqlx::Error> {
    if lanes.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update inbox_parked
            set next_attempt_at = clock_timestamp()
          where id in (select distinct on (lane) id
                         from inbox_parked
                        where consumer = $1 and topic = $2 and partition = $3 and lane = any($4)
                        order by lane, generation, record_offset)
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

/// What is parked of a consumer, and the database's clock.
pub(super) struct ParkedCounts {
    pub(super) parked: i64,
    /// The number of those that wait for a lock.
    pub(super) locked: i64,
    /// What the first of those waits for, and for how long; `None`: none waits.
    pub(super) longest: Option<(String, Duration)>,
    pub(super) untried: Option<Untried>,
    pub(super) time: OffsetDateTime,
}

impl ParkedCounts {
    /// The trouble of records that have been waiting for locks for too long.
    pub(super) fn waits_for_locks(&self) -> Option<HealthIssue> {
        let (reason, since) = self.longest.as_ref().filter(|(_, since)| *since > LOCKED_MAX)?;
        let (locked, seconds) = (self.locked, since.as_secs());
        let reason =
            format!("parked records that wait for locks: {locked}; the first, since {seconds} s ago, {reason}");
        Some(HealthIssue { since: clock::monotonic().checked_sub(*since), ..HealthIssue::new(Cause::Stalled, reason) })
    }
}

/// Parked records that nothing tries: due for minutes, or put off because this build cannot read them.
pub(super) struct Untried {
    pub(super) count: i64,
    /// The id of the first row of them.
    pub(super) id: i64,
    topic: String,
    partition: i32,
    /// Why this build cannot read the first row; `None` if it can.
    unreadable: Option<String>,
    /// For how long the first row has been so.
    age: Duration,
}

impl Untried {
    pub(super) fn issue(&self) -> HealthIssue {
        let Self { count, id, topic, partition, unreadable, age } = self;
        let why = match unreadable {
            Some(reason) => format!(
                "cannot be read by this build: {reason}; let a build try it that can, correct the row, or delete it"
            ),
            None => format!(
                "is due since {} s ago; if the topic has no such partition any more, give it its partitions back, or set \
                 `partition` of these rows to one that it has",
                age.as_secs()
            ),
        };
        let reason = format!(
            "parked records that nothing tries: {count}; the first, row {id} of inbox_parked, of partition {partition} of {topic}, {why}"
        );
        HealthIssue { since: clock::monotonic().checked_sub(*age), ..HealthIssue::new(Cause::Stalled, reason) }
    }
}

/// Counts a consumer's parked records.
pub(super) async fn count(mut tx: Transaction, consumer: &str) -> Result<ParkedCounts, sqlx::Error> {
    let row = sqlx::query(
        "select count(*) as parked, count(*) filter (where error_class = $2) as locked,
                (array_agg(reason order by parked_at) filter (where error_class = $2))[1] as reason,
                extract(epoch from clock_timestamp() - min(parked_at) filter (where error_class = $2))::float8 as since,
                clock_timestamp() as time
           from inbox_parked
          where consumer = $1",
    )
    .bind(consumer)
    .bind(LOCKED)
    .fetch_one(&mut **tx)
    .await?;
    let untried = untried_in(&mut tx, consumer).await?;
    tx.commit_quietly().await?;
    let reason: Option<String> = row.try_get("reason")?;
    Ok(ParkedCounts {
        parked: row.try_get("parked")?,
        locked: row.try_get("locked")?,
        longest: reason.zip(row.try_get::<Option<f64>, _>("since")?.map(seconds)),
        untried,
        time: row.try_get("time")?,
    })
}

async fn untried_in(tx: &mut Tx<'_>, consumer: &str) -> Result<Option<Untried>, sqlx::Error> {
    let row = sqlx::query(
        "select count(*) over () as count, id, topic, partition, unreadable,
                extract(epoch from clock_timestamp() - since)::float8 as age
           from (select id, topic, partition, case when error_class = $2 then reason end as unreadable,
                        -- What cannot be read is put off, again and again.
                        case when error_class = $2 then parked_at else next_attempt_at end as since
                   from inbox_parked
                  where consumer = $1) as parked
          where since < clock_timestamp() - make_interval(secs => $3)
          order by since, id
          limit 1",
    )
    .bind(consumer)
    .bind(UNREADABLE)
    .bind(clock::seconds(UNTRIED_MAX))
    .fetch_optional(&mut **tx)
    .await?;
    row.map(|row| {
        Ok(Untried {
            count: row.try_get("count")?,
            id: row.try_get("id")?,
            topic: row.try_get("topic")?,
            partition: row.try_get("partition")?,
            unreadable: row.try_get("unreadable")?,
            age: seconds(row.try_get("age")?),
        })
    })
    .transpose()
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn read(row: &PgRow) -> Result<Parked, sqlx::Error> {
    let Json(headers) = row.try_get::<Json<Headers>, _>("headers")?;
    let headers = RawHeaders::from_stored(&headers);
    // The headers were an envelope when they were parked.
    let envelope = Envelope::decode(headers.iter()).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
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
        origin: RecordOrigin { timestamp: row.try_get("record_time")?, headers },
    })
}

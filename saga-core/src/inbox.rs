//! The inbox: which messages of a batch are new.
//!
//! A row is written in the transaction that handles the message. So a message with a row is done, and one without a row
//! left nothing behind, whenever the process died. Two transactions that handle one message at once meet at the row's
//! key. The second waits for the first to commit or roll back.
//!
//! ```
//! use saga_core::{clock, id::MessageId, inbox::{Inadmissible, admissible}};
//! use std::time::Duration;
//!
//! let horizon = Duration::from_secs(14 * 24 * 3600);
//! let id = MessageId::new();
//! assert_eq!(admissible(id, horizon, clock::now()), Ok(()));
//! assert_eq!(admissible(id, horizon, clock::now() + time::Duration::days(15)), Err(Inadmissible::TooOld));
//! ```

use crate::{id::MessageId, outbox::Tx};
use sqlx::{PgExecutor, PgPool, Row};
use std::{collections::HashSet, time::Duration};
use time::OffsetDateTime;

/// How far ahead of our clock the birth of a message may lie. More means a broken clock, or an id that is no honest
/// UUIDv7. Well below the 14 days that partitions are made ahead for.
pub const FUTURE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Whether a message may be handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// The message was not seen before; its row is written.
    Fresh,
    /// The message was handled before.
    Duplicate,
    /// The message, or another of its key, is parked: it waits behind.
    Held,
}

/// What the inbox needs to know of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival<'a> {
    /// `ce_source`.
    pub source: &'a str,
    /// `ce_id`.
    pub id: MessageId,
    /// A hash of the record's key; `None` for a record without one.
    pub lane: Option<i64>,
    /// Whether the inbox remembers the message; if not, the message has no row and is fresh whenever it comes. Only
    /// messages that are older than the horizon, and handled all the same, are not remembered.
    pub remembered: bool,
}

/// The place where messages arrive: a partition, read by a consumer group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InboxPlace<'a> {
    /// The name of the consumer group.
    pub consumer: &'a str,
    /// The topic's name.
    pub topic: &'a str,
    /// The partition's number, from 0.
    pub partition: i32,
}

/// Why an id cannot be in the inbox, which then could not show whether the message was handled before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Inadmissible {
    /// The id does not hold the time of its birth.
    #[error("the message id is not a UUIDv7")]
    NotV7,
    /// The id is older than the inbox remembers.
    #[error("the message is older than the inbox's horizon")]
    TooOld,
    /// The clock of the id's maker is wrong.
    #[error("the message's id is more than a day ahead of the clock")]
    FromTheFuture,
}

/// Whether the inbox can remember `id`.
///
/// # Errors
/// The reason; the consumer dead-letters such a message and never handles it.
pub fn admissible(id: MessageId, horizon: Duration, now: OffsetDateTime) -> Result<(), Inadmissible> {
    let born = match id.0.get_timestamp() {
        Some(timestamp) if id.0.get_version_num() == 7 => timestamp.to_unix().0,
        _ => return Err(Inadmissible::NotV7),
    };
    let now = u64::try_from(now.unix_timestamp()).unwrap_or(0);
    if born < now.saturating_sub(horizon.as_secs()) {
        Err(Inadmissible::TooOld)
    } else if born > now.saturating_add(FUTURE_MAX.as_secs()) {
        Err(Inadmissible::FromTheFuture)
    } else {
        Ok(())
    }
}

/// Writes the rows of the new messages among `arrivals` and returns what each message is: one statement, rows in the
/// order of ids. Of two arrivals with one id the first is fresh. A held message gets no row.
///
/// # Errors
/// When the database returns an error.
pub async fn receive_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    arrivals: &[Arrival<'_>],
) -> Result<Vec<Delivery>, sqlx::Error> {
    let rows = sqlx::query(
        "insert into inbox (consumer, source, message_id)
         select $1, a.source, a.message_id
           from unnest($4::text[], $5::uuid[], $6::bigint[], $7::boolean[]) as a (source, message_id, lane, remembered)
          where a.remembered
            and not exists (select from inbox_parked p
                             where p.consumer = $1 and p.topic = $2 and p.partition = $3 and p.lane = a.lane)
            and not exists (select from inbox_parked p
                             where p.consumer = $1 and p.source = a.source and p.message_id = a.message_id)
          order by a.message_id, a.source
             on conflict do nothing
         returning source, message_id",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(arrivals.iter().map(|arrival| arrival.source).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.id.0).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.lane).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.remembered).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    // Nearly always all messages are new, and no further query is needed.
    if rows.len() == arrivals.len() {
        return Ok(vec![Delivery::Fresh; arrivals.len()]);
    }
    let mut written = HashSet::with_capacity(rows.len());
    for row in &rows {
        written.insert((row.try_get::<&str, _>("source")?, MessageId(row.try_get("message_id")?)));
    }
    let held = find_held_in(tx, place, arrivals).await?;
    let mut deliveries = vec![Delivery::Duplicate; arrivals.len()];
    // Held messages come last: a message whose row was written is fresh, even if a copy of it was parked elsewhere
    // since.
    for waits in [false, true] {
        for (n, arrival) in arrivals.iter().enumerate().filter(|(n, _)| held[*n] == waits) {
            if written.remove(&(arrival.source, arrival.id)) {
                deliveries[n] = Delivery::Fresh;
            } else if waits {
                deliveries[n] = Delivery::Held;
            } else if !arrival.remembered {
                deliveries[n] = Delivery::Fresh;
            }
        }
    }
    Ok(deliveries)
}

/// Which of `arrivals` have to wait: their lane has something parked, or they are parked themselves.
async fn find_held_in(
    tx: &mut Tx<'_>,
    place: InboxPlace<'_>,
    arrivals: &[Arrival<'_>],
) -> Result<Vec<bool>, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from inbox_parked p
                         where p.consumer = $1 and p.topic = $2 and p.partition = $3 and p.lane = a.lane)
             or exists (select from inbox_parked p
                         where p.consumer = $1 and p.source = a.source and p.message_id = a.message_id)
           from unnest($4::text[], $5::uuid[], $6::bigint[]) with ordinality as a (source, message_id, lane, n)
          order by a.n",
    )
    .bind(place.consumer)
    .bind(place.topic)
    .bind(place.partition)
    .bind(arrivals.iter().map(|arrival| arrival.source).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.id.0).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.lane).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await
}

/// Writes the rows of the new messages among `arrivals`, whatever is parked, and returns whether each was new. For
/// messages that come out of `inbox_parked`; all ids differ there.
pub(crate) async fn record_in(
    tx: &mut Tx<'_>,
    consumer: &str,
    arrivals: &[Arrival<'_>],
) -> Result<Vec<bool>, sqlx::Error> {
    sqlx::query_scalar(
        "with arrival as materialized (
             select source, message_id, remembered, n
               from unnest($2::text[], $3::uuid[], $4::boolean[])
                    with ordinality as a (source, message_id, remembered, n)
         ), fresh as (
             insert into inbox (consumer, source, message_id)
             select $1, source, message_id
               from arrival
              where remembered
              order by message_id, source
                 on conflict do nothing
             returning source, message_id
         )
         select f.message_id is not null or not a.remembered
           from arrival a
           left join fresh f using (source, message_id)
          order by a.n",
    )
    .bind(consumer)
    .bind(arrivals.iter().map(|arrival| arrival.source).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.id.0).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.remembered).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await
}

/// Which of `arrivals` are in the inbox, without writing anything.
pub(crate) async fn known(
    connection: impl PgExecutor<'_>,
    consumer: &str,
    arrivals: &[Arrival<'_>],
) -> Result<Vec<bool>, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from inbox i
                         where i.consumer = $1 and i.source = a.source and i.message_id = a.message_id)
           from unnest($2::text[], $3::uuid[]) with ordinality as a (source, message_id, n)
          order by n",
    )
    .bind(consumer)
    .bind(arrivals.iter().map(|arrival| arrival.source).collect::<Vec<_>>())
    .bind(arrivals.iter().map(|arrival| arrival.id.0).collect::<Vec<_>>())
    .fetch_all(connection)
    .await
}

/// Makes the partitions for messages of the next two weeks, and of the past as far as `horizon`; returns how many were
/// missing. Call it at start and now and then. (Forgetting what is older than the horizon, by dropping whole
/// partitions, belongs beside it.)
///
/// # Errors
/// When the database returns an error.
pub async fn add_partitions(pool: &PgPool, horizon: Duration) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("select inbox_add_partitions(make_interval(secs => $1))")
        .bind(horizon.as_secs_f64())
        .fetch_one(pool)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::{NoContext, Timestamp, Uuid};

    #[test]
    fn a_message_is_admissible_while_the_inbox_remembers_its_age() {
        let horizon = Duration::from_secs(100);
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let born = |seconds: u64| MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, 1_800_000_000 + seconds, 0)));
        let old = MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, 1_800_000_000 - 101, 0)));
        assert_eq!(admissible(born(0), horizon, now), Ok(()));
        assert_eq!(admissible(born(24 * 3600), horizon, now), Ok(()));
        assert_eq!(admissible(born(24 * 3600 + 1), horizon, now), Err(Inadmissible::FromTheFuture));
        assert_eq!(admissible(old, horizon, now), Err(Inadmissible::TooOld));
        assert_eq!(admissible(MessageId(Uuid::new_v4()), horizon, now), Err(Inadmissible::NotV7));
        assert_eq!(admissible(MessageId(Uuid::nil()), horizon, now), Err(Inadmissible::NotV7));
    }
}

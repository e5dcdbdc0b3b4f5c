//! Rows that Kafka will never take as they are, and the lanes behind them.
//!
//! A lane is a topic and a key. While a row of it is parked, every later row of it is parked behind, so that its order
//! holds; all other lanes flow on. A row without a key is a lane of its own. A parked row is a copy, made in the
//! transaction that moves the position past it. So whenever the process dies, a row is either still to come or parked,
//! never neither.
//!
//! A lane may hold a million rows. Every statement here follows an index to its rows. A statement that has their ids
//! says `status || '' = 'parked'`, so that the planner does not take the index on lanes for that.

use crate::{
    database::Database,
    row::{Row, columns, whole_columns},
};
use sqlx::PgConnection;
use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use time::OffsetDateTime;
use uuid::Uuid;

/// How many lanes one statement loads.
const LANES_AT_ONCE: i64 = 2_000;
/// How many rows of a topic with requests one look reads. Requests that are met make room for others, four times a
/// second.
const ASKED_AT_ONCE: i64 = 1_000;

/// Lanes with parked rows; nearly always none. The session, which parks rows, shares it with the retries.
#[derive(Debug, Default)]
pub(crate) struct BlockedLanes {
    /// By topic and key: the rows that are parked there.
    lanes: Mutex<HashMap<String, HashMap<String, ParkedRange>>>,
    any: AtomicBool,
    /// Held while lanes are loaded and while one is freed, so that no load is older than a freed lane.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone, Copy)]
struct ParkedRange {
    /// The row that later ones wait behind.
    first: i64,
    /// The last row that was decided to be parked. It may not be recorded yet.
    last: i64,
}

/// A topic and a key. Rows without a key have no order and block nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Lane {
    pub(crate) topic: String,
    pub(crate) key: Option<String>,
}

impl BlockedLanes {
    /// Reads which lanes are blocked, and replaces what was known of the topics that are `mine`. A session may have
    /// ended before its decisions were recorded: the next one decides again.
    pub(crate) async fn load(
        &self,
        db: &Database,
        outbox: &str,
        mine: impl Fn(&str) -> bool,
    ) -> Result<(), sqlx::Error> {
        let _turn = self.turn.lock().await;
        let mut lanes: HashMap<String, HashMap<String, ParkedRange>> = HashMap::new();
        let (mut topic, mut hash) = (String::new(), String::new());
        loop {
            let found = db.ask(async |db| lanes_behind(db, outbox, &topic, &hash).await).await?;
            let full = i64::try_from(found.len()).is_ok_and(|found| found == LANES_AT_ONCE);
            for (lane_topic, lane_hash, key, first, last) in found {
                (topic, hash) = (lane_topic, lane_hash);
                lanes.entry(topic.clone()).or_default().insert(key, ParkedRange { first, last });
            }
            if !full {
                break;
            }
        }
        lanes.retain(|topic, _| mine(topic));
        let mut known = self.lanes();
        known.retain(|topic, _| !mine(topic));
        known.extend(lanes);
        self.any.store(!known.is_empty(), Ordering::Release);
        Ok(())
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<String, HashMap<String, ParkedRange>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The row that row `id` of this lane has to wait behind, if there is one; then `id` has to be parked as well.
    pub(crate) fn behind(&self, topic: &str, key: Option<&str>, id: i64) -> Option<i64> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut lanes = self.lanes();
        let waiting = lanes.get_mut(topic)?.get_mut(key?)?;
        waiting.last = waiting.last.max(id);
        Some(waiting.first)
    }

    /// Blocks a lane: row `id` has to be parked, and later rows of its lane wait behind it.
    pub(crate) fn block(&self, topic: &str, key: Option<&str>, id: i64) {
        let Some(key) = key else { return };
        let mut lanes = self.lanes();
        self.any.store(true, Ordering::Release);
        let lane = lanes.entry(topic.to_owned()).or_default().entry(key.to_owned());
        lane.or_insert(ParkedRange { first: id, last: id }).last = id;
    }

    /// Lets a lane flow again if none of its rows is parked, and none is about to be; returns whether it flows.
    pub(crate) async fn free(&self, db: &mut PgConnection, outbox: &str, lane: &Lane) -> Result<bool, sqlx::Error> {
        let _turn = self.turn.lock().await;
        let Some(last) = self.last(lane) else { return Ok(true) };
        let (parked, recorded): (bool, bool) = sqlx::query_as(
            "select exists (select
                              from outbox_parked
                             where outbox = $1 and topic = $2 and md5(key) = md5($3) and status = 'parked'),
                    exists (select from outbox_parked where outbox = $1 and id = $4)",
        )
        .bind(outbox)
        .bind(&lane.topic)
        .bind(&lane.key)
        .bind(last)
        .fetch_one(db)
        .await?;
        Ok(!parked && recorded && self.remove(lane, last))
    }

    fn last(&self, lane: &Lane) -> Option<i64> {
        Some(self.lanes().get(&lane.topic)?.get(lane.key.as_ref()?)?.last)
    }

    /// Forgets the lane, unless a further row was parked behind `last`.
    fn remove(&self, lane: &Lane, last: i64) -> bool {
        let mut lanes = self.lanes();
        let (Some(keys), Some(key)) = (lanes.get_mut(&lane.topic), &lane.key) else { return true };
        if keys.get(key).is_some_and(|waiting| waiting.last != last) {
            return false;
        }
        keys.remove(key);
        if keys.is_empty() {
            lanes.remove(&lane.topic);
        }
        self.any.store(!lanes.is_empty(), Ordering::Release);
        true
    }
}

/// Topic, hash of the key, key, first and last parked row of a lane.
type LaneColumns = (String, String, String, i64, i64);

/// Lanes with parked rows, in the order of topic and hash, behind the given ones. The query goes from one to the next
/// by the index, however many rows are parked in them.
async fn lanes_behind(
    db: &mut PgConnection,
    outbox: &str,
    topic: &str,
    hash: &str,
) -> Result<Vec<LaneColumns>, sqlx::Error> {
    sqlx::query_as(
        "with recursive lane as (
                  (select topic, md5(key) as hash
                     from outbox_parked
                    where outbox = $1 and status = 'parked' and (topic, md5(key)) > ($2, $3)
                    order by topic, md5(key)
                    limit 1)
                  union all
                  (select next.topic, next.hash
                     from lane
                    cross join lateral (select topic, md5(key) as hash
                                          from outbox_parked as parked
                                         where outbox = $1 and status = 'parked'
                                           and (parked.topic, md5(key)) > (lane.topic, lane.hash)
                                         order by topic, md5(key)
                                         limit 1) as next))
         select lane.topic, lane.hash, first.key, first.id, last.id
           from (select topic, hash from lane limit $4) as lane
          cross join lateral (select key, id
                                from outbox_parked
                               where outbox = $1 and topic = lane.topic and md5(key) = lane.hash and status = 'parked'
                               order by id
                               limit 1) as first
          cross join lateral (select id
                                from outbox_parked
                               where outbox = $1 and topic = lane.topic and md5(key) = lane.hash and status = 'parked'
                               order by id desc
                               limit 1) as last",
    )
    .bind(outbox)
    .bind(topic)
    .bind(hash)
    .bind(LANES_AT_ONCE)
    .fetch_all(db)
    .await
}

/// A row that has to be parked.
#[derive(Debug, Clone)]
pub(crate) struct RowToPark {
    pub(crate) id: i64,
    pub(crate) reason: String,
    pub(crate) blocked_by: Option<i64>,
    /// The bytes of the whole row.
    pub(crate) bytes: usize,
}

/// The lanes that an operator wants tried again, with the time of the request: those of each topic that come first,
/// however many there are. Rows without a key are one lane here, with the time of their first row.
pub(crate) async fn requested(
    db: &mut PgConnection,
    outbox: &str,
) -> Result<HashMap<Lane, OffsetDateTime>, sqlx::Error> {
    let lanes: Vec<(String, Option<String>, OffsetDateTime)> = sqlx::query_as(
        "with recursive found (topic) as (
                  (select topic
                     from outbox_parked
                    where outbox = $1 and retry_requested_at is not null
                    order by topic
                    limit 1)
                  union all
                  (select next.topic
                     from found
                    cross join lateral (select topic
                                          from outbox_parked as parked
                                         where outbox = $1 and retry_requested_at is not null
                                           and parked.topic > found.topic
                                         order by topic
                                         limit 1) as next))
         select found.topic, asked.key, max(asked.at)
           from found
          cross join lateral ((select key, retry_requested_at as at
                                 from outbox_parked
                                where outbox = $1 and topic = found.topic and md5(key) >= ''
                                  and retry_requested_at is not null
                                order by md5(key), id
                                limit $2)
                              union all
                              (select null, retry_requested_at
                                 from outbox_parked
                                where outbox = $1 and topic = found.topic and md5(key) is null
                                  and retry_requested_at is not null
                                order by md5(key), id
                                limit 1)) as asked
          group by found.topic, asked.key",
    )
    .bind(outbox)
    .bind(ASKED_AT_ONCE)
    .fetch_all(db)
    .await?;
    Ok(lanes.into_iter().map(|(topic, key, at)| (Lane { topic, key }, at)).collect())
}

/// The next rows of a lane that is to be tried again; the bodies of large ones are not read. A row without a key is a
/// lane of its own, so only requested rows are taken.
pub(crate) async fn waiting(
    db: &mut PgConnection,
    outbox: &str,
    lane: &Lane,
    rows: usize,
) -> Result<Vec<Row>, sqlx::Error> {
    const KEYED: &str = concat!(
        "select ",
        columns!(),
        " from outbox_parked where outbox = $1 and topic = $2 and md5(key) = md5($3) and status = 'parked' order by id limit $4",
    );
    const KEYLESS: &str = concat!(
        "select ",
        columns!(),
        " from outbox_parked where outbox = $1 and topic = $2 and md5(key) is null and status || '' = 'parked' and $3::text is null
            and retry_requested_at is not null
          order by md5(key), id limit $4",
    );
    let found = sqlx::query(if lane.key.is_some() { KEYED } else { KEYLESS })
        .bind(outbox)
        .bind(&lane.topic)
        .bind(&lane.key)
        .bind(i64::try_from(rows).unwrap_or(i64::MAX))
        .fetch_all(db)
        .await?;
    found.into_iter().map(Row::new).collect()
}

/// Takes parked rows to send them, if `owner` still holds the lease. From here on, until their fate is known, they
/// cannot be discarded. A row that was discarded just now is not returned.
pub(crate) async fn claim(
    db: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    ids: &[i64],
) -> Result<Vec<Row>, sqlx::Error> {
    let found = sqlx::query(concat!(
        "update outbox_parked
            set sending_by = $2
          where outbox = $1 and id = any ($3) and status || '' = 'parked'
            and exists (select from outbox_lease where outbox = $1 and owner = $2 for share)
        returning ",
        whole_columns!(),
    ))
    .bind(outbox)
    .bind(owner)
    .bind(ids)
    .fetch_all(db)
    .await?;
    let mut rows = found.into_iter().map(Row::new).collect::<Result<Vec<_>, _>>()?;
    rows.sort_unstable_by_key(Row::id);
    Ok(rows)
}

/// Releases rows of `owner` that were surely not published: they can be discarded again.
pub(crate) async fn release(db: &mut PgConnection, outbox: &str, owner: Uuid, ids: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query("update outbox_parked set sending_by = null where outbox = $1 and id = any ($2) and sending_by = $3")
        .bind(outbox)
        .bind(ids)
        .bind(owner)
        .execute(db)
        .await?;
    Ok(())
}

/// Published rows of a lane, and the request by which they were tried; the request covers the rest of the lane.
pub(crate) struct Published {
    pub(crate) lane: Lane,
    pub(crate) requested: OffsetDateTime,
    pub(crate) ids: Vec<i64>,
}

/// Records that rows are published, if `owner` still holds the lease; false: the owner is fenced. The request of a lane
/// goes on to its next row. When there is none, it stays on the last published row. From that the owner learns to free
/// the lane, even if it cannot do so at once.
pub(crate) async fn published(
    db: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    lanes: &[Published],
) -> Result<bool, sqlx::Error> {
    let ids: Vec<i64> = lanes.iter().flat_map(|lane| lane.ids.iter().copied()).collect();
    let keyed = || lanes.iter().filter(|lane| lane.lane.key.is_some());
    let topics: Vec<&str> = keyed().map(|lane| lane.lane.topic.as_str()).collect();
    let keys: Vec<&str> = keyed().filter_map(|lane| lane.lane.key.as_deref()).collect();
    let last: Vec<i64> = keyed().map(|lane| lane.ids.iter().copied().max().unwrap_or(0)).collect();
    let requested: Vec<OffsetDateTime> = keyed().map(|lane| lane.requested).collect();
    let done: i64 = sqlx::query_scalar(
        "with next as (
                  select next.id, lane.last, lane.requested
                    from unnest($4::text[], $5::text[], $6::bigint[], $7::timestamptz[])
                             as lane (topic, key, last, requested)
                    left join lateral (select id
                                         from outbox_parked as parked
                                        where outbox = $1 and parked.topic = lane.topic
                                          and md5(parked.key) = md5(lane.key) and status = 'parked' and id > lane.last
                                        order by id
                                        limit 1) as next on true),
              done as (
                  update outbox_parked
                     set status = 'published', resolved_at = clock_timestamp(), sending_by = null,
                         attempts = attempts + 1,
                         retry_requested_at = (select next.requested
                                                 from next
                                                where next.last = outbox_parked.id and next.id is null)
                   where outbox = $1 and id = any ($3) and status || '' = 'parked'
                     and exists (select from outbox_lease where outbox = $1 and owner = $2 for share)
                  returning id),
              asked as (
                  update outbox_parked as parked
                     set retry_requested_at = next.requested
                    from next
                   where parked.outbox = $1 and parked.id = next.id and parked.retry_requested_at is null
                     and exists (select from done))
         select count(*) from done",
    )
    .bind(outbox)
    .bind(owner)
    .bind(&ids)
    .bind(topics)
    .bind(keys)
    .bind(last)
    .bind(requested)
    .fetch_one(db)
    .await?;
    Ok(done > 0 || ids.is_empty())
}

/// Records that a row was refused again, for this reason, if `owner` still holds the lease. The fate of a row that
/// another owner claimed stays open.
pub(crate) async fn refused(
    db: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    id: i64,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_parked
            set attempts = attempts + 1, reason = $3, blocked_by = null, sending_by = nullif(sending_by, $4),
                retry_requested_at = case when key is not null then retry_requested_at end
          where outbox = $1 and id = $2 and status || '' = 'parked'
            and exists (select from outbox_lease where outbox = $1 and owner = $4 for share)",
    )
    .bind(outbox)
    .bind(id)
    .bind(reason)
    .bind(owner)
    .execute(db)
    .await?;
    Ok(())
}

/// Records that the lane has been tried, by the request of `requested`, if `owner` still holds the lease. A later
/// request stands, and so does that of a parked row without a key, which is a lane of its own.
pub(crate) async fn tried(
    db: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    lane: &Lane,
    requested: OffsetDateTime,
) -> Result<(), sqlx::Error> {
    const KEYED: &str = "update outbox_parked
                            set retry_requested_at = null
                          where outbox = $1 and topic = $2 and md5(key) = md5($3)
                            and retry_requested_at is not null and retry_requested_at <= $4
                            and exists (select from outbox_lease where outbox = $1 and owner = $5 for share)";
    const KEYLESS: &str = "update outbox_parked
                              set retry_requested_at = null
                            where outbox = $1 and topic = $2 and md5(key) is null and $3::text is null
                              and retry_requested_at is not null and retry_requested_at <= $4
                              and status || '' <> 'parked'
                              and exists (select from outbox_lease where outbox = $1 and owner = $5 for share)";
    sqlx::query(if lane.key.is_some() { KEYED } else { KEYLESS })
        .bind(outbox)
        .bind(&lane.topic)
        .bind(&lane.key)
        .bind(requested)
        .bind(owner)
        .execute(db)
        .await?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use saga_core::{service::messaging_migrations, testkit::TestDatabase};
    use sqlx::{Connection as _, postgres::PgConnectOptions};
    use std::str::FromStr as _;

    #[test]
    fn a_lane_is_blocked_by_its_first_row_until_it_is_freed_behind_its_last() {
        let blocked = BlockedLanes::default();
        blocked.block("t", Some("k"), 3);
        assert_eq!(blocked.behind("t", Some("k"), 5), Some(3));
        blocked.block("t", None, 6);
        assert_eq!(blocked.behind("t", Some("other"), 7), None);
        assert_eq!(blocked.behind("t", None, 8), None);
        let lane = Lane { topic: "t".into(), key: Some("k".into()) };
        assert_eq!(blocked.last(&lane), Some(5));
        blocked.behind("t", Some("k"), 9);
        assert!(!blocked.remove(&lane, 5), "row 9 is to be parked behind it");
        assert!(blocked.remove(&lane, 9));
        assert_eq!(blocked.behind("t", Some("k"), 10), None);
    }

    /// A database and a connection like the relay's. Rows 1 to `rows` of topic `t` are parked, without a key, and as
    /// many behind them of topic `u`, each a lane.
    pub(crate) async fn with_lanes(rows: i64) -> (TestDatabase, PgConnection) {
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let options = PgConnectOptions::from_str(&database.url).unwrap().options(crate::outbox::PLANS);
        let mut db = PgConnection::connect_with(&options).await.unwrap();
        sqlx::query(
            "insert into outbox_parked (outbox, id, message_id, topic, key, type, headers, created_at, reason)
             select 'orders', id, gen_random_uuid(), case when id > $1 then 'u' else 't' end,
                    case when id > $1 then 'k' || id end, 'test.v1', '{}', now(), ''
               from generate_series(1, 2 * $1) as id",
        )
        .bind(rows)
        .execute(&mut db)
        .await
        .unwrap();
        (database, db)
    }

    /// Parked rows that the transaction has read.
    pub(crate) async fn touched(db: &mut PgConnection) -> i64 {
        sqlx::query_scalar(
            "select coalesce(sum(coalesce(idx_tup_fetch, 0) + seq_tup_read), 0)::bigint
               from pg_stat_xact_user_tables
              where relname = 'outbox_parked'",
        )
        .fetch_one(db)
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn what_a_turn_of_a_long_lane_touches_does_not_depend_on_its_length() {
        let rows = i64::try_from(saga_core::testkit::size(20_000, 1_000_000)).unwrap();
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let options = PgConnectOptions::from_str(&database.url).unwrap().options(crate::outbox::PLANS);
        let mut db = PgConnection::connect_with(&options).await.unwrap();
        sqlx::query(
            "insert into outbox_parked (outbox, id, message_id, topic, key, type, headers, created_at, reason)
             select 'orders', id, gen_random_uuid(), 't', 'k' || (id > $1)::int * (id % 7), 'test.v1', '{}', now(), ''
               from generate_series(1, $1 + 100) as id",
        )
        .bind(rows)
        .execute(&mut db)
        .await
        .unwrap();
        let owner = Uuid::new_v4();
        sqlx::query("insert into outbox_lease values ('orders', $1, '', now(), now(), now() + interval '1 hour')")
            .bind(owner)
            .execute(&mut db)
            .await
            .unwrap();
        let lane = Lane { topic: "t".into(), key: Some("k0".into()) };
        let mut tx = sqlx::Connection::begin(&mut db).await.unwrap();
        let before = touched(&mut tx).await;
        let ids: Vec<i64> = waiting(&mut tx, "orders", &lane, 10).await.unwrap().iter().map(Row::id).collect();
        assert_eq!(ids, (1..=10).collect::<Vec<_>>());
        assert_eq!(claim(&mut tx, "orders", owner, &ids).await.unwrap().len(), 10);
        let requested = OffsetDateTime::UNIX_EPOCH;
        let done = [Published { lane: lane.clone(), requested, ids }];
        assert!(published(&mut tx, "orders", owner, &done).await.unwrap());
        let asked: Vec<i64> = sqlx::query_scalar("select id from outbox_parked where retry_requested_at is not null")
            .fetch_all(&mut *tx)
            .await
            .unwrap();
        assert_eq!(asked, [11], "the request goes on to the next row of the lane");
        tried(&mut tx, "orders", owner, &lane, requested).await.unwrap();
        assert_eq!(lanes_behind(&mut tx, "orders", "", "").await.unwrap().len(), 7);
        let touched = touched(&mut tx).await - before;
        assert!(touched < 300, "{touched} rows of {rows}");
    }

    #[tokio::test]
    async fn what_a_look_at_requests_touches_does_not_depend_on_how_many_wait() {
        let rows = i64::try_from(saga_core::testkit::size(20_000, 200_000)).unwrap();
        let (_database, mut db) = with_lanes(rows).await;
        // The planner knows of no requests: an operator asks for all rows between two looks of autovacuum.
        sqlx::raw_sql("analyze outbox_parked").execute(&mut db).await.unwrap();
        sqlx::query("update outbox_parked set retry_requested_at = clock_timestamp()").execute(&mut db).await.unwrap();
        sqlx::query("update outbox_parked set topic = 'v' where id = 2 * $1")
            .bind(rows)
            .execute(&mut db)
            .await
            .unwrap();
        let mut tx = sqlx::Connection::begin(&mut db).await.unwrap();
        let before = touched(&mut tx).await;
        let lanes = requested(&mut tx, "orders").await.unwrap();
        let of = |topic: &str| lanes.keys().filter(|lane| lane.topic == topic).count();
        assert_eq!(["t", "u", "v"].map(of), [1, 1_000, 1], "no topic waits for another");
        let keyless = Lane { topic: "t".into(), key: None };
        let ids: Vec<i64> = waiting(&mut tx, "orders", &keyless, 10).await.unwrap().iter().map(Row::id).collect();
        assert_eq!(ids, (1..=10).collect::<Vec<_>>());
        let touched = touched(&mut tx).await - before;
        assert!(touched < 1_100, "{touched} rows of {}", 2 * rows);
    }

    #[tokio::test]
    async fn a_published_lane_stays_asked_for_until_it_is_freed() {
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let owner = Uuid::new_v4();
        sqlx::query("insert into outbox_lease values ('orders', $1, '', now(), now(), now() + interval '1 hour')")
            .bind(owner)
            .execute(&database.pool)
            .await
            .unwrap();
        sqlx::query(
            "insert into outbox_parked (outbox, id, message_id, topic, key, type, headers, created_at, reason)
             select 'orders', id, gen_random_uuid(), 't', 'k', 'test.v1', '{}', now(), '' from generate_series(1, 2) as id",
        )
        .execute(&database.pool)
        .await
        .unwrap();
        let mut db = database.pool.acquire().await.unwrap();
        let lane = Lane { topic: "t".into(), key: Some("k".into()) };
        let blocked = BlockedLanes::default();
        blocked.block("t", Some("k"), 1);
        // Row 3 is decided to be parked, and not recorded yet.
        blocked.behind("t", Some("k"), 3);
        let requested_at = OffsetDateTime::UNIX_EPOCH;
        claim(&mut db, "orders", owner, &[1, 2]).await.unwrap();
        let done = [Published { lane: lane.clone(), requested: requested_at, ids: vec![1, 2] }];
        assert!(published(&mut db, "orders", owner, &done).await.unwrap());
        assert!(!blocked.free(&mut db, "orders", &lane).await.unwrap());
        assert_eq!(requested(&mut db, "orders").await.unwrap().get(&lane), Some(&requested_at));
        assert!(waiting(&mut db, "orders", &lane, 10).await.unwrap().is_empty(), "nothing is sent again");
        tried(&mut db, "orders", owner, &lane, requested_at).await.unwrap();
        assert!(requested(&mut db, "orders").await.unwrap().is_empty());
    }
}

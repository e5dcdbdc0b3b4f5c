//! The statements that find the rows of a window. Each touches a bounded number of rows, whatever the outbox holds.

use crate::{
    position::{Position, ReadError},
    row::{Row, columns},
    snapshot::{Snapshot, Span, texts},
};
use sqlx::{PgConnection, Row as _};

/// How many ids one step of a walk covers: rows of other windows and topics among them are passed over.
const STRETCH_IDS: i64 = 20_000;

/// How many index entries one step of a search reads.
const SEARCHED_ENTRIES: i64 = 20_000;

/// The index of the column behind those of a row.
const SNAPSHOT_COLUMN: usize = 9;

/// The query returns the snapshot once, in a row of its own, because with hundreds of running transactions it is long.
/// It also returns up to `$2` rows of the transactions that began after the snapshot whose end is `$1`. A transaction
/// id that this cluster has not given yet came with a copy of another cluster's rows, and means nothing here.
macro_rules! new_rows {
    () => {
        concat!(
            "(select null::bigint, null::uuid, null, null, null, null::bytea, null, null::timestamptz,
                     null::integer[], pg_current_snapshot()::text)
             union all
             (select ",
            columns!(),
            ", null
                from outbox
               where xid >= $1::text::xid8 and xid < pg_snapshot_xmax(pg_current_snapshot())
               order by xid, id
               limit $2)"
        )
    };
}

const POLL: &str = new_rows!();

/// The query of [`POLL`], and rows of the transactions `$3`, which were running at the first snapshot. It takes only
/// those that ended, so that one that is writing a million rows costs nothing meanwhile. Each is a range of one
/// transaction: for an equality the primary key has the wanted order too, and the planner may choose to read all of a
/// later partition along it. Where none was running, [`POLL`] serves: this part is half of the plan, and starting the
/// plan is a third of a poll.
const POLL_WITH_STRAGGLERS: &str = concat!(
    new_rows!(),
    "
     union all
     (select found.*
        from unnest($3::text[]::xid8[]) as straggler (xid)
       cross join lateral (select ",
    columns!(),
    ", null
                             from outbox
                            where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid
                            order by outbox.xid, id
                            limit $2) as found
       where pg_visible_in_snapshot(straggler.xid, pg_current_snapshot())
       limit $2)"
);

/// Takes the snapshot that becomes a window's target, and the window's rows. All of them come in no order if there are
/// no more than `most`, else one row more. It is one statement, so that there is one snapshot. Its transaction has no
/// id, so that the snapshot holds none of the relay's. And there is one round trip from a commit to its rows.
pub(crate) async fn poll(db: &mut PgConnection, base: &Snapshot, most: i64) -> Result<(Snapshot, Vec<Row>), ReadError> {
    let stragglers = texts(base.running());
    let mut query = sqlx::query(if stragglers.is_empty() { POLL } else { POLL_WITH_STRAGGLERS });
    query = query.bind(base.xmax().to_string()).bind(most + 1);
    if !stragglers.is_empty() {
        query = query.bind(stragglers);
    }
    let found = query.fetch_all(db).await?;
    let mut target = None;
    let mut rows = Vec::with_capacity(found.len());
    for row in found {
        match row.try_get::<Option<&str>, _>(SNAPSHOT_COLUMN)? {
            Some(snapshot) => target = Some(snapshot.parse()?),
            None => rows.push(Row::new(row)?),
        }
    }
    Ok((target.ok_or(sqlx::Error::RowNotFound)?, rows))
}

/// Whether a window has more rows than `most`.
pub(crate) async fn is_long(db: &mut PgConnection, span: &Span, most: i64) -> Result<bool, sqlx::Error> {
    let rows: i64 = sqlx::query_scalar(
        "select count(*)
           from ((select 1
                    from outbox
                   where xid >= $1::text::xid8 and xid < $2::text::xid8
                   order by xid, id
                   limit $4)
                 union all
                 (select 1
                    from unnest($3::text[]::xid8[]) as straggler (xid)
                   cross join lateral (select 1
                                         from outbox
                                        where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid
                                        order by outbox.xid, id
                                        limit $4) as found
                   limit $4)) as row",
    )
    .bind(span.from.to_string())
    .bind(span.to.to_string())
    .bind(texts(&span.stragglers))
    .bind(most + 1)
    .fetch_one(db)
    .await?;
    Ok(rows > most)
}

/// All rows of a window in no order, if there are no more than `most`; else one row more.
pub(crate) async fn whole(
    db: &mut PgConnection,
    span: &Span,
    only_topic: Option<&str>,
    most: i64,
) -> Result<Vec<Row>, sqlx::Error> {
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "(select ",
                columns!(),
                "
                    from outbox
                   where xid >= $1::text::xid8 and xid < $2::text::xid8 and xid <> all ($3::text[]::xid8[]) ",
                $topic,
                "
                   order by xid, id
                   limit $5)
                 union all
                 (select found.*
                    from unnest($4::text[]::xid8[]) as straggler (xid)
                   cross join lateral (select ",
                columns!(),
                "
                                         from outbox
                                        where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid ",
                $topic,
                "
                                        order by outbox.xid, id
                                        limit $5) as found
                   limit $5)"
            )
        };
    }
    let sql = if only_topic.is_some() { sql!("and topic = $6") } else { sql!("") };
    let mut query = sqlx::query(sql)
        .bind(span.from.to_string())
        .bind(span.to.to_string())
        .bind(texts(&span.running))
        .bind(texts(&span.stragglers))
        .bind(most + 1);
    if let Some(topic) = only_topic {
        query = query.bind(topic.to_owned());
    }
    query.fetch_all(db).await?.into_iter().map(Row::new).collect()
}

/// The greatest id in the outbox; 0 where it is empty.
pub(crate) async fn greatest_id(db: &mut PgConnection) -> Result<i64, sqlx::Error> {
    let id: Option<i64> =
        sqlx::query_scalar("select id from outbox order by id desc limit 1").fetch_optional(db).await?;
    Ok(id.unwrap_or(0))
}

/// The search for the ids between which the range of a long window lies. It goes along the index on transaction ids,
/// which holds the window and nothing else, a bounded piece at a time.
pub(crate) struct Search {
    /// The place at which the last piece ended.
    xid: String,
    id: i64,
    /// The transaction id behind the range.
    to: String,
    lowest: i64,
    greatest: i64,
}

impl Search {
    pub(crate) fn of(span: &Span) -> Self {
        let (xid, to) = (span.from.to_string(), span.to.to_string());
        Self { xid, id: i64::MIN, to, lowest: i64::MAX, greatest: 0 }
    }

    /// Reads the next piece; after the last one, returns the lowest and the greatest id.
    pub(crate) async fn step(&mut self, db: &mut PgConnection) -> Result<Option<(i64, i64)>, sqlx::Error> {
        type Found = (i64, Option<i64>, Option<i64>, Option<String>, Option<i64>);
        let (rows, lowest, greatest, xid, id): Found = sqlx::query_as(
            "with piece as materialized (
                      select xid, id
                        from outbox
                       where (xid, id) > ($1::text::xid8, $2) and xid < $3::text::xid8
                       order by xid, id
                       limit $4),
                  last as (select xid, id from piece offset $4 - 1)
             select (select count(*) from piece), (select min(id) from piece), (select max(id) from piece),
                    (select xid::text from last), (select id from last)",
        )
        .bind(&self.xid)
        .bind(self.id)
        .bind(&self.to)
        .bind(SEARCHED_ENTRIES)
        .fetch_one(db)
        .await?;
        self.lowest = self.lowest.min(lowest.unwrap_or(i64::MAX));
        self.greatest = self.greatest.max(greatest.unwrap_or(0));
        if let (Some(xid), Some(id)) = (xid, id) {
            (self.xid, self.id) = (xid, id);
        }
        Ok((rows < SEARCHED_ENTRIES).then_some((self.lowest, self.greatest)))
    }
}

/// A page of a long window's rows that are not in its range, with ids above `after` and below `before`. The index gives
/// each straggling transaction's rows in order. So the page costs the same however many rows it wrote and however long
/// ago.
pub(crate) async fn stragglers(
    db: &mut PgConnection,
    stragglers: &[u64],
    after: i64,
    before: i64,
    only_topic: Option<&str>,
    most: i64,
) -> Result<Vec<Row>, sqlx::Error> {
    if stragglers.is_empty() {
        return Ok(Vec::new());
    }
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "select found.*
                   from unnest($1::text[]::xid8[]) as straggler (xid)
                  cross join lateral (select ",
                columns!(),
                "
                                        from outbox
                                       where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid
                                         and id > $2 and id < $3 ",
                $topic,
                "
                                       order by outbox.xid, id
                                       limit $4) as found
                  order by id
                  limit $4"
            )
        };
    }
    let sql = if only_topic.is_some() { sql!("and topic = $5") } else { sql!("") };
    let mut query = sqlx::query(sql).bind(texts(stragglers)).bind(after).bind(before).bind(most);
    if let Some(topic) = only_topic {
        query = query.bind(topic.to_owned());
    }
    query.fetch_all(db).await?.into_iter().map(Row::new).collect()
}

/// A page of a long window along the primary key, and the id up to which there is no other row of the window. The query
/// asks for visibility by function on purpose: no index can answer that. So the primary key, which gives the order, is
/// the only way for the planner. The upper bound keeps partitions out that hold nothing of the window.
pub(crate) async fn stretch(
    db: &mut PgConnection,
    at: &Position,
    after: i64,
    top: i64,
    only_topic: Option<&str>,
    most: i64,
) -> Result<(Vec<Row>, i64), sqlx::Error> {
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "select ",
                columns!(),
                "
                   from outbox
                  where id > $1 and id <= $2
                    and pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot))
                    and not pg_visible_in_snapshot(xid, (select $4::text::pg_snapshot)) ",
                $topic,
                "
                  order by id
                  limit $5"
            )
        };
    }
    let end = top.min(after.saturating_add(STRETCH_IDS));
    let sql = if only_topic.is_some() { sql!("and topic = $6") } else { sql!("") };
    let mut query =
        sqlx::query(sql).bind(after).bind(end).bind(at.target.to_string()).bind(at.base.to_string()).bind(most);
    if let Some(topic) = only_topic {
        query = query.bind(topic.to_owned());
    }
    let rows: Vec<Row> = query.fetch_all(&mut *db).await?.into_iter().map(Row::new).collect::<Result<_, _>>()?;
    let full = i64::try_from(rows.len()).is_ok_and(|rows| rows >= most);
    let reached = match rows.last() {
        Some(last) if full => last.id(),
        Some(_) => end,
        // A gap in the ids may be long.
        None => before_next(db, end, top).await?,
    };
    Ok((rows, reached))
}

/// The id before the next row's behind `after`, or `top` when there is no row up to it.
async fn before_next(db: &mut PgConnection, after: i64, top: i64) -> Result<i64, sqlx::Error> {
    let next: Option<i64> = sqlx::query_scalar("select id from outbox where id > $1 and id <= $2 order by id limit 1")
        .bind(after)
        .bind(top)
        .fetch_optional(db)
        .await?;
    Ok(next.map_or(top, |id| id - 1))
}

/// The keys of these rows.
pub(crate) async fn keys(db: &mut PgConnection, ids: &[i64]) -> Result<Vec<(i64, Option<String>)>, sqlx::Error> {
    sqlx::query_as("select id, key from outbox where id = any ($1)").bind(ids).fetch_all(db).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        budget::{Area, Areas, Budget, default, least},
        read::cursor::{Cursor, Page},
    };
    use saga_core::{
        service::messaging_migrations,
        testkit::{Log, TestDatabase, size},
    };
    use sqlx::{Connection as _, postgres::PgConnectOptions};
    use std::{
        str::FromStr as _,
        sync::Arc,
        time::{Duration, Instant},
    };

    /// Room for all that a test reads.
    fn room() -> Arc<Area> {
        Areas::new(&Budget::new(default(1), 1)).main
    }

    struct Reading {
        database: TestDatabase,
        db: PgConnection,
    }

    impl Reading {
        async fn new() -> Self {
            let database = TestDatabase::new(&[messaging_migrations()]).await;
            let options = PgConnectOptions::from_str(&database.url).unwrap().options(crate::outbox::PLANS);
            let db = PgConnection::connect_with(&options).await.unwrap();
            Self { database, db }
        }

        /// Appends rows of a topic, in a transaction of their own.
        async fn append(&self, topic: &str, rows: usize) {
            self.append_bodies(topic, rows, 1, "{}").await;
        }

        async fn append_bodies(&self, topic: &str, rows: usize, payload_bytes: i32, headers: &str) {
            sqlx::query(
                "insert into outbox (message_id, topic, key, type, payload, headers)
                 select gen_random_uuid(), $1, 'k', 'test.v1', convert_to(repeat('x', $3), 'UTF8'), $4::jsonb
                   from generate_series(1, $2)",
            )
            .bind(topic)
            .bind(i64::try_from(rows).unwrap())
            .bind(payload_bytes)
            .bind(headers)
            .execute(&self.database.pool)
            .await
            .unwrap();
        }

        async fn snapshot(&self) -> Snapshot {
            let text: String =
                sqlx::query_scalar("select pg_current_snapshot()::text").fetch_one(&self.database.pool).await.unwrap();
            text.parse().unwrap()
        }

        /// Makes a partition for the rows that come from here on.
        async fn next_partition(&self) {
            sqlx::raw_sql(
                "create table later partition of outbox for values from (20000001) to (30000001);
                 alter sequence outbox_id_seq restart 20000001;
                 analyze outbox",
            )
            .execute(&self.database.pool)
            .await
            .unwrap();
        }

        /// The next page of a cursor.
        async fn page(&mut self, cursor: &mut Cursor, target: &Snapshot) -> Option<Page> {
            cursor.make_room().await;
            cursor.follow(&mut self.db, &Position::at(target.clone())).await.unwrap()
        }

        /// Reads all that a cursor finds up to `target`, and explains each statement of it (`analyze, buffers`). Returns
        /// the rows, and the plan of each statement.
        async fn explained(&mut self, mut cursor: Cursor, target: &Snapshot) -> (Vec<i64>, Vec<String>) {
            sqlx::raw_sql("vacuum analyze outbox").execute(&self.database.pool).await.unwrap();
            sqlx::raw_sql(
                "load 'auto_explain';
                 set auto_explain.log_analyze = on;
                 set auto_explain.log_buffers = on;
                 set auto_explain.log_timing = off;
                 set auto_explain.log_level = notice;
                 set auto_explain.log_min_duration = 0",
            )
            .execute(&mut self.db)
            .await
            .unwrap();
            let log = Log::hear("sqlx::postgres::notice=info");
            let mut found = Vec::new();
            while let Some(page) = self.page(&mut cursor, target).await {
                found.extend(page.rows.iter().map(Row::id));
            }
            sqlx::raw_sql("set auto_explain.log_min_duration = -1").execute(&mut self.db).await.unwrap();
            let plans = log.said("duration: ");
            (found, plans.iter().map(|plan| plan["message"].as_str().unwrap().to_owned()).collect())
        }

        /// Makes one step of a cursor; returns the rows, and how many it touched.
        async fn step(&mut self, cursor: &mut Cursor, target: &Snapshot) -> (Option<Vec<i64>>, i64) {
            // The count may still include what earlier transactions touched.
            let before = touched(&mut self.db).await;
            let page = self.page(cursor, target).await;
            let touched = touched(&mut self.db).await - before;
            (page.map(|page| page.rows.iter().map(Row::id).collect()), touched)
        }

        /// Reads all that a cursor finds up to `target`; returns it, and how many rows its dearest step touched.
        async fn read(&mut self, mut cursor: Cursor, target: &Snapshot) -> (Vec<i64>, i64) {
            // The step runs in one transaction: only for so long the server counts its reads apart.
            sqlx::raw_sql("begin").execute(&mut self.db).await.unwrap();
            let (mut found, mut dearest) = (Vec::new(), 0);
            loop {
                let (page, touched) = self.step(&mut cursor, target).await;
                dearest = dearest.max(touched);
                let Some(page) = page else { break };
                found.extend(page);
            }
            sqlx::raw_sql("rollback").execute(&mut self.db).await.unwrap();
            (found, dearest)
        }
    }

    /// The shared buffers that the top node of a logged plan counts, hit or read.
    fn shared_buffers(plan: &str) -> i64 {
        let Some((_, counts)) = plan.split_once("Buffers: shared") else { return 0 };
        let counts = counts.lines().next().unwrap_or_default().split_whitespace();
        let counts = counts.filter_map(|count| count.strip_prefix("hit=").or(count.strip_prefix("read=")));
        counts.map(|count| count.parse::<i64>().unwrap()).sum()
    }

    async fn touched(db: &mut PgConnection) -> i64 {
        sqlx::query_scalar(
            "select coalesce(sum(coalesce(idx_tup_fetch, 0) + seq_tup_read), 0)::bigint
               from pg_stat_xact_user_tables
              where relname in (select inhrelid::regclass::text from pg_inherits)",
        )
        .fetch_one(db)
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn pages_of_a_long_window_touch_no_rows_of_later_partitions() {
        let mut reading = Reading::new().await;
        reading.append("before", 10).await;
        let base = reading.snapshot().await;
        reading.append("window", 7_000).await;
        let target = reading.snapshot().await;
        reading.next_partition().await;
        reading.append("later", size(30_000, 2_000_000)).await;
        let cursor = Cursor::new(Position { base, target: target.clone(), after: 0 }, None, room());
        let (found, dearest) = reading.read(cursor, &target).await;
        assert_eq!(found, (11..=7_010).collect::<Vec<i64>>());
        assert!(dearest <= 7_100, "{dearest} rows");
        // This window was begun by an owner that died in the middle of it, when everything was new.
        let cursor =
            Cursor::new(Position { base: Snapshot::initial(), target: target.clone(), after: 3_000 }, None, room());
        let (found, dearest) = reading.read(cursor, &target).await;
        assert_eq!(found, (3_001..=7_010).collect::<Vec<i64>>());
        assert!(dearest <= STRETCH_IDS + 10, "{dearest} rows");
    }

    #[tokio::test]
    async fn no_statement_of_a_page_touches_buffers_of_what_lies_outside_its_window() {
        /// To see that a further partition holds nothing of a range of transactions is a descent in its index.
        const A_DESCENT: i64 = 4;
        let mut reading = Reading::new().await;
        reading.append("before", 10).await;
        // This transaction is running at the first snapshot, and has ended at the second.
        let mut straggler = reading.database.pool.begin().await.unwrap();
        sqlx::query("select pg_current_xact_id()").execute(&mut *straggler).await.unwrap();
        let base = reading.snapshot().await;
        straggler.commit().await.unwrap();
        reading.append("window", 7_000).await;
        let target = reading.snapshot().await;
        let cursor = |topic: Option<&str>| {
            Cursor::new(
                Position { base: base.clone(), target: target.clone(), after: 0 },
                topic.map(Into::into),
                room(),
            )
        };
        // Tests beside this one have transactions of their own.
        let stragglers = Span::between(&base, &target).stragglers.len();
        let bound = A_DESCENT * (1 + i64::try_from(stragglers).unwrap());
        let topics = [None, Some("window")];
        let mut alone = Vec::new();
        for topic in topics {
            alone.push(reading.explained(cursor(topic), &target).await);
        }
        reading.next_partition().await;
        reading.append("later", size(30_000, 2_000_000)).await;
        for (topic, (found, alone)) in topics.into_iter().zip(alone) {
            let beside = reading.explained(cursor(topic), &target).await;
            assert_eq!((&found, found.len()), (&beside.0, 7_000));
            assert!(alone.len() == beside.1.len() && alone.len() >= 4, "other statements: {alone:#?} {:#?}", beside.1);
            for (alone, beside) in alone.iter().zip(&beside.1) {
                let (few, more) = (shared_buffers(alone), shared_buffers(beside));
                assert!(few > 0 && more - few <= bound, "{few} buffers: {alone}\n{more} beside newer rows: {beside}");
            }
        }
    }

    #[tokio::test]
    async fn few_rows_of_a_topic_among_many_of_others_are_found_stretch_by_stretch() {
        let mut reading = Reading::new().await;
        reading.append("few", 2).await;
        reading.append("many", 30_000).await;
        let base = reading.snapshot().await;
        reading.append("few", 1).await;
        let many = size(45_000, 5_000_000);
        reading.append("many", many).await;
        reading.append("few", 1).await;
        let target = reading.snapshot().await;
        let cursor = Cursor::new(Position::at(base), Some("few".into()), room());
        let (found, dearest) = reading.read(cursor, &target).await;
        assert_eq!(found, [30_003, 30_004 + i64::try_from(many).unwrap()]);
        assert!(dearest <= STRETCH_IDS + 10, "{dearest} rows");
    }

    #[tokio::test]
    async fn a_window_of_any_length_is_searched_piece_by_piece() {
        /// The longest that a relay waits, which is no more than the bound of a statement that reads.
        const SOON: Duration = Duration::from_secs(10);
        let mut reading = Reading::new().await;
        reading.append("before", 10).await;
        let base = reading.snapshot().await;
        reading.append("window", size(50_000, 80_000_000)).await;
        let target = reading.snapshot().await;
        let mut cursor = Cursor::new(Position::at(base), None, room());
        let (mut steps, mut dearest, mut slowest) = (0, 0, Duration::ZERO);
        let first = loop {
            sqlx::raw_sql("begin").execute(&mut reading.db).await.unwrap();
            let began = Instant::now();
            let (page, touched) = reading.step(&mut cursor, &target).await;
            (steps, dearest, slowest) = (steps + 1, dearest.max(touched), slowest.max(began.elapsed()));
            sqlx::raw_sql("rollback").execute(&mut reading.db).await.unwrap();
            if let Some(first) = page.expect("there are rows").first() {
                break *first;
            }
        };
        println!("{steps} steps, the slowest {slowest:?}, the dearest {dearest} rows");
        assert_eq!(first, 11);
        assert!(dearest <= SEARCHED_ENTRIES + 10, "{dearest} rows");
        assert!(slowest < SOON, "{slowest:?}");
    }

    #[tokio::test]
    async fn a_topics_reader_that_is_held_back_does_not_wait_for_its_own_room() {
        let mut reading = Reading::new().await;
        let base = reading.snapshot().await;
        reading.append("main", 1).await;
        reading.append_bodies("apart", 408, 5_000, "{}").await;
        let target = reading.snapshot().await;
        let area = Areas::new(&Budget::new(least(1), 1)).topic().await;
        let mut cursor = Cursor::new(Position::at(base.clone()), Some("apart".into()), area);
        // The main stream has passed its own row, and none of the topic's.
        let main = Position { base, target, after: 1 };
        for _ in 0..4 {
            let room = tokio::time::timeout(Duration::from_secs(30), cursor.make_room());
            room.await.expect("nothing of the stream is in flight that would make room");
            cursor.follow(&mut reading.db, &main).await.unwrap();
        }
    }

    #[tokio::test]
    async fn stragglers_below_and_above_a_long_window_are_in_it_by_id() {
        let mut reading = Reading::new().await;
        let mut early = PgConnection::connect(&reading.database.url).await.unwrap();
        let mut early = early.begin().await.unwrap();
        let append = "insert into outbox (message_id, topic, type) values (gen_random_uuid(), 't', 'test.v1')";
        sqlx::query(append).execute(&mut *early).await.unwrap();
        reading.append("before", 10).await;
        let base = reading.snapshot().await;
        reading.append("window", 6_000).await;
        sqlx::query(append).execute(&mut *early).await.unwrap();
        early.commit().await.unwrap();
        let target = reading.snapshot().await;
        let (found, _) = reading.read(Cursor::new(Position::at(base), None, room()), &target).await;
        let expected: Vec<i64> = [1].into_iter().chain(12..=6_011).chain([6_012]).collect();
        assert_eq!(found, expected);
    }

    #[tokio::test]
    async fn the_bytes_of_a_page_are_bounded_whatever_its_rows_are_made_of() {
        let reading = &mut Reading::new().await;
        let headers = format!(r#"{{"h": "{}"}}"#, "x".repeat(100_000));
        let many = size(200, 5_000);
        reading.append_bodies("headers", many, 1, &headers).await;
        reading.append_bodies("payloads", 20, 1_000_000, "{}").await;
        reading.append_bodies("beyond any limit", 2, 20_000_000, "{}").await;
        let target = reading.snapshot().await;
        let mut cursor = Cursor::new(Position::initial(), None, room());
        let (mut rows, mut unread) = (0, 0);
        while let Some(page) = reading.page(&mut cursor, &target).await {
            let bytes: usize = page.rows.iter().filter(|row| !row.lacks_body()).map(Row::bytes).sum();
            assert!(bytes <= 9 << 20, "{bytes} bytes in a page");
            rows += page.rows.len();
            unread += page.rows.iter().filter(|row| row.lacks_body()).count();
            assert!(page.rows.iter().all(|row| row.key() == Some("k") && row.kind() == "test.v1"));
        }
        assert_eq!((rows, unread), (many + 22, 2), "what is beyond any limit is not read");
    }

    #[tokio::test]
    async fn a_large_row_that_was_deleted_before_its_body_was_read_is_left_out() {
        let reading = &mut Reading::new().await;
        reading.append_bodies("t", 10, 1_000_000, "{}").await;
        let target = reading.snapshot().await;
        let mut cursor = Cursor::new(Position::initial(), None, room());
        let first = reading.page(&mut cursor, &target).await.unwrap();
        assert!((1..10).contains(&first.rows.len()));
        sqlx::query("delete from outbox where id = 10").execute(&reading.database.pool).await.unwrap();
        let second = reading.page(&mut cursor, &target).await.unwrap();
        assert_eq!(first.rows.len() + second.rows.len(), 9);
        assert!(second.rows.iter().all(|row| row.payload().is_some()), "none would be sent as a tombstone");
    }

    #[tokio::test]
    async fn transaction_ids_that_the_cluster_has_not_given_yet_are_not_read() {
        let reading = &mut Reading::new().await;
        sqlx::query(
            "insert into outbox (xid, message_id, topic, type)
             values ('9000000000000000000', gen_random_uuid(), 't', 'test.v1')",
        )
        .execute(&reading.database.pool)
        .await
        .unwrap();
        reading.append("t", 1).await;
        let mut cursor = Cursor::new(Position::initial(), None, room());
        cursor.make_room().await;
        let page = cursor.next(&mut reading.db).await.unwrap().unwrap();
        assert_eq!(page.rows.iter().map(Row::id).collect::<Vec<_>>(), [2]);
        for _ in 0..3 {
            cursor.make_room().await;
            assert!(cursor.next(&mut reading.db).await.unwrap().is_none());
        }
    }
}

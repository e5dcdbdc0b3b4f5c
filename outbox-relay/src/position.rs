//! Which rows come next: the outbox between two snapshots, by id, page by page.
//!
//! ```text
//!  published ──────────────┐ base            target ┌─ not looked at yet
//!                          │ rows of this window,   │
//!                          │ by id: …after_id│……    │
//! ```
//!
//! A window holds the rows that are visible in `target` and not in `base`. Two rows of one key are in order: their writers
//! held the key's lock to the commit, so the later one has the greater id, and no snapshot sees it without the earlier.
//! A row that commits late, with however low an id, is in the first window whose target sees it. Nothing waits for
//! anybody. `target` is never made smaller to bound a window (rows of a transaction that got its id early and the lock
//! late would then overtake): a window is cut by id only.
//!
//! When the process dies, a new owner starts from the last position that was recorded in the batch log and
//! publishes again what was not.

use crate::{
    row::{Row, columns},
    snapshot::{Snapshot, Span, texts},
};
use sqlx::{PgConnection, Row as _};
use std::{collections::VecDeque, sync::Arc};

/// Rows that are read at once. Large enough that a round trip costs nothing per row, small enough that the first one
/// is not kept waiting.
pub(crate) const PAGE_ROWS: i64 = 5_000;

/// The column behind those of a row.
const SNAPSHOT: usize = 9;

/// Payload bytes beyond the inline ones that a page may carry. One row may exceed it alone.
const PAGE_LARGE_BYTES: usize = 8 << 20;

/// Where reading stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Everything visible in it is published.
    pub base: Snapshot,
    /// What is being published: the rows visible in it and not in `base` …
    pub target: Snapshot,
    /// … whose id is greater than this.
    pub after: i64,
}

impl Position {
    /// Before the first row.
    pub fn initial() -> Self {
        Self { base: Snapshot::initial(), target: Snapshot::initial(), after: 0 }
    }

    /// All that `snapshot` sees is published.
    pub fn at(snapshot: Snapshot) -> Self {
        Self { base: snapshot.clone(), target: snapshot, after: 0 }
    }
}

/// Rows to publish, in order, and where they stand.
pub(crate) struct Page {
    /// The topic whose rows these are, when it is catching up after a pause; else rows of any topic.
    pub(crate) lane: Option<Arc<str>>,
    pub(crate) base: Snapshot,
    pub(crate) target: Snapshot,
    /// The position before the first row.
    pub(crate) after: i64,
    pub(crate) rows: Vec<Row>,
}

/// How far a cursor may go.
pub(crate) enum UpTo<'a> {
    /// What is committed now.
    Now,
    /// A snapshot that the main cursor has finished.
    Snapshot(&'a Snapshot),
}

/// How the rows of the current window are found.
enum Plan {
    /// Not known yet: try all of it at once.
    Untried,
    /// All of it has been read.
    Read,
    /// Too many for one page: stragglers below `floor` first, then along the primary key.
    Walk { floor: i64 },
}

/// Reads the outbox in publishing order.
pub(crate) struct Cursor {
    at: Position,
    plan: Plan,
    lane: Option<Arc<str>>,
    /// Read, but not handed out: large payloads cut a page into several.
    read: VecDeque<Row>,
}

impl Cursor {
    pub(crate) fn new(at: Position, lane: Option<Arc<str>>) -> Self {
        Self { at, plan: Plan::Untried, lane, read: VecDeque::new() }
    }

    /// The snapshot up to which all is handed out, if the cursor stands between two windows.
    pub(crate) fn finished(&self) -> Option<&Snapshot> {
        (self.at.base == self.at.target && self.read.is_empty()).then_some(&self.at.base)
    }

    /// Whether the next rows are known to be there: the window was cut, or is long.
    pub(crate) fn knows_more(&self) -> bool {
        !self.read.is_empty() || matches!(self.plan, Plan::Walk { .. })
    }

    /// The last snapshot up to which all is handed out.
    pub(crate) fn base(&self) -> &Snapshot {
        &self.at.base
    }

    /// The next rows, or `None` when there are none up to `up_to`.
    pub(crate) async fn next(&mut self, db: &mut PgConnection, up_to: UpTo<'_>) -> Result<Option<Page>, ReadError> {
        let mut up_to = Some(up_to);
        loop {
            if !self.read.is_empty() {
                return self.cut(db).await.map(Some);
            }
            if self.at.base == self.at.target {
                let Some(limit) = up_to.take() else { return Ok(None) };
                if !self.open(db, limit).await? {
                    return Ok(None);
                }
            } else {
                self.fill(db).await?;
            }
        }
    }

    /// Opens the next window; false when there is nothing new.
    async fn open(&mut self, db: &mut PgConnection, up_to: UpTo<'_>) -> Result<bool, ReadError> {
        let (target, rows) = match up_to {
            UpTo::Snapshot(target) if *target == self.at.base => (target.clone(), Vec::new()),
            UpTo::Snapshot(target) => {
                self.plan = Plan::Untried;
                (self.at.target, self.at.after) = (target.clone(), 0);
                return Ok(true);
            }
            UpTo::Now => poll(db, &self.at.base).await?,
        };
        if rows.is_empty() {
            // Nothing between the two: the new snapshot is as good a base, and a cheaper one to look from.
            self.at = Position::at(target);
            return Ok(false);
        }
        (self.at.target, self.at.after) = (target, 0);
        let span = Span::between(&self.at.base, &self.at.target);
        self.take_whole(db, &span, rows).await?;
        Ok(true)
    }

    /// Takes the rows of a window that was tried as a whole: all of them, or one more than a page may hold.
    async fn take_whole(&mut self, db: &mut PgConnection, span: &Span, rows: Vec<Row>) -> Result<(), ReadError> {
        if i64::try_from(rows.len()).is_ok_and(|found| found > PAGE_ROWS) {
            let floor = if self.at.base.is_initial() { 0 } else { lowest_id(db, span).await? };
            self.plan = Plan::Walk { floor };
        } else {
            self.plan = Plan::Read;
            self.read = rows.into();
            self.read.make_contiguous().sort_unstable_by_key(Row::id);
        }
        Ok(())
    }

    /// Reads the next rows of the window; an exhausted one is closed.
    async fn fill(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        let span = Span::between(&self.at.base, &self.at.target);
        let after = self.at.after.max(self.read.back().map_or(0, Row::id));
        let mut rows = match self.plan {
            Plan::Untried => {
                let rows = whole_window(db, &span, after, self.lane.as_deref()).await?;
                return self.take_whole(db, &span, rows).await;
            }
            Plan::Read => Vec::new(),
            Plan::Walk { floor } => {
                let mut rows = Vec::new();
                if after < floor && !span.stragglers.is_empty() {
                    rows = stragglers(db, &span, after, floor, self.lane.as_deref()).await?;
                }
                if rows.is_empty() {
                    rows = walk(db, &self.at, after.max(floor - 1), self.lane.as_deref()).await?;
                }
                rows
            }
        };
        if rows.is_empty() {
            self.close();
        }
        self.read.extend(rows.drain(..));
        Ok(())
    }

    fn close(&mut self) {
        self.at = Position::at(self.at.target.clone());
        self.plan = Plan::Untried;
    }

    /// Hands out as many of the read rows as a page may hold, with their large payloads.
    async fn cut(&mut self, db: &mut PgConnection) -> Result<Page, ReadError> {
        let mut bytes = 0;
        let mut take = 0;
        for row in &self.read {
            if row.wants_payload() {
                bytes += row.size().unwrap_or(0);
                if bytes > PAGE_LARGE_BYTES && take > 0 {
                    break;
                }
            }
            take += 1;
        }
        let mut rows: Vec<Row> = self.read.drain(..take).collect();
        if bytes > 0 {
            fetch_payloads(db, &mut rows).await?;
        }
        let after = self.at.after;
        self.at.after = rows.last().map_or(after, Row::id);
        let (base, target) = (self.at.base.clone(), self.at.target.clone());
        Ok(Page { lane: self.lane.clone(), base, target, after, rows })
    }
}

/// Reading the outbox failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// PostgreSQL said so, or is not there.
    #[error("reading the outbox: {0}")]
    Database(#[from] sqlx::Error),
    /// A snapshot in the batch log, or from the server, does not parse.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::NotASnapshot),
}

/// The snapshot, once and in a row of its own (with hundreds of transactions running it is long), and up to `$2` rows of
/// the transactions that began after the snapshot whose end is `$1`.
macro_rules! new_rows {
    () => {
        concat!(
            "(select null::bigint, null::uuid, null, null, null, null::bytea, null::integer, null, null::timestamptz,
                     pg_current_snapshot()::text)
             union all
             (select ",
            columns!(),
            ", null
                from outbox
               where xid >= $1::text::xid8
               order by xid, id
               limit $2)"
        )
    };
}

const POLL: &str = new_rows!();

/// And rows of `$3`, which were running then: only of those that ended, so that one that is writing a million rows costs
/// nothing meanwhile. Where none was, this is left out: it is half of the plan, and to start the plan is a third of a poll.
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
                            where outbox.xid = straggler.xid
                            order by id
                            limit $2) as found
       where pg_visible_in_snapshot(straggler.xid, pg_current_snapshot())
       limit $2)"
);

/// Takes the snapshot that becomes a window's target, and the window's rows: all of them in no order if they fit a page,
/// else one row more than fits. One statement, so that it is one snapshot, in a transaction that has no id of its own, so
/// that the snapshot holds nothing of ours; and one round trip from a commit to its rows.
async fn poll(db: &mut PgConnection, base: &Snapshot) -> Result<(Snapshot, Vec<Row>), ReadError> {
    let stragglers = texts(base.running());
    let mut query = sqlx::query(if stragglers.is_empty() { POLL } else { POLL_WITH_STRAGGLERS });
    query = query.bind(base.xmax().to_string()).bind(PAGE_ROWS + 1);
    if !stragglers.is_empty() {
        query = query.bind(stragglers);
    }
    let found = query.fetch_all(db).await?;
    let mut target = None;
    let mut rows = Vec::with_capacity(found.len());
    for row in found {
        match row.try_get::<Option<&str>, _>(SNAPSHOT)? {
            Some(snapshot) => target = Some(snapshot.parse()?),
            None => rows.push(Row::new(row)?),
        }
    }
    Ok((target.ok_or(sqlx::Error::RowNotFound)?, rows))
}

/// All rows of a window in no order, if they fit a page; else one row more than fits.
async fn whole_window(
    db: &mut PgConnection,
    span: &Span,
    after: i64,
    lane: Option<&str>,
) -> Result<Vec<Row>, sqlx::Error> {
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "(select ",
                columns!(),
                "
                    from outbox
                   where xid >= $1::text::xid8 and xid < $2::text::xid8 and xid <> all ($3::text[]::xid8[])
                     and id > $5 ",
                $topic,
                "
                   order by xid, id
                   limit $6)
                 union all
                 (select found.*
                    from unnest($4::text[]::xid8[]) as straggler (xid)
                   cross join lateral (select ",
                columns!(),
                "
                                         from outbox
                                        where outbox.xid = straggler.xid and id > $5 ",
                $topic,
                "
                                        order by id
                                        limit $6) as found
                   limit $6)"
            )
        };
    }
    let sql = if lane.is_some() { sql!("and topic = $7") } else { sql!("") };
    let mut query = sqlx::query(sql)
        .bind(span.from.to_string())
        .bind(span.to.to_string())
        .bind(texts(&span.running))
        .bind(texts(&span.stragglers))
        .bind(after)
        .bind(PAGE_ROWS + 1);
    if let Some(topic) = lane {
        query = query.bind(topic.to_owned());
    }
    query.fetch_all(db).await?.into_iter().map(Row::new).collect()
}

/// The lowest id of a long window's range. One pass over an index, once per window; `+ 0` keeps the planner from looking
/// for it along the primary key, which would begin at the oldest row there is.
async fn lowest_id(db: &mut PgConnection, span: &Span) -> Result<i64, sqlx::Error> {
    let lowest: Option<i64> =
        sqlx::query_scalar("select min(id + 0) from outbox where xid >= $1::text::xid8 and xid < $2::text::xid8")
            .bind(span.from.to_string())
            .bind(span.to.to_string())
            .fetch_one(db)
            .await?;
    Ok(lowest.unwrap_or(i64::MAX))
}

/// A page of a long window's rows that lie below its range: each straggling transaction's rows come in order from the
/// index, so the page costs the same however many it wrote and however long ago.
async fn stragglers(
    db: &mut PgConnection,
    span: &Span,
    after: i64,
    floor: i64,
    lane: Option<&str>,
) -> Result<Vec<Row>, sqlx::Error> {
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "select found.*
                   from unnest($1::text[]::xid8[]) as straggler (xid)
                  cross join lateral (select ",
                columns!(),
                "
                                        from outbox
                                       where outbox.xid = straggler.xid and id > $2 and id < $3 ",
                $topic,
                "
                                       order by id
                                       limit $4) as found
                  order by id
                  limit $4"
            )
        };
    }
    let sql = if lane.is_some() { sql!("and topic = $5") } else { sql!("") };
    let mut query = sqlx::query(sql).bind(texts(&span.stragglers)).bind(after).bind(floor).bind(PAGE_ROWS);
    if let Some(topic) = lane {
        query = query.bind(topic.to_owned());
    }
    query.fetch_all(db).await?.into_iter().map(Row::new).collect()
}

/// A page of a long window along the primary key. Visibility is asked by function on purpose: no index can answer it, so
/// the primary key, which gives the order, is the only way the planner has.
async fn walk(db: &mut PgConnection, at: &Position, after: i64, lane: Option<&str>) -> Result<Vec<Row>, sqlx::Error> {
    macro_rules! sql {
        ($topic:literal) => {
            concat!(
                "select ",
                columns!(),
                "
                   from outbox
                  where id > $1
                    and pg_visible_in_snapshot(xid, (select $2::text::pg_snapshot))
                    and not pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot)) ",
                $topic,
                "
                  order by id
                  limit $4"
            )
        };
    }
    let sql = if lane.is_some() { sql!("and topic = $5") } else { sql!("") };
    let mut query = sqlx::query(sql).bind(after).bind(at.target.to_string()).bind(at.base.to_string()).bind(PAGE_ROWS);
    if let Some(topic) = lane {
        query = query.bind(topic.to_owned());
    }
    query.fetch_all(db).await?.into_iter().map(Row::new).collect()
}

/// Fetches the payloads that were too large to come with their page.
async fn fetch_payloads(db: &mut PgConnection, rows: &mut [Row]) -> Result<(), sqlx::Error> {
    let ids: Vec<i64> = rows.iter().filter(|row| row.wants_payload()).map(Row::id).collect();
    let payloads: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("select id, payload from outbox where id = any ($1) order by id")
            .bind(ids)
            .fetch_all(db)
            .await?;
    for (id, payload) in payloads {
        // Page rows are in the order of their ids.
        if let Ok(at) = rows.binary_search_by_key(&id, Row::id) {
            rows[at].set_payload(payload);
        }
    }
    Ok(())
}

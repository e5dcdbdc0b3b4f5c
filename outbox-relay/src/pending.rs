//! Rows that are not published yet: how many, and since when.

use crate::{
    position::{Position, ReadError},
    record::{
        batch_log,
        pause::{self, Paused},
    },
    row::within_calendar,
    snapshot::{Span, texts},
};
use sqlx::PgConnection;
use time::OffsetDateTime;

/// Up to this many rows are counted; more are estimated. The counting burdens a database that is behind already.
const COUNTED_MAX: i64 = 100_000;

/// How far behind an outbox is.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Pending {
    pub(crate) rows: i64,
    /// Whether `rows` is a count, not an estimate.
    pub(crate) exact: bool,
    pub(crate) oldest: Option<OffsetDateTime>,
    pub(crate) parked: i64,
    pub(crate) paused: i64,
    /// The number of the batch that was recorded last.
    pub(crate) n: i64,
    /// How many of `rows` wait for the main stream.
    pub(crate) main: i64,
    /// Whether the whole outbox is paused.
    pub(crate) whole: bool,
    /// The waiting rows of each topic that is set apart.
    pub(crate) behind: Vec<Behind>,
}

/// Rows of a topic that is set apart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Behind {
    pub(crate) paused: Paused,
    pub(crate) rows: i64,
}

/// Measures how far behind an outbox is.
pub(crate) async fn of(db: &mut PgConnection, outbox: &str) -> Result<Pending, ReadError> {
    let Some(last) = batch_log::last(db, outbox).await? else { return look(db, outbox, &Position::initial()).await };
    if last.system_identifier == batch_log::system_identifier(db).await? {
        return Ok(Pending { n: last.n, ..look(db, outbox, &last.position).await? });
    }
    // The position is another cluster's, and its transaction ids mean nothing here. But ids of rows go on.
    let (rows, oldest) = behind_id(db, outbox).await?;
    let (parked, paused) = set_aside(db, outbox).await?;
    Ok(Pending { rows, main: rows, n: last.n, oldest, parked, paused, ..Pending::default() })
}

/// Measures an outbox whose position is `at`.
async fn look(db: &mut PgConnection, outbox: &str, at: &Position) -> Result<Pending, ReadError> {
    let mut pending = behind_position(db, at).await?;
    for paused in pause::load(db, outbox).await? {
        pending.whole |= paused.topic == pause::WHOLE;
        if let Some(left) = &paused.position {
            let (rows, oldest, looked_at) = left_behind(db, &paused.topic, left, at).await?;
            pending.rows += rows;
            pending.exact &= looked_at < COUNTED_MAX;
            pending.oldest = [pending.oldest, oldest].into_iter().flatten().min();
            pending.behind.push(Behind { paused, rows });
        }
    }
    let (parked, paused) = set_aside(db, outbox).await?;
    Ok(Pending { parked, paused, ..pending })
}

/// How many rows are parked, and how many topics are paused.
async fn set_aside(db: &mut PgConnection, outbox: &str) -> Result<(i64, i64), sqlx::Error> {
    sqlx::query_as(
        "select (select count(*) from outbox_parked where outbox = $1 and status = 'parked'),
                (select count(*) from outbox_pause where outbox = $1)",
    )
    .bind(outbox)
    .fetch_one(db)
    .await
}

/// Counts rows behind the last published one, by id: all except those that committed late.
async fn behind_id(db: &mut PgConnection, outbox: &str) -> Result<(i64, Option<OffsetDateTime>), sqlx::Error> {
    sqlx::query_as(concat!(
        "select count(*), min(",
        within_calendar!("created_at"),
        ")
           from (select created_at
                   from outbox
                  where id > (select max(to_id)
                                from (select to_id
                                        from outbox_batch
                                       where outbox = $1
                                       order by n desc
                                       limit 1000) as recent)
                  order by id
                  limit $2) as pending",
    ))
    .bind(outbox)
    .bind(COUNTED_MAX)
    .fetch_one(db)
    .await
}

/// Counts rows behind the position: the rest of its window, and what its target does not see. They are found by
/// transaction, as the window itself is. After a straggler, the position's id may lie far below rows that were
/// published long ago.
async fn behind_position(db: &mut PgConnection, at: &Position) -> Result<Pending, ReadError> {
    let span = Span::between(&at.base, &at.target);
    let (rows, oldest): (i64, Option<OffsetDateTime>) = sqlx::query_as(concat!(
        "select count(*), min(",
        within_calendar!("created_at"),
        ")
           from ((select created_at
                    from outbox
                   where xid >= $1::text::xid8 and xid < $4::text::xid8 and xid <> all ($2::text[]::xid8[]) and id > $3
                   order by xid, id
                   limit $6)
                 union all
                 (select found.created_at
                    from unnest($7::text[]::xid8[]) as straggler (xid)
                   cross join lateral (select created_at
                                         from outbox
                                        where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid and id > $3
                                        order by outbox.xid, id
                                        limit $6) as found
                   limit $6)
                 union all
                 (select created_at
                    from outbox
                   where xid >= $4::text::xid8
                   order by xid, id
                   limit $6)
                 union all
                 (select found.created_at
                    from unnest($5::text[]::xid8[]) as straggler (xid)
                   cross join lateral (select created_at
                                         from outbox
                                        where outbox.xid >= straggler.xid and outbox.xid <= straggler.xid
                                        order by outbox.xid, id
                                        limit $6) as found
                   where pg_visible_in_snapshot(straggler.xid, pg_current_snapshot())
                   limit $6)) as pending",
    ))
    .bind(span.from.to_string())
    .bind(texts(&span.running))
    .bind(at.after)
    .bind(span.to.to_string())
    .bind(texts(at.target.running()))
    .bind(COUNTED_MAX)
    .bind(texts(&span.stragglers))
    .fetch_one(&mut *db)
    .await?;
    let exact = rows < COUNTED_MAX;
    let rows = if exact { rows } else { rows.max(ids_behind(db, at.after).await?) };
    Ok(Pending { rows, exact, oldest, main: rows, ..Pending::default() })
}

/// How many ids were given behind `after`, without those that were left out after an overflow.
async fn ids_behind(db: &mut PgConnection, after: i64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select coalesce(sum(greatest(least(to_id, last.id + 1) - greatest(from_id, $1 + 1), 0)), 0)::bigint
                    + coalesce((select max(id) - min(id) + 1 from outbox_overflow where id > $1), 0)
           from outbox_ranges(),
                (select coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass), 0) as id) as last",
    )
    .bind(after)
    .fetch_one(db)
    .await
}

/// Rows of a paused topic that the position has passed and the topic has not. The last value is how many rows of all
/// topics the query read for that.
async fn left_behind(
    db: &mut PgConnection,
    topic: &str,
    left: &Position,
    at: &Position,
) -> Result<(i64, Option<OffsetDateTime>, i64), ReadError> {
    let found = sqlx::query_as(concat!(
        "select count(*) filter (where missed), min(",
        within_calendar!("created_at"),
        ") filter (where missed), count(*)
           from (select created_at,
                        topic = $1
                        and (pg_visible_in_snapshot(xid, $5::text::pg_snapshot)
                             or pg_visible_in_snapshot(xid, $6::text::pg_snapshot) and id <= $7)
                        and not (pg_visible_in_snapshot(xid, $2::text::pg_snapshot)
                                 or pg_visible_in_snapshot(xid, $3::text::pg_snapshot) and id <= $4) as missed
                   from ((select id, xid, topic, created_at
                            from outbox
                           where xid >= $8::text::xid8
                           order by xid, id
                           limit $10)
                         union all
                         (select found.*
                            from unnest($9::text[]::xid8[]) as straggler (xid)
                           cross join lateral (select id, xid, topic, created_at
                                                 from outbox
                                                where outbox.xid >= straggler.xid
                                                  and outbox.xid <= straggler.xid
                                                order by outbox.xid, id
                                                limit $10) as found
                           limit $10)) as candidate) as row",
    ))
    .bind(topic)
    .bind(left.base.to_string())
    .bind(left.target.to_string())
    .bind(left.after)
    .bind(at.base.to_string())
    .bind(at.target.to_string())
    .bind(at.after)
    .bind(left.base.xmax().to_string())
    .bind(texts(left.base.running()))
    .bind(COUNTED_MAX)
    .fetch_one(db)
    .await?;
    Ok(found)
}

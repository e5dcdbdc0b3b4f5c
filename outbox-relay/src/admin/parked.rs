//! Parked rows: list them, discard one, or many.

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use super::{
    audit,
    request::{Failed, Reason, outbox},
    retries::{being_retried, topics},
};
use crate::{Relay, row::within_calendar};
use axum::{Extension, extract::State};
use saga_core::http::{Cursor, Json, Limit, List, Path, Problem, Query, Role};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{Connection as _, FromRow, PgConnection, Row as _, postgres::PgRow};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// Which parked rows are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ParkedQuery {
    /// Only rows of this topic; all topics when left out.
    topic: Option<String>,
    /// Only rows of this key; all keys when left out.
    key: Option<String>,
    /// The most rows of the page.
    limit: Option<Limit>,
    /// `next_cursor` of the page before.
    cursor: Option<Cursor>,
}

/// A parked row. Its payload is not shown.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ParkedView {
    /// The id of the outbox row.
    id: i64,
    /// The message's id: `ce_id`.
    message_id: Uuid,
    topic: String,
    key: Option<String>,
    /// The message's type: `ce_type`.
    #[serde(rename = "type")]
    kind: String,
    /// The size of the payload, in bytes; `null` for a tombstone.
    bytes: Option<i32>,
    /// Why the row is parked, in words.
    reason: String,
    /// The row that this row waits behind now: the first of its topic and key that is parked. `null` when it is that
    /// row.
    blocked_by: Option<i64>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    parked_at: OffsetDateTime,
    /// How often the relay tried the row again.
    attempts: i32,
    /// Whether the row is being tried again.
    retrying: bool,
}

impl FromRow<'_, PgRow> for ParkedView {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            message_id: row.try_get("message_id")?,
            topic: row.try_get("topic")?,
            key: row.try_get("key")?,
            kind: row.try_get("type")?,
            bytes: row.try_get("bytes")?,
            reason: row.try_get("reason")?,
            blocked_by: row.try_get("blocked_by")?,
            created_at: row.try_get("created_at")?,
            parked_at: row.try_get("parked_at")?,
            attempts: row.try_get("attempts")?,
            retrying: row.try_get("retrying")?,
        })
    }
}

/// Parked rows, oldest first.
#[utoipa::path(
    get, path = "/v1/outboxes/{name}/parked", tag = "parked", operation_id = "listParked",
    params(("name" = String, Path, description = "The outbox"), ParkedQuery),
    responses((status = 200, body = List<ParkedView>), (status = 404, body = Problem))
)]
pub(super) async fn list(
    State(relay): State<Relay>,
    Path(name): Path<String>,
    Query(query): Query<ParkedQuery>,
) -> Result<Json<List<ParkedView>>, Failed> {
    let outbox = outbox(&relay, &name)?;
    let after: i64 = query.cursor.as_ref().map_or(Ok(0), Cursor::key)?;
    let limit = query.limit.unwrap_or_default();
    let rows = outbox.admin.ask(async |db| find(db, &name, &query, after, limit).await).await?;
    Ok(Json(List::page(rows, limit, |row| row.id)?))
}

async fn find(
    db: &mut PgConnection,
    outbox: &str,
    query: &ParkedQuery,
    after: i64,
    limit: Limit,
) -> Result<Vec<ParkedView>, sqlx::Error> {
    let topics = match &query.topic {
        Some(topic) => vec![topic.clone()],
        None => topics(db, outbox).await?,
    };
    sqlx::query_as(if query.key.is_some() { FIND_OF_KEY } else { FIND })
        .bind(outbox)
        .bind(after)
        .bind(topics)
        .bind(&query.key)
        .bind(limit.and_one())
        .fetch_all(db)
        .await
}

/// A page of the parked rows of some topics. Each topic yields as many as the page has, by an index, whatever else was
/// ever parked.
macro_rules! find {
    ($which:literal, $order:literal) => {
        concat!(
            // The row that a row was parked behind may have been discarded, or published, since.
            "select found.id, message_id, found.topic, found.key, type, bytes, created_at, parked_at, attempts, retrying,
                    first.id as blocked_by,
                    case when found.blocked_by is null then reason
                         when first.id is null then 'the row that it waited behind is parked no more; it is tried again'
                         else format('row %s of the same topic and key is parked', first.id) end as reason
               from (select found.*
                       from unnest($3::text[]) as wanted (topic)
                      cross join lateral (select id, message_id, topic, key, type, octet_length(payload) as bytes, reason,
                                                 blocked_by, ",
            within_calendar!("created_at"),
            " as created_at, parked_at, attempts, retry_requested_at is not null as retrying
                                            from outbox_parked
                                           where outbox = $1 and topic = wanted.topic and id > $2
                                             and ",
            $which,
            "                              order by ",
            $order,
            "                              limit $5) as found
                      order by found.id
                      limit $5) as found
               left join lateral (select other.id
                                    from outbox_parked as other
                                   where other.outbox = $1 and other.topic = found.topic
                                     and other.status = 'parked' and md5(other.key) = md5(found.key) and other.id < found.id
                                   order by md5(other.key), other.id
                                   limit 1) as first on true
              order by found.id",
        )
    };
}

/// The condition of a row that is not resolved, which is parked; it reads like the index's condition.
const FIND: &str = find!("resolved_at is null and $4::text is null ", "id ");
const FIND_OF_KEY: &str = find!("status = 'parked' and md5(key) = md5($4) ", "md5(key), id ");

/// Why a row is given up.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DiscardRequest {
    reason: Reason,
}

/// What became of the row.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Discarded {
    /// Rows that waited behind the row and are tried now, 10000 of them counted at most. They stay when another row
    /// before them is parked.
    released: i64,
}

/// Give a parked row up: it is never published. When it was the first of its lane, the rows behind it are tried at once.
#[utoipa::path(
    post, path = "/v1/outboxes/{name}/parked/{id}/discard", tag = "parked", operation_id = "discardParked",
    params(("name" = String, Path, description = "The outbox"), ("id" = i64, Path, description = "The row")),
    request_body = DiscardRequest,
    responses((status = 200, body = Discarded), (status = 404, body = Problem), (status = 409, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem))
)]
pub(super) async fn discard(
    State(relay): State<Relay>,
    Extension(role): Extension<Role>,
    Path((name, id)): Path<(String, i64)>,
    Json(request): Json<DiscardRequest>,
) -> Result<Json<Discarded>, Failed> {
    let outbox = outbox(&relay, &name)?;
    let reason = request.reason.check()?;
    outbox
        .admin
        .ask(async |db| {
            let mut tx = db.begin().await?;
            let found: Option<(String, String, Option<String>, bool)> = sqlx::query_as(
                "select status, topic, key, sending_by is not null
                   from outbox_parked
                  where outbox = $1 and id = $2
                    for update nowait",
            )
            .bind(&name)
            .bind(id)
            .fetch_optional(&mut *tx)
            .await
            .map_err(|error| match &error {
                sqlx::Error::Database(database) if database.code().as_deref() == Some("55P03") => {
                    Failed::from(being_retried())
                }
                _ => error.into(),
            })?;
            let Some((status, topic, key, sending)) = found else {
                return Err(Problem::not_found("No such row was ever parked.").into());
            };
            if status != "parked" {
                let problem = Problem::conflict("not-parked", "The row is not parked any more");
                return Err(problem.detail(format!("It is {status}.")).into());
            }
            // Kafka may take the row at any moment, or has: only its answer shows that.
            if sending {
                return Err(being_retried().into());
            }
            sqlx::query(
                "update outbox_parked
                    set status = 'discarded', resolution = $3, resolved_at = clock_timestamp(),
                        retry_requested_at = null
                  where outbox = $1 and id = $2",
            )
            .bind(&name)
            .bind(id)
            .bind(reason)
            .execute(&mut *tx)
            .await?;
            let released = release(&mut tx, &name, id, &topic, key.as_deref()).await?;
            let detail = json!({ "id": id, "topic": topic, "key": key, "released": released });
            audit::write_in(&mut tx, &name, role, "discard-parked", reason, &detail).await?;
            tx.commit().await?;
            Ok(Json(Discarded { released }))
        })
        .await
}

/// Asks the owner to try the rest of the lane, if no row of the lane is parked before `id` any more. The request stands
/// on the lane's first row. It stands on the discarded row as well: when nothing is left, the owner learns from it that
/// the lane is free.
async fn release(
    tx: &mut PgConnection,
    outbox: &str,
    id: i64,
    topic: &str,
    key: Option<&str>,
) -> Result<i64, sqlx::Error> {
    let Some(key) = key else { return Ok(0) };
    let released: i64 = sqlx::query_scalar(
        "with first as (
             select 1
              where not exists (select
                                  from outbox_parked
                                 where outbox = $1 and topic = $3 and md5(key) = md5($4) and status = 'parked'
                                   and id < $2)),
              asked as (
             update outbox_parked
                set retry_requested_at = clock_timestamp()
              where outbox = $1
                and id in (select $2
                           union all
                           (select id
                              from outbox_parked
                             where outbox = $1 and topic = $3 and md5(key) = md5($4) and status = 'parked' and id > $2
                             order by id
                             limit 1))
                and exists (select from first))
         select count(*)
           from (select
                   from outbox_parked
                  where outbox = $1 and topic = $3 and md5(key) = md5($4) and status = 'parked' and id > $2
                    and exists (select from first)
                  order by id
                  limit 10000) as waiting",
    )
    .bind(outbox)
    .bind(id)
    .bind(topic)
    .bind(key)
    .fetch_one(tx)
    .await?;
    Ok(released)
}

/// The most rows that one request discards; the statement's time is limited.
const DISCARDED_AT_ONCE: i64 = 10_000;

/// Which rows are given up, and why.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DiscardManyRequest {
    /// The topic of the rows.
    topic: String,
    /// The key of the rows; the whole topic when left out.
    key: Option<String>,
    reason: Reason,
}

/// What became of the rows.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DiscardedMany {
    /// Rows that are given up, 10000 at most, the earliest of each lane.
    discarded: i64,
    /// Rows that match and are still parked, 10000 of them counted at most. Nothing releases them: repeat the request until
    /// none is left. A row that is being tried again at this moment is one of them.
    left: i64,
}

/// Give up parked rows of a lane (a topic and a key), or of a whole topic: they are never published. In one transaction, many
/// rows at a time; what is left stays parked, in its order.
#[utoipa::path(
    post, path = "/v1/outboxes/{name}/parked/discard", tag = "parked", operation_id = "discardManyParked",
    params(("name" = String, Path, description = "The outbox")),
    request_body = DiscardManyRequest,
    responses((status = 200, body = DiscardedMany), (status = 404, body = Problem), (status = 409, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem))
)]
pub(super) async fn discard_many(
    State(relay): State<Relay>,
    Extension(role): Extension<Role>,
    Path(name): Path<String>,
    Json(request): Json<DiscardManyRequest>,
) -> Result<Json<DiscardedMany>, Failed> {
    let outbox = outbox(&relay, &name)?;
    let reason = request.reason.check()?;
    let DiscardManyRequest { topic, key, .. } = &request;
    outbox
        .admin
        .ask(async |db| {
            let mut tx = db.begin().await?;
            let discarded: i64 = sqlx::query_scalar(DISCARD_MANY)
                .bind(&name)
                .bind(topic)
                .bind(key)
                .bind(reason)
                .bind(DISCARDED_AT_ONCE)
                .fetch_one(&mut *tx)
                .await?;
            let left = count(&mut tx, &name, topic, key.as_deref()).await?;
            match (discarded, left) {
                (0, 0) => return Err(Problem::not_found("No parked row matches.").into()),
                (0, _) => return Err(being_retried().into()),
                _ => {}
            }
            let detail = json!({ "topic": topic, "key": key, "discarded": discarded, "left": left });
            audit::write_in(&mut tx, &name, role, "discard-parked", reason, &detail).await?;
            tx.commit().await?;
            Ok(Json(DiscardedMany { discarded, left }))
        })
        .await
}

/// Where the last row of a lane is discarded, a request stands on it, from which the owner learns that the lane is
/// free. A row that Kafka may take at any moment stays.
const DISCARD_MANY: &str = "
    with free as materialized (
             select id, key
               from outbox_parked
              where outbox = $1 and topic = $2 and status = 'parked' and sending_by is null
                and ($3::text is null or md5(key) = md5($3))
              order by md5(key), id
              limit $5
                for update skip locked),
         last as (
             select max(id) as id
               from free
              where key is not null
              group by key
             having not exists (select
                                  from outbox_parked as behind
                                 where outbox = $1 and topic = $2 and md5(behind.key) = md5(free.key)
                                   and status = 'parked'
                                   and (behind.id > max(free.id) or behind.sending_by is not null))),
         discarded as (
             update outbox_parked as parked
                set status = 'discarded', resolution = $4, resolved_at = clock_timestamp(),
                    retry_requested_at = case when parked.id in (select id from last) then clock_timestamp() end
              where outbox = $1 and parked.id = any (array(select id from free))
             returning parked.id)
    select count(*) from discarded";

async fn count(db: &mut PgConnection, outbox: &str, topic: &str, key: Option<&str>) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select count(*)
           from (select
                   from outbox_parked
                  where outbox = $1 and topic = $2 and status = 'parked' and ($3::text is null or md5(key) = md5($3))
                  order by md5(key), id
                  limit 10000) as parked",
    )
    .bind(outbox)
    .bind(topic)
    .bind(key)
    .fetch_one(db)
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::parking::tests::{touched, with_lanes};

    #[tokio::test]
    async fn what_a_page_of_parked_rows_touches_does_not_depend_on_how_many_there_are() {
        let rows = 10_000;
        let (_database, mut db) = with_lanes(rows).await;
        // Most of the rows are resolved, and each page begins behind them.
        sqlx::query("update outbox_parked set status = 'published', resolved_at = now() where id % $1 <= 9_000")
            .bind(rows)
            .execute(&mut db)
            .await
            .unwrap();
        let query = |topic: Option<&str>, key: Option<&str>| ParkedQuery {
            topic: topic.map(Into::into),
            key: key.map(Into::into),
            limit: None,
            cursor: None,
        };
        let limit = Limit::try_from(10).unwrap();
        for (query, after, expected) in [
            (query(None, None), 0, 9_001..=9_011),
            (query(None, None), 9_995, 9_996..=9_999),
            (query(Some("u"), None), 0, 19_001..=19_011),
            (query(Some("u"), Some("k19500")), 0, 19_500..=19_500),
            (query(None, Some("k19500")), 0, 19_500..=19_500),
        ] {
            let mut tx = db.begin().await.unwrap();
            let before = touched(&mut tx).await;
            let found = find(&mut tx, "orders", &query, after, limit).await.unwrap();
            let ids: Vec<i64> = found.iter().map(|row| row.id).filter(|id| *id < 19_001 || after == 0).collect();
            assert_eq!(ids, expected.collect::<Vec<_>>(), "{query:?}");
            let touched = touched(&mut tx).await - before;
            assert!(touched < 60, "{touched} rows for {query:?}");
        }
    }
}

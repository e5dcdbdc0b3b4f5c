//! Retries of parked lanes, at an operator's request.

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use super::{
    audit,
    request::{Failed, Reason, outbox},
};
use crate::Relay;
use axum::{Extension, extract::State};
use http::StatusCode;
use saga_core::http::{Json, Path, Problem, Role};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use utoipa::ToSchema;

/// The most lanes, and rows without a key, that one request asks for; the statement's time is limited.
const RETRIED_AT_ONCE: i64 = 10_000;

/// Which lanes to try again, and why.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RetryRequest {
    /// Only lanes of this topic; all topics when left out.
    topic: Option<String>,
    /// Only lanes of this key; all keys when left out.
    key: Option<String>,
    reason: Reason,
}

/// What will be tried.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Retrying)]
pub(super) struct RetryCounts {
    /// The number of parked rows in the lanes that will be tried. Of one lane, 10000 are counted at most. Of one topic,
    /// 10000 lanes are asked for at most; then repeat the request.
    rows: i64,
}

/// Try parked lanes (a topic and a key each) again: in order, until one is refused again. Afterwards look at what is
/// still parked.
#[utoipa::path(
    post, path = "/v1/outboxes/{name}/parked/retry", tag = "parked", operation_id = "retryParked",
    params(("name" = String, Path, description = "The outbox")),
    request_body = RetryRequest,
    responses((status = 202, body = RetryCounts), (status = 404, body = Problem), (status = 409, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem))
)]
pub(super) async fn retry(
    State(relay): State<Relay>,
    Extension(role): Extension<Role>,
    Path(name): Path<String>,
    Json(request): Json<RetryRequest>,
) -> Result<(StatusCode, Json<RetryCounts>), Failed> {
    let outbox = outbox(&relay, &name)?;
    let reason = request.reason.check()?;
    outbox
        .admin
        .ask(async |db| {
            let mut tx = db.begin().await?;
            let topics = match &request.topic {
                Some(topic) => vec![topic.clone()],
                None => topics(&mut tx, &name).await?,
            };
            let (mut rows, mut any) = (0, false);
            for topic in &topics {
                let (asked, matching) = ask(&mut tx, &name, topic, request.key.as_deref()).await?;
                rows += asked;
                any |= matching;
            }
            match (rows, any) {
                (0, false) => return Err(Problem::not_found("No parked row matches.").into()),
                (0, true) => return Err(being_retried().into()),
                _ => {}
            }
            let detail = json!({ "topic": request.topic, "key": request.key, "rows": rows });
            audit::write_in(&mut tx, &name, role, "retry-parked", reason, &detail).await?;
            tx.commit().await?;
            Ok((StatusCode::ACCEPTED, Json(RetryCounts { rows })))
        })
        .await
}

/// The answer to a request that the retry of a row keeps from its work.
pub(super) fn being_retried() -> Problem {
    Problem::conflict("being-retried", "The row is being tried again at this moment")
        .detail("Nothing was changed. Look at the parked rows again in a moment.")
}

/// Topics with parked rows, from one to the next by the index.
pub(super) async fn topics(db: &mut PgConnection, outbox: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "with recursive found (topic) as (
                  (select topic
                     from outbox_parked
                    where outbox = $1 and status = 'parked'
                    order by topic
                    limit 1)
                  union all
                  (select next.topic
                     from found
                    cross join lateral (select topic
                                          from outbox_parked as parked
                                         where outbox = $1 and status = 'parked' and parked.topic > found.topic
                                         order by topic
                                         limit 1) as next))
         select topic from found",
    )
    .bind(outbox)
    .fetch_all(db)
    .await
}

/// Asks for the lanes of a topic; returns how many rows are parked in them, and whether there are any at all. The
/// request stands on the first row of a lane, and on each row without a key. A row that is locked is left as it is.
async fn ask(db: &mut PgConnection, outbox: &str, topic: &str, key: Option<&str>) -> Result<(i64, bool), sqlx::Error> {
    let (lanes, any): (i64, bool) =
        sqlx::query_as(ASK_LANES).bind(outbox).bind(topic).bind(key).bind(RETRIED_AT_ONCE).fetch_one(&mut *db).await?;
    if key.is_some() {
        return Ok((lanes, any));
    }
    let (keyless, matching): (i64, bool) =
        sqlx::query_as(ASK_KEYLESS).bind(outbox).bind(topic).bind(RETRIED_AT_ONCE).fetch_one(db).await?;
    Ok((lanes + keyless, any || matching))
}

/// Lanes by their keys' hashes, from one to the next by the index, whatever is parked in them.
const ASK_LANES: &str = "
    with recursive lane (hash) as (
             (select md5(key)
                from outbox_parked
               where outbox = $1 and topic = $2 and status = 'parked' and md5(key) >= coalesce(md5($3), '')
               order by md5(key)
               limit 1)
             union all
             (select next.hash
                from lane
               cross join lateral (select md5(key) as hash
                                     from outbox_parked as parked
                                    where outbox = $1 and topic = $2 and status = 'parked' and md5(key) > lane.hash
                                    order by md5(key)
                                    limit 1) as next
               where $3 is null)),
         matching as materialized (
             select hash from lane where $3 is null or hash = md5($3) limit $4),
         first as materialized (
             select found.id, matching.hash
               from matching
              cross join lateral (select id
                                    from outbox_parked
                                   where outbox = $1 and topic = $2 and md5(key) = matching.hash and status = 'parked'
                                   order by id
                                   limit 1
                                     for update skip locked) as found),
         asked as (
             update outbox_parked
                set retry_requested_at = clock_timestamp()
              where outbox = $1 and id = any (array(select id from first)))
    select coalesce(sum(waiting.rows), 0)::bigint, exists (select from matching)
      from first
     cross join lateral (select count(*) as rows
                           from (select
                                   from outbox_parked
                                  where outbox = $1 and topic = $2 and md5(key) = first.hash and status = 'parked'
                                    and id >= first.id
                                  order by id
                                  limit 10000) as row) as waiting";

/// Rows without a key, each of which is a lane of its own.
const ASK_KEYLESS: &str = "
    with free as materialized (
             select id
               from outbox_parked
              where outbox = $1 and topic = $2 and key is null and status = 'parked' and retry_requested_at is null
              order by id
              limit $3
                for update skip locked),
         asked as (
             update outbox_parked
                set retry_requested_at = clock_timestamp()
              where outbox = $1 and id = any (array(select id from free))
             returning id)
    select (select count(*) from asked),
           exists (select
                     from outbox_parked
                    where outbox = $1 and topic = $2 and md5(key) is null and status = 'parked')";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::parking::tests::{touched, with_lanes};

    #[tokio::test]
    async fn a_request_touches_no_row_that_is_asked_for_already() {
        let (_database, mut db) = with_lanes(20_000).await;
        for left in [10_000, 0] {
            let mut tx = db.begin().await.unwrap();
            let before = touched(&mut tx).await;
            assert_eq!(ask(&mut tx, "orders", "t", None).await.unwrap(), (10_000, true));
            let touched = touched(&mut tx).await - before;
            // Each row is found, locked, and updated.
            assert!(touched < 31_000, "{touched} rows, {left} left");
            tx.commit().await.unwrap();
        }
        assert_eq!(ask(&mut db, "orders", "t", None).await.unwrap(), (0, true));
    }
}

//! The outbox's rows by state. A request reads a bounded stretch of ids, newest first. When that held less than a page,
//! the cursor carries where to go on.

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use super::request::{Failed, outbox};
use crate::{
    Relay,
    position::{Position, ReadError},
    record::batch_log,
    row::within_calendar,
};
use axum::extract::State;
use saga_core::http::{Cursor, Json, Limit, List, Path, Problem, Query};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection, Row as _, postgres::PgRow};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// The rows that one request reads. There is no index on topic, key or type, on purpose.
const ROWS_PER_REQUEST: i64 = 20_000;

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum EventState {
    /// Committed, not published yet.
    Pending,
    /// Acknowledged by Kafka.
    Published,
    /// Refused by Kafka, or behind a row that was.
    Parked,
    /// Parked, and given up by an operator.
    Discarded,
}

impl EventState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Published => "published",
            Self::Parked => "parked",
            Self::Discarded => "discarded",
        }
    }
}

/// Which rows are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// Only rows in this state; all when left out.
    state: Option<EventState>,
    /// Only rows of this topic; all topics when left out.
    topic: Option<String>,
    /// Only rows of this key; all keys when left out.
    key: Option<String>,
    /// Only rows of this `ce_type`; all types when left out.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// The most rows of the page.
    limit: Option<Limit>,
    /// `next_cursor` of the page before.
    cursor: Option<Cursor>,
}

/// A row. Its payload is not shown.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventView {
    /// The id of the row: `ce_sequence`.
    id: i64,
    /// `pending`, `published`, `parked` or `discarded`.
    state: String,
    /// The message's id: `ce_id`.
    message_id: Uuid,
    topic: String,
    key: Option<String>,
    /// The message's type: `ce_type`.
    #[serde(rename = "type")]
    kind: String,
    /// The size of the payload, in bytes; `null` for a tombstone.
    bytes: Option<i32>,
    /// The message's own headers, without those that the relay adds.
    headers: serde_json::Value,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

impl FromRow<'_, PgRow> for EventView {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            state: row.try_get("state")?,
            message_id: row.try_get("message_id")?,
            topic: row.try_get("topic")?,
            key: row.try_get("key")?,
            kind: row.try_get("type")?,
            bytes: row.try_get("bytes")?,
            headers: row.try_get("headers")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// Rows of the outbox, newest first. A page may be short, or empty, and still have a next one.
#[utoipa::path(
    get, path = "/v1/outboxes/{name}/events", tag = "events", operation_id = "listEvents",
    params(("name" = String, Path, description = "The outbox"), EventQuery),
    responses((status = 200, body = List<EventView>), (status = 404, body = Problem))
)]
pub(super) async fn list(
    State(relay): State<Relay>,
    Path(name): Path<String>,
    Query(query): Query<EventQuery>,
) -> Result<Json<List<EventView>>, Failed> {
    let outbox = outbox(&relay, &name)?;
    let before: i64 = query.cursor.as_ref().map_or(Ok(i64::MAX), Cursor::key)?;
    let limit = query.limit.unwrap_or_default();
    let (oldest_looked_at, rows) = outbox.admin.ask(async |db| find(db, &name, &query, before, limit).await).await?;
    let mut page = List::page(rows, limit, |row| row.id)?;
    if let (None, Some(oldest)) = (&page.next_cursor, oldest_looked_at) {
        page.next_cursor = Some(Cursor::after(&oldest)?);
    }
    Ok(Json(page))
}

/// The oldest row that was read, unless all were, and the rows that were found.
async fn find(
    db: &mut PgConnection,
    outbox: &str,
    query: &EventQuery,
    before: i64,
    limit: Limit,
) -> Result<(Option<i64>, Vec<EventView>), ReadError> {
    let last = batch_log::last(db, outbox).await?;
    let at = last.map_or_else(Position::initial, |last| last.position);
    let oldest_looked_at: Option<i64> =
        sqlx::query_scalar("select id from outbox where id < $1 order by id desc offset $2 limit 1")
            .bind(before)
            .bind(ROWS_PER_REQUEST - 1)
            .fetch_optional(&mut *db)
            .await?;
    let rows = sqlx::query_as(FIND)
        .bind(outbox)
        .bind(before)
        .bind(oldest_looked_at.unwrap_or(0))
        .bind(at.base.to_string())
        .bind(at.target.to_string())
        .bind(at.after)
        .bind(query.state.map(EventState::as_str))
        .bind(&query.topic)
        .bind(&query.key)
        .bind(&query.kind)
        .bind(limit.and_one())
        .fetch_all(db)
        .await?;
    Ok((oldest_looked_at, rows))
}

/// A row is published when the position covers it, unless its topic was left behind before it. A row that was parked
/// has a record of its own.
const FIND: &str = concat!(
    "
    select *
      from (select o.id, o.message_id, o.topic, o.key, o.type, octet_length(o.payload) as bytes, o.headers,
                   ",
    within_calendar!("o.created_at"),
    " as created_at,
                   case
                       when parked.status is not null then parked.status
                       when pause.base is not null
                            and not pg_visible_in_snapshot(o.xid, pause.base)
                            and not (pg_visible_in_snapshot(o.xid, pause.target) and o.id <= pause.after_id)
                       then 'pending'
                       when pg_visible_in_snapshot(o.xid, $4::text::pg_snapshot)
                            or pg_visible_in_snapshot(o.xid, $5::text::pg_snapshot) and o.id <= $6
                       then 'published'
                       else 'pending'
                   end as state
              from outbox o
              left join outbox_parked parked on parked.outbox = $1 and parked.id = o.id
              left join outbox_pause pause on pause.outbox = $1 and pause.topic = o.topic
             where o.id < $2 and o.id >= $3
               and ($8::text is null or o.topic = $8)
               and ($9::text is null or o.key = $9)
               and ($10::text is null or o.type = $10)) as event
     where $7::text is null or state = $7
     order by id desc
     limit $11"
);

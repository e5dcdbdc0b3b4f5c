//! Rows that Kafka will never take as they are, and the lines behind them.
//!
//! A line is a topic and a key. While a row of it is parked, every later row of it is parked behind, so that its order
//! holds; all other lines flow on. A parked row is a copy, made in the transaction that moves the position past it:
//! whenever the process dies, a row is either still to come or parked, never neither.

use crate::row::within_calendar;
use sqlx::PgConnection;
use std::collections::HashMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// Lines with parked rows. Nearly always empty.
#[derive(Debug, Default)]
pub(crate) struct Blocked {
    /// Topic to key to the row that later ones wait behind.
    lines: HashMap<String, HashMap<String, i64>>,
}

/// A topic and a key. Rows without a key have no order and block nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Line {
    pub(crate) topic: String,
    pub(crate) key: Option<String>,
}

impl Blocked {
    pub(crate) async fn load(db: &mut PgConnection, outbox: &str) -> Result<Self, sqlx::Error> {
        let parked: Vec<(String, String, i64)> = sqlx::query_as(
            "select topic, key, min(id)
               from outbox_parked
              where outbox = $1 and status = 'parked' and key is not null
              group by topic, key",
        )
        .bind(outbox)
        .fetch_all(db)
        .await?;
        let mut blocked = Self::default();
        for (topic, key, id) in parked {
            blocked.lines.entry(topic).or_default().insert(key, id);
        }
        Ok(blocked)
    }

    /// The row that rows of this line wait behind.
    pub(crate) fn by(&self, topic: &str, key: Option<&str>) -> Option<i64> {
        if self.lines.is_empty() {
            return None;
        }
        self.lines.get(topic)?.get(key?).copied()
    }

    pub(crate) fn block(&mut self, topic: &str, key: Option<&str>, by: i64) {
        let Some(key) = key else { return };
        self.lines.entry(topic.to_owned()).or_default().entry(key.to_owned()).or_insert(by);
    }

    pub(crate) fn free(&mut self, line: &Line) {
        let Some(key) = &line.key else { return };
        if let Some(keys) = self.lines.get_mut(&line.topic) {
            keys.remove(key);
            if keys.is_empty() {
                self.lines.remove(&line.topic);
            }
        }
    }
}

/// A row that is to be parked.
#[derive(Debug, Clone)]
pub(crate) struct Park {
    pub(crate) id: i64,
    pub(crate) reason: String,
    pub(crate) blocked_by: Option<i64>,
}

/// Copies rows to the parked table, in the caller's transaction.
pub(crate) async fn park_in(tx: &mut PgConnection, outbox: &str, rows: &[Park]) -> Result<(), sqlx::Error> {
    let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
    let reasons: Vec<&str> = rows.iter().map(|row| row.reason.as_str()).collect();
    let blocked_by: Vec<Option<i64>> = rows.iter().map(|row| row.blocked_by).collect();
    sqlx::query(
        "insert into outbox_parked
                (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason, blocked_by)
         select $1, o.id, o.message_id, o.topic, o.key, o.type, o.payload, o.headers, o.created_at,
                park.reason, park.blocked_by
           from unnest($2::bigint[], $3::text[], $4::bigint[]) as park (id, reason, blocked_by)
           join outbox o on o.id = park.id
          order by o.id
             on conflict (outbox, id) do nothing",
    )
    .bind(outbox)
    .bind(ids)
    .bind(reasons)
    .bind(blocked_by)
    .execute(tx)
    .await?;
    Ok(())
}

/// Lines that an operator wants tried again, and when he last said so.
pub(crate) async fn requested(
    db: &mut PgConnection,
    outbox: &str,
) -> Result<HashMap<Line, OffsetDateTime>, sqlx::Error> {
    let lines: Vec<(String, Option<String>, OffsetDateTime)> = sqlx::query_as(
        "select topic, key, max(retry_requested_at)
           from outbox_parked
          where outbox = $1 and retry_requested_at is not null
          group by topic, key",
    )
    .bind(outbox)
    .fetch_all(db)
    .await?;
    Ok(lines.into_iter().map(|(topic, key, at)| (Line { topic, key }, at)).collect())
}

/// The next row of a line that is to be tried again, locked against a discard while it is. A row without a key is a
/// line of its own, so only those that were asked for are taken.
pub(crate) async fn next_in(
    tx: &mut PgConnection,
    outbox: &str,
    line: &Line,
) -> Result<Option<crate::row::Row>, sqlx::Error> {
    let found = sqlx::query(concat!(
        "select id, message_id, topic, key, type, payload,
                coalesce(octet_length(payload), -1) as size, nullif(headers, '{}')::text as headers, ",
        within_calendar!("created_at"),
        " as created_at, 0::bigint as bytes, 0 as key_bytes
           from outbox_parked
          where outbox = $1 and topic = $2 and md5(key) is not distinct from md5($3) and status = 'parked'
            and (key is not null or retry_requested_at is not null)
          order by id
          limit 1
            for update",
    ))
    .bind(outbox)
    .bind(&line.topic)
    .bind(&line.key)
    .fetch_optional(tx)
    .await?;
    let Some(found) = found else { return Ok(None) };
    Ok(Some(crate::row::Row::new(found)?))
}

/// The row is published, in the caller's transaction, if `owner` still holds the lease; false means: fenced.
pub(crate) async fn published_in(
    tx: &mut PgConnection,
    outbox: &str,
    owner: Uuid,
    id: i64,
) -> Result<bool, sqlx::Error> {
    let published = sqlx::query(
        "update outbox_parked
            set status = 'published', resolved_at = clock_timestamp(), retry_requested_at = null, attempts = attempts + 1
          where outbox = $1 and id = $2 and status = 'parked'
            and exists (select from outbox_lease where outbox = $1 and owner = $3 for share)",
    )
    .bind(outbox)
    .bind(id)
    .bind(owner)
    .execute(tx)
    .await?;
    Ok(published.rows_affected() == 1)
}

/// The line has been tried, as was asked for at `requested`; a later request stands. A row that failed keeps why.
pub(crate) async fn tried(
    db: &mut PgConnection,
    outbox: &str,
    line: &Line,
    requested: OffsetDateTime,
    failed: Option<(i64, &str)>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_parked
            set retry_requested_at = case when retry_requested_at > $6 then retry_requested_at end,
                attempts           = attempts + case when id = $4 then 1 else 0 end,
                reason             = case when id = $4 then $5 else reason end,
                blocked_by         = case when id = $4 then null else blocked_by end
          where outbox = $1 and topic = $2 and md5(key) is not distinct from md5($3)
            and (retry_requested_at is not null or id = $4)",
    )
    .bind(outbox)
    .bind(&line.topic)
    .bind(&line.key)
    .bind(failed.map(|(id, _)| id))
    .bind(failed.map(|(_, reason)| reason))
    .bind(requested)
    .execute(db)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_blocked_by_its_first_row_until_it_is_freed() {
        let mut blocked = Blocked::default();
        blocked.block("t", Some("k"), 3);
        blocked.block("t", Some("k"), 5);
        blocked.block("t", None, 6);
        assert_eq!(blocked.by("t", Some("k")), Some(3));
        assert_eq!(blocked.by("t", Some("other")), None);
        assert_eq!(blocked.by("t", None), None);
        blocked.free(&Line { topic: "t".into(), key: Some("k".into()) });
        assert_eq!(blocked.by("t", Some("k")), None);
    }
}

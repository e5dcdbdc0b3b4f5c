//! Inspection: lists of sagas, and one saga with its log, read without a lock.

use super::{
    definition::Definition,
    engine::Engine,
    log::LogEntry,
    state::State,
    store,
    view::{Names, Payloads, SagaSummary, SagaView, StoredSaga, view},
};
use crate::id::SagaId;
use serde_json::Value;
use sqlx::{Row as _, postgres::PgRow, types::Json};
use std::sync::Arc;
use time::OffsetDateTime;
use uuid::Uuid;

/// Which sagas a list has. `None` in a field matches every saga.
#[derive(Debug, Clone, Default)]
pub struct SagaFilter {
    /// `running`, `compensating`, `stuck`, `completed` or `compensated`.
    pub status: Option<String>,
    /// The name of the sagas' definition.
    pub definition: Option<String>,
    /// The business key that the saga was started with, for example an order's number.
    pub business_key: Option<String>,
    /// Only sagas behind this one in the list, which are older: its creation time and its id.
    pub after: Option<(OffsetDateTime, Uuid)>,
}

impl Engine {
    /// The newest sagas first, whatever their definition, and whether or not this build can read them; at most `limit`.
    ///
    /// # Errors
    /// When the database returns an error.
    pub async fn list(&self, filter: &SagaFilter, limit: i64) -> Result<Vec<SagaSummary>, sqlx::Error> {
        let unfinished = matches!(filter.status.as_deref(), Some("running" | "compensating" | "stuck"));
        let sql = if unfinished { LIST_UNFINISHED } else { LIST };
        let rows = sqlx::query(sql)
            .bind(&filter.status)
            .bind(&filter.definition)
            .bind(&filter.business_key)
            .bind(filter.after.map(|(at, _)| at))
            .bind(filter.after.map(|(_, id)| id))
            .bind(limit)
            .fetch_all(self.pool())
            .await?;
        rows.iter().map(|row| self.summary(row).map(|(summary, ..)| summary)).collect()
    }

    /// One saga with its timeline.
    ///
    /// # Errors
    /// When the database returns an error.
    pub async fn inspect(&self, id: SagaId, payloads: Payloads) -> Result<Option<SagaView>, sqlx::Error> {
        let Some(row) = sqlx::query(ONE).bind(id.0).fetch_optional(self.pool()).await? else { return Ok(None) };
        let (summary, definition, state) = self.summary(&row)?;
        let log = sqlx::query(
            "select revision, at, entry from saga_event where saga_id = $1 and revision <= $2 order by revision",
        )
        .bind(id.0)
        .bind(summary.revision)
        .try_map(|line: PgRow| {
            let entry = line.try_get::<Json<LogEntry>, _>("entry").map(|Json(entry)| entry);
            Ok((line.try_get("revision")?, line.try_get("at")?, entry.map_err(|error| error.to_string())))
        })
        .fetch_all(self.pool())
        .await?;
        let input = row.try_get::<Json<Value>, _>("input").ok().map(|Json(input)| input);
        let found = StoredSaga { summary, state, input, log, undecided: row.try_get("undecided")? };
        Ok(Some(view(found, definition.as_deref(), payloads)))
    }

    /// What a list shows of a saga, whether or not this build can read its state.
    fn summary(&self, row: &PgRow) -> sqlx::Result<(SagaSummary, Option<Arc<Definition>>, Option<State>)> {
        let (name, version) = (row.try_get::<String, _>("definition")?, row.try_get("version")?);
        let definition = self.find(&name, version, row.try_get("fingerprint")?);
        let state = definition.as_ref().and_then(|_| store::state(row).ok());
        let id = SagaId(row.try_get("saga_id")?);
        let names = Names { definition: definition.as_deref(), state: state.as_ref() };
        let summary = SagaSummary {
            id,
            version,
            definition: name,
            business_key: row.try_get("business_key")?,
            status: row.try_get("status")?,
            revision: row.try_get("revision")?,
            readable: state.is_some(),
            step: names.open_step(),
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
            finished_at: row.try_get("finished_at")?,
        };
        Ok((summary, definition, state))
    }
}

const ONE: &str = "
    select s.saga_id, s.definition, s.version, s.fingerprint, s.business_key, s.status, s.revision, s.state, s.input,
           s.created_at, s.updated_at, s.finished_at,
           (select count(*) from saga_undecided u where u.saga_id = s.saga_id) as undecided
      from saga s
     where s.saga_id = $1";

/// This query reads along the index on the age.
const LIST: &str = "
    select s.saga_id, s.definition, s.version, s.fingerprint, s.business_key, s.status, s.revision, s.state,
           s.created_at, s.updated_at, s.finished_at
      from saga s
     where ($1::text is null or s.status = $1)
       and ($2::text is null or s.definition = $2)
       and ($3::text is null or s.business_key = $3)
       and ($4::timestamptz is null or (s.created_at, s.saga_id) < ($4, $5::uuid))
     order by s.created_at desc, s.saga_id desc
     limit $6";

/// A saga that has not ended is in `saga_due`, which is small: finding three stuck sagas must not mean reading all that
/// ended.
const LIST_UNFINISHED: &str = "
    select s.saga_id, s.definition, s.version, s.fingerprint, s.business_key, s.status, s.revision, s.state,
           s.created_at, s.updated_at, s.finished_at
      from saga_due d
      join saga s on s.saga_id = d.saga_id
     where d.status = $1
       and ($2::text is null or d.definition = $2)
       and ($3::text is null or s.business_key = $3)
       and ($4::timestamptz is null or (s.created_at, s.saga_id) < ($4, $5::uuid))
     order by s.created_at desc, s.saga_id desc
     limit $6";

//! Looking at sagas: lists and one saga with its log, read without a lock.

use super::{
    engine::Engine,
    log::Entry,
    state::State,
    view::{Found, Names, Payloads, SagaSummary, SagaView, view},
};
use crate::id::SagaId;
use serde_json::Value;
use sqlx::{Row as _, postgres::PgRow, types::Json};
use time::OffsetDateTime;
use uuid::Uuid;

/// Which sagas a list has. What is `None` does not matter.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// `running`, `compensating`, `stuck`, `completed` or `compensated`.
    pub status: Option<String>,
    /// The definition's name.
    pub definition: Option<String>,
    /// What it is about.
    pub business_key: Option<String>,
    /// Only those that come after this one in the list (which are older).
    pub after: Option<(OffsetDateTime, Uuid)>,
}

impl Engine {
    /// The newest sagas first, whatever their definition; at most `limit`.
    ///
    /// # Errors
    /// When the database says no.
    pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Vec<SagaSummary>, sqlx::Error> {
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
        rows.iter().map(|row| self.summary(row)).collect()
    }

    /// One saga with its timeline.
    ///
    /// # Errors
    /// When the database says no.
    pub async fn inspect(&self, id: SagaId, payloads: Payloads) -> Result<Option<SagaView>, sqlx::Error> {
        let Some(row) = sqlx::query(ONE).bind(id.0).fetch_optional(self.pool()).await? else { return Ok(None) };
        let summary = self.summary(&row)?;
        let Json(state): Json<State> = row.try_get("state")?;
        let Json(input): Json<Value> = row.try_get("input")?;
        let log: Vec<(i32, OffsetDateTime, Json<Entry>)> = sqlx::query_as(
            "select revision, at, entry from saga_event where saga_id = $1 and revision <= $2 order by revision",
        )
        .bind(id.0)
        .bind(summary.revision)
        .fetch_all(self.pool())
        .await?;
        let log = log.into_iter().map(|(revision, at, Json(entry))| (revision, at, entry)).collect();
        let definition = self.find(&summary.definition, summary.version, row.try_get("fingerprint")?);
        let found = Found { summary, state, input, log, undecided: row.try_get("undecided")? };
        Ok(Some(view(found, definition.as_deref(), payloads)))
    }

    fn summary(&self, row: &PgRow) -> sqlx::Result<SagaSummary> {
        let Json(state): Json<State> = row.try_get("state")?;
        let (name, version) = (row.try_get::<String, _>("definition")?, row.try_get("version")?);
        let definition = self.find(&name, version, row.try_get("fingerprint")?);
        let id = SagaId(row.try_get("saga_id")?);
        Ok(SagaSummary {
            id,
            version,
            definition: name,
            business_key: row.try_get("business_key")?,
            status: row.try_get("status")?,
            revision: row.try_get("revision")?,
            step: Names { saga: id, definition: definition.as_deref() }.open_step(&state),
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
            finished_at: row.try_get("finished_at")?,
        })
    }
}

const ONE: &str = "
    select s.*, (select count(*) from saga_undecided u where u.saga_id = s.saga_id) as undecided
      from saga s
     where s.saga_id = $1";

/// Along the index on the age.
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

/// What has not ended is in `saga_due`, which is small: finding three stuck sagas must not mean reading all that ended.
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

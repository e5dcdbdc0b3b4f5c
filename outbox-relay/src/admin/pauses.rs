//! Pause and resume: the whole outbox, or one topic while the others go on.

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use super::{
    audit,
    request::{Failed, Reason, outbox},
};
use crate::{Relay, record::pause::WHOLE};
use axum::{Extension, extract::State};
use http::StatusCode;
use saga_core::{
    http::{Json, Path, Problem, Role},
    topic::is_legal_name,
};
use serde::Deserialize;
use serde_json::json;
use sqlx::Connection as _;
use utoipa::ToSchema;

/// What to pause or resume, and why.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PauseRequest {
    /// One topic; the whole outbox when left out.
    topic: Option<String>,
    reason: Reason,
}

impl PauseRequest {
    fn topic(&self) -> Result<&str, Problem> {
        match self.topic.as_deref() {
            None => Ok(WHOLE),
            Some(topic) if !is_legal_name(topic) => Err(Problem::field("topic", "is not a topic name")),
            Some(topic) => Ok(topic),
        }
    }
}

/// Stop publishing, of a topic or of everything. Rows go on being appended; nothing is lost or parked.
#[utoipa::path(
    post, path = "/v1/outboxes/{name}/pause", tag = "outboxes", operation_id = "pauseOutbox",
    params(("name" = String, Path, description = "The outbox")),
    request_body = PauseRequest,
    responses((status = 202, description = "The owner stops within a second"), (status = 404, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem))
)]
pub(super) async fn pause(
    State(relay): State<Relay>,
    Extension(role): Extension<Role>,
    Path(name): Path<String>,
    Json(request): Json<PauseRequest>,
) -> Result<StatusCode, Failed> {
    let outbox = outbox(&relay, &name)?;
    let (topic, reason) = (request.topic()?, request.reason.check()?);
    outbox
        .admin
        .ask(async |db| {
            let mut tx = db.begin().await?;
            // A topic that is paused already stays where it was left behind, and now waits for an operator.
            sqlx::query(
                "insert into outbox_pause (outbox, topic, cause, reason, actor)
                 values ($1, $2, 'operator', $3, $4)
                 on conflict (outbox, topic) do update
                    set cause = excluded.cause, reason = excluded.reason, actor = excluded.actor,
                        paused_at = clock_timestamp(), resume_requested_at = null",
            )
            .bind(&name)
            .bind(topic)
            .bind(reason)
            .bind(role.as_str())
            .execute(&mut *tx)
            .await?;
            audit::write_in(&mut tx, &name, role, "pause", reason, &json!({ "topic": request.topic })).await?;
            tx.commit().await?;
            Ok(StatusCode::ACCEPTED)
        })
        .await
}

/// Publish again, from where it stopped.
#[utoipa::path(
    post, path = "/v1/outboxes/{name}/resume", tag = "outboxes", operation_id = "resumeOutbox",
    params(("name" = String, Path, description = "The outbox")),
    request_body = PauseRequest,
    responses((status = 202, description = "The owner goes on within a second"), (status = 404, body = Problem), (status = 409, body = Problem), (status = 422, body = Problem), (status = 503, body = Problem))
)]
pub(super) async fn resume(
    State(relay): State<Relay>,
    Extension(role): Extension<Role>,
    Path(name): Path<String>,
    Json(request): Json<PauseRequest>,
) -> Result<StatusCode, Failed> {
    let outbox = outbox(&relay, &name)?;
    let (topic, reason) = (request.topic()?, request.reason.check()?);
    outbox
        .admin
        .ask(async |db| {
            let mut tx = db.begin().await?;
            // A topic has to catch up first, so only its owner can end the pause; the whole outbox just goes on.
            let sql = if topic == WHOLE {
                "delete from outbox_pause where outbox = $1 and topic = $2"
            } else {
                "update outbox_pause
                    set resume_requested_at = coalesce(resume_requested_at, clock_timestamp())
                  where outbox = $1 and topic = $2"
            };
            if sqlx::query(sql).bind(&name).bind(topic).execute(&mut *tx).await?.rows_affected() == 0 {
                return Err(Problem::conflict("not-paused", "It is not paused").into());
            }
            audit::write_in(&mut tx, &name, role, "resume", reason, &json!({ "topic": request.topic })).await?;
            tx.commit().await?;
            Ok(StatusCode::ACCEPTED)
        })
        .await
}

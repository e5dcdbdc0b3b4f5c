//! Inspection of sagas, to be mounted on the admin listener: lists, one saga with its timeline, and the first verb.
//!
//! | route | what |
//! |---|---|
//! | `GET /v1/sagas` | newest first; `status`, `type`, `business_key`, `limit`, `cursor` |
//! | `GET /v1/sagas/{id}` | one saga: steps, what remains, the way back, why it waits, timeline; `payloads=true` for operators |
//! | `POST /v1/sagas/{id}/retry` | a stuck saga gets a fresh start |

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use super::{
    extract::{Json, Path, Query},
    openapi::complete_by_role,
    paging::{Cursor, Limit, List, TimeKey},
    problem::Problem,
    role::Role,
};
use crate::{
    card::{self, holds_a_card_number},
    id::SagaId,
    saga::{
        Engine, RetryError,
        inspect::SagaFilter,
        view::{Payloads, SagaSummary, SagaView},
    },
};
use axum::{Extension, Router, extract::State};
use http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::{IntoParams, OpenApi as _, ToSchema, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

/// The routes, to be mounted behind the admin listener's roles.
pub fn saga_routes(engine: Arc<Engine>) -> Router {
    documented().with_state(engine).split_for_parts().0
}

/// The routes' description, to be merged into the service's own.
pub fn saga_openapi() -> OpenApi {
    complete_by_role(documented().split_for_parts().1)
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Sagas", description = "What each saga has done, what remains, why it waits, and the repairs"),
    tags((name = "sagas", description = "Sagas and their timelines"))
)]
struct Document;

fn documented() -> OpenApiRouter<Arc<Engine>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(list_sagas))
        .routes(routes!(get_saga))
        .routes(routes!(retry_saga))
}

/// Which sagas are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `running`, `compensating`, `stuck`, `completed` or `compensated`.
    #[param(inline)]
    status: Option<SagaStatus>,
    /// The definition's name.
    #[serde(rename = "type")]
    definition: Option<String>,
    /// What it is about, for example an order's id.
    business_key: Option<String>,
    /// How many at most.
    #[param(inline)]
    limit: Option<Limit>,
    /// From the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// What a saga can be.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum SagaStatus {
    Running,
    Compensating,
    Stuck,
    Completed,
    Compensated,
}

impl SagaStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Compensating => "compensating",
            Self::Stuck => "stuck",
            Self::Completed => "completed",
            Self::Compensated => "compensated",
        }
    }
}

/// Sagas, newest first.
#[utoipa::path(get, path = "/v1/sagas", tag = "sagas", operation_id = "listSagas", params(ListQuery), responses(
    (status = 200, body = List<SagaSummary>),
    (status = "4XX", body = Problem, content_type = "application/problem+json"),
))]
async fn list_sagas(
    State(engine): State<Arc<Engine>>,
    Query(query): Query<ListQuery>,
) -> Result<Json<List<SagaSummary>>, Problem> {
    let limit = query.limit.unwrap_or_default();
    let after = query.cursor.map(|cursor| cursor.key::<(TimeKey, Uuid)>()).transpose()?;
    let filter = SagaFilter {
        status: query.status.map(|status| status.as_str().to_owned()),
        definition: query.definition,
        business_key: query.business_key,
        after: after.map(|(TimeKey(at), id)| (at, id)),
    };
    let sagas = engine.list(&filter, limit.and_one()).await?;
    Ok(Json(List::page(sagas, limit, |saga| (TimeKey(saga.created_at), saga.id.0))?))
}

/// What of a saga is shown.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ViewQuery {
    /// Whether input, replies and rejections are shown; for operators only.
    #[serde(default)]
    payloads: bool,
}

/// One saga: steps, what remains, the way back, why it waits, and its timeline.
#[utoipa::path(get, path = "/v1/sagas/{id}", tag = "sagas", operation_id = "getSaga", params(("id" = Uuid, Path), ViewQuery), responses(
    (status = 200, body = SagaView),
    (status = "4XX", body = Problem, content_type = "application/problem+json"),
))]
async fn get_saga(
    State(engine): State<Arc<Engine>>,
    role: Option<Extension<Role>>,
    Path(id): Path<Uuid>,
    Query(query): Query<ViewQuery>,
) -> Result<Json<SagaView>, Problem> {
    let operator = role.is_some_and(|Extension(role)| role == Role::Operator);
    let payloads = match query.payloads {
        true if !operator => {
            return Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", "An operator's token is needed")
                .detail("Payloads are shown to operators only."));
        }
        true => Payloads::Shown,
        false => Payloads::Redacted,
    };
    show(&engine, id, payloads).await
}

/// Why a stuck saga gets a fresh start.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RetryRequest {
    /// Why the saga is retried: it stands in the saga's log.
    #[schema(min_length = 1, max_length = 500)]
    reason: String,
    /// The revision at which the saga was read; if it is another by now, nothing happens.
    expected_revision: i32,
}

/// Gives a stuck saga a fresh start: its open command is sent again, its open local effect is run again.
#[utoipa::path(post, path = "/v1/sagas/{id}/retry", tag = "sagas", operation_id = "retrySaga", params(("id" = Uuid, Path)),
    request_body = RetryRequest, responses(
    (status = 200, body = SagaView),
    (status = 409, description = "It is not stuck, or not at that revision", body = Problem,
        content_type = "application/problem+json"),
    (status = "4XX", body = Problem, content_type = "application/problem+json"),
))]
async fn retry_saga(
    State(engine): State<Arc<Engine>>,
    role: Option<Extension<Role>>,
    Path(id): Path<Uuid>,
    Json(request): Json<RetryRequest>,
) -> Result<Json<SagaView>, Problem> {
    let reason = request.reason.trim();
    if reason.is_empty() || reason.chars().count() > 500 {
        return Err(Problem::field("reason", "say why, in 1 to 500 characters"));
    }
    if holds_a_card_number(reason) {
        return Err(Problem::field("reason", card::REFUSED));
    }
    let actor = role.map_or("operator", |Extension(role)| role.as_str()).to_owned();
    let (reason, expected) = (reason.to_owned(), request.expected_revision);
    // The retry runs in a task of its own: a client that hangs up must not leave a connection in the middle of a
    // transaction.
    let retried = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.retry(SagaId(id), expected, &reason, &actor).await }
    });
    retried.await.map_err(|error| Problem::internal(&error))?.map_err(refused)?;
    show(&engine, id, Payloads::Redacted).await
}

async fn show(engine: &Engine, id: Uuid, payloads: Payloads) -> Result<Json<SagaView>, Problem> {
    let saga = engine.inspect(SagaId(id), payloads).await?;
    saga.map(Json).ok_or_else(|| Problem::not_found(format!("There is no saga {id}.")))
}

fn refused(error: RetryError) -> Problem {
    let detail = error.to_string();
    match error {
        RetryError::Unknown(_) => Problem::not_found(detail),
        RetryError::Revision { .. } => {
            Problem::conflict("stale", "The saga has changed since it was read").detail(detail)
        }
        RetryError::NotStuck(_) => Problem::conflict("not-stuck", "Only a stuck saga can be retried").detail(detail),
        RetryError::Undefined(..) => {
            Problem::conflict("definition-unknown", "This replica does not know the saga's definition").detail(detail)
        }
        RetryError::Unreadable(..) => {
            Problem::conflict("saga-unreadable", "This replica cannot read the saga").detail(detail)
        }
        RetryError::Database(error) => error.into(),
    }
}

//! The admin endpoints, to be mounted behind the admin listener's roles (a viewer looks, an operator acts).
//!
//! | route | what |
//! |---|---|
//! | `GET /v1/outboxes` | every outbox: owner, position, lag in rows and seconds, what is paused and parked |
//! | `GET /v1/outboxes/{name}/events` | rows by `state`, `topic`, `key`, `type` |
//! | `POST /v1/outboxes/{name}/pause`, `…/resume` | a topic, or everything |
//! | `GET /v1/outboxes/{name}/parked` | parked rows |
//! | `POST /v1/outboxes/{name}/parked/retry` | try their lines again, in order |
//! | `POST /v1/outboxes/{name}/parked/{id}/discard` | give one up |
//! | `POST /v1/outboxes/{name}/parked/discard` | give up a line, or a topic, many rows at a time |
//!
//! Every verb is audited in the transaction that performs it, and the owner, wherever it runs, sees it in the database.

mod audit;
mod events;
mod outboxes;
mod parked;
mod pauses;
mod request;
mod retries;

use crate::{Relay, outbox::Role};
use axum::Router;
use saga_core::service::Health;
use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

/// The routes.
pub fn routes(relay: &Relay) -> Router {
    let (router, document) = documented().with_state(relay.clone()).split_for_parts();
    router.merge(SwaggerUi::new("/docs").url("/openapi.json", document))
}

/// Their description.
pub fn openapi() -> OpenApi {
    documented().split_for_parts().1
}

#[derive(utoipa::OpenApi)]
#[openapi(info(title = "outbox-relay", description = "What the relay publishes, what it could not, and the repairs"))]
struct Document;

fn documented() -> OpenApiRouter<Relay> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(outboxes::list))
        .routes(routes!(events::list))
        .routes(routes!(pauses::pause))
        .routes(routes!(pauses::resume))
        .routes(routes!(parked::list))
        .routes(routes!(retries::retry))
        .routes(routes!(parked::discard))
        .routes(routes!(parked::discard_many))
}

/// Readiness: red while an outbox that this process should publish cannot be published. Standing by is fine.
pub fn check_health(health: &Health, relay: &Relay) {
    let relay = relay.clone();
    health.check("outboxes", move || {
        let relay = relay.clone();
        async move {
            let problems: Vec<String> = relay
                .outboxes()
                .iter()
                .filter_map(|outbox| match outbox.status.all() {
                    (Role::Starting, _) => Some(format!("{}: starting", outbox.name)),
                    (_, Some(problem)) => Some(format!("{}: {problem}", outbox.name)),
                    (_, None) => outbox.leases.clock.check().err().map(|skew| format!("{}: {skew}", outbox.name)),
                })
                .collect();
            if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
        }
    });
}

//! The admin endpoints, to be mounted behind the admin listener's roles (a viewer looks, an operator acts).
//!
//! | route | what |
//! |---|---|
//! | `GET /v1/outboxes` | every outbox: owner, position, lag in rows and seconds, what is paused and parked |
//! | `GET /v1/outboxes/{name}/events` | rows by `state`, `topic`, `key`, `type` |
//! | `POST /v1/outboxes/{name}/pause`, `…/resume` | a topic, or everything |
//! | `GET /v1/outboxes/{name}/parked` | parked rows |
//! | `POST /v1/outboxes/{name}/parked/retry` | try their lanes again, in order |
//! | `POST /v1/outboxes/{name}/parked/{id}/discard` | give one up |
//! | `POST /v1/outboxes/{name}/parked/discard` | give up a lane, or a topic, many rows at a time |
//!
//! Every verb is audited in the transaction that performs it. The outbox's owner, wherever it runs, sees it in the
//! database.

mod audit;
mod events;
mod outboxes;
mod parked;
mod pauses;
mod request;
mod retries;

use crate::{Relay, outbox::Outbox};
use axum::Router;
use saga_core::{
    error_class::is_pool_full,
    http::{Limit, openapi::complete_by_role},
    part::{Cause, HealthIssue, PartReport},
    service::{Health, Needs, missing},
    transaction::Bound,
};
use sqlx::PgConnection;
use std::{sync::Arc, time::Duration};
use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

/// How long one database may take to answer. It must not take as long as health waits for all of them.
const ANSWER_MAX: Duration = Duration::from_millis(1_500);

/// How long requests may have all connections before health reports that the outbox does not answer.
const BUSY_MAX: Duration = Duration::from_secs(30);
/// The tables of an outbox that requests read and write.
const NEEDS: &[Needs] = &[
    Needs { table: "outbox", rights: &["select"] },
    Needs { table: "outbox_batch", rights: &["select"] },
    Needs { table: "outbox_lease", rights: &["select"] },
    Needs { table: "outbox_parked", rights: &["select", "update"] },
    Needs { table: "outbox_pause", rights: &["select", "insert", "update", "delete"] },
    Needs { table: "outbox_audit", rights: &["insert"] },
];

/// The routes, with `/openapi.json` and `/docs`.
pub fn routes(relay: &Relay) -> Router {
    let router = documented().with_state(relay.clone()).split_for_parts().0;
    router.merge(SwaggerUi::new("/docs").url("/openapi.json", openapi()))
}

/// The OpenAPI document of the routes.
pub fn openapi() -> OpenApi {
    complete_by_role(documented().split_for_parts().1)
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "outbox-relay", description = "What the relay publishes, what it could not, and the repairs"),
    // utoipa does not find the types of parameters by itself.
    components(schemas(events::EventState, Limit))
)]
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

/// Adds the checks of health. Callers need the databases, of which one that answers is enough. The relay shows what can
/// be asked, and one that is started while a database is away publishes the others. Each outbox has three parts: its
/// publishing, its tables, its database's clock. The first is red while the outbox should be published and is not;
/// standing by is fine.
pub fn check_health(health: &Health, relay: &Relay) {
    for outbox in relay.outboxes() {
        let part = |name: &str, report: fn(&Outbox) -> PartReport| {
            let outbox = Arc::clone(outbox);
            health.part(format!("{name}:{}", outbox.name), move || std::future::ready(report(&outbox)));
        };
        part("outbox", |outbox| outbox.status.report());
        part("upkeep", |outbox| outbox.status.upkeep());
        part("clock", |outbox| {
            let skew = outbox.leases.clock.check();
            skew.map_err(|skew| HealthIssue::new(Cause::ClockSkew, skew)).into()
        });
    }
    let relay = relay.clone();
    health.callers_need("databases", move || {
        let relay = relay.clone();
        async move {
            let asked = relay.outboxes().iter().map(|outbox| async {
                let seen = async |db: &mut PgConnection| missing(&mut *db, NEEDS).await;
                match tokio::time::timeout(ANSWER_MAX, outbox.admin.ask(seen)).await {
                    // Requests have all connections: the database answers them, unless they wait for something
                    // themselves.
                    Ok(Err(error)) if is_pool_full(&error) && !outbox.admin.is_full_for(BUSY_MAX) => PartReport::fine(),
                    Ok(Err(error)) => HealthIssue::from(&error).into(),
                    Ok(Ok(report)) => report,
                    Err(_) => HealthIssue::from(&Bound::new(ANSWER_MAX).no_answer()).into(),
                }
            });
            let reports: Vec<PartReport> = futures::future::join_all(asked).await;
            reports.into_iter().min_by_key(|report| report.issue.is_some()).unwrap_or_default()
        }
    });
}

//! A payment provider, simulated: a server of its own, with its own database, another company's system to
//! `payment-svc`.
//!
//! Invariant: a request moves money at most once per `Idempotency-Key`, and everything that moved is in its movements.
//! Only an answer is ever lost, late or broken. When the process dies, a request's transaction is committed with its
//! answer, or nothing of it happened.

mod api;
mod config;
mod store;
mod strange;
mod tokens;

pub use config::{Behaviour, IDENTITY, SimArgs, SimSettings};

use crate::migrations;
use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use saga_core::{
    http::{Api, Problem, openapi::complete},
    service::{self, AdminAuth, Health, Needs, NotLetIn, config::Secret, database, migrate, telemetry},
};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

/// What the simulator's handlers share.
#[derive(Clone)]
struct Sim {
    pool: PgPool,
    behaviour: Behaviour,
}

/// The tables that requests read and write, with the rights that they need.
pub const NEEDS: &[Needs] = &[
    Needs { table: "gateway_authorization", rights: &["select", "insert", "update"] },
    Needs { table: "gateway_movement", rights: &["select", "insert"] },
    Needs { table: "gateway_answer", rights: &["select", "insert"] },
    Needs { table: "gateway_arrival", rights: &["select", "insert", "update"] },
];

#[derive(OpenApi)]
#[openapi(info(
    title = "Payment gateway simulator",
    description = "Holds, takes and gives back simulated money. Every POST needs an Idempotency-Key."
))]
struct Document;

/// The simulator's API. A caller shows `token`, where there is one.
pub fn api(pool: PgPool, behaviour: Behaviour, token: Option<&Secret>) -> Api {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(api::authorize, api::of_order))
        .routes(routes!(api::capture))
        .routes(routes!(api::refund))
        .routes(routes!(api::void))
        .routes(routes!(api::void_by_key))
        .routes(routes!(api::request))
        .routes(routes!(api::ledger))
        .split_for_parts();
    let callers = AdminAuth::new(token.map(|token| token.reveal().to_owned()), None);
    let router: Router = router.with_state(Sim { pool, behaviour });
    let router = router.route_layer(middleware::from_fn_with_state(callers, admit));
    Api::new(router.merge(SwaggerUi::new("/docs").url("/openapi.json", complete(document))))
}

async fn admit(State(callers): State<AdminAuth>, request: Request, next: Next) -> Response {
    let Err(why) = callers.admit(&request) else { return next.run(request).await };
    let problem = Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", "A bearer token is needed");
    let problem =
        problem.detail("Send `Authorization: Bearer <token>` with the token in GATEWAY_TOKEN of gateway-sim.");
    // The status is still 401. A caller that shows a wrong token over and over waits after a 401, and counts other
    // answers against its payments.
    let problem = if why == NotLetIn::TooMany { problem.retry_after(1) } else { problem };
    ([(header::WWW_AUTHENTICATE, "Bearer realm=\"gateway-sim\"")], problem).into_response()
}

/// Runs the simulator until it is asked to stop. The admin listener answers from the first moment, red until the
/// database is there.
pub async fn run(settings: SimSettings) -> anyhow::Result<()> {
    let telemetry = telemetry::init(&settings.telemetry, IDENTITY.name)?;
    let token = service::shutdown::token();
    let health = Health::new(&token);
    health.starting("the database");
    let admin = TcpListener::bind(settings.admin.addr).await?;
    let routes = service::admin_router(health.clone(), telemetry.metrics(), settings.admin.auth.clone(), Router::new());
    let routes = Api::new(routes).reached_as(settings.admin.hosts.clone());
    let tasks = vec![
        service::task("admin", service::serve(admin, routes, token.clone())),
        service::task("health", watch(health.clone(), token.clone())),
        service::task("gateway", open(settings, health, token.clone())),
    ];
    Ok(service::run_all(&token, tasks).await?)
}

async fn open(settings: SimSettings, health: Health, token: CancellationToken) -> anyhow::Result<()> {
    let prepared = async {
        migrate::migrate(&settings.database, &[migrations::gateway()]).await?;
        anyhow::Ok(database::connect(&settings.database, IDENTITY.name).await?)
    };
    let Some(pool) = token.run_until_cancelled(prepared).await else { return Ok(()) };
    let pool = pool?;
    health.database(&pool);
    health.tables(&pool, NEEDS);
    let http = TcpListener::bind(settings.http.addr).await?;
    health.look().await;
    health.started();
    tracing::info!(http = %http.local_addr()?, behaviour = ?settings.behaviour, "the gateway simulator is open");
    let api = api(pool, settings.behaviour, settings.token.as_ref()).reached_as(settings.http.hosts);
    service::serve(http, api, token).await?;
    Ok(())
}

async fn watch(health: Health, token: CancellationToken) -> Result<(), std::convert::Infallible> {
    health.watch(token).await;
    Ok(())
}

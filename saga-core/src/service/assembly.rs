//! A service from its parts, the same way for every service.
//!
//! The admin listener answers from the first moment, so that whoever waits for the database or for Kafka can see what
//! is being waited for. Then: migrate, wait for the database, create topics; then the API and the service's own tasks.
//! A process that dies in between has done what the next start will find done.

use super::{
    admin::admin_router,
    config::{ConfigErrors, Identity, ServiceArgs, ServiceCommand, Settings},
    connections::serve,
    database::hear_clock,
    health::Health,
    migrate::{Migrations, migrate},
    shutdown,
    supervisor::{BoxError, Task, exit_code, run_all, task},
    telemetry::{self, TelemetrySettings},
    topics,
};
use crate::{http::Api, topic::Topic};
use axum::Router;
use sqlx::PgPool;
use std::{net::SocketAddr, process::ExitCode};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What a service is made of. Nothing in it runs yet; the pool that its routes and tasks hold is a lazy one
/// ([`super::database::pool`]).
pub struct Parts {
    /// All migrations of its database, in order.
    pub migrations: Vec<Migrations>,
    /// The topics that it makes sure of.
    pub topics: Vec<Topic>,
    /// Its API.
    pub api: Router,
    /// What its admin listener has beside health and metrics, behind the roles.
    pub admin: Router,
    /// Its consumers, timers and other loops; each runs until the token is cancelled.
    pub tasks: Vec<Task>,
}

/// Runs a service until `token` is cancelled or a part of it fails. `health` may have checks of the service's own.
pub async fn run(
    settings: Settings,
    pool: PgPool,
    health: Health,
    token: CancellationToken,
    parts: Parts,
) -> Result<(), BoxError> {
    health.check("startup", || async { Err("waiting for the database and Kafka".to_owned()) });
    let admin = listen("ADMIN_ADDR", settings.admin.addr).await?;
    let routes = admin_router(health.clone(), telemetry::metrics()?, settings.admin.auth.clone(), parts.admin);
    let (api, tasks) = (parts.api, parts.tasks);
    let work = {
        let (health, token) = (health.clone(), token.clone());
        async move {
            let ready = prepare(&settings, &pool, &health, &parts.migrations, &parts.topics);
            let Some(ready) = token.run_until_cancelled(ready).await else { return Ok(()) };
            ready?;
            let listener = listen("HTTP_ADDR", settings.http_addr).await?;
            health.check("startup", || async { Ok(()) });
            tracing::info!(http = %settings.http_addr, admin = %settings.admin.addr, "started");
            let mut all = vec![task("http", serve(listener, Api::new(api), token.clone()))];
            all.extend(tasks);
            run_all(&token, all).await.map_err(BoxError::from)
        }
    };
    let watch = {
        let token = token.clone();
        async move {
            health.watch(token).await;
            Ok::<_, BoxError>(())
        }
    };
    let all = vec![task("admin", serve(admin, routes, token.clone())), task("health", watch), task("service", work)];
    Ok(run_all(&token, all).await?)
}

async fn prepare(
    settings: &Settings,
    pool: &PgPool,
    health: &Health,
    migrations: &[Migrations],
    declared: &[Topic],
) -> Result<(), BoxError> {
    migrate(&settings.database, migrations).await?;
    // Before anything gets a time of its own. If the database is just away, the check asks again.
    hear_clock(pool).await.ok();
    health.database(pool);
    topics::ensure(&settings.kafka, declared).await?;
    health.kafka(&settings.kafka)?;
    Ok(())
}

async fn listen(variable: &'static str, addr: SocketAddr) -> Result<TcpListener, BoxError> {
    TcpListener::bind(addr).await.map_err(|error| format!("{variable}: cannot listen on {addr}: {error}").into())
}

/// All that a service's `main` does once it has parsed its arguments: validate them whole, set telemetry up, then do as
/// it was told. The exit code is 0, 1 after a failure, 2 for a configuration that is wrong.
pub async fn launch<S, F>(
    identity: &Identity,
    command: Option<ServiceCommand>,
    args: &ServiceArgs,
    migrations: impl FnOnce() -> Vec<Migrations>,
    serve: S,
) -> ExitCode
where
    S: FnOnce(Settings, CancellationToken) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    if command.unwrap_or(ServiceCommand::Serve) == ServiceCommand::Migrate {
        return launch_migrate(identity, args, &migrations()).await;
    }
    match args.validate(identity) {
        Ok(settings) => {
            let telemetry = settings.telemetry.clone();
            launch_with(identity, &telemetry, serve(settings, shutdown::token())).await
        }
        Err(mistakes) => mistakes.report(),
    }
}

/// All that a `migrate` does: it brings the database's schema up to date, and needs nothing but the database. The exit code
/// is [`launch`]'s.
pub async fn launch_migrate(identity: &Identity, args: &ServiceArgs, migrations: &[Migrations]) -> ExitCode {
    let mut errors = ConfigErrors::default();
    let (database, telemetry) = (args.database.read(&mut errors), args.telemetry.read(&mut errors));
    match errors.finish(database.zip(telemetry)) {
        Ok((database, telemetry)) => {
            let migrated = async {
                let applied = migrate(&database, migrations).await?;
                tracing::info!(applied, "the schema is up to date");
                Ok(())
            };
            launch_with(identity, &telemetry, migrated).await
        }
        Err(mistakes) => mistakes.report(),
    }
}

/// Sets telemetry up, does `work`, and tells what became of it: the part of a `main` that comes after its arguments.
pub async fn launch_with(
    identity: &Identity,
    telemetry: &TelemetrySettings,
    work: impl Future<Output = anyhow::Result<()>>,
) -> ExitCode {
    match telemetry::init(telemetry, identity.name) {
        Ok(_until_the_end) => exit_code(work.await),
        // Nobody would hear it otherwise.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

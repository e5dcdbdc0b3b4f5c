//! A service from its parts, the same way for every service.
//!
//! The admin listener answers from the first moment and shows what the process waits for. Then the process migrates,
//! which waits for the database. Then it starts the API and the service's own tasks. Beside them come the topics, which
//! wait for Kafka, and then the consumers. So the API serves without Kafka, also in a process that is started
//! meanwhile. A process that dies in between has done what the next start will find done.

use super::{
    admin::admin_router,
    config::{ConfigErrors, Identity, KafkaSettings, ServiceArgs, ServiceCommand, ServiceSettings},
    connections::serve,
    health::{Health, Needs},
    migrate::{Migrations, migrate},
    shutdown,
    supervisor::{BoxError, Task, exit_code, run_all, task},
    telemetry::{self, TelemetrySettings},
    topics,
};
use crate::{
    http::Api,
    part::{Cause, PartReport},
    topic::Topic,
};
use axum::Router;
use sqlx::PgPool;
use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How soon the process asks again for topics that the brokers refused.
const TOPICS_AGAIN: Duration = Duration::from_secs(30);

/// The parts of a service. None of them runs yet; the pool that its routes and tasks hold is a lazy one
/// ([`super::database::pool`]).
pub struct Parts {
    /// All migrations of the service's database, in order.
    pub migrations: Vec<Migrations>,
    /// The topics that the service makes sure of.
    pub topics: Vec<Topic>,
    /// The tables that the service's callers need: while one is not there, no traffic is sent to this process.
    pub needs: &'static [Needs],
    /// The routes of the service's API.
    pub api: Router,
    /// The routes of the admin listener beside health and metrics, behind the roles.
    pub admin: Router,
    /// The service's loops that need no Kafka; each runs until the token is cancelled.
    pub tasks: Vec<Task>,
    /// The service's consumers, which begin when the topics are there.
    pub consumers: Vec<Task>,
}

/// Runs a service until `token` is cancelled or a part of it fails. `health` may have checks of the service's own.
///
/// # Errors
/// A part failed, or ended before it was asked to.
pub async fn run(
    settings: ServiceSettings,
    pool: PgPool,
    health: Health,
    token: CancellationToken,
    parts: Parts,
) -> Result<(), BoxError> {
    health.starting("the database");
    let admin = listen("ADMIN_ADDR", settings.admin.addr).await?;
    let hosts = settings.admin.hosts.clone();
    let routes = admin_router(health.clone(), telemetry::metrics()?, settings.admin.auth.clone(), parts.admin);
    let routes = Api::new(routes).reached_as(hosts);
    let (api, tasks, consumers) = (parts.api, parts.tasks, parts.consumers);
    let work = {
        let (health, token) = (health.clone(), token.clone());
        async move {
            health.kafka(&settings.kafka)?;
            let ready = prepare(&settings, &pool, &health, &parts.migrations, parts.needs);
            let Some(ready) = token.run_until_cancelled(ready).await else { return Ok(()) };
            ready?;
            let listener = listen("HTTP_ADDR", settings.http.addr).await?;
            let consuming = consume(settings.kafka, parts.topics, consumers, &health, token.clone());
            let api = Api::new(api).reached_as(settings.http.hosts);
            let mut all = vec![task("http", serve(listener, api, token.clone())), task("consumers", consuming)];
            all.extend(tasks);
            // The first look at all parts comes before the process says that it has started.
            health.look().await;
            health.started();
            tracing::info!(http = %settings.http.addr, admin = %settings.admin.addr, "started");
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
    settings: &ServiceSettings,
    pool: &PgPool,
    health: &Health,
    migrations: &[Migrations],
    needs: &'static [Needs],
) -> Result<(), BoxError> {
    migrate(&settings.database, migrations).await?;
    // This comes before anything gets a time of its own. If the database is just away, the check asks again.
    crate::clock::hear(pool).await.ok();
    health.database(pool);
    health.tables(pool, needs);
    Ok(())
}

/// Makes sure of the topics, however long Kafka is away, and runs the consumers. Topics that the brokers refuse are red
/// and asked for again, and the consumers read the topics that there are. The part `topics` is there from the call on.
fn consume(
    kafka: KafkaSettings,
    declared: Vec<Topic>,
    consumers: Vec<Task>,
    health: &Health,
    token: CancellationToken,
) -> impl Future<Output = Result<(), BoxError>> + Send + use<> {
    let standing = Arc::new(Mutex::new(PartReport::red(Cause::Starting, "the topics are not made sure of yet")));
    let shared = Arc::clone(&standing);
    let is = move |report: PartReport| *shared.lock().unwrap_or_else(PoisonError::into_inner) = report;
    health.part("topics", move || std::future::ready(standing.lock().unwrap_or_else(PoisonError::into_inner).clone()));
    async move {
        let ensure = || topics::ensure_and_tell(&kafka, &declared, |issue| is(issue.into()));
        let Some(ensured) = token.run_until_cancelled(ensure()).await else { return Ok(()) };
        let again = async {
            let mut refused = ensured.is_err();
            while refused {
                tokio::time::sleep(TOPICS_AGAIN).await;
                refused = ensure().await.is_err();
            }
            is(PartReport::fine());
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = run_consumers(&token, consumers) => ended,
            () = again => Ok(()),
        }
    }
}

async fn run_consumers(token: &CancellationToken, consumers: Vec<Task>) -> Result<(), BoxError> {
    if consumers.is_empty() {
        token.cancelled().await;
        return Ok(());
    }
    Ok(run_all(token, consumers).await?)
}

async fn listen(variable: &'static str, addr: SocketAddr) -> Result<TcpListener, BoxError> {
    TcpListener::bind(addr).await.map_err(|error| format!("{variable}: cannot listen on {addr}: {error}").into())
}

/// Does all that a service's `main` does once it has parsed its arguments: validates them whole, sets telemetry up,
/// then runs the command. The exit code is 0, 1 after a failure, 2 for a configuration that is wrong.
///
/// ```no_run
/// # use saga_core::service::{Identity, Migrations, ServiceArgs, ServiceCommand, ServiceSettings, command_line, launch};
/// # use std::process::ExitCode;
/// # use tokio_util::sync::CancellationToken;
/// # const IDENTITY: Identity = Identity { name: "shop", http_port: 8080, admin_port: 9080 };
/// # fn migrations() -> Vec<Migrations> { vec![saga_core::service::messaging_migrations()] }
/// # async fn serve(_: ServiceSettings, _: CancellationToken) -> anyhow::Result<()> { Ok(()) }
/// #[derive(clap::Parser)]
/// struct Cli {
///     #[command(subcommand)]
///     command: Option<ServiceCommand>,
///     #[command(flatten)]
///     args: ServiceArgs,
/// }
///
/// #[tokio::main]
/// async fn main() -> ExitCode {
///     let Cli { command, args } = command_line();
///     launch(&IDENTITY, command, &args, migrations, serve).await
/// }
/// ```
pub async fn launch<S, F>(
    identity: &Identity,
    command: Option<ServiceCommand>,
    args: &ServiceArgs,
    migrations: impl FnOnce() -> Vec<Migrations>,
    serve: S,
) -> ExitCode
where
    S: FnOnce(ServiceSettings, CancellationToken) -> F,
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

/// Does all that a `migrate` does: it brings the database's schema up to date, and needs nothing but the database. The
/// exit code is [`launch`]'s.
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

/// Sets telemetry up, does `work`, and returns its exit code: the part of a `main` that comes after its arguments.
pub async fn launch_with(
    identity: &Identity,
    telemetry: &TelemetrySettings,
    work: impl Future<Output = anyhow::Result<()>>,
) -> ExitCode {
    match telemetry::init(telemetry, identity.name) {
        Ok(_until_the_end) => exit_code(work.await),
        // Without telemetry, standard error is the only place for this error.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

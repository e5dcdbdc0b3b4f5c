//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.

use anyhow::Context;
use clap::Parser;
use outbox_relay::{
    Relay, admin,
    config::{Cli, Command, Configuration, IDENTITY},
};
use saga_core::service::{
    self, DatabaseSettings, Health, admin_router, exit_code, messaging_migrations,
    migrate::migrate,
    shutdown, task,
    telemetry::{self, TelemetryGuard},
};
use std::process::ExitCode;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let configuration = match cli.args.validate() {
        Ok(configuration) => configuration,
        Err(errors) => return errors.report(),
    };
    let telemetry = match telemetry::init(&configuration.telemetry, IDENTITY.name) {
        Ok(telemetry) => telemetry,
        Err(error) => return exit_code(Err::<(), _>(error)),
    };
    exit_code(match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(configuration, &telemetry).await,
        Command::Migrate => migrate_all(&configuration).await,
    })
}

async fn serve(configuration: Configuration, telemetry: &TelemetryGuard) -> anyhow::Result<()> {
    let stop = shutdown::token();
    let relay = Relay::new(&configuration.relay).context("the Kafka client")?;
    let health = Health::new(&stop);
    admin::check_health(&health, &relay);
    let addr = configuration.admin.addr;
    let listener = TcpListener::bind(addr).await.with_context(|| format!("ADMIN_ADDR {addr}"))?;
    let router = admin_router(health.clone(), telemetry.metrics(), configuration.admin.auth, admin::routes(&relay));
    tracing::info!(%addr, outboxes = relay.outboxes().len(), "the admin listener is open");
    let publishing = {
        let stop = stop.clone();
        async move {
            relay.run(stop).await;
            Ok::<_, std::io::Error>(())
        }
    };
    let watching = health.watch(stop.clone());
    let watching = async move {
        watching.await;
        Ok::<_, std::io::Error>(())
    };
    let tasks = vec![
        task("relay", publishing),
        task("admin", service::serve(listener, saga_core::http::Api::new(router), stop.clone())),
        task("health", watching),
    ];
    Ok(service::run_all(&stop, tasks).await?)
}

async fn migrate_all(configuration: &Configuration) -> anyhow::Result<()> {
    for outbox in &configuration.relay.outboxes {
        let settings = DatabaseSettings { options: outbox.database.clone(), max_connections: 1 };
        let applied =
            migrate(&settings, &[messaging_migrations()]).await.with_context(|| format!("outbox {}", outbox.name))?;
        tracing::info!(outbox = outbox.name, applied, "the messaging tables are up to date");
    }
    Ok(())
}

//! The parts put together: the commands `serve` and `migrate`.

use crate::{
    Relay, admin,
    config::{Command, Configuration, Reanchor},
    moved::{self, Cure},
    settings::OutboxSettings,
};
use anyhow::Context;
use saga_core::{
    http::Api,
    service::{
        self, DatabaseSettings, Health, admin_router, in_clear, messaging_migrations, migrate::migrate, shutdown, task,
        telemetry,
    },
};
use tokio::net::TcpListener;

/// Publishes until a signal stops it or a part of it fails.
///
/// # Errors
/// A listener cannot be opened, librdkafka does not accept the settings, or a part failed.
pub async fn serve(configuration: Configuration) -> anyhow::Result<()> {
    let stop = shutdown::token();
    configuration.relay.outboxes.iter().for_each(|outbox| in_clear::warn_of_database(&outbox.database));
    let relay = Relay::new(&configuration.relay).context("the Kafka client")?;
    let health = Health::new(&stop);
    admin::check_health(&health, &relay);
    let addr = configuration.admin.addr;
    let listener = TcpListener::bind(addr).await.with_context(|| format!("ADMIN_ADDR {addr}"))?;
    let router = admin_router(health.clone(), telemetry::metrics()?, configuration.admin.auth, admin::routes(&relay));
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
        task("admin", service::serve(listener, Api::new(router).reached_as(configuration.admin.hosts), stop.clone())),
        task("health", watching),
    ];
    Ok(service::run_all(&stop, tasks).await?)
}

/// Runs a command that needs nothing but the databases, and returns.
///
/// # Errors
/// The command does not apply to the database as it is, or the database returned an error.
pub async fn run_once(outboxes: Vec<OutboxSettings>, command: Command) -> anyhow::Result<()> {
    let named = |name: &str| {
        let found = outboxes.iter().find(|outbox| outbox.name == name);
        found.with_context(|| format!("OUTBOXES names no outbox {name:?}"))
    };
    match command {
        Command::Serve | Command::Migrate => migrate_all(&outboxes).await,
        Command::Reanchor(Reanchor { outbox, cure }) => {
            in_clear::warn_of_database(&named(&outbox)?.database);
            let cure = if cure.accept { Cure::Accept } else { Cure::Rewrite };
            Ok(moved::reanchor(named(&outbox)?, cure).await?)
        }
        Command::Rename { from, to } => {
            in_clear::warn_of_database(&named(&to)?.database);
            Ok(moved::rename(named(&to)?, &from).await?)
        }
    }
}

/// Brings the messaging tables of every outbox up to date.
async fn migrate_all(outboxes: &[OutboxSettings]) -> anyhow::Result<()> {
    for outbox in outboxes {
        let settings = DatabaseSettings { options: outbox.database.clone(), max_connections: 1 };
        let applied =
            migrate(&settings, &[messaging_migrations()]).await.with_context(|| format!("outbox {}", outbox.name))?;
        tracing::info!(outbox = outbox.name, applied, "the messaging tables are up to date");
    }
    Ok(())
}

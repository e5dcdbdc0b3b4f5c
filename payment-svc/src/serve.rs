//! The service's process: the consumer of commands, the executor of intents, the two listeners.
//!
//! When it dies, nothing is lost: commands that were not committed come again from Kafka, and intents that were open are
//! resolved by whoever claims them next.

use crate::{
    api,
    config::{GatewaySettings, IDENTITY},
    effects,
    gateway::{Guarded, HttpGateway, breaker::BreakerConfig},
    migrations,
};
use axum::Router;
use contracts::topics;
use saga_core::{
    consumer::{Consumer, ConsumerConfig, ConsumerHealth},
    participant::{IntentConfig, Participant},
    service::{self, Health, Settings, database, migrate, telemetry},
    topic::Topic,
};
use sqlx::PgPool;
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What this service reads, and so creates: its commands.
const TOPICS: [Topic; 1] = [topics::PAYMENTS_COMMANDS];

/// Brings the schema up to date.
pub async fn migrate(settings: Settings) -> anyhow::Result<()> {
    let _telemetry = telemetry::init(&settings.telemetry, IDENTITY.name)?;
    let applied = migrate::migrate(&settings.database, &migrations::all()).await?;
    tracing::info!(applied, "the schema is up to date");
    Ok(())
}

/// Runs the service until it is asked to stop.
pub async fn serve(settings: Settings, gateway: GatewaySettings) -> anyhow::Result<()> {
    let telemetry = telemetry::init(&settings.telemetry, IDENTITY.name)?;
    let token = service::shutdown::token();
    let http = TcpListener::bind(settings.http_addr).await?;
    let admin = TcpListener::bind(settings.admin.addr).await?;
    migrate::migrate(&settings.database, &migrations::all()).await?;
    let pool = database::connect(&settings.database, IDENTITY.name).await?;
    service::topics::ensure(&settings.kafka, &TOPICS).await?;
    let participant = Arc::new(participant(&gateway)?);
    let intents = participant.intents(pool.clone()).with_config(limits(&gateway));
    let commands = ConsumerConfig::new(&settings.kafka.brokers, IDENTITY.name, [topics::PAYMENTS_COMMANDS.name]);
    let consumer = Consumer::new(commands, pool.clone(), participant);
    let health = checks(&settings, &pool, consumer.health(), &token)?;
    tracing::info!(http = %http.local_addr()?, admin = %admin.local_addr()?, gateway = gateway.url.host_str(), "open");
    let guarded =
        service::admin_router(health.clone(), telemetry.metrics(), settings.admin.auth.clone(), Router::new());
    service::run_all(
        &token,
        vec![
            service::task("consumer", consumer.run(token.clone())),
            service::task(
                "intents",
                never_fails({
                    let token = token.clone();
                    async move { intents.run(token).await }
                }),
            ),
            service::task("http", service::serve(http, api::api(pool), token.clone())),
            service::task("admin", service::serve(admin, guarded, token.clone())),
            service::task("health", never_fails(health.watch(token.clone()))),
        ],
    )
    .await?;
    Ok(())
}

fn checks(
    settings: &Settings,
    pool: &PgPool,
    consumer: ConsumerHealth,
    token: &CancellationToken,
) -> anyhow::Result<Health> {
    let health = Health::new(token);
    health.database(pool);
    health.kafka(&settings.kafka)?;
    health.check("consumer", move || std::future::ready(consumer.check()));
    Ok(health)
}

async fn never_fails(work: impl Future<Output = ()>) -> Result<(), Infallible> {
    work.await;
    Ok(())
}

/// The participant with its provider behind retries and a breaker.
pub fn participant(gateway: &GatewaySettings) -> anyhow::Result<Participant> {
    let provider = HttpGateway::new(&gateway.url, gateway.timeout)?;
    Ok(effects::participant(IDENTITY.name, Arc::new(Guarded::new(provider, BreakerConfig::default()))))
}

/// A call has the provider's time-out and time for quick retries.
pub fn limits(gateway: &GatewaySettings) -> IntentConfig {
    IntentConfig {
        concurrency: gateway.concurrency,
        call_timeout: gateway.timeout * 2 + Duration::from_secs(1),
        ..IntentConfig::default()
    }
}

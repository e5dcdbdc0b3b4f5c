//! The parts put together, which `serve` runs: the consumer of commands, the executor of intents, the two listeners.
//!
//! When the process dies, nothing is lost. Commands that were not committed come again from Kafka. The process that
//! claims the open intents next resolves them.

use crate::{
    api,
    config::{GatewaySettings, IDENTITY},
    effects,
    gateway::{Guarded, HttpGateway, breaker::BreakerConfig},
    migrations, store,
};
use axum::Router;
use contracts::{OrderId, topics};
use saga_core::{
    consumer::{Consumer, ConsumerConfig},
    participant::{IntentConfig, Participant},
    service::{self, Health, Needs, ParticipantSettings, Parts, ServiceSettings, database, in_clear, task, telemetry},
    topic::Topic,
};
use sqlx::PgPool;
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The topics that this service reads, and so creates: its commands.
const TOPICS: [Topic; 1] = [topics::PAYMENTS_COMMANDS];

/// The tables and the view that requests read; no request writes.
pub const NEEDS: &[Needs] = &[
    Needs { table: "payment", rights: &["select"] },
    Needs { table: "ledger_entry", rights: &["select"] },
    Needs { table: "payment_difference", rights: &["select"] },
    Needs { table: "payment_in_doubt", rights: &["select"] },
];

/// Runs the service until `token` is cancelled or a part of it fails.
pub async fn serve(
    settings: ServiceSettings,
    beside: ParticipantSettings,
    gateway: GatewaySettings,
    token: CancellationToken,
) -> anyhow::Result<()> {
    telemetry::name_sagas(topics::SAGAS);
    in_clear::warn_of_http("GATEWAY_URL", gateway.url.as_str(), "payments, and the token in GATEWAY_TOKEN,");
    let pool = database::pool(&settings.database, IDENTITY.name);
    let health = Health::new(&token);
    let participant = participant(&gateway, &pool)?;
    let participant = participant.replies_to(beside.reply_topics).takes_commands_of(beside.command_sources);
    let participant = Arc::new(participant);
    let intents = participant.intents(pool.clone()).with_config(limits(&gateway));
    let commands = ConsumerConfig::new(&settings.kafka.brokers, IDENTITY.name, [topics::PAYMENTS_COMMANDS.name])
        .with_session_timeout(settings.kafka.session_timeout);
    let consumer = Consumer::new(commands, pool.clone(), participant);
    let commands = consumer.health();
    health.part("commands", move || std::future::ready(commands.report()));
    let effects = intents.clone();
    health.part("effects", move || std::future::ready(effects.report()));
    let payments = pool.clone();
    health.answers("payments", move || {
        let pool = payments.clone();
        async move { store::find(&pool, OrderId(Uuid::nil())).await.map(drop) }
    });
    let executing = {
        let token = token.clone();
        async move {
            intents.run(token).await;
            Ok::<_, Infallible>(())
        }
    };
    let parts = Parts {
        migrations: migrations::all(),
        topics: TOPICS.to_vec(),
        needs: NEEDS,
        api: api::router(pool.clone()),
        admin: Router::new(),
        tasks: vec![task("intents", executing)],
        consumers: vec![task("commands", consumer.run(token.clone()))],
    };
    service::run(settings, pool, health, token, parts).await.map_err(anyhow::Error::from_boxed)
}

/// The participant with its provider behind retries and circuits.
pub fn participant(gateway: &GatewaySettings, pool: &PgPool) -> anyhow::Result<Participant> {
    let mut provider = HttpGateway::new(&gateway.url, gateway.timeout)?;
    if let Some(token) = &gateway.token {
        provider = provider.with_token(token)?;
    }
    let provider = Arc::new(Guarded::new(provider, BreakerConfig::default()));
    Ok(effects::participant(IDENTITY.name, provider, pool.clone()))
}

/// The limits of a call: the provider's time-out, and time for quick retries and for the database's work beside it.
pub fn limits(gateway: &GatewaySettings) -> IntentConfig {
    IntentConfig {
        concurrency: gateway.concurrency,
        call_timeout: gateway.timeout * 2 + Duration::from_secs(3),
        ..IntentConfig::default()
    }
}

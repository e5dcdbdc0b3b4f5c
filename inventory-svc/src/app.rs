//! The parts put together, which `serve` runs: the consumer of commands, the two listeners.
//!
//! When the process dies, nothing is lost: commands that were not committed come again from Kafka.

use crate::{api, commands::Commands, config::IDENTITY, items, migrations};
use axum::Router;
use contracts::topics;
use saga_core::{
    consumer::{Consumer, ConsumerConfig},
    service::{self, Health, Needs, ParticipantSettings, Parts, ServiceSettings, database, task, telemetry},
};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The consumer group of `inventory.commands`, and the name under which the inbox knows it.
pub const GROUP: &str = "inventory-svc";

/// The tables that requests read and write, with the rights that they need.
pub const NEEDS: &[Needs] = &[
    Needs { table: "item", rights: &["select", "insert", "update"] },
    Needs { table: "stock", rights: &["select", "insert", "update"] },
    Needs { table: "stock_movement", rights: &["select", "insert"] },
    // A movement is shown with the order of its reservation.
    Needs { table: "reservation", rights: &["select"] },
    Needs { table: "outbox", rights: &["insert"] },
    Needs { table: "idempotency_answer", rights: &["select", "insert"] },
];

/// Runs the service until `token` is cancelled or a part of it fails.
pub async fn serve(
    settings: ServiceSettings,
    beside: ParticipantSettings,
    token: CancellationToken,
) -> anyhow::Result<()> {
    telemetry::name_sagas(topics::SAGAS);
    let pool = database::pool(&settings.database, IDENTITY.name);
    let health = Health::new(&token);
    let config = ConsumerConfig::new(&settings.kafka.brokers, GROUP, [topics::INVENTORY_COMMANDS.name])
        .with_session_timeout(settings.kafka.session_timeout);
    let commands = Consumer::new(config, pool.clone(), Arc::new(Commands::beside(beside)));
    let reading = commands.health();
    health.part("commands", move || std::future::ready(reading.report()));
    let items = pool.clone();
    health.answers("items", move || {
        let pool = items.clone();
        async move { items::list(&pool, None, 0).await.map(drop) }
    });
    let parts = Parts {
        migrations: migrations::all(),
        topics: vec![topics::INVENTORY_COMMANDS, topics::INVENTORY_ITEMS, topics::ORDERS_REPLIES],
        needs: NEEDS,
        api: api::router(pool.clone()),
        admin: Router::new(),
        tasks: Vec::new(),
        consumers: vec![task("commands", commands.run(token.clone()))],
    };
    service::run(settings, pool, health, token, parts).await.map_err(anyhow::Error::from_boxed)
}

//! The parts put together: what `serve` runs.

use crate::{api, commands::Commands, items};
use axum::Router;
use contracts::topics;
use saga_core::{
    consumer::{Consumer, ConsumerConfig},
    service::{
        self, Health, Identity, Migrations, Needs, ParticipantSettings, Parts, Settings, database,
        messaging_migrations, task, telemetry,
    },
};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The service's name and its default ports.
pub const IDENTITY: Identity = Identity { name: "inventory-svc", http_port: 8082, admin_port: 9082 };

mod embedded {
    #![allow(missing_docs, unreachable_pub)]
    refinery::embed_migrations!("../migrations/inventory");
}

/// Everything this service's database needs, in order.
#[must_use]
pub fn migrations() -> Vec<Migrations> {
    vec![messaging_migrations(), Migrations { owner: "inventory", runner: embedded::migrations::runner() }]
}

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
pub async fn serve(settings: Settings, beside: ParticipantSettings, token: CancellationToken) -> anyhow::Result<()> {
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
        migrations: migrations(),
        topics: vec![topics::INVENTORY_COMMANDS, topics::INVENTORY_ITEMS, topics::ORDERS_REPLIES],
        needs: NEEDS,
        api: api::router(pool.clone()),
        admin: Router::new(),
        tasks: Vec::new(),
        consumers: vec![task("commands", commands.run(token.clone()))],
    };
    service::run(settings, pool, health, token, parts).await.map_err(anyhow::Error::from_boxed)
}

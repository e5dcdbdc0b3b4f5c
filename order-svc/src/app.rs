//! The parts put together.
//!
//! ```text
//!   HTTP ────────────► Orders ──┐
//!   orders.replies ──► engine ──┼─► one transaction: orders, sagas, outbox ──► relay ──► Kafka
//!   timers ──────────► engine ──┘
//!   inventory.items ─► catalogue
//! ```

use crate::{
    api::{ApiState, router},
    catalogue::{self, CatalogueHandler},
    config::IDENTITY,
    live::nudging,
    migrations,
    orders::Orders,
    store,
};
use contracts::{
    OrderId,
    topics::{self, INVENTORY_COMMANDS, INVENTORY_ITEMS, ORDERS_EVENTS, ORDERS_REPLIES, PAYMENTS_COMMANDS},
};
use saga_core::{
    consumer::{Consumer, ConsumerConfig, ConsumerHealth, Handler},
    http::sagas::{saga_openapi, saga_routes},
    service::{self, Health, KafkaSettings, Needs, Parts, ServiceSettings, database, task, telemetry},
    topic::Topic,
};
use sqlx::PgPool;
use std::{convert::Infallible, sync::Arc};
use tokio_util::sync::CancellationToken;
use utoipa_swagger_ui::SwaggerUi;
use uuid::Uuid;

/// The tables that requests read and write, with the rights that they need.
pub const NEEDS: &[Needs] = &[
    Needs { table: "orders", rights: &["select", "insert", "update"] },
    Needs { table: "order_line", rights: &["select", "insert"] },
    Needs { table: "order_status_history", rights: &["select", "insert"] },
    Needs { table: "catalogue", rights: &["select"] },
    Needs { table: "saga", rights: &["select", "insert", "update"] },
    Needs { table: "saga_due", rights: &["select", "insert", "update", "delete"] },
    Needs { table: "saga_event", rights: &["select", "insert"] },
    Needs { table: "outbox", rights: &["insert"] },
    Needs { table: "idempotency_answer", rights: &["select", "insert"] },
];

/// The consumer group that takes the replies to the order saga.
const REPLIES: &str = "order-svc.saga";

/// Runs the service until `token` is cancelled or a part of it fails.
pub async fn serve(
    settings: ServiceSettings,
    reply_sources: Vec<String>,
    token: CancellationToken,
) -> anyhow::Result<()> {
    telemetry::name_sagas(topics::SAGAS);
    let pool = database::pool(&settings.database, IDENTITY.name);
    let health = Health::new(&token);
    let orders = Orders::taking_replies_of(reply_sources, pool.clone())?;
    let kafka = &settings.kafka;
    let replies = nudging(orders.engine.handler(), Arc::clone(&orders.live));
    let replies = consumer(REPLIES, ORDERS_REPLIES, kafka, &pool, replies);
    let items = catalogue::consumer_config(&kafka.brokers).with_session_timeout(kafka.session_timeout);
    let items = Consumer::new(items, pool.clone(), Arc::new(CatalogueHandler));
    let (engine, live) = (Arc::clone(&orders.engine), Arc::clone(&orders.live));
    tell_health(&health, &orders, replies.health(), items.health());
    let (timers, watching) = (token.clone(), token.clone());
    let parts = Parts {
        migrations: migrations::all(),
        topics: vec![PAYMENTS_COMMANDS, INVENTORY_COMMANDS, ORDERS_REPLIES, ORDERS_EVENTS, INVENTORY_ITEMS],
        admin: saga_routes(Arc::clone(&orders.engine))
            .merge(SwaggerUi::new("/docs").url("/openapi.json", saga_openapi())),
        needs: NEEDS,
        api: router(ApiState { orders, shutdown: token.clone() }),
        tasks: vec![
            task("timers", async move { engine.run_timers(timers).await }),
            task("live", async move {
                live.run(watching).await;
                Ok::<_, Infallible>(())
            }),
        ],
        consumers: vec![task("replies", replies.run(token.clone())), task("catalogue", items.run(token.clone()))],
    };
    service::run(settings, pool, health, token, parts).await.map_err(anyhow::Error::from_boxed)
}

/// Adds the checks of health. Callers need to read orders and to price them, as their requests do. Each part's work has
/// to move.
fn tell_health(health: &Health, orders: &Orders, replies: ConsumerHealth, items: ConsumerHealth) {
    let pool = orders.pool.clone();
    health.answers("orders", move || {
        let pool = pool.clone();
        async move {
            // The query finds no order: a row that cannot be read concerns only the request for it.
            store::find(&pool, OrderId(Uuid::nil())).await?;
            catalogue::prices(&pool, &[]).await.map(drop)
        }
    });
    health.part("replies", move || std::future::ready(replies.report()));
    let engine = Arc::clone(&orders.engine);
    health.part("timers", move || std::future::ready(engine.timers_report()));
    let pool = orders.pool.clone();
    health.part("catalogue", move || {
        let (pool, items) = (pool.clone(), items.clone());
        async move { catalogue::report(&pool, &items).await }
    });
}

fn consumer<H: Handler>(group: &str, topic: Topic, kafka: &KafkaSettings, pool: &PgPool, handler: H) -> Consumer<H> {
    let config = ConsumerConfig::new(&kafka.brokers, group, [topic.name]).with_session_timeout(kafka.session_timeout);
    Consumer::new(config, pool.clone(), Arc::new(handler))
}

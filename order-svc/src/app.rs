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
    live::nudging,
    migrations,
    orders::Orders,
};
use contracts::topics::{INVENTORY_COMMANDS, INVENTORY_ITEMS, ORDERS_EVENTS, ORDERS_REPLIES, PAYMENTS_COMMANDS};
use saga_core::{
    consumer::{Consumer, ConsumerConfig, Handler},
    http::sagas::{saga_openapi, saga_routes},
    service::{self, Health, Identity, KafkaSettings, Parts, Settings, database, task},
    topic::Topic,
};
use sqlx::PgPool;
use std::{convert::Infallible, sync::Arc};
use tokio_util::sync::CancellationToken;
use utoipa_swagger_ui::SwaggerUi;

/// Who this is.
pub const IDENTITY: Identity = Identity { name: "order-svc", http_port: 8080, admin_port: 9080 };

/// The group that takes the replies to the order saga.
const REPLIES: &str = "order-svc.saga";

/// Runs the service until `token` is cancelled or a part of it fails.
pub async fn serve(settings: Settings, reply_sources: Vec<String>, token: CancellationToken) -> anyhow::Result<()> {
    let pool = database::pool(&settings.database, IDENTITY.name);
    let health = Health::new(&token);
    let orders = Orders::taking_replies_of(reply_sources, pool.clone())?;
    let kafka = &settings.kafka;
    let replies = nudging(orders.engine.handler(), Arc::clone(&orders.live));
    let replies = consumer(REPLIES, ORDERS_REPLIES, kafka, &pool, replies);
    let items = catalogue::consumer_config(&kafka.brokers).with_session_timeout(kafka.session_timeout);
    let items = Consumer::new(items, pool.clone(), Arc::new(CatalogueHandler));
    for (name, consumer) in [("replies", replies.health()), ("catalogue", items.health())] {
        health.check(name, move || std::future::ready(consumer.check()));
    }
    let (engine, live) = (Arc::clone(&orders.engine), Arc::clone(&orders.live));
    let timed = Arc::clone(&engine);
    health.check("timers", move || std::future::ready(timed.check_timers()));
    let (timers, watching) = (token.clone(), token.clone());
    let parts = Parts {
        migrations: migrations::all(),
        topics: vec![PAYMENTS_COMMANDS, INVENTORY_COMMANDS, ORDERS_REPLIES, ORDERS_EVENTS, INVENTORY_ITEMS],
        admin: saga_routes(Arc::clone(&orders.engine))
            .merge(SwaggerUi::new("/docs").url("/openapi.json", saga_openapi())),
        api: router(ApiState { orders, shutdown: token.clone() }),
        tasks: vec![
            task("replies", replies.run(token.clone())),
            task("catalogue", items.run(token.clone())),
            task("timers", async move { engine.run_timers(timers).await }),
            task("live", async move {
                live.run(watching).await;
                Ok::<_, Infallible>(())
            }),
        ],
    };
    service::run(settings, pool, health, token, parts).await.map_err(anyhow::Error::from_boxed)
}

fn consumer<H: Handler>(group: &str, topic: Topic, kafka: &KafkaSettings, pool: &PgPool, handler: H) -> Consumer<H> {
    let config = ConsumerConfig::new(&kafka.brokers, group, [topic.name]).with_session_timeout(kafka.session_timeout);
    Consumer::new(config, pool.clone(), Arc::new(handler))
}

//! Through a real Kafka: items reach the catalogue, replies move orders, and clients that wait get the changes.

use crate::{
    catalogue::{item, price},
    support::{Shop, id_of, json_of},
};
use order_svc::{catalogue::CatalogueHandler, live::nudging};
use saga_core::{
    command::Outcome,
    consumer::{Consumer, ConsumerConfig, Handler},
    testkit::{Record, TestTopic, brokers, eventually, produce, unique},
};
use serde_json::json;
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

fn consume<H: Handler>(topic: &TestTopic, pool: &PgPool, handler: H, stop: &CancellationToken) -> JoinHandle<()> {
    let config = ConsumerConfig::new(&brokers(), &unique("order-svc"), [topic.name()]);
    let consumer = Consumer::new(config, pool.clone(), Arc::new(handler));
    let stop = stop.clone();
    tokio::spawn(async move { consumer.run(stop).await.unwrap() })
}

#[tokio::test]
async fn items_reach_the_catalogue_and_garbage_between_them_is_dead_lettered() {
    let shop = Shop::open().await;
    let topic = TestTopic::create("inventory-items", 3).await;
    let stop = CancellationToken::new();
    let running = consume(&topic, &shop.db.pool, CatalogueHandler, &stop);
    let garbage = Record { key: Some(b"NEW-1".to_vec()), value: Some(b"garbage".to_vec()), ..Record::default() };
    let mut unknown_version = item("NEW-1", 2, 250);
    unknown_version.envelope.kind = "inventory.item-changed.v2".into();
    let last = Record::from(&item("NEW-1", 3, 300));
    let records = [Record::from(&item("NEW-1", 1, 200)), garbage, Record::from(&unknown_version), last.clone(), last];
    produce(topic.name(), &records).await;
    eventually(PATIENCE, || async {
        // A type that a later build may know is tried again; the test does not wait for that.
        sqlx::query(
            "update inbox_parked set next_attempt_at = clock_timestamp() where next_attempt_at > clock_timestamp()",
        )
        .execute(&shop.db.pool)
        .await
        .unwrap();
        let dead: i64 = sqlx::query_scalar("select count(*) from outbox where topic = $1")
            .bind(topic.dead_letters())
            .fetch_one(&shop.db.pool)
            .await
            .unwrap();
        (price(&shop.db.pool, "NEW-1").await == Some(300) && dead == 2).then_some(())
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_reply_on_the_topic_moves_the_order_and_wakes_whoever_waits() {
    let shop = Shop::open().await;
    let topic = TestTopic::create("orders-replies", 3).await;
    let stop = CancellationToken::new();
    let handler = nudging(shop.orders.engine.handler(), shop.orders.live.clone());
    let running = consume(&topic, &shop.db.pool, handler, &stop);

    let request = shop.post_order("k", &crate::support::basket()).header("Prefer", "wait=30");
    let waiting = tokio::spawn(request.timeout(PATIENCE).send());
    let order = eventually(PATIENCE, || async {
        let page = json_of(shop.get("/v1/orders").await).await;
        page["items"].get(0).map(id_of)
    })
    .await;
    let declined = shop.reply(order, Outcome::Rejected, json!({ "reason": "insufficient_funds" })).await;
    // The reply is published twice, as a relay may; and there is a record that answers no command.
    let record = Record::from(&declined);
    let garbage = Record { key: Some(order.to_string().into_bytes()), value: None, ..Record::default() };
    produce(topic.name(), &[garbage, record.clone(), record]).await;
    let response = waiting.await.unwrap().unwrap();
    assert_eq!(response.status(), 201);
    let view = json_of(response).await;
    assert_eq!((&view["status"], &view["reason"]), (&json!("cancelled"), &json!("payment_declined")));
    stop.cancel();
    running.await.unwrap();
    assert_eq!(shop.history(order).await, ["pending", "cancelled"]);
}

#[tokio::test]
async fn how_far_replies_were_read_is_said_to_those_who_wait_for_them() {
    let shop = Shop::open().await;
    let topic = TestTopic::create("orders-replies", 1).await;
    let stop = CancellationToken::new();
    let handler = nudging(shop.orders.engine.handler(), shop.orders.live.clone());
    let running = consume(&topic, &shop.db.pool, handler, &stop);
    eventually(PATIENCE, || async {
        let said = sqlx::query_scalar("select count(*) from inbox_partition where read_until is not null");
        let said: i64 = said.fetch_one(&shop.db.pool).await.unwrap();
        (said == 1).then_some(())
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

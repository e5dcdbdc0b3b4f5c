//! Parked lines: many rows at once, each row without a key for itself, and nothing published that was discarded.

mod common;

use common::{LEASE, PATIENCE, Running, World, append, call, ids, payloads, published};
use outbox_relay::{Relay, Settings};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::testkit::{brokers, eventually, unique};
use serde_json::json;
use std::time::{Duration, Instant};

const RETRY: &str = "/v1/outboxes/orders/parked/retry";

fn kafka() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap()
}

/// Rows of one line, as if their topic had been too small for them.
async fn park(world: &World, topic: &str, rows: i64) {
    sqlx::query(
        "insert into outbox_parked (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason)
         select 'orders', id, gen_random_uuid(), $1, 'k', 'test.v1', 'x', '{}', now(), 'a test'
           from generate_series(1, $2) as id",
    )
    .bind(topic)
    .bind(rows)
    .execute(world.db())
    .await
    .unwrap();
}

async fn parked(world: &World, rows: i64) {
    eventually(PATIENCE, || async {
        let parked = world.count("select count(*) from outbox_parked where status = 'parked'").await;
        (parked == rows).then_some(())
    })
    .await;
}

#[tokio::test]
async fn parked_rows_without_a_key_are_tried_each_for_itself() {
    let world = World::new().await;
    let topic = unique("limited");
    let limited = NewTopic::new(&topic, 2, TopicReplication::Fixed(1)).set("max.message.bytes", "3000");
    kafka().create_topics([&limited], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    for bytes in [200_000, 5_000, 5_000] {
        sqlx::query("select outbox_append($1, null, 'test.v1', convert_to(repeat('x', $2), 'UTF8'))")
            .bind(&topic)
            .bind(bytes)
            .execute(world.db())
            .await
            .unwrap();
    }
    parked(&world, 3).await;
    let raised = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("max.message.bytes", "100000");
    kafka().alter_configs([&raised], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let (status, asked) = call(&relay, "POST", RETRY, Some(json!({ "reason": "raised" }))).await;
    assert_eq!((status, asked["rows"].as_i64()), (202, Some(3)));
    let mut found = ids(&published(&topic, 2).await);
    found.sort_unstable();
    assert_eq!(found, [2, 3], "in any order: they have none");
    eventually(PATIENCE, || async {
        let asked = world.count("select count(*) from outbox_parked where retry_requested_at is not null").await;
        (asked == 0).then_some(())
    })
    .await;
    parked(&world, 1).await;
    running.stop().await;
}

#[tokio::test]
async fn a_long_line_is_tried_again_many_rows_at_a_time_and_in_order() {
    const ROWS: i64 = 3_000;
    let world = World::new().await;
    park(&world, &world.topic, ROWS).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    let (status, asked) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!((status, asked["rows"].as_i64()), (202, Some(ROWS)));
    let records = world.published(usize::try_from(ROWS).unwrap()).await;
    assert_eq!(ids(&records), (1..=ROWS).collect::<Vec<_>>(), "each once");
    parked(&world, 0).await;
    let transactions = world.count("select count(distinct xmin::text) from outbox_parked").await;
    assert!(transactions <= 60, "{transactions} transactions for {ROWS} rows");
    // The line flows again.
    sqlx::query("select setval('outbox_id_seq', 10000)").execute(world.db()).await.unwrap();
    let free = world.append("k", "free").await;
    assert_eq!(ids(&world.published(usize::try_from(ROWS + 1).unwrap()).await).last(), Some(&free));
    running.stop().await;
}

#[tokio::test]
async fn a_discard_writes_no_more_rows_when_its_line_is_long() {
    let world = World::new().await;
    park(&world, &world.topic, 5_000).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let path = "/v1/outboxes/orders/parked/1/discard";
    let (status, answer) = call(&relay, "POST", path, Some(json!({ "reason": "not needed" }))).await;
    assert_eq!((status, answer["released"].as_i64()), (200, Some(4_999)), "{answer}");
    let asked = world.count("select count(*) from outbox_parked where retry_requested_at is not null").await;
    assert_eq!(asked, 2, "the row itself and the first behind it");
    let _running = Running::of(relay.clone());
    assert_eq!(ids(&world.published(4_999).await), (2..=5_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_was_told_is_discarded_is_never_published() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    let settings = Settings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() };
    let relay = Relay::new(&settings).unwrap();
    let _running = Running::of(relay.clone());
    append(world.db(), "orders.events", "other", "first").await;
    eventually(PATIENCE, || async { (world.count("select count(*) from outbox_batch").await > 0).then_some(()) }).await;
    // The broker takes nothing, for longer than PostgreSQL keeps an idle transaction.
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS; 500]);
    sqlx::query(
        "insert into outbox_parked (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason)
         values ('orders', 77, gen_random_uuid(), 'orders.events', 'k', 'test.v1', 'x', '{}', now(), 'a test')",
    )
    .execute(world.db())
    .await
    .unwrap();
    let (status, _) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!(status, 202);
    eventually(PATIENCE, || async {
        (world.count("select count(*) from outbox_parked where sending_by is not null").await == 1).then_some(())
    })
    .await;
    let path = "/v1/outboxes/orders/parked/77/discard";
    let tried = Instant::now();
    while tried.elapsed() < LEASE * 2 {
        let (status, problem) = call(&relay, "POST", path, Some(json!({ "reason": "not needed" }))).await;
        assert_eq!((status, problem["type"].as_str()), (409, Some("/problems/being-retried")), "{problem}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    eventually(PATIENCE, || async {
        (world.count("select count(*) from outbox_parked where status = 'published'").await == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_topics_limit_may_not_be_read_the_broker_judges() {
    // The mock cluster tells no topic's settings, as brokers do not without a right to it.
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    let _relay = Running::start(&Settings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() });
    append(world.db(), "orders.events", "k", &"x".repeat(1_500_000)).await;
    append(world.db(), "orders.events", "k", "behind").await;
    eventually(PATIENCE, || async {
        let rows = world.count("select coalesce(sum(rows), 0)::bigint from outbox_batch").await;
        (rows == 2).then_some(())
    })
    .await;
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
}

#[tokio::test]
async fn resolved_rows_leave_after_a_while_and_discarded_ones_with_their_row() {
    let world = World::new().await;
    let discarded = world.append("k", "discarded").await;
    park(&world, &world.topic, 3).await;
    sqlx::query(
        "update outbox_parked
            set resolved_at = now() - interval '1 hour', status = case when id = 3 then 'published' else 'discarded' end,
                resolution = case when id < 3 then 'a test' end",
    )
    .execute(world.db())
    .await
    .unwrap();
    let settings = Settings { resolved_kept: Duration::from_secs(60), ..world.settings() };
    let _relay = Running::start(&settings);
    eventually(PATIENCE, || async { (world.count("select count(*) from outbox_parked").await == 1).then_some(()) })
        .await;
    assert_eq!(world.count("select id from outbox_parked").await, discarded, "nothing else tells what became of it");
}

#[tokio::test]
async fn a_large_row_for_a_missing_topic_is_left_behind_and_comes_when_there_is_one() {
    let world = World::new().await;
    let missing = unique("missing");
    let _relay = world.relay();
    append(world.db(), &missing, "k", &"x".repeat(3_000_000)).await;
    append(world.db(), &missing, "k", "small").await;
    world.append("k", "flows").await;
    world.published(1).await;
    let large = NewTopic::new(&missing, 1, TopicReplication::Fixed(1)).set("max.message.bytes", "4000000");
    kafka().create_topics([&large], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let records = published(&missing, 2).await;
    assert_eq!(payloads(&records, "k").iter().map(String::len).collect::<Vec<_>>(), [3_000_000, 5]);
}

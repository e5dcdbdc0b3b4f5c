//! Parked lanes: many rows at once, each row without a key for itself, and nothing published that was discarded.

mod common;

use common::{
    LEASE, PATIENCE, RECORDED, Running, World, append, call, create_with, ids, limit_topic, limited_topic, park,
    payloads, published, published_ids,
};
use outbox_relay::{Relay, RelaySettings};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::testkit::{eventually, size, unique};
use serde_json::json;
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

const RETRY: &str = "/v1/outboxes/orders/parked/retry";
/// The most rows that one request counts of a lane, and the most keyless rows that it takes.
const AT_ONCE: usize = 10_000;

/// The number of rows that are asked for and not tried yet.
const ASKED: &str = "select count(*) from outbox_parked where retry_requested_at is not null";

#[tokio::test]
async fn parked_rows_without_a_key_are_tried_each_for_itself() {
    let world = World::new().await;
    let topic = limited_topic("3000").await;
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
    world.parked(3).await;
    limit_topic(&topic, "100000").await;
    let (status, asked) = call(&relay, "POST", RETRY, Some(json!({ "reason": "raised" }))).await;
    assert_eq!((status, asked["rows"].as_i64()), (202, Some(3)));
    let mut found = ids(&published(&topic, 2).await);
    found.sort_unstable();
    assert_eq!(found, [2, 3], "in any order: they have none");
    world.counts(ASKED, 0).await;
    world.parked(1).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_parked_rows_without_a_key_are_tried_again_request_by_request() {
    let rows = size(12_000, 200_000);
    let world = World::new().await;
    park(&world, &world.topic, rows, 0).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let _running = Running::of(relay.clone());
    // The requests come as fast as an operator can ask: rows that are asked for are tried meanwhile.
    let mut asked = 0;
    while asked < rows {
        let (status, answer) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
        assert_eq!((status, answer["rows"].as_u64()), (202, Some((rows - asked).min(AT_ONCE) as u64)), "{answer}");
        asked += AT_ONCE;
    }
    let found = published_ids(&world.topic, rows).await;
    let distinct: HashSet<i64> = found.iter().copied().collect();
    assert_eq!((found.len(), distinct.len()), (rows, rows), "each once");
    world.counts(ASKED, 0).await;
    world.parked(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_beyond_those_of_one_look_are_tried_as_well() {
    let rows = 2_500;
    let world = World::new().await;
    park(&world, &world.topic, rows, rows).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let _running = Running::of(relay.clone());
    let (status, asked) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!((status, asked["rows"].as_u64()), (202, Some(rows as u64)));
    world.counts(ASKED, 0).await;
    world.parked(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_lane_is_tried_again_many_rows_at_a_time_and_in_order() {
    let rows = size(3_000, 1_000_000);
    let world = World::new().await;
    park(&world, &world.topic, rows, 1).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    let (status, asked) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!((status, asked["rows"].as_u64()), (202, Some(rows.min(AT_ONCE) as u64)));
    let last = i64::try_from(rows).unwrap();
    assert_eq!(published_ids(&world.topic, rows).await, (1..=last).collect::<Vec<_>>(), "each once");
    world.parked(0).await;
    let transactions = world.count("select count(distinct xmin::text) from outbox_parked").await;
    assert!(transactions <= last / 50, "{transactions} transactions for {rows} rows");
    // The lane flows again.
    let free = world.append("k0", "free").await;
    assert_eq!(published_ids(&world.topic, rows + 1).await.last(), Some(&free));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discard_writes_no_more_rows_when_its_lane_is_long() {
    let rows = size(5_000, 1_000_000);
    let world = World::new().await;
    park(&world, &world.topic, rows, 1).await;
    let relay = Relay::new(&world.settings()).unwrap();
    let path = "/v1/outboxes/orders/parked/1/discard";
    let (status, answer) = call(&relay, "POST", path, Some(json!({ "reason": "not needed" }))).await;
    assert_eq!((status, answer["released"].as_u64()), (200, Some((rows - 1).min(AT_ONCE) as u64)), "{answer}");
    assert_eq!(world.count(ASKED).await, 2, "the row itself and the first behind it");
    let _running = Running::of(relay.clone());
    let expected: Vec<i64> = (2..=i64::try_from(rows).unwrap()).collect();
    assert_eq!(published_ids(&world.topic, rows - 1).await, expected);
}

#[tokio::test]
async fn a_lane_is_discarded_in_pieces_and_flows_when_nothing_is_left() {
    let world = World::new().await;
    park(&world, &world.topic, 10_500, 1).await;
    sqlx::query("update outbox_parked set sending_by = gen_random_uuid() where id = 7")
        .execute(world.db())
        .await
        .unwrap();
    let relay = Relay::new(&world.settings()).unwrap();
    let discard = async || {
        let request = json!({ "topic": world.topic.name(), "key": "k0", "reason": "not needed" });
        let (status, answer) = call(&relay, "POST", "/v1/outboxes/orders/parked/discard", Some(request)).await;
        (status, answer["discarded"].as_i64(), answer["left"].as_i64())
    };
    let _running = Running::of(relay.clone());
    assert_eq!(discard().await, (200, Some(10_000), Some(500)));
    assert_eq!(discard().await, (200, Some(499), Some(1)));
    assert_eq!(discard().await, (409, None, None), "it may be on its way");
    sqlx::query("update outbox_parked set sending_by = null").execute(world.db()).await.unwrap();
    assert_eq!(discard().await, (200, Some(1), Some(0)));
    assert_eq!(discard().await, (404, None, None));
    // The lane flows again, and nothing of it was published.
    let free = world.append("k0", "free").await;
    assert_eq!(ids(&world.published(1).await), [free]);
    assert_eq!(world.count("select count(*) from outbox_audit where action = 'discard-parked'").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_was_told_is_discarded_is_never_published() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    let settings = RelaySettings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() };
    let relay = Relay::new(&settings).unwrap();
    let _running = Running::of(relay.clone());
    append(world.db(), "orders.events", "other", "first").await;
    world.counts(RECORDED, 1).await;
    // The broker takes nothing, for longer than PostgreSQL keeps an idle transaction.
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS; 500]);
    park(&world, "orders.events", 1, 1).await;
    let (status, _) = call(&relay, "POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!(status, 202);
    world.counts("select count(*) from outbox_parked where sending_by is not null", 1).await;
    let tried = Instant::now();
    eventually(PATIENCE, || async {
        let path = "/v1/outboxes/orders/parked/1/discard";
        let (status, problem) = call(&relay, "POST", path, Some(json!({ "reason": "not needed" }))).await;
        assert_eq!((status, problem["type"].as_str()), (409, Some("/problems/being-retried")), "{problem}");
        (tried.elapsed() > LEASE * 2).then_some(())
    })
    .await;
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    world.counts("select count(*) from outbox_parked where status = 'published'", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_topics_limit_may_not_be_read_the_broker_judges() {
    // The mock cluster returns no topic's settings, as brokers do not without a right to it.
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    let _relay = Running::start(&RelaySettings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() });
    append(world.db(), "orders.events", "k", &"x".repeat(1_500_000)).await;
    append(world.db(), "orders.events", "k", "behind").await;
    world.counts(RECORDED, 2).await;
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
}

#[tokio::test]
async fn resolved_rows_leave_after_a_while_and_discarded_ones_with_their_row() {
    let world = World::new().await;
    let discarded = world.append("k", "discarded").await;
    park(&world, &world.topic, 3, 1).await;
    sqlx::query(
        "update outbox_parked
            set resolved_at = now() - interval '1 hour', status = case when id = 3 then 'published' else 'discarded' end,
                resolution = case when id < 3 then 'a test' end",
    )
    .execute(world.db())
    .await
    .unwrap();
    let settings = RelaySettings { resolved_kept: Duration::from_secs(60), ..world.settings() };
    let _relay = Running::start(&settings);
    world.counts("select count(*) from outbox_parked", 1).await;
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
    create_with(&missing, 1, "max.message.bytes", "4000000").await;
    let records = published(&missing, 2).await;
    assert_eq!(payloads(&records, "k").iter().map(String::len).collect::<Vec<_>>(), [3_000_000, 5]);
}

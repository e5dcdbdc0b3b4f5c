//! One budget of bytes for all outboxes of a process: nothing exceeds it, and no outbox waits for a neighbour's rows.

mod common;

use common::{PATIENCE, Running, World, append, call, topic_with};
use outbox_relay::{Relay, RelaySettings, budget};
use rdkafka::mocking::MockCluster;
use saga_core::testkit::eventually;
use serde_json::json;
use std::time::Duration;

const BUDGET: usize = budget::least(2);
const LARGE: i32 = 10_000_000;

/// Two outboxes, and a relay of both with the least budget.
async fn two(settings: impl FnOnce(RelaySettings) -> RelaySettings) -> ([World; 2], Relay) {
    let (first, second) = (World::new().await, World { name: "payments".to_owned(), ..World::new().await });
    let mut both = RelaySettings { lease: Duration::from_secs(20), held: BUDGET, ..first.settings() };
    both.outboxes.extend(second.settings().outboxes);
    ([first, second], Relay::new(&settings(both)).unwrap())
}

/// Appends rows of so many bytes.
async fn append_large(world: &World, topic: &str, rows: usize, bytes: i32) {
    for _ in 0..rows {
        sqlx::query("select outbox_append($1, 'k', 'test.v1', convert_to(repeat('x', $2), 'UTF8'))")
            .bind(topic)
            .bind(bytes)
            .execute(world.db())
            .await
            .unwrap();
    }
}

/// Waits until the main stream has published so many rows and no topic is set apart.
async fn all_published(world: &World, rows: i64) {
    eventually(PATIENCE, || async {
        let recorded = world.count("select coalesce(sum(rows), 0)::bigint from outbox_batch").await;
        let apart = world.count("select count(*) from outbox_pause").await;
        (recorded >= rows && apart == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_of_several_outboxes_stay_within_one_budget() {
    let (worlds, relay) = two(|settings| settings).await;
    let large = topic_with(1, "max.message.bytes", "30000000").await;
    for world in &worlds {
        let pause = json!({ "topic": world.topic.name(), "reason": "maintenance" });
        let path = |verb: &str| format!("/v1/outboxes/{}/{verb}", world.name);
        assert_eq!(call(&relay, "POST", &path("pause"), Some(pause)).await.0, 202);
        append_large(world, &world.topic, 150, 400_000).await;
        append_large(world, &large, 5, LARGE).await;
    }
    let running = Running::of(relay.clone());
    for world in &worlds {
        let left = "select count(*) from outbox_pause where base is not null";
        eventually(PATIENCE, || async { (world.count(left).await == 1).then_some(()) }).await;
        append_large(world, &large, 5, LARGE).await;
        let resume = json!({ "topic": world.topic.name(), "reason": "go on" });
        let path = format!("/v1/outboxes/{}/resume", world.name);
        assert_eq!(call(&relay, "POST", &path, Some(resume)).await.0, 202);
    }
    for world in &worlds {
        all_published(world, 160).await;
        assert_eq!(common::published(&world.topic, 150).await.len(), 150, "each once");
        assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
    }
    let (_, most) = relay.held();
    assert!((usize::try_from(LARGE).unwrap()..=BUDGET).contains(&most), "{most} of {BUDGET}");
    running.stop().await;
    eventually(PATIENCE, || async { (relay.held().0 == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_whose_rows_no_broker_takes_leaves_the_others_their_room() {
    let cluster = MockCluster::new(2).unwrap();
    for (topic, leader) in [("stuck", 1), ("flows", 2)] {
        cluster.create_topic(topic, 1, 1).unwrap();
        cluster.partition_leader(topic, 0, Some(leader)).unwrap();
    }
    let hour = Duration::from_secs(3_600);
    let kafka_brokers = cluster.bootstrap_servers();
    let ([stuck, flows], relay) = two(|settings| RelaySettings { kafka_brokers, stuck_after: hour, ..settings }).await;
    append(stuck.db(), "stuck", "k", "0").await;
    let _running = Running::of(relay.clone());
    all_published(&stuck, 1).await;
    cluster.broker_down(1).unwrap();
    append_large(&stuck, "stuck", 200, 500_000).await;
    // The relay holds all that it can.
    eventually(PATIENCE, || async { (relay.held().0 > 2 << 20).then_some(()) }).await;
    append_large(&flows, "flows", 200, 500_000).await;
    all_published(&flows, 200).await;
    let (_, most) = relay.held();
    assert!(most <= BUDGET, "{most} of {BUDGET}");
    cluster.broker_up(1).unwrap();
    all_published(&stuck, 201).await;
}

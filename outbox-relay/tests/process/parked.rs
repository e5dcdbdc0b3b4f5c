//! The binary, killed while it tries parked lanes again.

use crate::{
    Process,
    common::{PATIENCE, World, park, published_ids},
};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::testkit::{count_to_end, eventually, size};
use serde_json::json;
use sqlx::Connection as _;
use std::collections::{BTreeSet, HashMap};

const RETRY: &str = "/v1/outboxes/orders/parked/retry";

/// Asks for a retry of all parked rows.
async fn retry(world: &World) {
    let (status, problem) = world.call("POST", RETRY, Some(json!({ "reason": "try" }))).await;
    assert_eq!(status, 202, "{problem}");
}

/// Discards these rows; returns those that were discarded, by the answers to the operator.
async fn discard(world: &World, rows: impl IntoIterator<Item = i64>) -> BTreeSet<i64> {
    let mut discarded = BTreeSet::new();
    for id in rows {
        let path = format!("/v1/outboxes/orders/parked/{id}/discard");
        let (status, problem) = world.call("POST", &path, Some(json!({ "reason": "not needed" }))).await;
        assert!(matches!(status, 200 | 409), "{status}: {problem}");
        if status == 200 {
            discarded.insert(id);
        }
    }
    discarded
}

/// Of rows 1 to `rows`, which were parked in `lanes` lanes, those are published that were not discarded, and no others.
/// First occurrences are in order along each lane.
async fn audit_parked(world: &World, topic: &str, rows: i64, lanes: i64, discarded: &BTreeSet<i64>) {
    let expected: BTreeSet<i64> = (1..=rows).filter(|id| !discarded.contains(id)).collect();
    world.parked(0).await;
    let found = published_ids(topic, expected.len()).await;
    let mut seen = BTreeSet::new();
    let mut last: HashMap<i64, i64> = HashMap::new();
    for id in found {
        if seen.insert(id) {
            let before = last.insert(id % lanes, id).unwrap_or(0);
            assert!(before < id, "{id} came after {before}");
        }
    }
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_while_lanes_are_tried_it_loses_and_inverts_nothing() {
    const LINES: usize = 20;
    const PUBLISHED: &str = "select count(*) from outbox_parked where status = 'published'";
    let parked = size(60_000, 200_000);
    let rows = i64::try_from(parked).unwrap();
    let world = World::new().await;
    park(&world, &world.topic, parked, LINES).await;
    retry(&world).await;
    let mut discarded = BTreeSet::new();
    for kill in 0..6 {
        let before = world.count(PUBLISHED).await;
        let process = Process::start(&world);
        eventually(PATIENCE, || async { (world.count(PUBLISHED).await > before).then_some(()) }).await;
        // Some rows are tried about now, and some are not for long.
        let (soon, late) = (before + 1_000..before + 1_020, (1..10).map(|n| rows - kill * 7 - n * 1_001));
        let killed = async {
            eventually(PATIENCE, || async { (world.count(PUBLISHED).await > before + 1_000).then_some(()) }).await;
            drop(process);
        };
        let (now, ()) = tokio::join!(discard(&world, soon.chain(late)), killed);
        discarded.extend(now);
        discarded.extend(discard(&world, before + 2_000..before + 2_010).await);
    }
    assert!(world.count(PUBLISHED).await < rows - 1_000, "the last kill came when all was done");
    assert!(discarded.len() > 50, "{} rows were discarded", discarded.len());
    let _last = Process::start(&world);
    audit_parked(&world, &world.topic, rows, 20, &discarded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_had_claimed_when_it_died_is_sent_by_the_next() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    park(&world, "orders.events", 10, 2).await;
    // The claimed rows reach no broker.
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS; 10_000]);
    let brokers = cluster.bootstrap_servers();
    let process = Process::start_with(&world, &[("KAFKA_BROKERS", &brokers)]);
    retry(&world).await;
    let claimed = "select count(*) from outbox_parked where sending_by is not null";
    world.counts(claimed, 10).await;
    drop(process);
    assert_eq!(world.count(claimed).await, 10);
    // It is not known what the dead relay did with the rows.
    assert!(discard(&world, [1, 9]).await.is_empty());
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    let _process = Process::start_with(&world, &[("KAFKA_BROKERS", &brokers)]);
    world.parked(0).await;
    world.counts("select count(*) from outbox_parked where status = 'published' and sending_by is null", 10).await;
}

/// Takes a lock that each statement waits for that records a parked row as published.
async fn lock_recording(world: &World) -> sqlx::PgConnection {
    let mut db = sqlx::PgConnection::connect(&world.database.url).await.unwrap();
    sqlx::raw_sql(
        "create function waits() returns trigger language plpgsql as $$
         begin
             perform pg_advisory_xact_lock(1);
             return new;
         end $$;
         create trigger waits before update on outbox_parked
            for each row when (new.status = 'published') execute function waits();
         select pg_advisory_lock(1)",
    )
    .execute(&mut db)
    .await
    .unwrap();
    db
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_had_sent_but_not_recorded_when_it_died_is_sent_again() {
    let world = World::with_partitions(1).await;
    park(&world, &world.topic, 10, 2).await;
    let lock = lock_recording(&world).await;
    let process = Process::start(&world);
    retry(&world).await;
    eventually(PATIENCE, || async { (count_to_end(&world.topic).await == 10).then_some(()) }).await;
    let waits = "select count(*) from pg_stat_activity
                  where datname = current_database() and application_name = 'outbox-relay' and wait_event = 'advisory'";
    world.counts(waits, 1).await;
    drop(process);
    // The session ends before its server process, which does not notice the kill, gets the lock and goes on.
    let relays = "select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
                   where datname = current_database() and application_name = 'outbox-relay'";
    assert!(world.count(relays).await > 0);
    lock.close().await.unwrap();
    world.parked(10).await;
    assert!(discard(&world, [1, 9]).await.is_empty(), "they are published");
    let _process = Process::start(&world);
    audit_parked(&world, &world.topic, 10, 2, &BTreeSet::new()).await;
    assert_eq!(count_to_end(&world.topic).await, 20, "each was sent again");
}

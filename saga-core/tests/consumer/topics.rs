//! Topics that are gone, made again, or without a leader: health names the cause, and their records are read.

use crate::support::{Fixture, Running, SOON, event, events};
use rdkafka::mocking::MockCluster;
use saga_core::{
    consumer::ConsumerHealth,
    part::Cause,
    testkit::{Log, create_topic, delete_topic, eventually, unique},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

async fn until(health: &ConsumerHealth, cause: Option<Cause>) {
    eventually(SOON, || async {
        let issue = health.report().issue;
        (issue.map(|issue| issue.cause) == cause).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_made_again_with_more_records_is_read_from_its_begin() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    fixture.send(&events(1, 3)).await;
    fixture.until_handled(3).await;
    for handled in [13, 23] {
        delete_topic(fixture.topic.name()).await;
        create_topic(fixture.topic.name(), 1).await;
        // The new topic gets more records than the old one had: its end does not show that they were not read.
        fixture.send(&events(1, 10)).await;
        fixture.until_handled(handled).await;
    }
    until(&running.health, None).await;
    running.stop().await;
}

/// Makes the topic again with 20 records while ten of the old one are in hand.
async fn with_the_old_in_hand(fixture: &Fixture) -> Running {
    // The records are there when the consumer begins, so that one fetch brings them all, and one batch has them all in
    // hand.
    fixture.send(&events(1, 10)).await;
    let running = fixture.start();
    running.gate.send(false).unwrap();
    eventually(SOON, || async { (*running.recorder.batches.lock().unwrap() == [10]).then_some(()) }).await;
    delete_topic(fixture.topic.name()).await;
    create_topic(fixture.topic.name(), 1).await;
    fixture.send(&events(1, 20)).await;
    running
}

fn values(handled: &[(String, String)]) -> Vec<&str> {
    handled.iter().map(|(_, value)| value.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_begins_after_a_topic_was_made_again_reads_all_of_it() {
    let fixture = Fixture::new(1).await;
    let running = with_the_old_in_hand(&fixture).await;
    // The consumer finishes the records in hand, and commits their offsets to the group: those of the topic that is
    // gone.
    let gate = running.gate.clone();
    futures::future::join(running.stop(), async { gate.send_replace(true) }).await;
    assert_eq!(fixture.handled().await.len(), 10);
    let next = fixture.start();
    let handled = fixture.until_handled(30).await;
    assert_eq!(values(&handled[10..]), values(&handled_of(20)));
    next.stop().await;
}

#[tokio::test]
async fn a_member_that_takes_over_a_topic_made_again_reads_it_from_its_begin() {
    let log = Log::hear("saga_core=info");
    let fixture = Fixture::new(1).await;
    let running = with_the_old_in_hand(&fixture).await;
    eventually(SOON, || async { log.said("the client is made anew").first().map(drop) }).await;
    // The spare member gets the partition when the other makes its client anew, and has never seen the old topic.
    let spare = fixture.start();
    running.gate.send(true).unwrap();
    let handled = fixture.until_handled(30).await;
    assert_eq!(values(&handled[10..]), values(&handled_of(20)));
    running.stop().await;
    spare.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_a_topic_made_again_wait_behind_what_was_parked_before() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 10_000;
    let works = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&works);
    let running = fixture.start_with(move |message| {
        let fails = message.payload.as_deref() == Some(b"old") && !may.load(Ordering::SeqCst);
        if fails { Err(anyhow::anyhow!("not yet").into()) } else { Ok(()) }
    });
    fixture.send(&events(1, 3)).await;
    fixture.send(&[event("a", "old")]).await;
    eventually(SOON, || async { (fixture.parked().await.len() == 1).then_some(()) }).await;

    delete_topic(fixture.topic.name()).await;
    create_topic(fixture.topic.name(), 1).await;
    fixture.send(&[event("a", "new")]).await;
    eventually(SOON, || async { (fixture.parked().await.len() == 2).then_some(()) }).await;
    works.store(true, Ordering::SeqCst);

    let handled = fixture.until_handled(5).await;
    assert_eq!(values(&handled[3..]), ["old", "new"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_at_a_record_of_a_deleted_topic_count_for_no_other_record() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    fixture.send(&events(1, 1)).await;
    fixture.until_handled(1).await;
    running.stop().await;
    // The process died of the record at offset 0, in its last attempt.
    let dies = "update inbox_partition set clean = false, record_offset = 0, attempts = 3";
    assert_eq!(sqlx::query(dies).execute(&fixture.database.pool).await.unwrap().rows_affected(), 1);

    delete_topic(fixture.topic.name()).await;
    create_topic(fixture.topic.name(), 1).await;
    fixture.send(&events(1, 2)).await;
    let next = fixture.start();

    fixture.until_handled(3).await;
    assert!(fixture.dead_letters().await.is_empty());
    next.stop().await;
}

fn handled_of(count: usize) -> Vec<(String, String)> {
    (0..count).map(|n| ("k0".to_owned(), format!("{n:06}"))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_gone_is_named_by_health_and_read_when_it_is_back() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    fixture.send(&events(1, 3)).await;
    fixture.until_handled(3).await;
    delete_topic(fixture.topic.name()).await;
    until(&running.health, Some(Cause::TopicMissing)).await;
    create_topic(fixture.topic.name(), 1).await;
    fixture.send(&events(1, 2)).await;
    fixture.until_handled(5).await;
    until(&running.health, None).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_without_a_leader_is_named_by_health_until_it_has_one() {
    let mut fixture = Fixture::new(1).await;
    // The real broker is every test's.
    let cluster = MockCluster::new(1).unwrap();
    let topic = unique("events");
    cluster.create_topic(&topic, 2, 1).unwrap();
    (fixture.config.brokers, fixture.config.topics) = (cluster.bootstrap_servers(), vec![topic.clone()]);
    let running = fixture.start();
    until(&running.health, None).await;
    cluster.partition_leader(&topic, 1, None).unwrap();
    until(&running.health, Some(Cause::Leaderless)).await;
    cluster.partition_leader(&topic, 1, Some(1)).unwrap();
    until(&running.health, None).await;
    running.stop().await;
}

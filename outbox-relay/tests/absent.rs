//! Topics that do not exist: some are set apart and waited for. Of more of them, wherever the names come from, rows are
//! parked.

mod common;

use common::{PATIENCE, World, payloads, published};
use saga_core::testkit::{create_topic, eventually, size, unique};
use serde_json::json;
use std::time::{Duration, Instant};

/// The most topics that one outbox sets apart.
const MOST: i64 = 128;
/// The longest stall of a topic that exists, beside ten times what its rows take anyway. It once was a minute.
const STALL_MAX: Duration = Duration::from_secs(10);

/// How long a relay that has just started takes to publish the rows of a world's own topic.
async fn time_to_publish(world: &World) -> (common::Running, Duration) {
    let begun = Instant::now();
    let relay = world.relay();
    assert_eq!(payloads(&published(&world.topic, 2).await, "k"), ["before", "behind"]);
    (relay, begun.elapsed())
}

#[tokio::test]
async fn topics_that_do_not_exist_neither_stall_the_others_nor_pause_without_end() {
    let undisturbed = {
        let world = World::new().await;
        world.append("k", "before").await;
        world.append("k", "behind").await;
        let (relay, took) = time_to_publish(&world).await;
        relay.stop().await;
        took
    };
    let world = World::new().await;
    let (prefix, topics) = (unique("nowhere"), i64::try_from(size(400, 3_000)).unwrap());
    world.append("k", "before").await;
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload)
         select outbox_message_id(), $1 || '.' || n, 'k', 'test.v1', 'x' from generate_series(1, $2) as n",
    )
    .bind(&prefix)
    .bind(topics)
    .execute(world.db())
    .await
    .unwrap();
    world.append("k", "behind").await;
    let (relay, took) = time_to_publish(&world).await;
    let bound = STALL_MAX + 10 * undisturbed;
    println!("behind {topics} topics that do not exist: {took:?}, without them: {undisturbed:?}");
    assert!(took < bound, "behind {topics} topics that do not exist: {took:?}, without them: {undisturbed:?}");
    world.parked(topics - MOST).await;
    assert_eq!(world.count("select count(*) from outbox_pause where cause = 'missing'").await, MOST);
    let reason: String = sqlx::query_scalar("select reason from outbox_parked order by id desc limit 1")
        .fetch_one(world.db())
        .await
        .unwrap();
    assert!(reason.contains("as many as there may be") && reason.contains("create it"), "{reason}");

    // A topic that was set apart appears: its pause ends, and leaves room for another.
    let appears = format!("{prefix}.1");
    create_topic(&appears, 1).await;
    published(&appears, 1).await;
    world.counts("select count(*) from outbox_pause", MOST - 1).await;
    // A topic appears whose row was parked, when that is tried again.
    let appears = format!("{prefix}.{topics}");
    create_topic(&appears, 1).await;
    eventually(PATIENCE, || async {
        let again = json!({ "topic": appears, "reason": "it is there" });
        let (status, _) = world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
        (status == 202).then_some(())
    })
    .await;
    published(&appears, 1).await;
    relay.stop().await;
}

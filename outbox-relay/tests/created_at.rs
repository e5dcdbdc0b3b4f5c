//! The time when a row was written: PostgreSQL knows more times than a calendar has.

mod common;

use common::{PATIENCE, World, call};
use outbox_relay::Relay;
use saga_core::testkit::eventually;

#[tokio::test]
async fn a_row_whose_time_no_calendar_has_is_published_and_listed_like_any_other() {
    let world = World::new().await;
    // The row is written as it could be before this was refused.
    sqlx::query("alter table outbox drop constraint if exists outbox_created_at_range")
        .execute(world.db())
        .await
        .unwrap();
    let times =
        ["infinity", "-infinity", "12000-01-01 00:00:00+00", "0044-03-15 12:00:00+00 BC", "2026-01-01 00:00:00+00"];
    sqlx::query(
        "insert into outbox_pause (outbox, topic, cause, reason, actor) values ('orders', '*', 'operator', 'a test', 'me')",
    )
    .execute(world.db())
    .await
    .unwrap();
    for at in times {
        // One row is published, one is parked.
        for topic in [world.topic.name(), "two words"] {
            sqlx::query(
                "insert into outbox (message_id, topic, key, type, created_at)
                 values (outbox_message_id(), $1, $2, 'test.v1', $2::timestamptz)",
            )
            .bind(topic)
            .bind(at)
            .execute(world.db())
            .await
            .unwrap();
        }
    }
    let relay = Relay::new(&world.settings()).unwrap();
    let (status, outboxes) = call(&relay, "GET", "/v1/outboxes", None).await;
    assert_eq!((status, outboxes[0]["lag"]["rows"].as_i64()), (200, Some(10)), "{outboxes}");
    sqlx::query("delete from outbox_pause").execute(world.db()).await.unwrap();
    let _relay = world.relay();
    let records = world.published(times.len()).await;
    let mut times: Vec<_> = records.iter().map(|record| record.header("ce_time").unwrap().to_owned()).collect();
    times.sort();
    assert_eq!(times[0], "0001-01-01T00:00:00Z");
    assert_eq!(times[4], "9999-12-31T23:59:59.999999Z");
    eventually(PATIENCE, || async { (world.count("select count(*) from outbox_parked").await == 5).then_some(()) })
        .await;
    for path in ["/v1/outboxes/orders/events", "/v1/outboxes/orders/parked"] {
        let (status, list) = call(&relay, "GET", path, None).await;
        assert_eq!(status, 200, "{list}");
        assert!(list["items"].as_array().unwrap().len() >= 5, "{list}");
    }
}

#[tokio::test]
async fn a_time_that_no_calendar_has_is_refused_where_it_is_written() {
    let world = World::new().await;
    // The constraint also holds in partitions that are made later.
    let partition: Option<String> =
        sqlx::query_scalar("select outbox_add_partition(20000000)").fetch_one(world.db()).await.unwrap();
    assert!(partition.is_some());
    for (at, fine) in [
        ("infinity", false),
        ("-infinity", false),
        ("10000-01-01 00:00:00+00", false),
        ("0001-12-31 23:59:59+00 BC", false),
        ("0001-01-01 00:00:00+00", true),
        ("9999-12-31 23:59:59.999999+00", true),
    ] {
        let written = sqlx::query(
            "insert into outbox (message_id, topic, type, created_at)
             values (outbox_message_id(), 't', 'test.v1', $1::timestamptz)",
        )
        .bind(at)
        .execute(world.db())
        .await;
        let refused = written.err().map(|error| error.into_database_error().unwrap());
        let constraint = refused.as_ref().and_then(|error| error.constraint());
        assert_eq!(constraint, (!fine).then_some("outbox_created_at_range"), "{at}");
    }
}

//! The inbox's SQL, on a real PostgreSQL.

use saga_core::{
    id::MessageId,
    inbox::{Arrival, Delivery, InboxPlace, add_partitions, receive_in},
    service::messaging_migrations,
    testkit::TestDatabase,
};
use std::time::Duration;
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

const HORIZON: Duration = Duration::from_secs(30 * 24 * 3600);
const PLACE: InboxPlace<'static> = InboxPlace { consumer: "group", topic: "topic", partition: 0 };

async fn database() -> TestDatabase {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    add_partitions(&database.pool, HORIZON).await.unwrap();
    database
}

fn arrival(id: MessageId) -> Arrival<'static> {
    Arrival { source: "orders", id, lane: None, remembered: true }
}

#[tokio::test]
async fn of_a_batch_the_new_messages_are_fresh_once() {
    let database = database().await;
    let (old, new) = (MessageId::new(), MessageId::new());
    let mut tx = database.pool.begin().await.unwrap();
    assert_eq!(receive_in(&mut tx, PLACE, &[arrival(old)]).await.unwrap(), [Delivery::Fresh]);
    tx.commit().await.unwrap();
    let mut tx = database.pool.begin().await.unwrap();
    let other_source = Arrival { source: "payments", ..arrival(old) };
    let batch = [arrival(new), arrival(old), arrival(new), other_source];
    assert_eq!(
        receive_in(&mut tx, PLACE, &batch).await.unwrap(),
        [Delivery::Fresh, Delivery::Duplicate, Delivery::Duplicate, Delivery::Fresh]
    );
    let elsewhere = InboxPlace { consumer: "other group", ..PLACE };
    assert_eq!(receive_in(&mut tx, elsewhere, &[arrival(old)]).await.unwrap(), [Delivery::Fresh]);
}

#[tokio::test]
async fn a_message_waits_while_something_of_its_key_or_it_itself_is_parked_and_nothing_else_does() {
    let database = database().await;
    let parked = MessageId::new();
    sqlx::query(
        "insert into inbox_parked (consumer, topic, partition, record_offset, lane, source, message_id, headers)
         values ('group', 'topic', 0, 7, 1, 'orders', $1, '{}')",
    )
    .bind(parked.0)
    .execute(&database.pool)
    .await
    .unwrap();
    let of_lane = |lane| Arrival { lane, ..arrival(MessageId::new()) };
    let elsewhere = InboxPlace { partition: 1, ..PLACE };
    let others = InboxPlace { consumer: "other group", ..PLACE };

    let mut tx = database.pool.begin().await.unwrap();
    let batch = [of_lane(Some(1)), of_lane(Some(2)), of_lane(None), arrival(parked)];
    let expected = [Delivery::Held, Delivery::Fresh, Delivery::Fresh, Delivery::Held];
    assert_eq!(receive_in(&mut tx, PLACE, &batch).await.unwrap(), expected);
    let batch = [of_lane(Some(1)), Arrival { lane: Some(2), ..arrival(parked) }];
    assert_eq!(receive_in(&mut tx, elsewhere, &batch).await.unwrap(), [Delivery::Fresh, Delivery::Held]);
    let batch = [of_lane(Some(1)), arrival(parked)];
    assert_eq!(receive_in(&mut tx, others, &batch).await.unwrap(), [Delivery::Fresh; 2]);

    sqlx::query("delete from inbox_parked").execute(&mut *tx).await.unwrap();
    let batch = [of_lane(Some(1)), arrival(parked)];
    assert_eq!(receive_in(&mut tx, PLACE, &batch).await.unwrap(), [Delivery::Fresh; 2]);
}

#[tokio::test]
async fn every_message_within_the_horizon_has_a_partition_and_upkeep_repeats_safely() {
    let database = database().await;
    assert_eq!(add_partitions(&database.pool, HORIZON).await.unwrap(), 0);
    let now = u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap();
    let ages = [now - HORIZON.as_secs(), now - 7 * 24 * 3600, now, now + 24 * 3600];
    let ids = ages.map(|born| arrival(MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, born, 0)))));
    let mut tx = database.pool.begin().await.unwrap();
    assert_eq!(receive_in(&mut tx, PLACE, &ids).await.unwrap(), [Delivery::Fresh; 4]);
}

#[tokio::test]
async fn many_may_make_partitions_at_once() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    let made = futures::future::join_all((0..8).map(|_| add_partitions(&database.pool, HORIZON))).await;
    let made: i32 = made.into_iter().map(Result::unwrap).sum();
    let partitions: i64 = sqlx::query_scalar("select count(*) from pg_inherits where inhparent = 'inbox'::regclass")
        .fetch_one(&database.pool)
        .await
        .unwrap();
    assert_eq!(i64::from(made), partitions);
}

//! Appending to the outbox, on a real PostgreSQL.

use saga_core::{
    outbox::{AppendError, InvalidMessage, NewMessage, append_in, nudge},
    service::{database::pool_options, messaging_migrations},
    testkit::TestDatabase,
};
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;

async fn database() -> TestDatabase {
    TestDatabase::new(&[messaging_migrations()]).await
}

fn message(topic: &str, key: &str) -> NewMessage {
    NewMessage::json(topic, key, "test.happened.v1", &json!({"n": 1})).unwrap()
}

#[tokio::test]
async fn a_bulk_append_gives_ids_in_the_order_of_the_messages() {
    let database = database().await;
    let messages: Vec<_> = (0..5_000).map(|n| message("orders.events", &(n % 7).to_string())).collect();
    let mut tx = database.pool.begin().await.unwrap();
    append_in(&mut tx, &messages).await.unwrap();
    tx.commit().await.unwrap();
    let ids: Vec<Uuid> =
        sqlx::query_scalar("select message_id from outbox order by id").fetch_all(&database.pool).await.unwrap();
    assert_eq!(ids, messages.iter().map(|message| message.id.0).collect::<Vec<_>>());
}

#[tokio::test]
async fn payloads_tombstones_and_headers_are_stored_as_they_are() {
    let database = database().await;
    let gone = NewMessage::tombstone("inventory.items", "sku-1", "inventory.item-gone.v1");
    let messages = [message("orders.events", "ö-1"), gone];
    let mut tx = database.pool.begin().await.unwrap();
    append_in(&mut tx, &messages).await.unwrap();
    append_in(&mut tx, &[]).await.unwrap();
    tx.commit().await.unwrap();
    type Row = (String, Option<String>, Option<Vec<u8>>, serde_json::Value);
    let rows: Vec<Row> = sqlx::query_as("select topic, key, payload, headers from outbox order by id")
        .fetch_all(&database.pool)
        .await
        .unwrap();
    let payload = Some(br#"{"n":1}"#.to_vec());
    let headers = json!({"content-type": "application/json"});
    assert_eq!(rows[0], ("orders.events".into(), Some("ö-1".into()), payload, headers));
    assert_eq!(rows[1], ("inventory.items".into(), Some("sku-1".into()), None, json!({})));
}

#[tokio::test]
async fn what_could_never_be_published_is_refused_with_its_reason_and_nothing_is_written() {
    let database = database().await;
    let mut header = message("t", "k");
    header.headers.insert("x".into(), "\0".into());
    let bad = [
        (message("", "k"), InvalidMessage::Topic(String::new())),
        (message("no spaces", "k"), InvalidMessage::Topic("no spaces".into())),
        (message(".", "k"), InvalidMessage::Topic(".".into())),
        (message("..", "k"), InvalidMessage::Topic("..".into())),
        (message("__consumer_offsets", "k"), InvalidMessage::Topic("__consumer_offsets".into())),
        (message("t", "k\0"), InvalidMessage::Key),
        (NewMessage { kind: String::new(), ..message("t", "k") }, InvalidMessage::Kind),
        (header, InvalidMessage::Header("x".into())),
    ];
    let mut tx = database.pool.begin().await.unwrap();
    for (message, expected) in bad {
        let id = message.id;
        match append_in(&mut tx, &[self::message("t", "k"), message]).await {
            Err(AppendError::Invalid { id: at, source }) => assert_eq!((at, source), (id, expected)),
            other => panic!("{expected:?}: {other:?}"),
        }
    }
    // The transaction is still usable: nothing reached the database.
    let written: i64 = sqlx::query_scalar("select count(*) from outbox").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(written, 0);
}

#[tokio::test]
async fn a_nudge_is_heard_and_the_connection_is_as_durable_as_before() {
    let database = database().await;
    let mut nudges = database.nudges().await;
    let pool = pool_options(1).connect(&database.url).await.unwrap();
    nudge(&pool);
    timeout(Duration::from_secs(10), nudges.recv()).await.expect("it is heard").unwrap();
    let durable: String = sqlx::query_scalar("show synchronous_commit").fetch_one(&pool).await.unwrap();
    assert_eq!(durable, "on");
}

#[tokio::test]
async fn no_statistics_are_kept_of_what_messages_say_in_new_partitions_either() {
    let database = database().await;
    let made: Option<String> =
        sqlx::query_scalar("select outbox_add_partition(20000000)").fetch_one(&database.pool).await.unwrap();
    assert!(made.is_some());
    let kept: Vec<(String, bool)> = sqlx::query_as(
        "select a.attrelid::regclass || '.' || a.attname, a.attstattarget is distinct from 0
           from pg_inherits i
           join pg_attribute a on a.attrelid = i.inhrelid
          where i.inhparent = 'outbox'::regclass
            and a.attname in ('payload', 'headers')",
    )
    .fetch_all(&database.pool)
    .await
    .unwrap();
    // The partitions are the overflow, the first one and the one that was just made.
    assert_eq!(kept.len(), 6, "{kept:?}");
    assert!(kept.iter().all(|(_, kept)| !kept), "{kept:?}");
}

//! The parts of its row that a record holds: every header of a dead letter, and its epoch. Of a dead letter that is too
//! large, the parts that fit.

mod common;

use common::{PATIENCE, World, create_with, limit_topic};
use saga_core::testkit::{Record, create_topic, eventually, read_to_end, unique};
use serde_json::{Value, json};

/// Appends a dead letter of the record at offset 14 of partition 3 of `original`.
async fn append(world: &World, original: &str, payload: usize, more: &Value) {
    let mut headers = json!({
        "x-original-topic": original, "x-original-partition": "3", "x-original-offset": "14",
        "x-error-class": "failed", "x-error-message": "the shelf is gone", "x-attempts": "8",
    });
    headers.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload, headers)
         values (outbox_message_id(), $1, 'k', 'test.v1', convert_to(repeat('x', $2), 'UTF8'), $3)",
    )
    .bind(format!("{original}.dlt"))
    .bind(i32::try_from(payload).unwrap())
    .bind(headers)
    .execute(world.db())
    .await
    .unwrap();
}

async fn read(topic: &str, count: usize) -> Vec<Record> {
    eventually(PATIENCE, || async {
        let records = read_to_end(topic).await;
        (records.len() >= count).then_some(records)
    })
    .await
}

fn all(record: &Record, name: &str) -> Vec<Option<Vec<u8>>> {
    record.headers.iter().filter(|(of, _)| of == name).map(|(_, value)| value.clone()).collect()
}

#[tokio::test]
async fn headers_that_are_no_text_come_out_as_they_went_in() {
    let world = World::new().await;
    let exact = r#"[["binary",{"base64":"/wAH"}],["null",null],["twice","1"],["twice",null],["twice","2"],["","x"],
                    ["ce_id","not this"]]"#;
    append(&world, &world.topic, 3, &json!({ "": exact, "plain": "p", "ce_sequence": "7" })).await;
    append(&world, &world.topic, 3, &json!({ "": "written by others" })).await;
    let relay = world.relay();
    let records = read(&world.topic.dead_letters(), 2).await;
    let bytes = |text: &str| Some(text.as_bytes().to_vec());
    assert_eq!(all(&records[0], "binary"), [Some(vec![0xff, 0, 7])]);
    assert_eq!(all(&records[0], "null"), [None]);
    assert_eq!(all(&records[0], "twice"), [bytes("1"), None, bytes("2")]);
    assert_eq!((all(&records[0], ""), all(&records[0], "plain")), (vec![bytes("x")], vec![bytes("p")]));
    assert_eq!((all(&records[0], "ce_id").len(), all(&records[0], "ce_sequence")), (1, vec![bytes("1")]));
    assert_eq!(all(&records[1], ""), [bytes("written by others")], "an old row, or one of another language");
    // Each record names the epoch that its sequence counts in.
    let epochs: Vec<_> = records.iter().map(|record| record.header("ce_epoch").unwrap()).collect();
    assert_eq!(epochs[0], epochs[1]);
    assert_eq!(epochs[0].split('-').count(), 4, "{epochs:?}");
    relay.stop().await;
}

#[tokio::test]
async fn a_dead_letter_that_is_too_large_arrives_and_says_where_the_rest_stands() {
    let world = World::new().await;
    let original = unique("large");
    let letters = format!("{original}.dlt");
    create_with(&letters, 1, "max.message.bytes", "3000").await;
    append(&world, &original, 2_000, &json!({ "x-shop": "1" })).await;
    // These are beyond what a page brings, beyond what any topic takes, and with headers that do not fit either.
    append(&world, &original, 10_000, &json!({ "x-shop": "1" })).await;
    append(&world, &original, 2_000_000, &json!({ "x-shop": "1" })).await;
    append(&world, &original, 10_000, &json!({ "x-shop": "y".repeat(5_000) })).await;
    append(&world, &original, 10, &json!({ "x-shop": "last" })).await;
    let relay = world.relay();
    let records = read(&letters, 5).await;
    let what = |record: &Record| {
        let header = |name: &str| record.header(name);
        assert_eq!(
            (header("x-original-topic"), header("x-original-offset")),
            (Some(original.clone()), Some("14".into()))
        );
        assert_eq!(header("x-error-message").as_deref(), Some("the shelf is gone"));
        assert_eq!(record.key.as_deref(), Some(&b"k"[..]));
        let size = record.value.as_ref().map(Vec::len);
        (size, header("x-original-payload-bytes"), header("x-original-headers-bytes").is_some(), header("x-shop"))
    };
    let some = |text: &str| Some(text.to_owned());
    let expected = [
        (Some(2_000), None, false, some("1")),
        (None, some("10000"), false, some("1")),
        (None, some("2000000"), false, some("1")),
        (None, some("10000"), true, None),
        (Some(10), None, false, some("last")),
    ];
    assert_eq!(records.iter().map(what).collect::<Vec<_>>(), expected);
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
    relay.stop().await;
}

#[tokio::test]
async fn what_is_too_large_and_no_dead_letter_is_parked_also_in_a_topic_of_such() {
    let world = World::new().await;
    let topic = unique("plain");
    create_with(&format!("{topic}.dlt"), 1, "max.message.bytes", "3000").await;
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload)
         values (outbox_message_id(), $1, 'k', 'test.v1', convert_to(repeat('x', 10000), 'UTF8'))",
    )
    .bind(format!("{topic}.dlt"))
    .execute(world.db())
    .await
    .unwrap();
    let relay = world.relay();
    world.parked(1).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_dead_letter_that_an_older_relay_has_parked_arrives_when_it_is_tried_again() {
    let world = World::new().await;
    let original = unique("parked");
    let letters = format!("{original}.dlt");
    create_topic(&letters, 1).await;
    append(&world, &original, 50_000, &json!({})).await;
    sqlx::query(
        "with row as (delete from outbox returning *)
         insert into outbox_parked (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason)
         select 'orders', id, message_id, topic, key, type, payload, headers, created_at, 'too large' from row",
    )
    .execute(world.db())
    .await
    .unwrap();
    limit_topic(&letters, "3000").await;
    let relay = world.relay();
    let again = json!({ "reason": "it fits now" });
    let (status, answer) = world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
    assert_eq!(status, 202, "{answer}");
    let records = read(&letters, 1).await;
    assert_eq!((&records[0].value, records[0].header("x-original-payload-bytes")), (&None, Some("50000".to_owned())));
    relay.stop().await;
}

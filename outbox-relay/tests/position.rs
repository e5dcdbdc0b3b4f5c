//! No row is skipped, no two are inverted, none waits: with real transactions.

mod common;

use common::{Rows, Running, World, append, ids, payloads};
use sqlx::{Connection, PgConnection};
use std::collections::HashMap;

#[tokio::test]
async fn what_is_committed_is_published_with_its_headers() {
    let world = World::new().await;
    let _relay = world.relay();
    let id: uuid::Uuid = sqlx::query_scalar(
        r#"select outbox_append($1, 'k', 'orders.placed.v1', '{"a":1}', '{"traceparent": "00-x", "n": 1}')"#,
    )
    .bind(world.topic.name())
    .fetch_one(world.db())
    .await
    .unwrap();
    let records = world.published(1).await;
    let record = &records[0];
    assert_eq!(record.key.as_deref(), Some(&b"k"[..]));
    assert_eq!(record.value.as_deref(), Some(&br#"{"a":1}"#[..]));
    let time = record.header("ce_time").unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    for (name, value) in [
        ("ce_id", id.to_string().as_str()),
        ("ce_type", "orders.placed.v1"),
        ("ce_specversion", "1.0"),
        ("ce_source", "orders"),
        ("ce_sequence", "1"),
        ("traceparent", "00-x"),
        ("n", "1"),
    ] {
        assert_eq!(record.header(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(record.header("content-type"), None, "what a payload is, its writer knows");
}

#[tokio::test]
async fn a_tombstone_an_empty_payload_and_large_payloads_are_published_as_they_are() {
    let world = World::with_partitions(1).await;
    let large = "x".repeat(700_000);
    for (key, payload) in [("tombstone", None), ("empty", Some("")), ("a", Some(large.as_str())), ("b", Some(&large))] {
        sqlx::query("select outbox_append($1, $2, 't.v1', convert_to($3, 'UTF8'))")
            .bind(world.topic.name())
            .bind(key)
            .bind(payload)
            .execute(world.db())
            .await
            .unwrap();
    }
    sqlx::query("select outbox_append($1, null, 't.v1', '\\x01')")
        .bind(world.topic.name())
        .execute(world.db())
        .await
        .unwrap();
    let _relay = world.relay();
    let records = world.published(5).await;
    assert_eq!(records[0].value, None);
    assert_eq!(records[1].value.as_deref(), Some(&b""[..]));
    assert_eq!(records[2].value.as_ref().map(Vec::len), Some(700_000));
    assert_eq!(records[3].value.as_ref().map(Vec::len), Some(700_000));
    assert_eq!((records[4].key.as_deref(), records[4].value.as_deref()), (None, Some(&b"\x01"[..])));
}

#[tokio::test]
async fn a_low_id_that_commits_late_is_published() {
    let world = World::new().await;
    let _relay = world.relay();
    let mut late = world.db().begin().await.unwrap();
    let low = append(&mut *late, &world.topic, "late", "late").await;
    let high = world.append("early", "early").await;
    assert!(low < high);
    assert_eq!(ids(&world.published(1).await), [high]);
    late.commit().await.unwrap();
    assert_eq!(payloads(&world.published(2).await, "late"), ["late"]);
}

#[tokio::test]
async fn an_early_xid_that_appends_late_does_not_invert_its_key() {
    let world = World::new().await;
    let _relay = world.relay();
    // The early transaction has its id before any other appends, and gets the key's lock after the other has committed.
    let mut early = world.db().begin().await.unwrap();
    sqlx::query("select pg_current_xact_id()").execute(&mut *early).await.unwrap();
    world.append("k", "first").await;
    append(&mut *early, &world.topic, "k", "second").await;
    world.append("other", "x").await;
    world.published(2).await;
    early.commit().await.unwrap();
    assert_eq!(payloads(&world.published(3).await, "k"), ["first", "second"]);
}

#[tokio::test]
async fn an_open_write_transaction_elsewhere_in_the_cluster_holds_nobody_back() {
    let world = World::new().await;
    let elsewhere = World::new().await;
    let mut open = elsewhere.db().begin().await.unwrap();
    append(&mut *open, &elsewhere.topic, "k", "never").await;
    let mut here = world.db().begin().await.unwrap();
    append(&mut *here, &world.topic, "k", "not yet").await;
    let _relay = world.relay();
    for i in 0..50 {
        world.append("other", &i.to_string()).await;
    }
    let expected: Vec<String> = (0..50).map(|i| i.to_string()).collect();
    assert_eq!(payloads(&world.published(50).await, "other"), expected);
    open.rollback().await.unwrap();
    here.commit().await.unwrap();
    world.published(51).await;
}

#[tokio::test]
async fn savepoints_rollbacks_and_prepared_transactions_need_nothing_special() {
    let world = World::with_partitions(1).await;
    let _relay = world.relay();
    let mut tx = world.db().begin().await.unwrap();
    append(&mut *tx, &world.topic, "k", "kept").await;
    let mut savepoint = tx.begin().await.unwrap();
    append(&mut *savepoint, &world.topic, "k", "undone").await;
    savepoint.rollback().await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    append(&mut *savepoint, &world.topic, "k", "kept too").await;
    savepoint.commit().await.unwrap();
    tx.commit().await.unwrap();
    let mut undone = world.db().begin().await.unwrap();
    append(&mut *undone, &world.topic, "k", "rolled back").await;
    undone.rollback().await.unwrap();

    let mut expected = vec!["kept", "kept too"];
    let prepared: i32 = sqlx::query_scalar("select current_setting('max_prepared_transactions')::int")
        .fetch_one(world.db())
        .await
        .unwrap();
    if prepared > 0 {
        let mut session = PgConnection::connect(&world.database.url).await.unwrap();
        sqlx::query("begin").execute(&mut session).await.unwrap();
        append(&mut session, &world.topic, "k", "prepared").await;
        sqlx::raw_sql("prepare transaction 'relay test'").execute(&mut session).await.unwrap();
        session.close().await.unwrap();
        world.append("other", "meanwhile").await;
        world.published(3).await;
        sqlx::raw_sql("commit prepared 'relay test'").execute(world.db()).await.unwrap();
        expected.push("prepared");
    }
    let records = world.published(expected.len() + usize::from(prepared > 0)).await;
    assert_eq!(payloads(&records, "k"), expected);
}

/// Writers that do everything a service may do, at once. Keys are locked by a row, as an aggregate is.
async fn write_at_random(world: &World, writer: u64, transactions: u64) -> HashMap<String, i64> {
    let mut state = writer.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let mut written = HashMap::new();
    for i in 0..transactions {
        let mut tx = world.db().begin().await.unwrap();
        if random(3) == 0 {
            sqlx::query("select pg_current_xact_id()").execute(&mut *tx).await.unwrap();
            tokio::task::yield_now().await;
        }
        let key = format!("key-{}", random(6));
        sqlx::query("select from aggregate where key = $1 for update").bind(&key).execute(&mut *tx).await.unwrap();
        let rows = 1 + random(20);
        let mut mine = Vec::new();
        for row in 0..rows {
            if random(4) == 0 {
                let mut savepoint = tx.begin().await.unwrap();
                let id = append(&mut *savepoint, &world.topic, &key, &format!("{writer}/{i}/{row}")).await;
                if random(2) == 0 {
                    savepoint.rollback().await.unwrap();
                } else {
                    savepoint.commit().await.unwrap();
                    mine.push(id);
                }
            } else {
                mine.push(append(&mut *tx, &world.topic, &key, &format!("{writer}/{i}/{row}")).await);
            }
        }
        if random(5) == 0 {
            tx.rollback().await.unwrap();
        } else {
            tx.commit().await.unwrap();
            *written.entry(key).or_default() += i64::try_from(mine.len()).unwrap();
        }
    }
    written
}

#[tokio::test(flavor = "multi_thread")]
async fn of_what_random_writers_do_nothing_is_missing_and_nothing_is_inverted() {
    let world = World::new().await;
    sqlx::raw_sql(
        "create table aggregate (key text primary key);
         insert into aggregate select 'key-' || i from generate_series(0, 5) as i",
    )
    .execute(world.db())
    .await
    .unwrap();
    let relay = world.relay();
    let mut straggler = PgConnection::connect(&world.database.url).await.unwrap();
    sqlx::query("begin").execute(&mut straggler).await.unwrap();
    append(&mut straggler, &world.topic, "straggler", "first of all").await;

    futures::future::join_all((1..=6).map(|writer| write_at_random(&world, writer, 60))).await;
    append(&mut straggler, &world.topic, "straggler", "last of all").await;
    sqlx::query("commit").execute(&mut straggler).await.unwrap();

    let committed: Vec<(i64, String)> =
        sqlx::query_as("select id, key from outbox order by id").fetch_all(world.db()).await.unwrap();
    let records = world.published(committed.len()).await;
    let mut found = ids(&records);
    found.sort_unstable();
    let expected: Vec<i64> = committed.iter().map(|(id, _)| *id).collect();
    assert_eq!(found, expected, "each once: nobody was killed");
    for key in ["key-0", "key-1", "key-2", "key-3", "key-4", "key-5", "straggler"] {
        let of_key: Vec<_> = records.iter().filter(|r| r.key.as_deref() == Some(key.as_bytes())).cloned().collect();
        assert!(ids(&of_key).is_sorted(), "{key} is inverted: {:?}", ids(&of_key));
    }
    relay.stop().await;
}

#[tokio::test]
async fn a_long_backlog_with_a_straggler_far_behind_is_published_in_order() {
    let world = World::with_partitions(1).await;
    let mut straggler = world.db().begin().await.unwrap();
    Rows::of(&world.topic, 6_000).append(&mut *straggler).await;
    Rows::of(&world.topic, 12_000).append(world.db()).await;
    let relay = Running::start(&world.unhurried());
    world.published(12_000).await;
    relay.stop().await;
    // The window has stragglers below its range, each more than a page.
    Rows::of(&world.topic, 11_000).append(world.db()).await;
    straggler.commit().await.unwrap();
    let relay = Running::start(&world.unhurried());
    let records = world.published(29_000).await;
    let found = ids(&records);
    assert_eq!(found.len(), 29_000, "each once");
    assert!(found[12_000..].is_sorted(), "within a window by id");
    assert_eq!(found[12_000], 1);
    relay.stop().await;
}

#[tokio::test]
async fn from_now_leaves_out_what_was_committed_before_and_nothing_else() {
    let world = World::new().await;
    world.append("k", "before").await;
    let mut open = world.db().begin().await.unwrap();
    append(&mut *open, &world.topic, "k", "committed later").await;
    let settings = outbox_relay::RelaySettings { from_now: true, ..world.settings() };
    let relay = Running::start(&settings);
    world.counts("select count(*) from outbox_batch", 1).await;
    open.commit().await.unwrap();
    assert_eq!(payloads(&world.published(1).await, "k"), ["committed later"]);
    relay.stop().await;
    // Only the first start counts the setting.
    world.append("k", "while it was away").await;
    let relay = Running::start(&settings);
    assert_eq!(payloads(&world.published(2).await, "k"), ["committed later", "while it was away"]);
    relay.stop().await;
}

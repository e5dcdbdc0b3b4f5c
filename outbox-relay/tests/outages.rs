//! A database that does not answer: the relay reports it, and goes on by itself.

mod common;

use common::{PATIENCE, RECORDED, Running, World, append, call, ids};
use outbox_relay::{OutboxSettings, Relay, RelaySettings, admin};
use saga_core::{
    service::Health,
    testkit::{FreezingProxy, Log, eventually},
};
use serde_json::json;
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use std::{collections::HashSet, str::FromStr};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

async fn connect(world: &World) -> PgConnection {
    PgConnection::connect(&world.database.url).await.expect("the database is there")
}

async fn owner(world: &World) -> Option<uuid::Uuid> {
    sqlx::query_scalar("select owner from outbox_lease").fetch_optional(world.db()).await.unwrap()
}

#[tokio::test]
async fn connections_that_fall_silent_again_and_again_stop_nothing() {
    let world = World::new().await;
    let (proxy, url) = FreezingProxy::of_database(&world.database.url).await;
    let database = PgConnectOptions::from_str(&url).unwrap();
    let outboxes = vec![OutboxSettings { name: world.name.clone(), database }];
    let _relay = Running::start(&RelaySettings { outboxes, ..world.settings() });
    for round in 0..5 {
        world.append("k", &round.to_string()).await;
        assert_eq!(ids(&world.published(round + 1).await).len(), round + 1, "each once");
        // The batch is recorded, so nothing has to be sent again.
        world.counts(RECORDED, i64::try_from(round).unwrap() + 1).await;
        proxy.freeze();
    }
}

#[tokio::test]
async fn a_poll_without_an_answer_ends_the_ownership_and_is_a_problem() {
    let log = Log::hear("warn");
    let world = World::new().await;
    // A server of its own: an outage is one per server, and is logged once.
    let (_proxy, url) = FreezingProxy::of_database(&world.database.url).await;
    let database = PgConnectOptions::from_str(&url).unwrap();
    let outboxes = vec![OutboxSettings { name: world.name.clone(), database }];
    let relay = Relay::new(&RelaySettings { outboxes, ..world.settings() }).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let running = Running::of(relay.clone());
    world.append("k", "0").await;
    world.published(1).await;
    let before = owner(&world).await;
    // The reader waits for this lock as it would wait for a host that is gone; the lease's table is free.
    let mut other = connect(&world).await;
    let mut tx = other.begin().await.unwrap();
    sqlx::query("lock table outbox in access exclusive mode").execute(&mut *tx).await.unwrap();
    // The log has the question that had no answer first. What health shows then may be that of a next try.
    eventually(PATIENCE, || async {
        log.warnings().iter().any(|line| line.to_string().contains("reading the outbox")).then_some(())
    })
    .await;
    eventually(PATIENCE, || async {
        health.look().await;
        let reason = health.healthiness().parts["outbox:orders"].reason.clone();
        reason.filter(|text| text.contains("no answer from the database"))
    })
    .await;
    eventually(PATIENCE, || async { (owner(&world).await != before).then_some(()) }).await;
    tx.rollback().await.unwrap();
    world.append("k", "1").await;
    world.published(2).await;
    running.stop().await;
}

#[tokio::test]
async fn admin_requests_that_are_blocked_say_so_and_leave_the_lease_with_its_owner() {
    let world = World::new().await;
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    world.append("k", "0").await;
    world.published(1).await;
    let before = owner(&world).await;
    let mut other = connect(&world).await;
    let mut tx = other.begin().await.unwrap();
    sqlx::query("lock table outbox_audit in share mode").execute(&mut *tx).await.unwrap();
    let pauses = (0..10).map(|n| {
        let body = json!({ "topic": format!("t{n}"), "reason": "a test" });
        let relay = &relay;
        async move { call(relay, "POST", "/v1/outboxes/orders/pause", Some(body)).await }
    });
    for (status, problem) in futures::future::join_all(pauses).await {
        assert_eq!((status, problem["type"].as_str()), (503, Some("/problems/locked")), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("pg_blocking_pids"), "{problem}");
    }
    append(&mut connect(&world).await, &world.topic, "k", "1").await;
    world.published(2).await;
    assert_eq!(owner(&world).await, before, "for longer than a lease");
    tx.rollback().await.unwrap();
    running.stop().await;
}

#[tokio::test]
async fn a_retry_does_not_wait_for_the_row_that_is_being_tried() {
    let world = World::new().await;
    let relay = Relay::new(&world.settings()).unwrap();
    sqlx::query(
        "insert into outbox_parked (outbox, id, message_id, topic, key, type, headers, created_at, reason)
         select 'orders', id, gen_random_uuid(), 't', 'k', 'test.v1', '{}', now(), 'a test'
           from generate_series(1, 2) as id",
    )
    .execute(world.db())
    .await
    .unwrap();
    // The test locks the row, as the owner does while it waits for Kafka.
    let mut other = connect(&world).await;
    let mut tx = other.begin().await.unwrap();
    sqlx::query("select from outbox_parked where id = 1 for update").execute(&mut *tx).await.unwrap();
    let path = "/v1/outboxes/orders/parked/retry";
    let again = json!({ "reason": "try" });
    let (status, answer) = call(&relay, "POST", path, Some(again.clone())).await;
    assert_eq!((status, answer["rows"].as_i64()), (202, Some(1)), "{answer}");
    sqlx::query("delete from outbox_parked where id = 2").execute(world.db()).await.unwrap();
    let (status, problem) = call(&relay, "POST", path, Some(again.clone())).await;
    assert_eq!((status, problem["type"].as_str()), (409, Some("/problems/being-retried")), "{problem}");
    sqlx::query("delete from outbox_parked").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let (status, problem) = call(&relay, "POST", path, Some(again)).await;
    assert_eq!(status, 404, "{problem}");
}

#[tokio::test]
async fn a_locked_outbox_leaves_no_server_process_behind() {
    // The most connections: recorder, control, session, retry and a spare one; two that read; upkeep; the lease's; a
    // listener, which asks with two.
    const CONNECTIONS: i64 = 5 + 2 + 1 + 1 + 2;
    let world = World::new().await;
    let _relay = world.relay();
    world.append("k", "0").await;
    world.published(1).await;
    let mut other = connect(&world).await;
    let mut tx = other.begin().await.unwrap();
    sqlx::query("lock table outbox in access exclusive mode").execute(&mut *tx).await.unwrap();
    // The test watches in no transaction: within one, PostgreSQL keeps its first answer about the server's processes.
    let watching = Mutex::new((connect(&world).await, 0, HashSet::new()));
    eventually(PATIENCE, || async {
        let (db, most, owners) = &mut *watching.lock().await;
        let processes: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where application_name = 'outbox-relay' and datname = current_database()",
        )
        .fetch_one(&mut *db)
        .await
        .unwrap();
        *most = processes.max(*most);
        let owner: Option<uuid::Uuid> =
            sqlx::query_scalar("select owner from outbox_lease").fetch_optional(db).await.unwrap();
        owners.extend(owner);
        (owners.len() == 6).then_some(())
    })
    .await;
    let (_, most, _) = watching.into_inner();
    assert!(most <= CONNECTIONS, "{most} server processes");
    tx.rollback().await.unwrap();
    world.append("k", "1").await;
    world.published(2).await;
}

#[tokio::test]
async fn each_outage_of_the_database_is_logged_once_and_so_is_each_end() {
    let world = World::new().await;
    let log = Log::hear("info");
    let name = world.database.url.rsplit('/').next().unwrap().to_owned();
    let said = |text: &str| {
        let of_ours = |line: &serde_json::Value| line["dependency"].as_str().is_some_and(|text| text.contains(&name));
        log.said(text).into_iter().filter(of_ours).count()
    };
    let _relay = world.relay();
    world.append("k", "0").await;
    world.published(1).await;
    for outage in 1..=2 {
        world.database.shut().await;
        eventually(PATIENCE, || async { (said("waiting for the database") == outage).then_some(()) }).await;
        world.database.open().await;
        eventually(PATIENCE, || async { (said("the database is there again") == outage).then_some(()) }).await;
        assert_eq!(said("waiting for the database"), outage);
    }
    world.append("k", "1").await;
    world.published(2).await;
}

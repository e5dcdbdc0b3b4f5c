//! The engine as it runs: replies through Kafka and the consumer, timers in their loop, and the trouble that they meet.

use crate::support::*;
use metrics_exporter_prometheus::PrometheusBuilder;
use saga_core::{
    command::Outcome,
    consumer::{Consumer, ConsumerConfig},
    saga::definition::Definition,
    service::database::pool_options,
    testkit::{FreezingProxy, Record, TestTopic, brokers, eventually, produce, unique},
};
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn replies_come_through_kafka_and_one_that_cannot_be_read_is_dead_lettered_while_the_others_go_on() {
    let world = World::new().await;
    let topic = TestTopic::create("replies", 2).await;
    let config = ConsumerConfig::new(&brokers(), &unique("sagas"), [topic.name()]);
    let consumer = Consumer::new(config, world.database.pool.clone(), Arc::new(world.engine.handler()));
    let stop = CancellationToken::new();
    let running = tokio::spawn(consumer.run(stop.clone()));
    let (good, bad) = (world.start(1).await, world.start(2).await);
    let nonsense = reply(&world.last(bad).await, Outcome::Succeeded, &json!({ "what": 1 }));
    produce(&topic, &[Record::from(&nonsense)]).await;
    for step in ["authorize", "reserve", "capture", "ship"] {
        let sent = eventually(SOON, || async {
            let last = world.last(good).await;
            (last.step == step).then_some(last)
        });
        let answer = Record::from(&succeeded(&sent.await));
        produce(&topic, &[answer.clone(), answer]).await;
    }
    eventually(SOON, || async { (world.status(good).await == "completed").then_some(()) }).await;
    let dead = "select count(*) from outbox where topic like '%.dlt'";
    eventually(SOON, || async { (world.count(dead).await == 1).then_some(()) }).await;
    assert_eq!(world.trail(good).await, ["authorize", "reserve", "capture", "ship"]);
    assert_eq!(world.kinds(good).await.len(), 5, "the inbox keeps duplicates away");
    assert_eq!(world.kinds(bad).await, ["started"]);
    stop.cancel();
    running.await.unwrap().unwrap();
    world.audit().await;
}

#[tokio::test]
async fn the_timers_run_until_they_are_stopped_and_notice_by_themselves() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let (engine, stop) = (Arc::clone(&world.engine), CancellationToken::new());
    let timers = tokio::spawn({
        let stop = stop.clone();
        async move { engine.run_timers(stop).await }
    });
    world.time_passes().await;
    eventually(SOON, || async { (world.last(saga).await.attempt == 2).then_some(()) }).await;
    stop.cancel();
    timers.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_timers_give_a_silent_connection_up_and_go_on_with_another() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let (proxy, url) = FreezingProxy::of_database(&world.database.url).await;
    let engine = builder_of(pool_options(8).connect(&url).await.unwrap(), &world.reply_topic, 1);
    let engine = engine.attempt_max(Duration::from_millis(500)).build().unwrap();
    // The timers have a connection, and nothing to do.
    assert_eq!(engine.tick().await.unwrap().due, 0);
    proxy.freeze();
    world.time_passes().await;
    let stop = CancellationToken::new();
    let timers = tokio::spawn({
        let stop = stop.clone();
        async move { engine.run_timers(stop).await }
    });
    eventually(SOON, || async { (world.last(saga).await.attempt == 2).then_some(()) }).await;
    stop.cancel();
    timers.await.unwrap().unwrap();
    world.audit().await;
}

#[tokio::test]
async fn a_due_saga_that_takes_too_long_is_put_off_and_the_others_are_not() {
    let world = World::new().await;
    let engine = builder_of(world.database.pool.clone(), &world.reply_topic, 1);
    let engine = engine.attempt_max(Duration::from_secs(1)).build().unwrap();
    let (slow, other) = (world.start(1).await, world.start(2).await);
    world.time_passes().await;
    // It is not known what takes so long: here the saga's row waits for something that the test holds.
    sqlx::query("create table slow as select saga_id from saga where business_key = '1'")
        .execute(&world.database.pool)
        .await
        .unwrap();
    for sql in [
        "create function take_long() returns trigger language plpgsql as $$ begin
             if exists (select from slow where saga_id = new.saga_id) then perform pg_advisory_xact_lock(1); end if;
             return new;
         end $$",
        "create trigger take_long before update on saga for each row execute function take_long()",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    let mut held = world.database.pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(1)").execute(&mut *held).await.unwrap();
    engine.tick().await.unwrap();
    assert_eq!((world.last(slow).await.attempt, world.last(other).await.attempt), (1, 2));
    assert_eq!(engine.tick().await.unwrap().due, 0, "it is put off");
    held.rollback().await.unwrap();
    world.time_passes().await;
    engine.tick().await.unwrap();
    assert_eq!(world.last(slow).await.attempt, 2);
}

#[tokio::test]
async fn a_due_saga_that_cannot_be_decided_is_put_off_and_the_others_are_not() {
    let world = World::new().await;
    let (mut sagas, mut others) = (Vec::new(), 0);
    for number in 0..5 {
        sagas.push(world.start(number).await);
    }
    world.time_passes().await;
    // It is not known what kind of trouble this will be: here the database refuses the saga's row.
    sqlx::query("create table cursed as select saga_id from saga where business_key = '3'")
        .execute(&world.database.pool)
        .await
        .unwrap();
    for sql in [
        "create function refuse() returns trigger language plpgsql as $$ begin
             if exists (select from cursed where saga_id = new.saga_id) then raise exception 'cursed'; end if;
             return new;
         end $$",
        "create trigger refuse before update on saga for each row execute function refuse()",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    world.engine.tick().await.unwrap();
    for saga in &sagas {
        others += usize::from(world.last(*saga).await.attempt == 2);
    }
    assert_eq!((others, world.last(sagas[3]).await.attempt), (4, 1));
    assert_eq!(world.engine.tick().await.unwrap().due, 0, "it is put off");
    sqlx::query("delete from cursed").execute(&world.database.pool).await.unwrap();
    world.time_passes().await;
    world.engine.tick().await.unwrap();
    assert_eq!(world.last(sagas[3]).await.attempt, 2);
}

#[tokio::test]
async fn sagas_of_which_none_can_be_decided_wait_for_the_timers_though_none_is_due() {
    let world = World::new().await;
    let (saga, _) = (world.start(1).await, world.start(2).await);
    world.time_passes().await;
    for sql in [
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'cursed'; end $$",
        "create trigger refuse before update on saga for each row execute function refuse()",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    let (engine, stop) = (Arc::clone(&world.engine), CancellationToken::new());
    let timers = tokio::spawn({
        let stop = stop.clone();
        async move { engine.run_timers(stop).await }
    });
    let waiting = async || world.engine.timers_report().waiting;
    let first = eventually(SOON, || async { waiting().await.filter(|waiting| waiting.oldest.is_some()) }).await;
    let due = "select count(*) from saga_due where due_at <= clock_timestamp()";
    assert_eq!(world.count(due).await, 0, "both are put off");
    let armed = sqlx::query_scalar("select min(armed_at) from saga").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!(first.oldest, armed, "it waits since it was due");
    sqlx::query("drop trigger refuse on saga").execute(&world.database.pool).await.unwrap();
    world.time_passes().await;
    eventually(SOON, || async { waiting().await.is_none().then_some(()) }).await;
    assert_eq!(world.last(saga).await.attempt, 2);
    stop.cancel();
    timers.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_definition_that_was_changed_under_its_version_is_another_one() {
    let (one, two) = (order_saga(1), order_saga(2));
    assert_eq!(one.fingerprint(), two.fingerprint(), "the shape is the same");
    let fewer = Definition::new("order", 1, one.steps()[1..].to_vec(), None);
    assert_ne!(fewer.fingerprint(), one.fingerprint());
    let world = World::new().await;
    let saga = world.start(1).await;
    sqlx::query("update saga set fingerprint = 'what it was before'").execute(&world.database.pool).await.unwrap();
    world.succeed(saga).await;
    assert_eq!(world.count("select count(*) from saga_undecided").await, 1);
    assert_eq!(world.trail(saga).await, ["authorize"]);
    world.time_passes().await;
    assert_eq!(world.engine.tick().await.unwrap().due, 0);
    let view = world.engine.inspect(saga, saga_core::saga::view::Payloads::Redacted).await.unwrap().unwrap();
    assert!(!view.definition_known && view.waits.unwrap().why.contains("a reply has come"));
}

#[tokio::test]
async fn sagas_that_are_due_and_that_this_replica_does_not_know_are_counted() {
    let metrics = PrometheusBuilder::new().build_recorder();
    let (shown, _metrics) = (metrics.handle(), metrics::set_default_local_recorder(&metrics));
    let world = World::new().await;
    for number in 0..3 {
        world.start(number).await;
    }
    world.time_passes().await;
    // Two sagas are another version's. The third is taken by an engine that knows it, and another one is not due.
    sqlx::query("update saga set version = 2 where business_key in ('0', '1')")
        .execute(&world.database.pool)
        .await
        .unwrap();
    let later = world.start(3).await;
    sqlx::query("update saga set version = 2 where saga_id = $1")
        .bind(later.0)
        .execute(&world.database.pool)
        .await
        .unwrap();
    let stop = CancellationToken::new();
    let counted = async {
        eventually(SOON, async || shown.render().contains("\nsaga_overdue_unknown 2\n").then_some(())).await;
        stop.cancel();
    };
    let (timers, ()) = tokio::join!(world.engine.run_timers(stop.clone()), counted);
    timers.unwrap();
    assert!(shown.render().contains("# HELP saga_overdue_unknown "), "{}", shown.render());
}

//! Sagas that are started by themselves: several at a time, and what each caller is told.

use crate::support::*;
use futures::future::join_all;
use saga_core::{
    id::SagaId,
    saga::{Engine, Saga, StartError, saga},
    testkit::{
        eventually,
        failpoints::{FailPoint, Fault},
    },
};
use std::{sync::Arc, time::Duration};

fn plain() -> Saga<Order> {
    saga::<Order>("plain", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .build()
}

fn engine(world: &World) -> Arc<Engine> {
    Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&plain()).build().unwrap()
}

/// Starts one saga about each of `orders`, all at once; nobody's task runs before all have asked.
async fn start_all(engine: &Arc<Engine>, orders: &[u32]) -> Vec<Result<(), StartError>> {
    let saga = &plain();
    let start =
        |&order: &u32| async move { engine.start(SagaId::new(), saga, &Order { order }, &order.to_string()).await };
    join_all(orders.iter().map(start)).await
}

#[tokio::test]
async fn sagas_that_start_at_one_moment_share_a_transaction_and_each_sends_its_command() {
    let world = World::new().await;
    let orders: Vec<u32> = (0..200).collect();
    for started in start_all(&engine(&world), &orders).await {
        started.unwrap();
    }
    assert_eq!(world.count("select count(*) from saga").await, 200);
    assert_eq!(world.count("select count(distinct key) from outbox where type = 'pay.authorize.v1'").await, 200);
    assert!(world.count("select count(distinct xid) from outbox").await < 10, "each had a transaction of its own");
}

#[tokio::test]
async fn of_starts_about_one_thing_one_starts_and_the_others_are_told() {
    let world = World::new().await;
    let engine = engine(&world);
    let answers = start_all(&engine, &[1, 2, 1, 3, 1]).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
    assert!(answers.iter().all(|answer| matches!(answer, Ok(()) | Err(StartError::Exists))), "{answers:?}");
    assert!(matches!(start_all(&engine, &[2]).await[..], [Err(StartError::Exists)]));
    assert_eq!(world.count("select count(*) from outbox").await, 3);
}

#[tokio::test]
async fn a_caller_that_goes_away_takes_nobodys_saga_with_it() {
    let world = World::new().await;
    let engine = engine(&world);
    let saga = plain();
    {
        let mut gone = Box::pin(engine.start(SagaId::new(), &saga, &Order { order: 1 }, "1"));
        assert!(futures::poll!(gone.as_mut()).is_pending());
    }
    start_all(&engine, &[2]).await.pop().unwrap().unwrap();
    eventually(Duration::from_secs(10), || async {
        (world.count("select count(*) from saga").await == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_outage_starts_nothing_and_says_so_to_all_and_a_mistake_is_only_its_own() {
    let world = World::new().await;
    let engine = engine(&world);
    let outage = FailPoint::once("saga.before-start", &world.reply_topic, Fault::Outage);
    for answer in start_all(&engine, &[1, 2, 3]).await {
        assert!(matches!(answer, Err(StartError::Database(_))), "{answer:?}");
    }
    drop(outage);
    assert_eq!(world.count("select count(*) from saga").await, 0);
    // The set fails, and so does the first of those that are then tried one by one.
    let mistakes = FailPoint::arm("saga.before-start", &world.reply_topic, Fault::Error, 0, 2);
    let answers = start_all(&engine, &[1, 2, 3]).await;
    drop(mistakes);
    assert!(matches!(answers[..], [Err(StartError::Database(_)), Ok(()), Ok(())]), "{answers:?}");
    start_all(&engine, &[1]).await.pop().unwrap().unwrap();
    assert_eq!(world.count("select count(distinct key) from outbox").await, 3);
}

#[tokio::test]
async fn a_saga_that_begins_with_a_local_effect_starts_with_it_or_not_at_all() {
    let world = World::new().await;
    let broken = SagaId::new();
    sqlx::query("insert into broken values ('open order', $1, true)")
        .bind(broken.0)
        .execute(&world.database.pool)
        .await
        .unwrap();
    let start = |id, order: u32| {
        let engine = Arc::clone(&world.engine);
        async move { engine.start(id, &order_saga(1), &Order { order }, &order.to_string()).await }
    };
    let panicked = start(broken, 1).await;
    assert!(matches!(panicked, Err(StartError::Database(_))), "{panicked:?}");
    start(SagaId::new(), 2).await.unwrap();
    assert_eq!(world.count("select count(*) from saga").await, 1);
    assert_eq!(world.count("select count(*) from note").await, 1);
    world.audit().await;
}

//! Sagas that are started by themselves: several at a time, and the answer to each caller.

use crate::support::*;
use futures::future::join_all;
use saga_core::{
    error_class::{is_outage, is_pool_full},
    id::SagaId,
    saga::{Engine, Saga, StartError, saga},
    service::database::pool_options,
    testkit::{
        FreezingProxy, eventually,
        failpoints::{FailPoint, Fault},
    },
};
use std::{sync::Arc, time::Duration};
use tokio::{runtime, task::JoinHandle, time::timeout};

/// Far longer than anything here takes that does not hang.
const SOON: Duration = Duration::from_secs(10);

fn plain() -> Saga<Order> {
    saga::<Order>("plain", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .build()
}

fn engine(world: &World) -> Arc<Engine> {
    Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&plain()).build().unwrap()
}

/// Starts one saga about each of `orders`, all at once; no caller's task runs before all have asked.
async fn start_all(engine: &Arc<Engine>, orders: &[u32]) -> Vec<Result<(), StartError>> {
    let saga = &plain();
    let start =
        |&order: &u32| async move { engine.start(SagaId::new(), saga, &Order { order }, &order.to_string()).await };
    join_all(orders.iter().map(start)).await
}

fn start(engine: &Arc<Engine>, order: u32) -> JoinHandle<Result<(), StartError>> {
    let engine = Arc::clone(engine);
    tokio::spawn(async move { engine.start(SagaId::new(), &plain(), &Order { order }, &order.to_string()).await })
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
async fn the_relay_is_told_when_a_saga_has_started() {
    let world = World::new().await;
    let mut nudges = world.database.nudges().await;
    start_all(&engine(&world), &[1]).await.remove(0).unwrap();
    timeout(SOON, nudges.recv()).await.expect("the relay is told").unwrap();
    assert_eq!(world.count("select count(*) from outbox").await, 1);
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
    // The set fails, and so does one of those that are then tried alone.
    let mistakes = FailPoint::arm("saga.before-start", &world.reply_topic, Fault::Error, 0, 2);
    let answers = start_all(&engine, &[1, 2, 3]).await;
    drop(mistakes);
    assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 1, "{answers:?}");
    let mistake = answers.iter().position(Result::is_err).unwrap();
    assert!(matches!(answers[mistake], Err(StartError::Database(_))), "{answers:?}");
    start_all(&engine, &[[1, 2, 3][mistake]]).await.pop().unwrap().unwrap();
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

#[tokio::test]
async fn whoever_waits_for_somebodys_transaction_waits_alone_and_learns_how_it_ended() {
    let world = World::new().await;
    let engine = engine(&world);
    for (rolled_back, orders) in [(true, [1, 2, 3, 4]), (false, [5, 6, 7, 8])] {
        let [held, beside, later, by_the_holder] = orders;
        let mut other = world.database.pool.begin().await.unwrap();
        let order = Order { order: held };
        engine.start_in(&mut other, SagaId::new(), &plain(), &order, &held.to_string()).await.unwrap();
        let (waits, beside) = (start(&engine, held), start(&engine, beside));
        // One start is in the same set, the other in the next one.
        timeout(SOON, beside).await.expect("it holds nobody up").unwrap().unwrap();
        let again = start(&engine, held);
        timeout(SOON, start(&engine, later)).await.expect("it holds nobody up").unwrap().unwrap();
        // The holder of the lock may start sagas too: PostgreSQL would not see that the two wait for each other.
        timeout(SOON, start(&engine, by_the_holder)).await.expect("it holds nobody up").unwrap().unwrap();
        assert!(!waits.is_finished() && !again.is_finished());
        if rolled_back {
            other.rollback().await.unwrap();
        } else {
            other.commit().await.unwrap();
        }
        let answers = [waits, again].map(|waits| timeout(SOON, waits));
        let answers = join_all(answers).await.into_iter().map(|answer| answer.expect("nothing is in the way").unwrap());
        let (started, refused): (Vec<_>, Vec<_>) = answers.partition(Result::is_ok);
        assert_eq!(started.len(), usize::from(rolled_back));
        assert!(refused.iter().all(|refused| matches!(refused, Err(StartError::Exists))), "{refused:?}");
    }
    assert_eq!(world.count("select count(*) from saga").await, 8);
    assert_eq!(world.count("select count(distinct key) from outbox").await, 8);
}

#[tokio::test]
async fn whoever_waits_for_a_transaction_that_does_not_end_is_told_after_a_while() {
    let world = World::new().await;
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic);
    let engine = engine.define(&plain()).attempt_max(Duration::from_millis(500)).build().unwrap();
    let mut other = world.database.pool.begin().await.unwrap();
    engine.start_in(&mut other, SagaId::new(), &plain(), &Order { order: 1 }, "1").await.unwrap();
    let refused = timeout(SOON, start(&engine, 1)).await.expect("it does not wait for ever").unwrap();
    let Err(StartError::Database(sqlx::Error::Database(why))) = refused else { panic!("{refused:?}") };
    assert_eq!(why.code().as_deref(), Some("55P03"), "a lock");
    other.rollback().await.unwrap();
    start(&engine, 1).await.unwrap().unwrap();
}

#[test]
fn starts_go_on_when_the_runtime_that_took_care_of_them_has_ended() {
    let lasting = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let world = lasting.block_on(World::new());
    let engine = engine(&world);
    let ending = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (saga, order) = (plain(), Order { order: 1 });
    let mut asked = Box::pin(engine.start(SagaId::new(), &saga, &order, "1"));
    // The runtime ends with a start in hand, before it has begun with it.
    ending.block_on(async { assert!(futures::poll!(asked.as_mut()).is_pending()) });
    drop(ending);
    let refused = lasting.block_on(async { timeout(SOON, asked).await.expect("it is told") });
    assert!(matches!(refused, Err(StartError::Database(_))), "{refused:?}");
    lasting.block_on(async {
        timeout(SOON, start(&engine, 2)).await.expect("somebody takes care").unwrap().unwrap();
        assert_eq!(world.count("select count(*) from saga").await, 1);
        drop(world);
    });
}

#[tokio::test]
async fn where_no_connection_is_to_be_had_all_who_wait_are_told_at_once() {
    let world = World::new().await;
    let patience = Duration::from_millis(500);
    let pool = pool_options(1).acquire_timeout(patience).connect(&world.database.url).await.unwrap();
    let engine = Engine::builder(pool.clone(), &world.reply_topic).define(&plain()).build().unwrap();
    let busy = pool.acquire().await.unwrap();
    // Twenty sets: one after the other their callers would get an answer after ten seconds.
    let orders: Vec<u32> = (0..20 * 256).collect();
    let answers = timeout(10 * patience, start_all(&engine, &orders)).await.expect("one after the other");
    for answer in answers {
        assert!(matches!(&answer, Err(StartError::Database(error)) if is_pool_full(error)), "{answer:?}");
    }
    drop(busy);
    start(&engine, 1).await.unwrap().unwrap();
}

#[tokio::test]
async fn starts_are_told_of_a_database_that_is_away_as_of_an_outage() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pool = pool_options(8).acquire_timeout(Duration::from_millis(500));
    let pool = pool.connect_lazy(&format!("postgres://nobody@{closed}/nothing")).unwrap();
    let engine = Engine::builder(pool, "replies").define(&plain()).build().unwrap();
    let answer = start(&engine, 1).await.unwrap();
    assert!(matches!(&answer, Err(StartError::Database(error)) if is_outage(error)), "{answer:?}");
}

#[tokio::test]
async fn a_connection_that_falls_silent_is_given_up_and_starts_go_on_with_another() {
    let world = World::new().await;
    let (proxy, url) = FreezingProxy::of_database(&world.database.url).await;
    let pool = pool_options(8).connect(&url).await.unwrap();
    let engine = Engine::builder(pool.clone(), &world.reply_topic).define(&plain());
    let engine = engine.attempt_max(Duration::from_millis(500)).build().unwrap();
    start(&engine, 1).await.unwrap().unwrap();
    eventually(SOON, || async { (pool.num_idle() == 1).then_some(()) }).await;
    proxy.freeze();
    let mut number = 1;
    let started = eventually(SOON, || {
        number += 1;
        let answer = start(&engine, number);
        async {
            match timeout(SOON, answer).await.expect("it is told").unwrap() {
                Ok(()) => Some(()),
                Err(StartError::Database(error)) if is_outage(&error) => None,
                Err(error) => panic!("{error:?}"),
            }
        }
    });
    started.await;
    assert!(number > 2, "the connection that there was is silent");
    assert_eq!(world.count("select count(*) from saga").await, 2, "what did not come through did not happen");
}

//! The headers of undos about their steps; undos that cannot be done; commands that were never sent.

use crate::support::*;
use saga_core::{
    command::{Op, Outcome},
    id::{CommandId, SagaId},
    saga::{Cancelled, Engine, RetryPolicy, Saga, saga, view::Payloads},
    testkit::{deliver, time_passes},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

/// The headers that undos carry: step, what is known of it, and the command that is undone.
async fn said(world: &World, saga: SagaId) -> Vec<(String, Option<String>, Option<CommandId>)> {
    let rows: Vec<Value> = sqlx::query_scalar("select headers from outbox where key = $1 order by id")
        .bind(saga.to_string())
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
    let text = |headers: &Value, name: &str| headers[name].as_str().map(str::to_owned);
    let one = |headers: &Value| {
        let undoes = text(headers, "ce_sagaundoes").map(|id| id.parse().unwrap());
        (text(headers, "ce_sagastep").unwrap(), text(headers, "ce_sagahappened"), undoes)
    };
    rows.iter().map(one).collect()
}

#[tokio::test]
async fn an_undo_says_which_command_it_undoes_and_whether_it_succeeded() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    world.cancel(saga).await;
    world.succeed(saga).await;
    let sent = world.sent(saga).await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "-reserve", "-authorize"]);
    let says = |step: &str, known: Option<&str>, undoes| (step.to_owned(), known.map(str::to_owned), undoes);
    let expected = [
        says("authorize", None, None),
        says("reserve", None, None),
        says("reserve", Some("in_doubt"), Some(sent[1].command)),
        says("authorize", Some("yes"), Some(sent[0].command)),
    ];
    assert_eq!(said(&world, saga).await, expected);
}

#[tokio::test]
async fn an_undo_that_finds_no_record_leaves_its_saga_stuck_with_the_reason() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    world.deliver(&[rejected(&world.last(saga).await)]).await;
    for _ in 0..2 {
        let error = json!({ "error": "this participant has no record of it" });
        world.deliver(&[reply(&world.last(saga).await, Outcome::Failed, &error)]).await;
        world.time_out().await;
    }
    assert_eq!(world.status(saga).await, "stuck");
    let view = world.engine.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
    let why = view.waits.unwrap().why;
    assert!(why.ends_with("in all its attempts: this participant has no record of it"), "{why}");
    world.audit().await;
}

/// A saga whose undo of the first step cannot be built for order 11, nor its second step for order 12. Its pivot cannot
/// for order 13, until that is mended.
fn unlucky(builds: bool) -> Saga<Order> {
    let twice = RetryPolicy::exponential(2, Duration::from_millis(10), Duration::from_secs(1));
    saga::<Order>("unlucky", 1)
        .saga_deadline(Duration::from_secs(3600))
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(move |order, (), _| {
            assert!(builds || order.order != 11, "bad luck");
            Void { order: order.order, with: None }
        })
        .step("reserve", move |order, (_,)| {
            assert!(builds || order.order != 12, "bad luck");
            Reserve { order: order.order, with: None }
        })
        .undo(|order, (_,), _| Release { order: order.order, with: None })
        .pivot("capture", move |order, (_, _)| {
            assert!(builds || order.order != 13, "bad luck");
            Capture { order: order.order, with: None }
        })
        .retry(twice)
        .build()
}

fn engine(world: &World, builds: bool) -> Arc<Engine> {
    let builder = Engine::builder(world.database.pool.clone(), &world.reply_topic);
    builder.define(&unlucky(builds)).build().unwrap()
}

/// A saga that is stuck because the command of the step after `steps` others cannot be built.
async fn stuck(world: &World, order: u32, steps: usize) -> SagaId {
    let (saga, engine) = (SagaId::new(), engine(world, false));
    engine.start(saga, &unlucky(false), &Order { order }, &saga.to_string()).await.unwrap();
    for _ in 0..steps {
        deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    }
    assert_eq!((world.status(saga).await.as_str(), world.sent(saga).await.len()), ("stuck", steps));
    saga
}

#[tokio::test]
async fn a_saga_whose_command_could_not_be_built_can_be_cancelled() {
    let world = World::new().await;
    for (order, done, undone) in [(12, 1, &["-authorize"][..]), (13, 2, &["-reserve", "-authorize"])] {
        let saga = stuck(&world, order, done).await;
        let view = engine(&world, false).inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
        assert_eq!(view.steps[done].state, "waiting", "the command is not out");
        assert_eq!(view.undo_path.len(), done);
        assert_eq!(world.cancel_with(&engine(&world, false), saga).await, Cancelled::Accepted);
        for _ in undone {
            assert_eq!(world.last(saga).await.op, Op::Undo);
            let engine = engine(&world, false);
            deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
        }
        assert_eq!(world.status(saga).await, "compensated");
        assert_eq!(world.trail(saga).await[done..], *undone, "what was never sent is not undone");
    }
    world.audit().await;
}

#[tokio::test]
async fn a_pivot_that_could_not_be_built_does_not_end_the_sagas_deadline() {
    let world = World::new().await;
    let saga = stuck(&world, 13, 2).await;
    let deadline: Option<i64> = sqlx::query_scalar("select (state ->> 'deadline')::int8 from saga where saga_id = $1")
        .bind(saga.0)
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    assert!(deadline.is_some());
    world.audit().await;
}

#[tokio::test]
async fn a_command_that_could_not_be_built_is_sent_for_the_first_time_by_a_retry() {
    let world = World::new().await;
    let saga = stuck(&world, 13, 2).await;
    let mended = engine(&world, true);
    mended.retry(saga, world.revision(saga).await, "deployed", "ann").await.unwrap();
    let capture = world.last(saga).await;
    assert_eq!((capture.step.as_str(), capture.attempt), ("capture", 1));
    assert_eq!(world.cancel_with(&mended, saga).await, Cancelled::TooLate, "now it is out");
    deliver(&world.database.pool, &mended.handler(), &[succeeded(&capture)]).await.unwrap();
    assert_eq!(world.status(saga).await, "completed");

    // A resend that cannot be built is another matter: the command is out.
    let saga = SagaId::new();
    mended.start(saga, &unlucky(true), &Order { order: 13 }, "resent").await.unwrap();
    for _ in 0..2 {
        deliver(&world.database.pool, &mended.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    }
    let broken = engine(&world, false);
    time_passes(&world.database.pool).await;
    broken.tick().await.unwrap();
    assert_eq!(world.status(saga).await, "stuck");
    assert_eq!(world.cancel_with(&broken, saga).await, Cancelled::TooLate);
    deliver(&world.database.pool, &broken.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    assert_eq!(world.status(saga).await, "completed");
    world.audit().await;
}

#[tokio::test]
async fn an_undo_that_could_not_be_built_is_sent_for_the_first_time_by_a_retry() {
    let world = World::new().await;
    let (saga, broken, mended) = (SagaId::new(), engine(&world, false), engine(&world, true));
    broken.start(saga, &unlucky(false), &Order { order: 11 }, "11").await.unwrap();
    assert_eq!(world.cancel_with(&broken, saga).await, Cancelled::Accepted);
    assert_eq!((world.status(saga).await.as_str(), world.trail(saga).await.len()), ("stuck", 1));
    mended.retry(saga, world.revision(saga).await, "deployed", "ann").await.unwrap();
    assert_eq!(world.trail(saga).await, ["authorize", "-authorize"]);
    deliver(&world.database.pool, &mended.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    assert_eq!(world.status(saga).await, "compensated");
    world.audit().await;
}

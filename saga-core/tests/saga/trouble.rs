//! Silence, duplicates, latecomers, cancels, broken effects: nothing is lost, nothing happens twice, nothing is hidden.

use crate::support::*;
use async_trait::async_trait;
use saga_core::{
    command::{Op, Outcome},
    consumer::HandleError,
    id::{CommandId, SagaId},
    outbox::Tx,
    saga::{Cancelled, Engine, LocalCall, LocalEffect, LocalError, RetryError, RetryPolicy, StartError, saga},
    testkit::{deliver, eventually},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test]
async fn a_silent_participant_is_asked_again_and_then_undone_as_in_doubt() {
    let world = World::new().await;
    let saga = world.start(1).await;
    assert_eq!(world.engine.tick().await.unwrap().due, 0, "nothing is due yet");
    assert_eq!(world.time_out().await, 1);
    let [first, second]: [Sent; 2] = world.sent(saga).await.try_into().unwrap();
    assert_eq!((first.command, first.attempt, second.attempt), (second.command, 1, 2), "one command, two attempts");
    world.time_out().await;
    assert_eq!(world.trail(saga).await, ["authorize", "authorize #2", "-authorize"]);
    assert_eq!(world.last(saga).await.with.as_deref(), Some("in doubt"));
    world.deliver(&[succeeded(&first)]).await;
    assert_eq!(world.status(saga).await, "compensating", "the late success changes nothing");
    world.succeed(saga).await;
    assert_eq!(world.status(saga).await, "compensated");
    assert_eq!(world.kinds(saga).await, ["started", "due", "due", "ignored", "reply"]);
    let (_, failure) = world.notes(saga).await.pop().unwrap();
    assert_eq!(failure.unwrap()["kind"], "failed");
    world.audit().await;
}

#[tokio::test]
async fn a_failure_is_resent_after_a_pause_and_a_late_success_of_an_earlier_attempt_counts() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let first = world.last(saga).await;
    world.deliver(&[failed(&first), failed(&first)]).await;
    assert_eq!(world.trail(saga).await, ["authorize"], "the pause comes first");
    assert_eq!(world.kinds(saga).await, ["started", "reply", "ignored"]);
    world.time_out().await;
    assert_eq!(world.trail(saga).await, ["authorize", "authorize #2"]);
    world.deliver(&[succeeded(&first)]).await;
    assert_eq!(world.last(saga).await.step, "reserve");
    world.audit().await;
}

#[tokio::test]
async fn duplicates_latecomers_and_strangers_are_recorded_and_ignored() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let authorize = world.last(saga).await;
    world.deliver(&[succeeded(&authorize), succeeded(&authorize), rejected(&authorize)]).await;
    let stranger = Sent { command: CommandId(uuid::Uuid::new_v4()), ..authorize.clone() };
    world.deliver(&[succeeded(&stranger)]).await;
    // A reply that the saga does not wait for may hold anything.
    world.deliver(&[reply(&authorize, Outcome::Succeeded, &json!("nonsense"))]).await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve"]);
    assert_eq!(world.kinds(saga).await, ["started", "reply", "ignored", "ignored", "ignored"]);
    let why: Vec<String> = sqlx::query_scalar(
        "select entry ->> 'why' from saga_event where saga_id = $1 and kind = 'ignored' order by revision",
    )
    .bind(saga.0)
    .fetch_all(&world.database.pool)
    .await
    .unwrap();
    assert_eq!(why, ["duplicate", "late", "unknown"], "each kind once");
    world.audit().await;
}

#[tokio::test]
async fn a_reply_that_is_waited_for_and_cannot_be_read_is_poison_and_changes_nothing() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    for wrong in [json!({ "referenz": "x" }), json!(null), json!({ "reference": "a\u{0}b" })] {
        let refused = world.try_deliver(&[reply(&sent, Outcome::Succeeded, &wrong)]).await;
        assert!(matches!(refused, Err(HandleError::Poison(_))), "{refused:?}");
    }
    let refused = world.try_deliver(&[reply(&sent, Outcome::Rejected, &json!("?"))]).await;
    assert!(matches!(refused, Err(HandleError::Poison(_))), "{refused:?}");
    assert_eq!(world.kinds(saga).await, ["started"]);
    let spelt = json!({ "reference": "\\u0000" });
    world.deliver(&[reply(&sent, Outcome::Succeeded, &spelt)]).await;
    assert_eq!(world.kinds(saga).await, ["started", "reply"], "a backslash and some letters are no NUL");
}

#[tokio::test]
async fn a_cancel_undoes_the_open_step_at_once_until_the_pivots_command_is_issued() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    let reserve = world.last(saga).await;
    assert_eq!(world.cancel(saga).await, Cancelled::Accepted);
    assert_eq!(world.cancel(saga).await, Cancelled::AlreadyCancelling);
    assert_eq!(world.last(saga).await.with.as_deref(), Some("in doubt"));
    world.deliver(&[succeeded(&reserve)]).await;
    world.succeed(saga).await;
    world.succeed(saga).await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "-reserve", "-authorize"]);
    assert_eq!(world.status(saga).await, "compensated");
    assert_eq!(world.cancel(saga).await, Cancelled::Finished);
    assert_eq!(world.cancel(SagaId::new()).await, Cancelled::Unknown);
    let (_, failure) = world.notes(saga).await.pop().unwrap();
    let failure = failure.unwrap();
    assert_eq!((&failure["kind"], &failure["reason"]), (&json!("cancelled"), &json!("changed my mind")));

    let other = world.start(2).await;
    world.succeed(other).await;
    world.succeed(other).await;
    assert_eq!(world.last(other).await.step, "capture");
    assert_eq!(world.cancel(other).await, Cancelled::TooLate);
    world.audit().await;
}

#[tokio::test]
async fn a_cancel_and_a_reply_at_once_are_decided_one_after_the_other() {
    let world = World::new().await;
    for number in 0..20 {
        let saga = world.start(number).await;
        world.succeed(saga).await;
        let reserve = [succeeded(&world.last(saga).await)];
        let (cancelled, ()) = tokio::join!(world.cancel(saga), world.deliver(&reserve));
        let trail = world.trail(saga).await;
        match cancelled {
            Cancelled::Accepted => assert_eq!(trail, ["authorize", "reserve", "-reserve"]),
            Cancelled::TooLate => assert_eq!(trail, ["authorize", "reserve", "capture"]),
            other => panic!("{other:?}"),
        }
    }
    world.audit().await;
}

#[tokio::test]
async fn a_sagas_deadline_is_a_cancel_and_of_the_two_at_once_one_counts() {
    let world = World::new().await;
    let hurried = saga::<Order>("hurried", 1)
        .saga_deadline(Duration::from_millis(1))
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .pivot("capture", |order, (_,)| Capture { order: order.order, with: None })
        .build();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&hurried).build().unwrap();
    for number in 0..10 {
        let id = SagaId::new();
        let mut tx = world.database.pool.begin().await.unwrap();
        let order = Order { order: number };
        engine.start_in(&mut tx, id, &hurried, &order, &number.to_string()).await.unwrap();
        tx.commit().await.unwrap();
        let cancel = async {
            let mut tx = world.database.pool.begin().await.unwrap();
            let cancelled = engine.cancel_in(&mut tx, id, "changed my mind").await.unwrap();
            tx.commit().await.unwrap();
            cancelled
        };
        let due = eventually(Duration::from_secs(10), async || {
            engine.tick().await.unwrap();
            (world.status(id).await == "compensating").then_some(())
        });
        let (cancelled, ()) = tokio::join!(async { if number % 2 == 0 { Some(cancel.await) } else { None } }, due);
        assert!(matches!(cancelled, None | Some(Cancelled::Accepted | Cancelled::AlreadyCancelling)), "{cancelled:?}");
        let kind: String = sqlx::query_scalar("select state -> 'failure' ->> 'kind' from saga where saga_id = $1")
            .bind(id.0)
            .fetch_one(&world.database.pool)
            .await
            .unwrap();
        let expected = if cancelled == Some(Cancelled::Accepted) { "cancelled" } else { "deadline" };
        assert_eq!((kind.as_str(), world.trail(id).await), (expected, vec!["authorize".into(), "-authorize".into()]));
    }
}

#[tokio::test]
async fn a_steps_deadline_is_how_long_its_participant_is_waited_for_and_no_other_steps() {
    let world = World::new().await;
    let quick = Duration::from_millis(1);
    let twice = RetryPolicy::exponential(2, quick, quick);
    let hurried = saga::<Order>("hurried", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .retry(twice)
        .deadline(quick)
        .undo(|order, (), _| Void { order: order.order, with: None })
        .pivot("capture", |order, (_,)| Capture { order: order.order, with: None })
        .then("ship", |order, (_, _)| Ship { order: order.order, with: None })
        .deadline(quick)
        .build();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&hurried).build().unwrap();
    let until = async |saga: SagaId, what: &str| {
        eventually(Duration::from_secs(10), async || {
            engine.tick().await.unwrap();
            (world.trail(saga).await.last().unwrap() == what).then_some(())
        })
        .await;
    };
    let answer = async |saga: SagaId| {
        deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    };
    let [silent, answered] = [1, 2].map(|order| (SagaId::new(), Order { order }));
    for (saga, order) in [&silent, &answered] {
        engine.start(*saga, &hurried, order, &order.order.to_string()).await.unwrap();
    }
    answer(answered.0).await;
    until(silent.0, "-authorize").await;
    assert_eq!(world.trail(silent.0).await, ["authorize", "authorize #2", "-authorize"]);
    assert_eq!(world.trail(answered.0).await, ["authorize", "capture"], "it has the time that all have");
    answer(answered.0).await;
    until(answered.0, "ship #2").await;
    world.audit().await;
}

#[tokio::test]
async fn a_pivot_in_doubt_that_is_retried_by_an_operator_ends_as_its_reply_says_and_the_log_says_who() {
    let world = World::new().await;
    for (number, outcome) in [(1, Outcome::Succeeded), (2, Outcome::Rejected)] {
        let saga = world.start(number).await;
        world.succeed(saga).await;
        world.succeed(saga).await;
        world.time_out().await;
        world.deliver(&[failed(&world.last(saga).await)]).await;
        assert_eq!(world.status(saga).await, "stuck");
        let seen = world.revision(saga).await;
        world.engine.retry(saga, seen, "the gateway is back", "ann").await.unwrap();
        let again = world.engine.retry(saga, seen, "the gateway is back", "bob").await;
        assert!(matches!(again, Err(RetryError::Revision { .. })), "{again:?}");
        let capture = world.last(saga).await;
        assert_eq!((capture.step.as_str(), capture.attempt), ("capture", 3), "neither on nor back, but again");
        let (end, rest) = match outcome {
            Outcome::Succeeded => ("completed", ["ship"].as_slice()),
            _ => ("compensated", ["-reserve", "-authorize"].as_slice()),
        };
        let answer = if outcome == Outcome::Succeeded { succeeded(&capture) } else { rejected(&capture) };
        world.deliver(&[answer]).await;
        for _ in rest {
            world.succeed(saga).await;
        }
        assert_eq!(world.status(saga).await, end);
        let trail = ["authorize", "reserve", "capture", "capture #2", "capture #3"];
        assert_eq!(world.trail(saga).await, [&trail, rest].concat());
        let actions: Vec<(String, String)> = sqlx::query_as(
            "select entry ->> 'actor', entry ->> 'reason' from saga_event where saga_id = $1 and kind = 'retry'",
        )
        .bind(saga.0)
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
        assert_eq!(actions, [("ann".into(), "the gateway is back".into())], "one line per action");
    }
    world.audit().await;
}

#[tokio::test]
async fn a_silent_pivot_neither_undoes_nor_proceeds_and_still_takes_its_reply() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    world.succeed(saga).await;
    let capture = world.last(saga).await;
    world.time_out().await;
    world.time_out().await;
    assert_eq!(world.status(saga).await, "stuck");
    assert_eq!(world.time_out().await, 0, "a stuck saga does nothing by itself");
    world.audit().await;
    world.deliver(&[succeeded(&capture)]).await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "capture", "capture #2", "ship"]);
    assert_eq!(world.status(saga).await, "running");
    world.audit().await;
}

#[tokio::test]
async fn an_undo_that_does_not_get_done_is_stuck_until_somebody_retries() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.cancel(saga).await;
    let undo = world.last(saga).await;
    world.deliver(&[failed(&undo)]).await;
    world.time_out().await;
    world.deliver(&[failed(&world.last(saga).await)]).await;
    assert_eq!(world.status(saga).await, "stuck", "never compensated with an undo open");
    let seen = world.revision(saga).await;
    let stale = world.engine.retry(saga, seen - 1, "again", "ann").await;
    assert!(matches!(stale, Err(RetryError::Revision { .. })), "{stale:?}");
    world.engine.retry(saga, seen, "the gateway is back", "ann").await.unwrap();
    let twice = world.engine.retry(saga, seen + 1, "again", "ann").await;
    assert!(matches!(twice, Err(RetryError::NotStuck(_))), "{twice:?}");
    assert_eq!(world.trail(saga).await, ["authorize", "-authorize", "-authorize #2", "-authorize #3"]);
    world.succeed(saga).await;
    assert_eq!(world.status(saga).await, "compensated");
    world.audit().await;
}

#[tokio::test]
async fn a_local_effect_that_fails_sticks_its_saga_alone_and_retry_runs_it_again() {
    for panics in [false, true] {
        sticks_alone(panics).await;
    }
}

async fn sticks_alone(panics: bool) {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..5 {
        let saga = world.start(number).await;
        world.succeed(saga).await;
        world.succeed(saga).await;
        sagas.push(saga);
    }
    let broken = sagas[2];
    world.break_effect("confirm order", broken, panics).await;
    let mut replies = Vec::new();
    for saga in &sagas {
        replies.push(succeeded(&world.last(*saga).await));
    }
    world.deliver(&replies).await;
    assert_eq!(world.status(broken).await, "running", "it is tried once more");
    world.time_passes().await;
    world.engine.tick().await.unwrap();
    for saga in &sagas {
        let expected = if *saga == broken { ("stuck", 1, "capture") } else { ("running", 2, "ship") };
        let (status, notes) = (world.status(*saga).await, world.notes(*saga).await.len());
        assert_eq!((status.as_str(), notes, world.last(*saga).await.step.as_str()), expected);
    }
    world.audit().await;
    world.mend().await;
    world.engine.retry(broken, world.revision(broken).await, "mended", "ann").await.unwrap();
    assert_eq!(world.last(broken).await.step, "ship");
    assert_eq!(world.notes(broken).await.len(), 2);
    world.audit().await;
}

#[tokio::test]
async fn a_reply_to_an_unknown_version_is_set_aside_until_a_replica_knows_it() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let other = engine_of(&world.database, &world.reply_topic, 2);
    let message = succeeded(&world.last(saga).await);
    let mut tx = world.database.pool.begin().await.unwrap();
    saga_core::consumer::Handler::handle(&other.handler(), &mut tx, std::slice::from_ref(&message)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.count("select count(*) from saga_undecided").await, 1);
    assert_eq!(other.tick().await.unwrap().undecided, 0);
    assert_eq!(world.trail(saga).await, ["authorize"]);
    world.time_passes().await;
    assert_eq!(other.tick().await.unwrap().due, 0, "a replica claims only what it can decide");
    assert_eq!(world.engine.tick().await.unwrap().undecided, 1);
    assert_eq!(world.last(saga).await.step, "reserve");
    assert_eq!(world.count("select count(*) from saga_undecided").await, 0);
}

#[tokio::test]
async fn two_runners_at_once_issue_each_resend_once() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..50 {
        sagas.push(world.start(number).await);
    }
    let other = engine_of(&world.database, &world.reply_topic, 1);
    world.time_passes().await;
    let (mine, theirs) = tokio::join!(world.engine.tick(), other.tick());
    assert_eq!(mine.unwrap().due + theirs.unwrap().due, 50);
    for saga in sagas {
        assert_eq!(world.trail(saga).await, ["authorize", "authorize #2"]);
        assert_eq!(world.last(saga).await.op, Op::Do);
    }
    world.audit().await;
}

/// A handler that goes on after an error of the database, as if nothing had been.
struct Swallows;

#[async_trait]
impl LocalEffect for Swallows {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        sqlx::query("insert into note (saga_id, effect) values ($1, $2)")
            .bind(call.saga.0)
            .bind(call.name)
            .execute(&mut **tx)
            .await?;
        sqlx::query("select 1 / 0").execute(&mut **tx).await.ok();
        Ok(())
    }
}

#[tokio::test]
async fn a_local_effect_that_swallows_an_error_of_the_database_has_failed() {
    let world = World::new().await;
    let first = saga::<Order>("first", 1).local("swallow").build();
    let later = saga::<Order>("later", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .local("swallow")
        .build();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&first).define(&later);
    let engine = engine.local("swallow", Swallows).build().unwrap();
    let started = engine.start(SagaId::new(), &first, &Order { order: 1 }, "1").await;
    assert!(matches!(started, Err(StartError::Database(_))), "PostgreSQL has rolled it back: {started:?}");
    let mut tx = world.database.pool.begin().await.unwrap();
    let started = engine.start_in(&mut tx, SagaId::new(), &first, &Order { order: 2 }, "2").await;
    assert!(matches!(started, Err(StartError::Database(_))), "PostgreSQL will roll it back: {started:?}");
    tx.rollback().await.unwrap();
    assert_eq!(world.count("select count(*) from saga").await, 0);

    let sagas = [3, 4].map(|order| (SagaId::new(), Order { order }));
    let mut replies = Vec::new();
    for (saga, order) in &sagas {
        engine.start(*saga, &later, order, &order.order.to_string()).await.unwrap();
        replies.push(succeeded(&world.last(*saga).await));
    }
    deliver(&world.database.pool, &engine.handler(), &replies).await.unwrap();
    for (saga, _) in sagas {
        assert_eq!((world.trail(saga).await, world.notes(saga).await.len()), (vec!["authorize".into()], 0));
    }
    world.audit().await;
}

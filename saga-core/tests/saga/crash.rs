//! Processes that die, errors, and success that no caller hears of, at every edge of the engine's transactions; and
//! many at once.

use crate::support::*;
use saga_core::{
    command::Op,
    consumer::{Handler, Message},
    id::SagaId,
    saga::Engine,
    testkit::{FailPoint, deliver, eventually, failpoints::Fault},
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Delivers until it worked, as the consumer does: replies that failed come again. Returns the failures.
async fn deliver_at_last(world: &World, replies: &[Message]) -> usize {
    let mut failures = 0;
    while world.try_deliver(replies).await.is_err() {
        failures += 1;
        assert!(failures < 10);
    }
    failures
}

/// Drives a saga whose pivot is refused to its end; the first attempt at each command is not answered.
async fn drive(world: &World, saga: SagaId) -> usize {
    let mut failures = 0;
    while world.status(saga).await != "compensated" {
        world.time_passes().await;
        while let Err(_crash) = world.engine.tick().await {
            failures += 1;
            assert!(failures < 10);
        }
        let sent = world.last(saga).await;
        let answer = if sent.step == "capture" { rejected(&sent) } else { succeeded(&sent) };
        // The reply comes once more, as if the offsets had not been stored; the inbox is not asked here.
        failures += deliver_at_last(world, std::slice::from_ref(&answer)).await;
        failures += deliver_at_last(world, &[answer]).await;
    }
    failures
}

#[tokio::test]
async fn a_crash_at_any_edge_of_any_transaction_leaves_the_same_saga() {
    let world = World::new().await;
    let mut number = 0;
    // The timers take an error for one saga's mistake, and go on with one saga at a time: no caller sees it fail.
    for (edge, seen) in [
        ("saga.after-load", [(Fault::Crash, 1), (Fault::Error, 1), (Fault::Outage, 1)]),
        ("saga.after-store", [(Fault::Crash, 1), (Fault::Error, 1), (Fault::Outage, 1)]),
        ("saga.timers.before-commit", [(Fault::Crash, 1), (Fault::Error, 0), (Fault::Outage, 1)]),
        ("saga.timers.after-commit", [(Fault::Crash, 1), (Fault::Error, 0), (Fault::Outage, 1)]),
    ] {
        for (fault, seen) in seen {
            for passage in [0, 1, 3] {
                number += 1;
                let saga = world.start(number).await;
                let armed = FailPoint::arm(edge, &world.reply_topic, fault, passage, 1);
                let failures = drive(&world, saga).await;
                // The drop panics unless the fail point fired.
                drop(armed);
                let trail = world.trail(saga).await;
                let steps: Vec<_> = trail.iter().filter(|sent| !sent.contains('#')).collect();
                assert_eq!(steps, ["authorize", "reserve", "capture", "-reserve", "-authorize"], "{edge} {fault:?}");
                assert_eq!(failures, seen, "{edge} {fault:?} {passage}");
                assert_eq!(world.notes(saga).await.len(), 2, "opened once, cancelled once");
            }
        }
    }
    world.audit().await;
}

/// Fail points before and after a commit of the timers that is about one saga, or about replies that were set aside.
fn around_other_commits(world: &World) -> [FailPoint; 2] {
    let database = world.database.pool.connect_options().get_database().unwrap().to_owned();
    ["outbox.before-commit", "outbox.after-commit"].map(|edge| FailPoint::once(edge, &database, Fault::Crash))
}

#[tokio::test]
async fn a_crash_around_the_commit_of_a_saga_that_is_taken_alone_leaves_the_same_saga() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..3 {
        sagas.push(world.start(number).await);
    }
    world.time_passes().await;
    let armed = around_other_commits(&world);
    for _crash in &armed {
        // Together the sagas fail, so the timers take each alone.
        let _together = FailPoint::once("saga.timers.before-commit", &world.reply_topic, Fault::Error);
        world.engine.tick().await.unwrap_err();
    }
    drop(armed);
    for saga in sagas {
        // Until a transaction that died is rolled back, its sagas are passed over.
        eventually(SOON, || async {
            world.engine.tick().await.unwrap();
            (world.last(saga).await.attempt == 2).then_some(())
        })
        .await;
        let attempts: Vec<_> = world.sent(saga).await.iter().map(|sent| sent.attempt).collect();
        assert_eq!(attempts, [1, 2], "resent once");
    }
    world.audit().await;
}

#[tokio::test]
async fn a_crash_around_the_commit_of_a_reply_that_was_set_aside_leaves_the_same_saga() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let reply = succeeded(&world.last(saga).await);
    let other = engine_of(&world.database, &world.reply_topic, 2);
    let mut tx = world.database.pool.begin().await.unwrap();
    Handler::handle(&other.handler(), &mut tx, &[reply]).await.unwrap();
    tx.commit().await.unwrap();
    let armed = around_other_commits(&world);
    for _crash in &armed {
        assert_eq!(world.count("select count(*) from saga_undecided").await, 1);
        // Until the transaction that died is rolled back, the reply is passed over.
        eventually(SOON, || async { world.engine.tick().await.err() }).await;
    }
    drop(armed);
    assert_eq!(world.engine.tick().await.unwrap().undecided, 0, "it was committed the second time");
    assert_eq!(world.trail(saga).await, ["authorize", "reserve"]);
    assert_eq!(world.count("select count(*) from saga_undecided").await, 0);
    world.audit().await;
}

#[tokio::test]
async fn a_start_that_is_rolled_back_was_never_there() {
    let world = World::new().await;
    let mut tx = world.database.pool.begin().await.unwrap();
    let id = SagaId::new();
    world.engine.start_in(&mut tx, id, &order_saga(1), &Order { order: 1 }, "1").await.unwrap();
    tx.rollback().await.unwrap();
    for table in [
        "select count(*) from saga",
        "select count(*) from saga_event",
        "select count(*) from saga_due",
        "select count(*) from note",
        "select count(*) from outbox",
    ] {
        assert_eq!(world.count(table).await, 0, "{table}");
    }
    world.start(1).await;
}

/// A participant of a sort: its answer to a command depends on the saga's id, the step and the attempt.
fn answer(sent: &Sent) -> Option<Message> {
    let dice = sent.command.0.as_u64_pair().1.wrapping_add(u64::from(sent.attempt).wrapping_mul(0x9e37_79b9)) % 100;
    match (sent.op, sent.step.as_str(), dice) {
        (_, _, 0..10) if sent.attempt < 2 => None,
        (_, _, 10..20) if sent.attempt < 2 => Some(failed(sent)),
        (Op::Do, "authorize" | "reserve" | "capture", 20..30) => Some(rejected(sent)),
        _ => Some(succeeded(sent)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replicas_replies_duplicates_timers_and_cancels_at_once_leave_every_saga_whole() {
    let world = Arc::new(World::new().await);
    let mut sagas = Vec::new();
    for number in 0..120 {
        sagas.push(world.start(number).await);
    }
    let replicas: Vec<Arc<Engine>> = (0..3).map(|_| engine_of(&world.database, &world.reply_topic, 1)).collect();
    let rounds = Arc::new(AtomicUsize::new(0));
    let work = replicas.into_iter().enumerate().map(|(replica, engine)| {
        let (world, sagas, rounds) = (Arc::clone(&world), sagas.clone(), Arc::clone(&rounds));
        tokio::spawn(async move {
            loop {
                let open = world.count("select count(*) from saga where finished_at is null").await;
                if open == 0 {
                    return;
                }
                assert!(rounds.fetch_add(1, Ordering::Relaxed) < 1000, "{open} sagas do not end");
                let mut replies = Vec::new();
                // Every replica answers everything, newest first or oldest first: duplicates, late ones, reordered.
                for saga in &sagas {
                    replies.extend(world.sent(*saga).await.iter().rev().take(2).filter_map(answer));
                }
                if replica % 2 == 0 {
                    replies.reverse();
                }
                for batch in replies.chunks(37) {
                    deliver(&world.database.pool, &engine.handler(), batch).await.unwrap();
                }
                if replica == 2 {
                    for saga in sagas.iter().step_by(9) {
                        world.cancel(*saga).await;
                    }
                }
                // One replica alone lets time pass, and answers in between: on a busy machine all attempts would run
                // out unanswered.
                if replica == 0 {
                    world.time_passes().await;
                }
                engine.tick().await.unwrap();
            }
        })
    });
    for done in futures::future::join_all(work).await {
        done.unwrap();
    }
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for saga in sagas {
        let (status, trail) = (world.status(saga).await, world.trail(saga).await);
        let first: Vec<&str> = trail.iter().filter(|sent| !sent.contains('#')).map(String::as_str).collect();
        let done: Vec<&str> = first.iter().copied().filter(|sent| !sent.starts_with('-')).collect();
        let undone: Vec<&str> = first.iter().filter_map(|sent| sent.strip_prefix('-')).collect();
        let notes: Vec<String> = world.notes(saga).await.into_iter().map(|(effect, _)| effect).collect();
        match status.as_str() {
            "completed" => {
                assert_eq!(first, ["authorize", "reserve", "capture", "ship"]);
                assert_eq!(notes, ["open order", "confirm order"]);
            }
            _ => {
                let mut undoable = done.clone();
                undoable.retain(|step| *step != "capture");
                undoable.reverse();
                assert!(
                    undone == undoable || undone == undoable[1..],
                    "{trail:?}: newest first, less the rejected one"
                );
                assert_eq!(notes, ["open order", "cancel order"]);
            }
        }
        *ends.entry(status).or_default() += 1;
    }
    assert_eq!(ends.keys().collect::<Vec<_>>(), ["compensated", "completed"], "{ends:?}");
    world.audit().await;
}

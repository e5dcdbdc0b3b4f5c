//! Effects outside the database: by intent, once, whichever process dies in between.

use crate::support::{Pay, Repay, World, message, words};
use saga_core::{
    command::{Op, Outcome::*},
    id::{CommandId, SagaId},
    participant::{Happened, IntentConfig},
    service::database::pool_options,
    testkit::{FailPoint, FreezingProxy, Log, eventually, failpoints::Fault},
};
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub(crate) fn pay(say: &[&str]) -> Pay {
    Pay { say: words(say) }
}

pub(crate) fn key(saga: SagaId) -> CommandId {
    CommandId::derive(saga, "step", Op::Do, 0)
}

#[tokio::test]
async fn intents_on_a_full_pool_wait_for_it_and_say_so_and_no_outage() {
    let world = World::new().await;
    let pool = pool_options(1).acquire_timeout(Duration::from_millis(100)).connect(&world.database.url).await.unwrap();
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
    let log = Log::hear("info");
    let busy = pool.acquire().await.unwrap();
    let (intents, stop) = (world.participant.intents(pool), CancellationToken::new());
    let running = intents.run(stop.clone());
    let meanwhile = async {
        let said = eventually(Duration::from_secs(30), || async { log.warnings().pop() }).await;
        assert!(said["dependency"].as_str().unwrap().starts_with("the pool of connections to database"), "{said}");
        assert!(said["reason"].as_str().unwrap().contains("a larger pool"), "{said}");
        drop(busy);
        eventually(Duration::from_secs(30), || async { (world.intents().await == 0).then_some(()) }).await;
        stop.cancel();
    };
    tokio::join!(running, meanwhile);
    assert_eq!(world.outcomes(saga).await, [Succeeded]);
    assert!(log.said("waiting for the database").is_empty(), "{:?}", log.warnings());
}

#[tokio::test]
async fn an_effect_is_called_after_the_commit_and_answered_when_it_is_certain() {
    let world = World::new().await;
    let [yes, no, at_once] = std::array::from_fn(|_| SagaId::new());
    world
        .deliver(&[
            message(yes, Op::Do, &pay(&["yes"])),
            message(no, Op::Do, &pay(&["no"])),
            message(at_once, Op::Do, &pay(&["refuse at once"])),
        ])
        .await;
    assert_eq!(world.outcomes(yes).await, []);
    assert_eq!(world.outcomes(at_once).await, [Rejected]);
    world.settle().await;
    assert_eq!(world.outcomes(yes).await, [Succeeded]);
    assert_eq!(world.outcomes(no).await, [Rejected]);
    assert_eq!((world.effects(yes).await, world.effects(no).await), (1, 0));
    assert_eq!(world.intents().await, 0);
}

#[tokio::test]
async fn the_relay_is_told_when_an_effect_is_settled() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
    let mut nudges = world.database.nudges().await;
    world.settle().await;
    timeout(Duration::from_secs(10), nudges.recv()).await.expect("the relay is told").unwrap();
    assert_eq!(world.outcomes(saga).await, [Succeeded]);
}

#[tokio::test]
async fn attempts_that_wait_for_a_locked_table_leave_no_backend_beside_the_pools() {
    let world = World::new().await;
    let sagas: Vec<_> = (0..21).map(|_| SagaId::new()).collect();
    let messages: Vec<_> = sagas.iter().map(|&saga| message(saga, Op::Do, &pay(&["yes"]))).collect();
    world.deliver(&messages).await;
    let pool = pool_options(4).connect(&world.database.url).await.unwrap();
    let config = IntentConfig {
        call_timeout: Duration::from_millis(100),
        claim_margin: Duration::from_millis(100),
        first_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(1),
        poll: Duration::from_millis(10),
        max_attempts: 2,
        database_timeout: Duration::from_millis(300),
        ..IntentConfig::default()
    };
    let executor = world.participant.intents(pool).with_config(config);
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (executor, stop) = (executor.clone(), stop.clone());
        async move { executor.run(stop).await }
    });

    let mut other = world.database.pool.begin().await.unwrap();
    sqlx::query("lock participant_fence in access exclusive mode").execute(&mut *other).await.unwrap();
    let mut most = 0;
    let calls = || sagas.iter().map(|&saga| world.provider.calls.of(key(saga))).sum::<usize>();
    while calls() < 100 {
        most = most.max(world.waiting_for_locks().await);
    }
    assert!((1..=4).contains(&most), "{most} backends waited at once");

    // The database was at fault: no attempt is counted, and all are settled once it works.
    other.rollback().await.unwrap();
    eventually(Duration::from_secs(30), || async { (world.intents().await == 0).then_some(()) }).await;
    for saga in sagas {
        assert_eq!((world.outcomes(saga).await, world.effects(saga).await), (vec![Succeeded], 1));
    }
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_resend_while_the_call_is_open_adds_nothing_and_later_gets_the_stored_reply() {
    let world = World::new().await;
    let saga = SagaId::new();
    for _ in 0..3 {
        world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
    }
    assert_eq!(world.intents().await, 1);
    world.settle().await;
    world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
    assert_eq!(world.outcomes(saga).await, [Succeeded, Succeeded]);
    assert_eq!(world.provider.calls.of(key(saga)), 1);
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_under_the_same_key() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["done, silence", "yes"]))]).await;
    world.settle().await;
    assert_eq!(world.replies(saga).await[0].payload, serde_json::json!({ "by_call": 1 }));
    assert_eq!(world.provider.calls.of(key(saga)), 2);
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn when_attempts_run_out_the_command_fails_in_doubt_and_a_resend_starts_anew() {
    let log = Log::hear("warn");
    let world = World::new().await;
    let saga = SagaId::new();
    let resend = || message(saga, Op::Do, &pay(&["silence", "silence", "silence", "yes"]));
    world.deliver(&[resend()]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Failed]);
    world.settle().await;
    assert_eq!(world.provider.calls.of(key(saga)), 3, "given up");
    let [line] = &log.said("no certain answer:")[..] else { panic!("{:?}", log.warnings()) };
    assert_eq!((&line["saga"], &line["command"]), (&saga.to_string().into(), &key(saga).to_string().into()), "{line}");
    world.deliver(&[resend()]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Failed, Succeeded]);
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn a_record_that_never_ends_is_counted_and_given_up_and_others_flow() {
    let world = World::new().await;
    let [hangs, other] = std::array::from_fn(|_| SagaId::new());
    world.deliver(&[message(hangs, Op::Do, &pay(&["record hangs"])), message(other, Op::Do, &pay(&["yes"]))]).await;
    let config = IntentConfig {
        max_attempts: 2,
        first_delay: Duration::ZERO,
        poll: Duration::from_millis(20),
        database_timeout: Duration::from_secs(2),
        ..IntentConfig::default()
    };
    let (executor, stop) =
        (world.participant.intents(world.database.pool.clone()).with_config(config), CancellationToken::new());
    let meanwhile = async {
        let is_given_up = async || (world.outcomes(hangs).await == [Failed]).then_some(());
        eventually(Duration::from_secs(30), is_given_up).await;
        stop.cancel();
    };
    tokio::join!(executor.run(stop.clone()), meanwhile);

    assert!((2..=4).contains(&world.provider.calls.of(key(hangs))), "each attempt counted");
    let error = world.replies(hangs).await[0].payload["error"].to_string();
    assert!(error.contains("did not end within 1.5s"), "{error}");
    assert_eq!((world.outcomes(other).await, world.effects(hangs).await), (vec![Succeeded], 0));
}

#[tokio::test]
async fn an_undo_waits_for_the_open_call_and_is_told_what_it_came_to() {
    let world = World::new().await;
    let cases: [(&[&str], Option<Happened<usize>>); 3] =
        [(&["yes"], Some(Happened::Yes(1))), (&["no"], None), (&["done, silence"], Some(Happened::InDoubt))];
    for (say, expected) in cases {
        let saga = SagaId::new();
        // The undo, and a duplicate of it, come while the intent is open.
        world.deliver(&[message(saga, Op::Do, &pay(say)), message(saga, Op::Undo, &Repay)]).await;
        world.deliver(&[message(saga, Op::Undo, &Repay)]).await;
        assert_eq!(world.outcomes(saga).await, [], "{say:?}");
        world.settle().await;
        let last = world.provider.heard.lock().unwrap().pop();
        let last = last.map(|happened| match happened {
            Happened::Yes(added) => Happened::Yes(added.by_call),
            Happened::InDoubt => Happened::InDoubt,
        });
        assert_eq!(last, expected, "{say:?}");
        assert_eq!(*world.outcomes(saga).await.last().unwrap(), Succeeded, "{say:?}");
        assert_eq!(world.replies(saga).await.len(), 2, "{say:?}");
        assert!(!world.provider.done.lock().unwrap().contains_key(&key(saga)), "{say:?}: it is taken back");
        assert_eq!((world.effects(saga).await, world.intents().await), (0, 0), "{say:?}");
        // Messages that come late change nothing.
        world.deliver(&[message(saga, Op::Do, &pay(say)), message(saga, Op::Undo, &Repay)]).await;
        world.settle().await;
        assert!(!world.provider.done.lock().unwrap().contains_key(&key(saga)), "{say:?}");
        assert_eq!((world.effects(saga).await, world.intents().await), (0, 0), "{say:?}");
    }
}

#[tokio::test]
async fn an_undo_of_what_never_came_asks_outside_and_refuses_what_follows() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Undo, &Repay), message(saga, Op::Do, &pay(&["yes"]))]).await;
    assert_eq!(world.outcomes(saga).await, [Rejected], "before anybody is called");
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Rejected, Succeeded]);
    assert_eq!(world.provider.calls.of(key(saga)), 0);
    assert_eq!(*world.provider.voided.lock().unwrap(), [key(saga)]);
}

#[tokio::test]
async fn wherever_the_process_dies_the_effect_happens_once_and_is_answered_once() {
    let world = World::new().await;
    for edge in [
        "participant.before-call",
        "participant.after-call",
        "participant.before-settle-commit",
        "participant.after-settle-commit",
    ] {
        for op in [Op::Do, Op::Undo] {
            let saga = SagaId::new();
            world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
            if op == Op::Undo {
                world.settle().await;
                world.deliver(&[message(saga, Op::Undo, &Repay)]).await;
            }
            let armed = FailPoint::once(edge, world.name, Fault::Crash);
            assert_eq!(world.executor().run_once().await.unwrap(), 1);
            drop(armed);
            // Another process waits for the dead one's claim to run out.
            let (token, other) = (CancellationToken::new(), world.executor());
            let running = tokio::spawn({
                let token = token.clone();
                async move { other.run(token).await }
            });
            let replies = if op == Op::Do { 1 } else { 2 };
            eventually(Duration::from_secs(10), async || {
                (world.intents().await == 0 && world.replies(saga).await.len() == replies).then_some(())
            })
            .await;
            token.cancel();
            running.await.unwrap();
            assert_eq!(world.outcomes(saga).await, vec![Succeeded; replies], "{edge} {op:?}");
            assert_eq!(world.effects(saga).await, i64::from(op == Op::Do), "{edge} {op:?}");
            assert_eq!(world.provider.done.lock().unwrap().contains_key(&key(saga)), op == Op::Do, "{edge} {op:?}");
        }
    }
}

#[tokio::test]
async fn a_nul_in_what_an_effect_says_keeps_nobody_from_being_answered() {
    let world = World::new().await;
    for words in [["panic with NUL"; 3], ["doubt with NUL"; 3]] {
        let saga = SagaId::new();
        world.deliver(&[message(saga, Op::Do, &pay(&words))]).await;
        world.settle().await;
        let [reply] = &world.replies(saga).await[..] else { panic!("it was not given up: {words:?}") };
        assert_eq!(reply.outcome, Failed);
        assert!(reply.payload["error"].as_str().unwrap().contains('\u{fffd}'), "{reply:?}");
        let error: String = sqlx::query_scalar("select last_error from participant_intent where saga_id = $1")
            .bind(saga.0)
            .fetch_one(&world.database.pool)
            .await
            .unwrap();
        assert!(error.contains('\u{fffd}'), "{error:?}");
    }
}

#[tokio::test]
async fn an_effect_that_panics_is_given_up_like_one_without_an_answer() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["panic", "panic", "panic", "yes"]))]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Failed]);
    world.deliver(&[message(saga, Op::Do, &pay(&[]))]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Failed, Succeeded]);
    assert_eq!(world.provider.calls.of(key(saga)), 4);
}

#[tokio::test]
async fn who_outlives_its_claim_changes_nothing_even_if_its_own_process_claimed_it_again() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["hang"]))]).await;
    let patient = IntentConfig { call_timeout: Duration::from_secs(60), ..IntentConfig::default() };
    let executor = world.executor().with_config(patient);
    let first = tokio::spawn({
        let executor = executor.clone();
        async move { executor.run_once().await }
    });
    world.provider.hangs.notified().await;
    // The claim is as if it had run out while the process could not get at it.
    sqlx::query("update participant_intent set due_at = clock_timestamp()")
        .execute(&world.database.pool)
        .await
        .unwrap();
    let second = tokio::spawn(async move { executor.run_once().await });
    world.provider.hangs.notified().await;
    let claim = async || -> Option<uuid::Uuid> {
        let claimed = sqlx::query_scalar("select claimed_by from participant_intent");
        claimed.fetch_one(&world.database.pool).await.unwrap()
    };
    let held = claim().await;
    assert!(held.is_some());
    world.provider.go_on.notify_one();
    first.await.unwrap().unwrap();
    assert_eq!(claim().await, held, "the first had nothing to let go of");
    world.provider.go_on.notify_one();
    second.await.unwrap().unwrap();
    assert_eq!((world.outcomes(saga).await, world.effects(saga).await), (vec![], 0));
}

#[tokio::test]
async fn two_executors_share_the_work_and_call_each_intent_once() {
    let world = World::new().await;
    let sagas: Vec<_> = (0..100).map(|_| SagaId::new()).collect();
    let batch: Vec<_> = sagas.iter().map(|&saga| message(saga, Op::Do, &pay(&["yes"]))).collect();
    world.deliver(&batch).await;
    let token = CancellationToken::new();
    let executors: Vec<_> = (0..2)
        .map(|_| {
            let (executor, token) = (world.executor(), token.clone());
            tokio::spawn(async move { executor.run(token).await })
        })
        .collect();
    eventually(Duration::from_secs(20), async || (world.intents().await == 0).then_some(())).await;
    token.cancel();
    for executor in executors {
        executor.await.unwrap();
    }
    for saga in sagas {
        assert_eq!(world.provider.calls.of(key(saga)), 1);
        assert_eq!(world.outcomes(saga).await, [Succeeded]);
    }
}

#[tokio::test]
async fn an_executor_whose_connections_fall_silent_goes_on_with_others() {
    let world = World::new().await;
    let (proxy, url) = FreezingProxy::of_database(&world.database.url).await;
    let executor = world.participant.intents(pool_options(4).connect(&url).await.unwrap());
    let token = CancellationToken::new();
    let running = tokio::spawn({
        let token = token.clone();
        async move { executor.run(token).await }
    });
    for _ in 0..2 {
        let saga = SagaId::new();
        world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
        eventually(Duration::from_secs(40), async || (world.outcomes(saga).await == [Succeeded]).then_some(())).await;
        proxy.freeze();
    }
    token.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn an_intent_that_cannot_be_read_is_put_off_and_the_others_are_performed() {
    let log = Log::hear("warn");
    let world = World::new().await;
    let sagas: [SagaId; 3] = std::array::from_fn(|_| SagaId::new());
    world.deliver(&sagas.map(|saga| message(saga, Op::Do, &pay(&["yes"])))).await;
    let set_origin = async |origin: &str| {
        sqlx::query("update participant_intent set origin = origin || $2::jsonb where saga_id = $1")
            .bind(sagas[1].0)
            .bind(origin)
            .execute(&world.database.pool)
            .await
            .unwrap();
    };
    set_origin(r#"{"version": "a later build's"}"#).await;
    world.settle().await;
    for (saga, outcomes) in sagas.into_iter().zip([&[Succeeded][..], &[], &[Succeeded]]) {
        assert_eq!(world.outcomes(saga).await, outcomes);
    }
    let [line] = &log.said("this build cannot read an intent")[..] else { panic!("{:?}", log.warnings()) };
    assert_eq!(line["command"], key(sagas[1]).to_string());
    let (attempts, error): (i32, String) = sqlx::query_as("select attempts, last_error from participant_intent")
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    assert!(attempts == 0 && error.contains("origin"), "{attempts} {error}");

    set_origin(r#"{"version": 1}"#).await;
    sqlx::query("update participant_intent set due_at = clock_timestamp()")
        .execute(&world.database.pool)
        .await
        .unwrap();
    world.settle().await;
    assert_eq!(world.outcomes(sagas[1]).await, [Succeeded]);
}

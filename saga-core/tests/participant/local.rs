//! Commands that are handled within the batch's transaction.

use crate::support::{Add, Pay, Remove, World, message, words};
use saga_core::{
    command::{Op, Outcome::*},
    consumer::{Consumer, ConsumerConfig, HandleError, Handler},
    id::{CommandId, SagaId},
    retry::Backoff,
    testkit::{Record, TestTopic, brokers, eventually, produce, unique},
};
use serde_json::json;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(40);

fn add(say: &[&str]) -> Add {
    Add { say: words(say) }
}

#[tokio::test]
async fn a_resent_command_is_answered_again_and_happens_once() {
    // The handler cannot even be called twice: the effect's key is unique.
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &add(&["yes"]))]).await;
    world.deliver(&[message(saga, Op::Do, &add(&["yes"])), message(saga, Op::Do, &add(&["yes"]))]).await;
    let replies = world.replies(saga).await;
    assert_eq!(replies.len(), 3);
    assert!(replies.iter().all(|reply| *reply == replies[0]));
    assert_eq!(replies[0].kind, "test.add.v1.reply");
    assert_eq!(replies[0].payload, json!({ "by_call": 1 }));
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn a_handler_that_swallows_an_error_of_the_database_has_not_handled_its_command() {
    let world = World::new().await;
    let saga = SagaId::new();
    // The command comes with its fence taken for new, and with its fence locked.
    for _ in 0..2 {
        let answer = world.try_deliver(&[message(saga, Op::Do, &add(&["swallow an error"]))]).await;
        assert!(matches!(answer, Err(HandleError::Database(_))), "{answer:?}");
        assert_eq!((world.replies(saga).await.len(), world.effects(saga).await), (0, 0));
    }
}

#[tokio::test]
async fn a_reply_says_whose_it_is() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &add(&["yes"]))]).await;
    let headers: serde_json::Value =
        sqlx::query_scalar("select headers from outbox").fetch_one(&world.database.pool).await.unwrap();
    let command = CommandId::derive(saga, "step", Op::Do, 0).to_string();
    assert_eq!(headers["ce_sagaid"], saga.to_string());
    assert_eq!(headers["ce_sagastep"], "step");
    assert_eq!(headers["ce_causationid"], command);
    assert_eq!(headers["ce_outcome"], "succeeded");
    assert_eq!(headers["traceparent"], "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    assert!(headers.get("ce_replyto").is_none());
}

#[tokio::test]
async fn a_refusal_leaves_no_writes_and_its_batch_keeps_theirs() {
    let world = World::new().await;
    let [yes, no, later, also] = std::array::from_fn(|_| SagaId::new());
    // The batch comes twice: the second starts with a savepoint per command, as the first one had refusals.
    for _ in 0..2 {
        world
            .deliver(&[
                message(yes, Op::Do, &add(&["yes"])),
                message(no, Op::Do, &add(&["no"])),
                message(later, Op::Do, &add(&["later"])),
                message(also, Op::Do, &add(&["yes"])),
            ])
            .await;
    }
    assert_eq!(world.outcomes(no).await, [Rejected, Rejected]);
    assert_eq!(world.outcomes(later).await, [Failed, Failed]);
    assert_eq!(world.outcomes(yes).await, [Succeeded, Succeeded]);
    for (saga, effects) in [(yes, 1), (no, 0), (later, 0), (also, 1)] {
        assert_eq!(world.effects(saga).await, effects);
    }
}

#[tokio::test]
async fn a_failed_command_stays_open_and_a_resend_tries_again() {
    let world = World::new().await;
    let saga = SagaId::new();
    for _ in 0..3 {
        world.deliver(&[message(saga, Op::Do, &add(&["later", "yes", "no"]))]).await;
    }
    assert_eq!(world.outcomes(saga).await, [Failed, Succeeded, Succeeded]);
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn an_undo_takes_back_once_and_is_answered_again() {
    let world = World::new().await;
    let saga = SagaId::new();
    // Both come in one batch: the undo sees what its predecessor in the batch did.
    world.deliver(&[message(saga, Op::Do, &add(&["yes"])), message(saga, Op::Undo, &Remove)]).await;
    world.deliver(&[message(saga, Op::Undo, &Remove)]).await;
    assert_eq!(world.outcomes(saga).await, [Succeeded, Succeeded, Succeeded]);
    assert_eq!(world.calls.of(CommandId::derive(saga, "step", Op::Undo, 0)), 1);
    assert_eq!(world.effects(saga).await, 0);
    // A late duplicate of the do gets the answer that it got before, and does nothing.
    world.deliver(&[message(saga, Op::Do, &add(&["yes"]))]).await;
    assert_eq!(world.effects(saga).await, 0);
}

#[tokio::test]
async fn an_undo_that_comes_first_refuses_the_command_that_follows() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Undo, &Remove)]).await;
    for _ in 0..2 {
        world.deliver(&[message(saga, Op::Do, &add(&["yes"]))]).await;
    }
    assert_eq!(world.outcomes(saga).await, [Succeeded, Rejected, Rejected]);
    assert_eq!(world.effects(saga).await, 0);
    assert_eq!(world.calls.of(CommandId::derive(saga, "step", Op::Undo, 0)), 0, "there was nothing to undo");
}

#[tokio::test]
async fn an_undo_of_a_refused_or_failed_command_has_nothing_to_do() {
    let world = World::new().await;
    for say in ["no", "later"] {
        let saga = SagaId::new();
        world.deliver(&[message(saga, Op::Do, &add(&[say]))]).await;
        world.deliver(&[message(saga, Op::Undo, &Remove)]).await;
        assert_eq!(world.outcomes(saga).await[1], Succeeded);
        assert_eq!(world.calls.of(CommandId::derive(saga, "step", Op::Undo, 0)), 0);
        world.deliver(&[message(saga, Op::Do, &add(&["yes"]))]).await;
        assert_eq!(world.effects(saga).await, 0, "after its undo a command stays refused");
    }
}

#[tokio::test]
async fn what_can_never_be_handled_is_poison() {
    let world = World::new().await;
    let saga = SagaId::new();
    let good = || message(saga, Op::Do, &add(&["yes"]));
    let spoil = |f: &dyn Fn(&mut saga_core::consumer::Message)| {
        let mut bad = good();
        f(&mut bad);
        bad
    };
    for kind in ["test.unknown.v1", "test.add.v2"] {
        let unknown = world.try_deliver(&[spoil(&|m| m.envelope.kind = kind.into())]).await;
        assert!(matches!(unknown, Err(HandleError::Failed(_))), "a later build may know {kind}: {unknown:?}");
    }
    let bad = [
        spoil(&|m| m.payload = Some(b"{".to_vec())),
        spoil(&|m| m.payload = None),
        spoil(&|m| {
            let deep = format!("{}1{}", "[".repeat(101), "]".repeat(101));
            m.payload = Some(format!(r#"{{"say":[],"more":{deep}}}"#).into_bytes());
        }),
        spoil(&|m| m.envelope.saga = None),
        spoil(&|m| m.envelope.saga.as_mut().unwrap().op = Op::Undo),
        spoil(&|m| m.envelope.saga.as_mut().unwrap().reply_to = None),
        spoil(&|m| m.envelope.saga.as_mut().unwrap().step = "a\0b".into()),
        spoil(&|m| m.envelope.saga.as_mut().unwrap().step = "x".repeat(10_000)),
        spoil(&|m| m.envelope.saga.as_mut().unwrap().occurrence = u32::MAX),
    ];
    for message in bad {
        let result = world.try_deliver(std::slice::from_ref(&message)).await;
        assert!(matches!(result, Err(HandleError::Poison(_))), "{message:?}: {result:?}");
    }
    // Another command comes in the place of one that was seen.
    world.deliver(&[good()]).await;
    let other = spoil(&|m| m.envelope.saga.as_mut().unwrap().command = CommandId(saga.0));
    assert!(matches!(world.try_deliver(&[other]).await, Err(HandleError::Poison(_))));
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn a_command_with_its_fields_in_an_array_is_poison_and_one_more_field_is_not() {
    let world = World::new().await;
    let saga = SagaId::new();
    let with = |payload: &[u8]| saga_core::consumer::Message {
        payload: Some(payload.to_vec()),
        ..message(saga, Op::Do, &add(&["yes"]))
    };
    let refused = world.try_deliver(&[with(br#"[["yes"]]"#)]).await.unwrap_err();
    let why = "an object with its fields by their names";
    assert!(matches!(&refused, HandleError::Poison(reason) if reason.contains(why)), "{refused:?}");
    assert_eq!(world.effects(saga).await, 0);
    world.deliver(&[with(br#"{"say":["yes"],"later":[1]}"#)]).await;
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn a_large_batch_is_answered_whole_and_again() {
    let world = World::new().await;
    let batch: Vec<_> =
        (0..500).map(|_| message(SagaId::new(), Op::Do, &Pay { say: words(&["refuse at once"]) })).collect();
    // The commands are refused at once, twice each: once together, once apart. Then they are answered from the fences
    // alone.
    world.deliver(&batch).await;
    world.deliver(&batch).await;
    let replies: i64 = sqlx::query_scalar("select count(*) from outbox").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!(replies, 1_000);
}

#[tokio::test]
async fn undos_that_wait_for_their_commands_transaction_see_what_it_did() {
    let world = World::new().await;
    let sagas: [SagaId; 5] = std::array::from_fn(|_| SagaId::new());
    let dos = || sagas.map(|saga| message(saga, Op::Do, &add(&["later", "yes"])));
    let undos = sagas.map(|saga| message(saga, Op::Undo, &Remove));
    // The fences are there, so that the transaction waits for rows that change under it, not for rows to appear.
    world.deliver(&dos()).await;
    let mut doing = world.database.pool.begin().await.unwrap();
    sqlx::query("select from participant_fence for update").execute(&mut *doing).await.unwrap();
    let undoing = async {
        let mut tx = world.database.pool.begin().await.unwrap();
        // This is the plan that there is when there are many fences: PostgreSQL 18 loses rows in it.
        sqlx::raw_sql(
            "set local enable_seqscan = off; set local enable_hashjoin = off; set local enable_mergejoin = off",
        )
        .execute(&mut *tx)
        .await
        .unwrap();
        world.participant.handle(&mut tx, &undos).await.unwrap();
        tx.commit().await.unwrap();
    };
    let done = async {
        eventually(Duration::from_secs(10), || async { (world.waiting_for_locks().await > 0).then_some(()) }).await;
        world.participant.handle(&mut doing, &dos()).await.unwrap();
        doing.commit().await.unwrap();
    };
    tokio::join!(undoing, done);
    for saga in sagas {
        assert_eq!(world.outcomes(saga).await, [Failed, Succeeded, Succeeded]);
        assert_eq!(world.effects(saga).await, 0, "undone, and there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_in_a_state_of_a_later_build_parks_its_command_and_no_other() {
    let (world, topic) = (World::new().await, TestTopic::create("commands", 1).await);
    let [strange, undone] = std::array::from_fn(|_| SagaId::new());
    let others: [SagaId; 8] = std::array::from_fn(|_| SagaId::new());
    let pool = &world.database.pool;
    world.deliver(&[strange, undone].map(|saga| message(saga, Op::Do, &add(&["yes"])))).await;
    // A later build knows more states, and its migration lets them in.
    sqlx::raw_sql(
        "alter table participant_fence
                drop constraint participant_fence_run_state_known, drop constraint participant_fence_run_reply_iff_final,
                drop constraint participant_fence_undo_state_known",
    )
    .execute(pool)
    .await
    .unwrap();
    let set = async |run: &str, undo: &str| {
        for (sql, state, saga) in [
            ("update participant_fence set run_state = $1 where saga_id = $2", run, strange),
            ("update participant_fence set undo_state = $1 where saga_id = $2", undo, undone),
        ] {
            sqlx::query(sql).bind(state).bind(saga.0).execute(pool).await.unwrap();
        }
    };
    set("postponed", "half-done").await;
    let mut commands: Vec<_> = others.map(|saga| message(saga, Op::Do, &add(&["yes"]))).into();
    commands.insert(3, message(strange, Op::Do, &add(&["yes"])));
    commands.insert(6, message(undone, Op::Undo, &Remove));
    produce(&topic, &commands.iter().map(Record::from).collect::<Vec<_>>()).await;

    let mut config = ConsumerConfig::new(&brokers(), &unique("group"), [topic.name()]);
    config.attempts = 1_000;
    config.backoff = Backoff::doubling(Duration::from_millis(50), Duration::from_millis(200));
    let stop = CancellationToken::new();
    let consumer = Consumer::new(config, pool.clone(), world.participant.clone());
    let running = tokio::spawn(consumer.run(stop.clone()));
    let parked = async || -> Vec<String> {
        sqlx::query_scalar("select reason from inbox_parked order by record_offset").fetch_all(pool).await.unwrap()
    };
    let reasons = eventually(SOON, || async { Some(parked().await).filter(|parked| parked.len() == 2) }).await;
    for (reason, state) in reasons.iter().zip(["\"postponed\"", "\"half-done (of its undo)\""]) {
        assert!(reason.contains(state) && reason.contains("a later build wrote it. Run that build"), "{reason}");
    }
    for saga in others {
        eventually(SOON, || async { (world.outcomes(saga).await == [Succeeded]).then_some(()) }).await;
    }
    assert_eq!((world.outcomes(strange).await, world.outcomes(undone).await), (vec![Succeeded], vec![Succeeded]));
    // Nothing was written over what the later build wrote, and once that is settled, both commands get their answers.
    set("succeeded", "absent").await;
    for saga in [strange, undone] {
        eventually(SOON, || async { (world.outcomes(saga).await == [Succeeded, Succeeded]).then_some(()) }).await;
    }
    eventually(SOON, || async { parked().await.is_empty().then_some(()) }).await;
    assert_eq!((world.effects(strange).await, world.effects(undone).await), (1, 0));
    stop.cancel();
    running.await.unwrap().unwrap();
}

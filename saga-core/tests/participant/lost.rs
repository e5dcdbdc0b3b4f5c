//! A participant's record of a step is gone: a restore, an asynchronous failover, another topic. The undo then depends
//! on what the orchestrator knows, and on where the effect is.

use crate::support::{Add, Pay, Remove, RemoveHandler, Repay, World, message, undo, words};
use saga_core::{
    command::{Happened, Op, Outcome::*},
    consumer::{HandleError, Message},
    id::{CommandId, SagaId},
    participant::{IntentConfig, Participant},
    testkit::{Log, deliver},
};
use std::{sync::Arc, time::Duration};

const YES: Happened = Happened::Yes(());

fn add() -> Add {
    Add { say: words(&["yes"]) }
}

fn pay(say: &[&str]) -> Pay {
    Pay { say: words(say) }
}

fn key(saga: SagaId, op: Op) -> CommandId {
    CommandId::derive(saga, "step", op, 0)
}

#[tokio::test]
async fn an_undo_of_a_success_that_left_no_record_fails_and_says_why() {
    let world = World::new().await;
    let log = Log::hear("warn");
    type Commands = fn(SagaId) -> [Message; 2];
    let local: Commands = |saga| [message(saga, Op::Do, &add()), undo(saga, YES, &Remove)];
    let external: Commands = |saga| [message(saga, Op::Do, &pay(&["yes"])), undo(saga, YES, &Repay)];
    for commands in [local, external] {
        let saga = SagaId::new();
        let [act, _] = commands(saga);
        world.deliver(&[act]).await;
        world.settle().await;
        world.lose(saga).await;
        // The undo and its resend fail; a late duplicate of the command is refused.
        for attempt in 1..=2 {
            let [late, undo] = commands(saga);
            world.deliver(&[undo]).await;
            world.deliver(&[late]).await;
            world.settle().await;
            assert_eq!(world.replies(saga).await.len(), 1 + 2 * attempt);
        }
        assert_eq!(world.outcomes(saga).await, [Succeeded, Failed, Rejected, Failed, Rejected]);
        let said = world.replies(saga).await[1].payload["error"].as_str().unwrap().to_owned();
        assert!(said.contains("this participant has no record of it"), "{said}");
        assert_eq!(world.calls.of(key(saga, Op::Undo)), 0, "the handler is not called");
        assert_eq!((world.effects(saga).await, world.intents().await), (0, 0));
        assert!(
            log.said("a command fails").iter().any(|line| line["saga"] == saga.to_string()),
            "{:?}",
            log.warnings()
        );
    }
    assert_eq!(*world.provider.voided.lock().unwrap(), [], "whether it is this provider is not known");
}

#[tokio::test]
async fn a_local_effect_in_doubt_is_lost_with_its_record_and_needs_no_undo() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &add())]).await;
    world.lose(saga).await;
    world.deliver(&[undo(saga, Happened::InDoubt, &Remove), message(saga, Op::Do, &add())]).await;
    assert_eq!(world.outcomes(saga).await, [Succeeded, Succeeded, Rejected]);
    assert_eq!((world.calls.of(key(saga, Op::Undo)), world.effects(saga).await), (0, 0));
}

#[tokio::test]
async fn an_external_effect_in_doubt_is_taken_back_though_its_record_is_lost() {
    let world = World::new().await;
    for say in [["yes"], ["done, silence"]] {
        let saga = SagaId::new();
        world.deliver(&[message(saga, Op::Do, &pay(&say))]).await;
        world.executor().run_once().await.unwrap();
        assert!(world.provider.done.lock().unwrap().contains_key(&key(saga, Op::Do)), "{say:?}");
        let before = world.replies(saga).await.len();
        world.lose(saga).await;

        // The undo is of an orchestrator that sends what it knows, and then twice of one that does not yet.
        let say_nothing = || message(saga, Op::Undo, &Repay);
        world.deliver(&[undo(saga, Happened::InDoubt, &Repay)]).await;
        world.deliver(&[message(saga, Op::Do, &pay(&["yes"])), say_nothing()]).await;
        world.settle().await;
        world.deliver(&[say_nothing()]).await;
        world.settle().await;

        assert_eq!(world.outcomes(saga).await[before..], [Rejected, Succeeded, Succeeded], "{say:?}");
        assert!(!world.provider.done.lock().unwrap().contains_key(&key(saga, Op::Do)), "{say:?}: it is taken back");
        assert_eq!((world.provider.calls.of(key(saga, Op::Undo)), world.intents().await), (1, 0), "{say:?}");
    }
}

#[tokio::test]
async fn an_undo_that_says_nothing_is_in_doubt_and_undoes_the_command_of_its_step() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Undo, &Repay)]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Succeeded]);
    assert_eq!(*world.provider.voided.lock().unwrap(), [key(saga, Op::Do)]);
}

#[tokio::test]
async fn a_call_that_is_under_way_when_its_record_is_lost_has_no_effect_later() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["arrive late"]))]).await;
    let patient = IntentConfig { call_timeout: Duration::from_secs(60), ..IntentConfig::default() };
    let executor = world.executor().with_config(patient);
    let call = tokio::spawn(async move { executor.run_once().await });
    world.provider.hangs.notified().await;
    world.lose(saga).await;

    world.deliver(&[undo(saga, Happened::InDoubt, &Repay)]).await;
    world.settle().await;
    world.provider.go_on.notify_one();
    call.await.unwrap().unwrap();

    assert_eq!(world.outcomes(saga).await, [Succeeded], "whose intent was lost answers nothing");
    assert!(world.provider.done.lock().unwrap().is_empty());
    assert_eq!((world.effects(saga).await, world.intents().await), (0, 0));
}

#[tokio::test]
async fn what_the_orchestrator_knows_is_not_forgotten_while_an_undo_waits() {
    let world = World::new().await;
    let saga = SagaId::new();
    // The orchestrator took a success, the record was lost, and a duplicate of the command is refused outside.
    world.deliver(&[message(saga, Op::Do, &pay(&["no"])), undo(saga, YES, &Repay)]).await;
    assert_eq!(world.outcomes(saga).await, []);
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Rejected, Failed]);
    assert_eq!(world.intents().await, 0);
}

#[tokio::test]
async fn an_undo_whose_command_this_participant_does_not_handle_fails() {
    let world = World::new().await;
    let elsewhere = Participant::new("elsewhere").on_undo::<Add, Remove>(RemoveHandler(Arc::default()));
    let saga = SagaId::new();
    for known in [Happened::InDoubt, YES] {
        deliver(&world.database.pool, &elsewhere, &[undo(saga, known, &Remove)]).await.unwrap();
    }
    assert_eq!(world.outcomes(saga).await, [Failed, Failed]);
    let said = world.replies(saga).await[0].payload["error"].as_str().unwrap().to_owned();
    assert!(said.contains("does not handle the command that this one undoes"), "{said}");
}

#[tokio::test]
async fn an_undo_of_another_command_than_was_done_is_poison() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &add())]).await;
    let mut other = undo(saga, YES, &Remove);
    other.envelope.saga.as_mut().unwrap().undoes = Some(CommandId(saga.0));
    let refused = world.try_deliver(&[other]).await;
    assert!(matches!(refused, Err(HandleError::Poison(_))), "{refused:?}");
    world.deliver(&[undo(saga, YES, &Remove)]).await;
    assert_eq!((world.outcomes(saga).await, world.effects(saga).await), (vec![Succeeded, Succeeded], 0));
}

#[tokio::test]
async fn an_intent_whose_fence_a_later_build_wrote_waits_and_is_not_given_up() {
    let world = World::new().await;
    let saga = SagaId::new();
    world.deliver(&[message(saga, Op::Do, &pay(&["yes"]))]).await;
    let state: String = sqlx::query_scalar("select run_state from participant_fence where saga_id = $1")
        .bind(saga.0)
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    // The later build's migration lets in its own states.
    sqlx::query("alter table participant_fence drop constraint participant_fence_run_state_known")
        .execute(&world.database.pool)
        .await
        .unwrap();
    let set = async |state: &str| {
        sqlx::query("update participant_fence set run_state = $1")
            .bind(state)
            .execute(&world.database.pool)
            .await
            .unwrap();
    };
    set("postponed").await;
    world.settle().await;
    let (attempts, waits, error): (i32, bool, String) = sqlx::query_as(
        "select attempts, due_at > clock_timestamp() + interval '30 seconds', last_error from participant_intent",
    )
    .fetch_one(&world.database.pool)
    .await
    .unwrap();
    assert_eq!((attempts, waits, world.provider.calls.of(key(saga, Op::Do))), (0, true, 1), "{error}");
    assert!(error.contains("a later build wrote it"), "{error}");
    assert_eq!(world.outcomes(saga).await, []);

    set(&state).await;
    sqlx::query("update participant_intent set due_at = clock_timestamp()")
        .execute(&world.database.pool)
        .await
        .unwrap();
    world.settle().await;
    assert_eq!((world.outcomes(saga).await, world.effects(saga).await), (vec![Succeeded], 1));
}

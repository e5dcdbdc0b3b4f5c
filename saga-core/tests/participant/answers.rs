//! Calls that an effect's provider did not answer, and commands without a place for the answer.

use crate::{
    external::{key, pay},
    support::{Add, AddHandler, World, message, words},
};
use saga_core::{
    command::{Op, Outcome::*},
    consumer::{HandleError, Handler as _, Message, UNDECLARED_SOURCE},
    id::SagaId,
    part::Cause,
    participant::{IntentConfig, Participant},
    testkit::{deliver, eventually},
    transaction::{Bound, Transaction},
};
use sqlx::postgres::PgPoolOptions;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_call_that_was_not_made_counts_nothing_is_in_no_doubt_and_waits() {
    let world = World::new().await;
    let saga = SagaId::new();
    // There are ten times more calls than there may be attempts.
    let say: Vec<_> = std::iter::repeat_n("away", 30).chain(["silence", "away", "yes"]).collect();
    let begun = Instant::now();
    world.deliver(&[message(saga, Op::Do, &pay(&say))]).await;
    let executor = world.executor();
    eventually(Duration::from_secs(60), || async {
        executor.run_once().await.unwrap();
        (world.intents().await == 0).then_some(())
    })
    .await;
    assert_eq!(world.outcomes(saga).await, [Succeeded], "and never failed");
    assert_eq!(world.provider.calls.of(key(saga)), 33);
    assert!(begun.elapsed() >= Duration::from_millis(31 * 60), "it asks no sooner than it was told");
}

#[tokio::test]
async fn a_provider_that_lets_nobody_in_is_red_health_and_gives_nothing_up() {
    let world = World::new().await;
    let saga = SagaId::new();
    // More calls than there may be attempts would take too long here: each waits for three seconds.
    world.deliver(&[message(saga, Op::Do, &pay(&["forbidden", "yes"]))]).await;
    let executor = world.executor();
    executor.run_once().await.unwrap();
    let issue = executor.report().issue.expect("it is red at once");
    assert_eq!(issue.cause, Cause::ProviderForbidden);
    assert!(issue.reason.contains("the token is wrong"), "{}", issue.reason);
    assert_eq!((world.intents().await, world.outcomes(saga).await), (1, vec![]), "it waits");
    let attempts: i32 =
        sqlx::query_scalar("select attempts from participant_intent").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!(attempts, 0);
    eventually(Duration::from_secs(60), || async {
        executor.run_once().await.unwrap();
        (world.intents().await == 0).then_some(())
    })
    .await;
    assert_eq!(world.outcomes(saga).await, [Succeeded]);
    eventually(Duration::from_secs(60), || async { executor.report().issue.is_none().then_some(()) }).await;
}

#[tokio::test]
async fn effects_are_in_order_when_another_replica_has_settled_what_failed_here() {
    let world = World::new().await;
    world.deliver(&[message(SagaId::new(), Op::Do, &pay(&["forbidden"]))]).await;
    let (executor, stop) = (world.executor(), CancellationToken::new());
    executor.run_once().await.unwrap();
    assert!(executor.report().issue.is_some());
    // Another process begins, with the right token.
    sqlx::query("delete from participant_intent").execute(&world.database.pool).await.unwrap();
    let settled = async {
        eventually(Duration::from_secs(60), || async { executor.report().issue.is_none().then_some(()) }).await;
        stop.cancel();
    };
    tokio::join!(executor.run(stop.clone()), settled);
}

#[tokio::test]
async fn effects_say_that_their_database_is_read_only_or_their_table_locked() {
    let world = World::new().await;
    let read_only = [("default_transaction_read_only", "on")];
    let options = world.database.pool.connect_options().as_ref().clone().options(read_only);
    let standby = PgPoolOptions::new().connect_with(options).await.unwrap();
    let locked = &world.database.pool;
    let mut holding = locked.begin().await.unwrap();
    for (pool, cause) in [(&standby, Cause::DatabaseReadOnly), (locked, Cause::Locked)] {
        if cause == Cause::Locked {
            sqlx::raw_sql("lock table participant_intent").execute(&mut *holding).await.unwrap();
        }
        let config = IntentConfig { database_timeout: Duration::from_secs(1), ..IntentConfig::default() };
        let (intents, stop) = (world.participant.intents(pool.clone()).with_config(config), CancellationToken::new());
        let said = async {
            let is = || intents.report().issue.filter(|issue| issue.cause == cause);
            eventually(Duration::from_secs(60), || async { is() }).await;
            stop.cancel();
        };
        tokio::join!(intents.run(stop.clone()), said);
    }
    holding.rollback().await.unwrap();
}

#[tokio::test]
async fn an_answer_that_contradicts_is_not_asked_for_again_before_the_resend() {
    let world = World::new().await;
    let saga = SagaId::new();
    let command = || message(saga, Op::Do, &pay(&["something else", "something else", "yes"]));
    for calls in [1, 2] {
        world.deliver(&[command()]).await;
        world.settle().await;
        assert_eq!(world.provider.calls.of(key(saga)), calls);
        let replies = world.replies(saga).await;
        let last = replies.last().unwrap();
        let said = serde_json::json!({ "error": "it did something else", "why": "contradiction" });
        assert_eq!((last.outcome, &last.payload), (Failed, &said));
    }
    world.deliver(&[command()]).await;
    world.settle().await;
    assert_eq!(world.outcomes(saga).await, [Failed, Failed, Succeeded]);
    assert_eq!(world.effects(saga).await, 1);
}

#[tokio::test]
async fn a_command_that_nobody_can_be_answered_to_is_refused_before_it_runs() {
    let world = World::new().await;
    for topic in ["", "..", "no topic", "a/b", "__consumer_offsets", &"x".repeat(250)] {
        let saga = SagaId::new();
        for mut command in [message(saga, Op::Do, &pay(&["yes"])), message(saga, Op::Do, &Add { say: words(&["yes"]) })]
        {
            command.envelope.saga.as_mut().unwrap().reply_to = Some(topic.to_owned());
            let refused = world.try_deliver(&[command]).await.unwrap_err();
            assert!(matches!(&refused, HandleError::Poison(why) if why.contains("ce_replyto")), "{topic:?}: {refused}");
        }
        world.settle().await;
        assert_eq!(world.provider.calls.of(key(saga)), 0, "{topic:?}");
        assert_eq!((world.effects(saga).await, world.intents().await), (0, 0), "{topic:?}");
    }
}

#[tokio::test]
async fn a_command_that_asks_for_its_reply_elsewhere_is_refused_before_it_runs() {
    let world = World::new().await;
    let participant = Participant::new("careful").replies_to(["test.replies"]).replies_to(vec!["other".to_owned()]);
    let participant = participant.on::<Add>(AddHandler::default());
    for (topic, allowed) in
        [("test.replies", true), ("other", true), ("orders.events", false), ("test.repliesx", false)]
    {
        let saga = SagaId::new();
        let mut command = message(saga, Op::Do, &Add { say: words(&["yes"]) });
        command.envelope.saga.as_mut().unwrap().reply_to = Some(topic.to_owned());
        let answer = deliver(&world.database.pool, &participant, &[command]).await;
        assert_eq!((answer.is_ok(), world.effects(saga).await), (allowed, i64::from(allowed)), "{topic}: {answer:?}");
    }
}

#[tokio::test]
async fn a_command_that_is_given_up_is_answered_and_a_strangers_is_not() {
    let world = World::new().await;
    let participant = Participant::new("adder").takes_commands_of(["orders"]).on::<Add>(AddHandler::default());
    let command = |source: &str, reply_to: &str| {
        let mut command = message(SagaId::new(), Op::Do, &Add { say: words(&["yes"]) });
        command.envelope.source = source.into();
        command.envelope.saga.as_mut().unwrap().reply_to = Some(reply_to.into());
        command.payload = Some(b"[]".to_vec());
        command
    };
    let all = [command("orders", "replies"), command("elsewhere", "replies"), command("orders", "no topic")];
    let given_up: Vec<_> = all.iter().map(|command| (command, "it cannot be read")).collect();
    let mut tx = Transaction::begin(&world.database.pool, Bound::new(Duration::from_secs(30))).await.unwrap();
    participant.gave_up(&mut tx, &given_up).await.unwrap();
    tx.commit().await.unwrap();
    let sagas = all.each_ref().map(|command| command.envelope.saga.as_ref().unwrap().saga);
    let replies = world.replies(sagas[0]).await;
    assert_eq!((replies.len(), replies[0].outcome), (1, Failed));
    let said = serde_json::json!({ "error": "adder gave the command up: it cannot be read", "why": "given_up" });
    assert_eq!(replies[0].payload, said);
    for stranger in &sagas[1..] {
        assert!(world.replies(*stranger).await.is_empty());
    }
}

#[tokio::test]
async fn commands_of_sources_that_are_not_declared_are_refused_before_anything_runs() {
    let world = World::new().await;
    let participant = Participant::new("careful").takes_commands_of(["orders"]).takes_commands_of(vec!["b".to_owned()]);
    let participant = participant.on::<Add>(AddHandler::default());
    let of = |source: &str| {
        let mut command = message(SagaId::new(), Op::Do, &Add { say: words(&["yes"]) });
        command.envelope.source = source.into();
        command
    };
    let batch = [of("orders"), of("elsewhere"), of("b"), of("Orders")];
    let answer = deliver(&world.database.pool, &participant, &batch).await;
    let Err(HandleError::Several(unfit)) = answer else { panic!("{answer:?}") };
    let named: Vec<_> = unfit.iter().map(|unfit| (unfit.message, unfit.class)).collect();
    assert_eq!(named, [1, 3].map(|n| (batch[n].envelope.id, UNDECLARED_SOURCE)));
    assert!(
        unfit[0].reason.contains("elsewhere") && unfit[0].reason.contains("COMMAND_SOURCES"),
        "{}",
        unfit[0].reason
    );
    let saga = |message: &Message| message.envelope.saga.as_ref().unwrap().saga;
    for command in &batch {
        assert_eq!(world.effects(saga(command)).await, 0);
    }
    deliver(&world.database.pool, &participant, &[batch[0].clone(), batch[2].clone()]).await.unwrap();
    assert_eq!((world.effects(saga(&batch[0])).await, world.effects(saga(&batch[2])).await), (1, 1));
}

#[tokio::test]
async fn an_effect_that_an_older_build_cannot_answer_to_is_called_once() {
    let world = World::new().await;
    let [done, doubtful] = std::array::from_fn(|_| SagaId::new());
    world.deliver(&[message(done, Op::Do, &pay(&["yes"])), message(doubtful, Op::Do, &pay(&["something else"]))]).await;
    sqlx::query("update participant_intent set origin = jsonb_set(origin, '{reply_to}', '\"no topic\"')")
        .execute(&world.database.pool)
        .await
        .unwrap();
    world.settle().await;
    for (saga, effects) in [(done, 1), (doubtful, 0)] {
        assert_eq!((world.provider.calls.of(key(saga)), world.effects(saga).await), (1, effects));
        assert_eq!(world.outcomes(saga).await, [], "nobody can be told");
    }
}

#[tokio::test]
async fn calls_that_hang_again_and_again_leave_slots_for_those_never_made() {
    let world = World::new().await;
    let config = IntentConfig {
        concurrency: 4,
        max_attempts: 1_000,
        first_delay: Duration::ZERO,
        call_timeout: Duration::from_millis(200),
        claim_margin: Duration::from_millis(100),
        poll: Duration::from_millis(20),
        ..IntentConfig::default()
    };
    let hanging: Vec<_> = (0..20).map(|_| SagaId::new()).collect();
    let messages: Vec<_> = hanging.iter().map(|&saga| message(saga, Op::Do, &pay(&["hang"]))).collect();
    world.deliver(&messages).await;
    let (executor, stop) =
        (world.participant.intents(world.database.pool.clone()).with_config(config), CancellationToken::new());
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { executor.run(stop).await }
    });
    let calls = || hanging.iter().map(|&saga| world.provider.calls.of(key(saga))).sum::<usize>();
    eventually(Duration::from_secs(30), || async { (calls() >= 24).then_some(()) }).await;

    let fresh = SagaId::new();
    let before = calls();
    world.deliver(&[message(fresh, Op::Do, &pay(&["yes"]))]).await;
    eventually(Duration::from_secs(30), || async { (!world.outcomes(fresh).await.is_empty()).then_some(()) }).await;
    let meanwhile = calls() - before;
    assert!(meanwhile <= 4, "{meanwhile} calls were made before one that had never been");
    stop.cancel();
    running.await.unwrap();
}

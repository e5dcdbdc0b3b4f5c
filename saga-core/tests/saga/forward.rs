//! Sagas that go well, and sagas that are refused: the commands that are sent, in their order, and what is left.

use crate::support::*;
use saga_core::{
    command::Op,
    consumer::Message,
    id::SagaId,
    saga::{Engine, StartError},
    testkit::Log,
};

#[tokio::test]
async fn a_saga_whose_steps_all_succeed_completes_with_every_effect() {
    let world = World::new().await;
    let saga = world.start(1).await;
    assert_eq!(world.status(saga).await, "running");
    for _ in ["authorize", "reserve", "capture", "ship"] {
        world.audit().await;
        world.succeed(saga).await;
    }
    assert_eq!(world.status(saga).await, "completed");
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "capture", "ship"]);
    assert_eq!(world.notes(saga).await, [("open order".into(), None), ("confirm order".into(), None)]);
    assert_eq!(world.kinds(saga).await, ["started", "reply", "reply", "reply", "reply"]);
    let with: Vec<_> = world.sent(saga).await.into_iter().map(|sent| sent.with).collect();
    let reference = |text: &str| Some(text.to_owned());
    assert_eq!(with, [None, reference("authorize 1"), reference("authorize 1"), reference("reserve 1")]);
    world.audit().await;
}

#[tokio::test]
async fn a_rejection_of_any_step_undoes_the_steps_before_it_newest_first() {
    let world = World::new().await;
    for (number, (step, trail)) in [
        (0, vec!["authorize"]),
        (1, vec!["authorize", "reserve", "-authorize"]),
        (2, vec!["authorize", "reserve", "capture", "-reserve", "-authorize"]),
    ]
    .into_iter()
    .enumerate()
    {
        let saga = world.start(u32::try_from(number).unwrap()).await;
        for _ in 0..step {
            world.succeed(saga).await;
        }
        let refused = world.last(saga).await;
        world.deliver(&[rejected(&refused)]).await;
        while world.last(saga).await.op == Op::Undo && world.status(saga).await == "compensating" {
            world.succeed(saga).await;
        }
        assert_eq!(world.status(saga).await, "compensated");
        assert_eq!(world.trail(saga).await, trail);
        let (effect, failure) = world.notes(saga).await.pop().unwrap();
        assert_eq!(effect, "cancel order");
        let failure = failure.unwrap();
        assert_eq!((&failure["step"], &failure["kind"]), (&refused.step.clone().into(), &"rejected".into()));
        assert_eq!(failure["rejection"]["why"], "no");
        for sent in world.sent(saga).await.iter().filter(|sent| sent.op == Op::Undo) {
            assert_eq!(sent.with, Some(format!("undo {} 1", sent.step)), "an undo is told what happened");
        }
    }
    world.audit().await;
}

#[tokio::test]
async fn a_business_key_starts_one_saga_and_the_second_start_leaves_the_transaction_usable() {
    let world = World::new().await;
    world.start(7).await;
    let mut tx = world.database.pool.begin().await.unwrap();
    let order = Order { order: 7 };
    let again = world.engine.start_in(&mut tx, SagaId::new(), &order_saga(1), &order, "7").await;
    assert!(matches!(again, Err(StartError::Exists)), "{again:?}");
    let unknown = world.engine.start_in(&mut tx, SagaId::new(), &order_saga(2), &order, "8").await;
    assert!(matches!(unknown, Err(StartError::Undefined(..))), "{unknown:?}");
    tx.commit().await.unwrap();
    assert_eq!(world.count("select count(*) from saga").await, 1);
    assert_eq!(world.count("select count(*) from note").await, 1);
    assert_eq!(world.count("select count(*) from outbox").await, 1);
}

#[tokio::test]
async fn an_engine_with_an_unbound_effect_is_not_built_and_every_mistake_is_named() {
    let world = World::new().await;
    let built = Engine::builder(world.database.pool.clone(), "replies")
        .define(&order_saga(1))
        .define(&order_saga(1))
        .local("open order", Note)
        .build();
    let errors = built.err().unwrap().to_string();
    for part in ["`cancel order`", "`confirm order`", "defined twice"] {
        assert!(errors.contains(part), "{part}: {errors}");
    }
}

#[tokio::test]
async fn five_hundred_replies_take_the_same_statements_as_one() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..500 {
        sagas.push(world.start(number).await);
    }
    type Answer = fn(&Sent) -> Message;
    let answers: [(&str, Answer); 4] =
        [("authorize", failed), ("authorize", succeeded), ("reserve", rejected), ("-authorize", failed)];
    for (step, answer) in answers {
        let mut replies = Vec::new();
        for saga in &sagas {
            assert_eq!(world.trail(*saga).await.last().unwrap(), step);
            replies.push(answer(&world.last(*saga).await));
        }
        let one = statements(&world, &replies[..1]).await;
        assert_eq!(statements(&world, &replies[1..]).await, one, "{step}");
        assert!((3..=4).contains(&one.len()), "load, then all that is written, commit: {one:#?}");
    }
    assert_eq!(world.count("select count(*) from outbox").await, 1500);
    assert_eq!(world.count("select count(*) from saga_event").await, 2500);
    world.audit().await;
}

/// The statements that the server gets for one batch.
async fn statements(world: &World, replies: &[Message]) -> Vec<String> {
    let log = Log::hear("sqlx::query=debug");
    world.deliver(replies).await;
    let mut statements = log.statements();
    // These statements are the pool's own, over a connection that was given back before or is now.
    statements.retain(|sql| sql != "begin; rollback");
    statements
}

#[tokio::test]
async fn five_hundred_replies_write_to_each_table_as_often_as_one() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..500 {
        sagas.push(world.start(number).await);
    }
    let mut replies = Vec::new();
    for saga in &sagas {
        replies.push(succeeded(&world.last(*saga).await));
    }
    let writes = count_writes(&world, &replies[..1]).await;
    assert_eq!(count_writes(&world, &replies[1..]).await, writes);
    assert!(writes <= 4, "saga, due, event, outbox: {writes}");
    assert_eq!(world.count("select count(*) from outbox").await, 1000);
    world.audit().await;
}

/// The number of writes that the tables see, whatever is in one statement. A trigger per statement counts them on every
/// table that a batch writes.
async fn count_writes(world: &World, replies: &[Message]) -> i64 {
    for sql in [
        "create table if not exists statement (tx xid8 default pg_current_xact_id())",
        "create or replace function count_statement() returns trigger language plpgsql as
         $$ begin insert into statement default values; return null; end $$",
        "create or replace trigger counts after insert or update or delete on saga execute function count_statement()",
        "create or replace trigger counts after insert or update or delete on saga_event
         execute function count_statement()",
        "create or replace trigger counts after insert or update or delete on saga_due
         execute function count_statement()",
        "create or replace trigger counts after insert or update or delete on outbox
         execute function count_statement()",
        "truncate statement",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    world.deliver(replies).await;
    world.count("select count(*) from statement").await
}

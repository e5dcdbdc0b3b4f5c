//! Local effects that do not work. A fault that passes repeats the batch and blames no saga. A fault of the effect's
//! own is tried again after a pause, and then an operator has to look.

use crate::support::*;
use async_trait::async_trait;
use saga_core::{
    consumer::HandleError,
    error_class::{ErrorClass, classify, classify_chain},
    id::SagaId,
    outbox::{AppendError, Tx},
    part::Cause,
    saga::{Engine, LocalCall, LocalEffect, LocalError, Saga, saga},
    testkit::deliver,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

/// The way in which an effect hands its engine the database's error.
#[derive(Debug, Clone, Copy)]
enum Raised {
    Plainly,
    InItsOwnEnum,
    ThroughTheOutbox,
    Deeper,
}

#[derive(Debug, thiserror::Error)]
enum ShopError {
    #[error("the order cannot be written")]
    Orders(#[source] sqlx::Error),
    #[error(transparent)]
    Outbox(#[from] AppendError),
}

/// An effect that fails as PostgreSQL does with these codes, one after the other; then it works.
struct Fails {
    codes: Mutex<Vec<(&'static str, Raised)>>,
    calls: AtomicU32,
}

impl Fails {
    fn with(codes: &[(&'static str, Raised)]) -> Arc<Self> {
        Arc::new(Self { codes: Mutex::new(codes.iter().rev().copied().collect()), calls: AtomicU32::new(0) })
    }
}

struct Effect(Arc<Fails>);

#[async_trait]
impl LocalEffect for Effect {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        sqlx::query("insert into note (saga_id, effect) values ($1, $2)")
            .bind(call.saga.0)
            .bind(call.name)
            .execute(&mut **tx)
            .await?;
        let next = self.0.codes.lock().unwrap().pop();
        let Some((code, raised)) = next else { return Ok(()) };
        let raise = format!("do $$ begin raise exception 'as it happens' using errcode = '{code}'; end $$");
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(raise)).execute(&mut **tx).await.unwrap_err();
        Err(match raised {
            Raised::Plainly => error.into(),
            Raised::InItsOwnEnum => anyhow::Error::from(ShopError::Orders(error)).into(),
            Raised::ThroughTheOutbox => anyhow::Error::from(ShopError::from(AppendError::from(error))).into(),
            Raised::Deeper => anyhow::Error::from(ShopError::Orders(error)).context("the shop is closed").into(),
        })
    }
}

fn shop() -> Saga<Order> {
    saga::<Order>("shop", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .local("open")
        .pivot("capture", |order, (_,)| Capture { order: order.order, with: None })
        .build()
}

async fn begun(world: &World, fails: &Arc<Fails>) -> (Arc<Engine>, SagaId) {
    let shop = shop();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&shop);
    let engine = engine.local("open", Effect(Arc::clone(fails))).build().unwrap();
    let id = SagaId::new();
    engine.start(id, &shop, &Order { order: 1 }, "1").await.unwrap();
    (engine, id)
}

fn class(error: &HandleError) -> ErrorClass {
    match error {
        HandleError::Database(error) => classify(error),
        HandleError::Failed(error) => classify_chain(error.as_ref()).unwrap_or(ErrorClass::Own),
        _ => ErrorClass::Own,
    }
}

#[tokio::test]
async fn what_passes_in_a_local_effect_repeats_the_batch_however_it_is_told() {
    let world = World::new().await;
    let mut codes = Vec::new();
    for code in ["40P01", "40001", "55P03", "57014", "57P01", "42P01", "25006"] {
        codes.extend(
            [Raised::Plainly, Raised::InItsOwnEnum, Raised::ThroughTheOutbox, Raised::Deeper]
                .map(|raised| (code, raised)),
        );
    }
    let fails = Fails::with(&codes);
    let (engine, saga) = begun(&world, &fails).await;
    let reply = [succeeded(&world.last(saga).await)];
    for (code, raised) in codes {
        let error = deliver(&world.database.pool, &engine.handler(), &reply).await.unwrap_err();
        assert!(class(&error).counts_nothing(), "{code} {raised:?}: {error}");
        assert_eq!(world.kinds(saga).await, ["started"], "{code} {raised:?}: no saga is blamed");
    }
    deliver(&world.database.pool, &engine.handler(), &reply).await.unwrap();
    assert_eq!(world.trail(saga).await, ["authorize", "capture"]);
    assert_eq!(world.notes(saga).await.len(), 1);
    world.audit().await;
}

#[tokio::test]
async fn a_local_effect_that_fails_by_its_own_fault_is_tried_again_until_it_works() {
    let world = World::new().await;
    let fails = Fails::with(&[("23505", Raised::Plainly), ("P0001", Raised::InItsOwnEnum), ("23514", Raised::Deeper)]);
    let (engine, saga) = begun(&world, &fails).await;
    deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    for calls in 1..=3 {
        assert_eq!((fails.calls.load(Ordering::Relaxed), world.status(saga).await.as_str()), (calls, "running"));
        assert_eq!(engine.tick().await.unwrap().due, 0, "a pause comes first");
        world.audit().await;
        world.time_passes().await;
        engine.tick().await.unwrap();
    }
    assert_eq!(world.trail(saga).await, ["authorize", "capture"]);
    assert_eq!((fails.calls.load(Ordering::Relaxed), world.notes(saga).await.len()), (4, 1));
    assert_eq!(world.kinds(saga).await, ["started", "reply", "due", "due", "due"]);
    let raised: Option<String> = sqlx::query_scalar(
        "select entry -> 'then' -> 0 -> 'pausing' ->> 'error' from saga_event where saga_id = $1 and revision = 3",
    )
    .bind(saga.0)
    .fetch_one(&world.database.pool)
    .await
    .unwrap();
    assert!(raised.as_ref().is_some_and(|raised| raised.contains("the order cannot be written")), "{raised:?}");
    world.audit().await;
}

#[tokio::test]
async fn a_local_effect_that_never_works_is_tried_as_often_as_its_policy_says() {
    let world = World::new().await;
    let fails = Fails::with(&[("23505", Raised::Plainly); 20]);
    let (engine, saga) = begun(&world, &fails).await;
    deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    while world.status(saga).await != "stuck" {
        world.time_passes().await;
        assert_eq!(engine.tick().await.unwrap().due, 1);
    }
    assert_eq!(fails.calls.load(Ordering::Relaxed), 5);
    assert_eq!(engine.tick().await.unwrap().due, 0);
    world.audit().await;
}

#[tokio::test]
async fn timers_name_what_an_effect_lacks_however_it_wraps_the_error() {
    let world = World::new().await;
    let fails = Fails::with(&[("23505", Raised::Plainly)]);
    let (engine, saga) = begun(&world, &fails).await;
    deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    fails.codes.lock().unwrap().extend([("42501", Raised::InItsOwnEnum); 3]);
    world.time_passes().await;

    engine.tick().await.unwrap();

    let issue = engine.timers_report().issue.expect("health names what is missing");
    assert_eq!(issue.cause, Cause::RightMissing, "{issue:?}");
    assert_eq!(world.status(saga).await, "running", "nothing is given up meanwhile");
}

#[tokio::test]
async fn a_due_saga_whose_local_effect_waits_for_others_does_not_stop_the_timers() {
    let world = World::new().await;
    let (fails, other) = (Fails::with(&[("23505", Raised::Plainly)]), world.start(2).await);
    let (engine, saga) = begun(&world, &fails).await;
    deliver(&world.database.pool, &engine.handler(), &[succeeded(&world.last(saga).await)]).await.unwrap();
    fails.codes.lock().unwrap().extend([("55P03", Raised::InItsOwnEnum); 3]);
    let both = builder_of(world.database.pool.clone(), &world.reply_topic, 1).define(&shop());
    let both = both.local("open", Effect(Arc::clone(&fails))).build().unwrap();
    world.time_passes().await;
    both.tick().await.unwrap();
    assert_eq!(world.trail(other).await, ["authorize", "authorize #2"]);
    assert_eq!((world.trail(saga).await, world.status(saga).await.as_str()), (vec!["authorize".into()], "running"));
    fails.codes.lock().unwrap().clear();
    world.time_passes().await;
    both.tick().await.unwrap();
    assert_eq!(world.trail(saga).await, ["authorize", "capture"]);
    world.audit().await;
}

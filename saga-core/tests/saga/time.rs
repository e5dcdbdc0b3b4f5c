//! Time passing: deadlines that no process checked in time, and replies long after they were wanted.

use crate::support::*;
use saga_core::{
    id::{CommandId, SagaId},
    outage::Outage,
    part::Cause,
    saga::{Engine, RetryPolicy, Saga, saga},
    service::{Health, database::pool_options},
    testkit::{Log, WrongClock, deliver, eventually},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// An order that has an hour until its money is taken.
fn hurried(retry: RetryPolicy) -> Saga<Order> {
    saga::<Order>("hurried", 1)
        .saga_deadline(Duration::from_secs(3600))
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .retry(retry)
        .undo(|order, (), happened| Void { order: order.order, with: Some(what_happened(&happened)) })
        .pivot("capture", |order, (_,)| Capture { order: order.order, with: None })
        .build()
}

fn engine(world: &World, saga: &Saga<Order>) -> Arc<Engine> {
    Engine::builder(world.database.pool.clone(), &world.reply_topic).define(saga).build().unwrap()
}

async fn begin(engine: &Arc<Engine>, saga: &Saga<Order>, order: u32) -> SagaId {
    let id = SagaId::new();
    engine.start(id, saga, &Order { order }, &order.to_string()).await.unwrap();
    id
}

impl World {
    /// Lets the deadlines of all sagas be over; the timers do not notice.
    async fn deadlines_pass(&self) {
        sqlx::query("update saga set state = jsonb_set(state, '{deadline}', '1000') where state ? 'deadline'")
            .execute(&self.database.pool)
            .await
            .unwrap();
    }

    async fn failure(&self, saga: SagaId) -> String {
        sqlx::query_scalar("select state -> 'failure' ->> 'kind' from saga where saga_id = $1")
            .bind(saga.0)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn timers_on_a_full_pool_put_nothing_off_and_say_what_to_do_and_no_outage() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let pool = pool_options(1).acquire_timeout(Duration::from_millis(100));
    let pool = pool.connect(&world.database.url).await.unwrap();
    let engine = builder_of(pool.clone(), &world.reply_topic, 1).build().unwrap();
    world.time_passes().await;
    let due = "select count(*) from saga_due where due_at <= clock_timestamp()";
    assert_eq!(world.count(due).await, 1);
    let log = Log::hear("info");
    let busy = pool.acquire().await.unwrap();
    let token = CancellationToken::new();
    let running = engine.run_timers(token.clone());
    let meanwhile = async {
        let said = eventually(Duration::from_secs(30), || async { engine.check_timers().err() }).await;
        assert!(said.contains("or give it a larger pool"), "{said}");
        assert_eq!(world.count(due).await, 1);
        drop(busy);
        eventually(Duration::from_secs(30), || async { (world.count(due).await == 0).then_some(()) }).await;
        token.cancel();
    };
    tokio::join!(running, meanwhile).0.unwrap();
    assert!(log.said("waiting for the database").is_empty(), "{:?}", log.warnings());
    assert_eq!(world.sent(saga).await.len(), 2, "its command was sent again");
}

#[tokio::test]
async fn timers_say_that_their_database_is_away_before_their_own_bound_has_passed() {
    let world = World::new().await;
    let saga = hurried(RetryPolicy::COMPENSABLE);
    let engine = engine(&world, &saga);
    assert_eq!(engine.timers_report().issue, None);
    // Health's own question reports in this way that the database does not answer.
    Outage::of_database(&world.database.pool).failing("no answer");
    let issue = engine.timers_report().issue;
    assert_eq!(issue.map(|issue| issue.cause), Some(Cause::DatabaseAway));
}

#[tokio::test]
async fn a_reply_after_the_sagas_deadline_issues_no_pivot_though_no_timer_has_looked() {
    let (world, hurried) = (World::new().await, hurried(RetryPolicy::COMPENSABLE));
    let engine = engine(&world, &hurried);
    let [done, refused, failed_once] =
        [begin(&engine, &hurried, 1).await, begin(&engine, &hurried, 2).await, begin(&engine, &hurried, 3).await];
    world.deadlines_pass().await;
    let answers = [
        succeeded(&world.last(done).await),
        rejected(&world.last(refused).await),
        failed(&world.last(failed_once).await),
    ];
    deliver(&world.database.pool, &engine.handler(), &answers).await.unwrap();
    assert_eq!(world.trail(done).await, ["authorize", "-authorize"]);
    assert_eq!(world.last(done).await.with.as_deref(), Some("undo authorize 1"), "what the reply said is known");
    assert_eq!(world.trail(failed_once).await, ["authorize", "-authorize"], "nothing is tried again");
    assert_eq!(world.status(refused).await, "compensated");
    for (saga, why) in [(done, "deadline"), (failed_once, "deadline"), (refused, "rejected")] {
        assert_eq!(world.failure(saga).await, why);
    }
    world.audit().await;
}

/// A saga's life on a host whose clock is off: how it ends, and how far its times are from the database's.
async fn lives_by_the_databases_clock(world: &World, order: u32) {
    let saga = world.start(order).await;
    assert_eq!(world.engine.tick().await.unwrap().due, 0, "nothing is due before its time");
    world.succeed(saga).await;
    assert_eq!(world.engine.tick().await.unwrap().due, 0);
    assert_eq!(world.time_out().await, 1, "what is due is taken");
    world.deliver(&[failed(&world.last(saga).await)]).await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "reserve #2", "-reserve"]);
    world.succeed(saga).await;
    world.succeed(saga).await;
    assert_eq!(world.status(saga).await, "compensated");
    for (what, sql) in [
        (
            "a saga's times",
            "select count(*) from saga where greatest(clock_timestamp() - created_at, clock_timestamp() - updated_at) > interval '5 minutes' or updated_at > clock_timestamp() + interval '1 second'",
        ),
        (
            "its log",
            "select count(*) from saga_event where at not between clock_timestamp() - interval '5 minutes' and clock_timestamp() + interval '1 second'",
        ),
        ("its waits", "select count(*) from saga_due where due_at > clock_timestamp() + interval '5 minutes'"),
        (
            "its messages",
            "select count(*) from outbox where message_id not between inbox_bound(clock_timestamp() - interval '5 minutes') and inbox_bound(clock_timestamp() + interval '1 second')",
        ),
    ] {
        assert_eq!(world.count(sql).await, 0, "{what}");
    }
    world.audit().await;
}

#[tokio::test]
async fn a_host_an_hour_off_or_in_1970_runs_sagas_as_one_with_a_right_clock() {
    let world = World::new().await;
    let health = Health::new(&CancellationToken::new());
    health.database(&world.database.pool);
    for (order, seconds) in [3_600, -3_600, 14 * 86_400, -1_790_000_000].into_iter().enumerate() {
        let _wrong = WrongClock::ahead_by(seconds);
        lives_by_the_databases_clock(&world, u32::try_from(order).unwrap()).await;
        health.look().await;
        health.look().await;
        let clock = health.healthiness().parts["clock"].clone();
        assert_eq!(clock.cause, Some(Cause::ClockSkew), "{clock:?}");
        assert!(clock.reason.unwrap_or_default().contains("synchronize"));
        assert!(health.readiness().ready, "what the database decides is right all the same");
    }
    health.look().await;
    health.look().await;
    assert_eq!(health.healthiness().parts["clock"].cause, None);
}

#[tokio::test]
async fn a_deadline_of_forever_is_as_late_as_a_calendar_knows() {
    let world = World::new().await;
    let forever = RetryPolicy { max: Duration::MAX, first: Duration::MAX, ..RetryPolicy::COMPENSABLE };
    let patient = saga::<Order>("patient", 1)
        .saga_deadline(Duration::MAX)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .deadline(Duration::MAX)
        .retry(forever)
        .undo(|order, (), _| Void { order: order.order, with: None })
        .pivot("capture", |order, (_,)| Capture { order: order.order, with: None })
        .deadline(Duration::MAX)
        .build();
    let engine = engine(&world, &patient);
    let saga = begin(&engine, &patient, 1).await;
    let authorize = world.last(saga).await;
    deliver(&world.database.pool, &engine.handler(), &[failed(&authorize)]).await.unwrap();
    deliver(&world.database.pool, &engine.handler(), &[succeeded(&authorize)]).await.unwrap();
    assert_eq!(world.trail(saga).await, ["authorize", "capture"]);
    world.audit().await;
}

#[tokio::test]
async fn latecomers_move_no_revision_and_each_kind_of_them_is_logged_once() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let authorize = world.last(saga).await;
    world.succeed(saga).await;
    world.succeed(saga).await;
    world.time_out().await;
    world.time_out().await;
    assert_eq!(world.status(saga).await, "stuck");
    let strays = |n: u32| {
        let stranger =
            Sent { command: CommandId(uuid::Uuid::new_v4()), step: format!("step {n}"), ..authorize.clone() };
        let again = Sent { attempt: n + 2, ..authorize.clone() };
        [succeeded(&authorize), rejected(&authorize), succeeded(&again), succeeded(&stranger)]
    };
    world.deliver(&strays(0)).await;
    let (seen, log) = (world.revision(saga).await, world.kinds(saga).await);
    for n in 1..50 {
        world.deliver(&strays(n)).await;
    }
    assert_eq!((world.revision(saga).await, world.kinds(saga).await), (seen, log.clone()));
    let ignored = log.iter().filter(|kind| *kind == "ignored").count();
    assert_eq!(ignored, 3, "a duplicate, a late one, one that is a stranger's: {log:?}");
    world.engine.retry(saga, seen, "the gateway is back", "ann").await.unwrap();
    world.audit().await;
}

#[tokio::test]
async fn a_log_that_has_told_enough_kinds_of_latecomers_is_told_no_more() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let authorize = world.last(saga).await;
    world.succeed(saga).await;
    for n in 0..100 {
        world.deliver(&[succeeded(&Sent { step: format!("step {n}"), ..authorize.clone() })]).await;
    }
    let ignored = world.kinds(saga).await.iter().filter(|kind| *kind == "ignored").count();
    assert!(ignored <= 64, "{ignored}");
    world.audit().await;
}

//! Input that others wrote, or that this build cannot read: it is cleaned or refused where it comes in, and stands
//! alone.

use crate::support::*;
use async_trait::async_trait;
use metrics_exporter_prometheus::PrometheusBuilder;
use saga_core::{
    command::Outcome,
    consumer::{HandleError, Message, UNDECLARED_SOURCE},
    id::SagaId,
    outbox::Tx,
    saga::{
        Engine, LocalCall, LocalEffect, LocalError, RetryError, StartError, inspect::SagaFilter, saga, view::Payloads,
    },
    testkit::{Log, deliver},
};
use serde_json::{Value, json};

/// `levels` arrays within one another.
fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |value, _| json!([value]))
}

/// An effect whose error has a NUL in it, or whose panic has for odd orders.
struct SaysNul;

#[async_trait]
impl LocalEffect for SaysNul {
    async fn run(&self, _tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        assert_eq!(call.input["order"].as_u64().unwrap() % 2, 0, "a mistake\0 in the effect");
        Err(LocalError::Failed(anyhow::anyhow!("no\0 such row")))
    }
}

#[tokio::test]
async fn a_nul_in_an_effects_error_or_panic_sticks_its_saga_alone() {
    let world = World::new().await;
    let definition = saga::<Order>("says nul", 1)
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .undo(|order, (), _| Void { order: order.order, with: None })
        .local("say nul")
        .build();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic).define(&definition);
    let engine = engine.local("say nul", SaysNul).build().unwrap();
    let other = world.start(7).await;
    let mut replies = vec![succeeded(&world.last(other).await)];
    let sagas = [1, 2].map(|order| (SagaId::new(), Order { order }));
    for (saga, order) in &sagas {
        engine.start(*saga, &definition, order, &order.order.to_string()).await.unwrap();
        replies.push(succeeded(&world.last(*saga).await));
    }
    let both = builder_of(world.database.pool.clone(), &world.reply_topic, 1).define(&definition);
    let both = both.local("say nul", SaysNul).build().unwrap();
    deliver(&world.database.pool, &both.handler(), &replies).await.unwrap();
    // The engine tries it again some times.
    while world.count("select count(*) from saga where status = 'stuck'").await < 2 {
        world.time_passes().await;
        assert!(both.tick().await.unwrap().due > 0);
    }
    for (saga, _) in sagas {
        let view = both.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
        assert!(view.waits.unwrap().why.contains('\u{fffd}'));
    }
    assert_eq!(world.last(other).await.step, "reserve", "the others of the batch go on");
}

#[tokio::test]
async fn a_reply_that_nests_too_deep_is_refused_and_its_saga_stays_readable() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    for levels in [101, 126, 127, 200] {
        for outcome in [Outcome::Succeeded, Outcome::Rejected] {
            // The depth lies beside the fields that are expected, where types do not look.
            let deep = json!({ "reference": "1", "why": "no", "more": nested(levels - 1) });
            let answer = world.try_deliver(&[reply(&sent, outcome, &deep)]).await;
            assert!(matches!(answer, Err(HandleError::Poison(_))), "{levels}: {answer:?}");
        }
    }
    let deepest = json!({ "reference": "1", "more": nested(99) });
    world.deliver(&[reply(&sent, Outcome::Succeeded, &deepest)]).await;
    assert_eq!(world.last(saga).await.step, "reserve");
    world.succeed(saga).await;
    assert_eq!(world.last(saga).await.step, "capture", "what was kept is read again");
    let view = world.engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
    assert_eq!(view.steps[1].reply, Some(deepest));
}

#[tokio::test]
async fn a_reply_of_another_type_than_its_commands_is_refused() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    for outcome in [Outcome::Succeeded, Outcome::Rejected, Outcome::Failed] {
        for kind in [sent.kind.clone(), "other.v1.reply".into(), "x".repeat(100_000)] {
            let mut forged = reply(&sent, outcome, &json!({ "reference": "1", "why": "no" }));
            forged.envelope.kind = kind;
            let answer = world.try_deliver(&[forged]).await;
            assert!(matches!(&answer, Err(HandleError::Poison(why)) if why.len() < 2_000), "{answer:?}");
        }
    }
    assert_eq!(world.last(saga).await.step, "authorize", "nothing was taken");
    world.succeed(saga).await;
    assert_eq!(world.last(saga).await.step, "reserve");
}

#[tokio::test]
async fn a_reply_with_its_fields_in_an_array_is_refused_and_one_more_field_is_not() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    for outcome in [Outcome::Succeeded, Outcome::Rejected] {
        let answer = world.try_deliver(&[reply(&sent, outcome, &json!(["1"]))]).await;
        let why = "an object with its fields by their names";
        assert!(matches!(&answer, Err(HandleError::Poison(reason)) if reason.contains(why)), "{answer:?}");
    }
    assert_eq!(world.last(saga).await.step, "authorize", "nothing was taken");
    let more = json!({ "reference": "1", "later": ["a field of a newer build"] });
    world.deliver(&[reply(&sent, Outcome::Succeeded, &more)]).await;
    assert_eq!(world.last(saga).await.step, "reserve");
}

#[tokio::test]
async fn an_input_and_a_command_that_nest_too_deep_start_no_saga() {
    let world = World::new().await;
    let of_input = saga::<Value>("deep", 1)
        .step("authorize", |_, ()| Authorize { order: 1, with: None })
        .undo(|_, (), _| Void { order: 1, with: None })
        .build();
    let of_command = saga::<u64>("deep command", 1)
        .step("deep", |levels, ()| Deep { more: nested(usize::try_from(*levels).unwrap()) })
        .nothing_to_undo()
        .build();
    let engine = Engine::builder(world.database.pool.clone(), &world.reply_topic);
    let engine = engine.define(&of_input).define(&of_command).build().unwrap();
    for levels in [101_usize, 126, 300] {
        let answer = engine.start(SagaId::new(), &of_input, &nested(levels), "too deep").await;
        assert!(matches!(answer, Err(StartError::Input(_))), "{levels}: {answer:?}");
        let answer = engine.start(SagaId::new(), &of_command, &(levels as u64), "too deep").await;
        assert!(matches!(answer, Err(StartError::Input(_))), "{levels}: {answer:?}");
    }
    let saga = SagaId::new();
    engine.start(saga, &of_input, &nested(100), "deep enough").await.unwrap();
    let view = engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
    assert_eq!(view.input, Some(nested(100)));
    engine.start(SagaId::new(), &of_command, &99, "deep enough").await.unwrap();
}

/// Gives a saga a state that this build has no word for, and perhaps the fingerprint of the build that has.
async fn of_another_build(world: &World, saga: SagaId, fingerprint: Option<&str>) {
    sqlx::query(
        "update saga
            set state = jsonb_set(state, '{status,open,wait}', '\"signal\"'), fingerprint = coalesce($2, fingerprint)
          where saga_id = $1",
    )
    .bind(saga.0)
    .bind(fingerprint)
    .execute(&world.database.pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_state_of_another_build_costs_its_neighbours_nothing() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..4 {
        sagas.push(world.start(number).await);
    }
    let [good, same_shape, other_shape, also_good] = sagas[..] else { panic!("{sagas:?}") };
    of_another_build(&world, same_shape, None).await;
    of_another_build(&world, other_shape, Some("another shape")).await;

    // The timers log the unreadable saga once, and go on with the others.
    let log = Log::hear("warn");
    let metrics = PrometheusBuilder::new().build_recorder();
    let (shown, _metrics) = (metrics.handle(), metrics::set_default_local_recorder(&metrics));
    world.time_passes().await;
    of_another_build(&world, same_shape, None).await;
    assert_eq!(world.engine.tick().await.unwrap().due, 2);
    assert_eq!(log.said("this build cannot read a saga's row").len(), 1, "{:?}", log.warnings());
    assert!(shown.render().contains("saga_unreadable_total{saga=\"order\"} 1"), "{}", shown.render());
    assert_eq!(world.engine.tick().await.unwrap().due, 0, "it is put off");
    assert_eq!(log.said("this build cannot read a saga's row").len(), 1);

    // Replies to the unreadable sagas are set aside; the others move theirs.
    let mut replies = Vec::new();
    for saga in &sagas {
        replies.push(succeeded(&world.last(*saga).await));
    }
    world.deliver(&replies).await;
    assert_eq!(world.count("select count(*) from saga_undecided").await, 2);
    for (saga, last) in
        [(good, "reserve"), (also_good, "reserve"), (same_shape, "authorize"), (other_shape, "authorize")]
    {
        assert_eq!(world.last(saga).await.step, last);
    }

    // Replies that were set aside are decided: a good one behind the others.
    sqlx::query("update saga_undecided set received_at = '2020-01-01'").execute(&world.database.pool).await.unwrap();
    let late = succeeded(&world.last(good).await);
    set_aside(&world, &late).await;
    assert_eq!(world.engine.tick().await.unwrap().undecided, 2);
    assert_eq!(world.last(good).await.step, "capture");
    assert_eq!(world.engine.tick().await.unwrap().undecided, 0, "the unreadable saga's is put off");

    // Lists and views show the sagas as unreadable.
    let list = world.engine.list(&SagaFilter::default(), 10).await.unwrap();
    let shown: Vec<_> = list.iter().rev().map(|saga| (saga.readable, saga.step.as_deref())).collect();
    assert_eq!(shown, [(true, Some("capture")), (false, None), (false, None), (true, Some("reserve"))]);
    for saga in [same_shape, other_shape] {
        let view = world.engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
        assert!(!view.summary.readable && view.timeline.len() > 1);
        assert_eq!(
            (view.input, view.undecided_replies),
            (Some(json!({ "order": 1 + i32::from(saga == other_shape) })), 1)
        );
        let answer = world.engine.retry(saga, view.summary.revision, "again", "ann").await;
        assert!(matches!(answer, Err(RetryError::Unreadable(..) | RetryError::Undefined(..))), "{answer:?}");
    }

    // A build that can read the saga goes on.
    sqlx::query("update saga set state = jsonb_set(state, '{status,open,wait}', '\"reply\"') where saga_id = $1")
        .bind(same_shape.0)
        .execute(&world.database.pool)
        .await
        .unwrap();
    sqlx::query("update saga_undecided set received_at = '2020-01-01'").execute(&world.database.pool).await.unwrap();
    assert_eq!(world.engine.tick().await.unwrap().undecided, 1);
    assert_eq!(world.last(same_shape).await.step, "reserve");
}

/// Sets a reply aside, as a replica without the definition would.
async fn set_aside(world: &World, reply: &Message) {
    let other = engine_of(&world.database, &world.reply_topic, 2);
    deliver(&world.database.pool, &other.handler(), std::slice::from_ref(reply)).await.unwrap();
}

#[tokio::test]
async fn a_reply_that_was_set_aside_by_a_newer_build_waits_for_one() {
    let world = World::new().await;
    let (newer, older) = (world.start(1).await, world.start(2).await);
    for saga in [newer, older] {
        set_aside(&world, &succeeded(&world.last(saga).await)).await;
    }
    for sql in [
        "alter table saga_undecided drop constraint saga_undecided_outcome",
        "update saga_undecided set outcome = 'accepted' where saga_id = (select saga_id from saga where business_key = '1')",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    assert_eq!(world.engine.tick().await.unwrap().undecided, 1);
    assert_eq!(
        (world.last(newer).await.step.as_str(), world.last(older).await.step.as_str()),
        ("authorize", "reserve")
    );
    assert_eq!(world.count("select count(*) from saga_undecided").await, 1, "kept, and counted");
}

#[tokio::test]
async fn a_reply_that_was_set_aside_is_refused_for_its_type_as_any_other() {
    let log = Log::hear("error");
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    let of_type = async |kind: &str| {
        let mut forged = succeeded(&sent);
        forged.envelope.kind = kind.into();
        set_aside(&world, &forged).await;
        world.engine.tick().await.unwrap();
    };
    for kind in [sent.kind.as_str(), "other.v1.reply", "with\0nul.reply"] {
        of_type(kind).await;
        assert_eq!(world.last(saga).await.step, "authorize", "{kind:?}");
    }
    let dropped = log.said("a reply that was set aside cannot be understood");
    assert!(dropped.len() == 3 && dropped[1]["why"].as_str().unwrap().contains("other.v1.reply"), "{dropped:?}");
    // An older build stored no type: there is nothing to check.
    set_aside(&world, &succeeded(&sent)).await;
    sqlx::query("update saga_undecided set type = null").execute(&world.database.pool).await.unwrap();
    world.engine.tick().await.unwrap();
    assert_eq!(world.last(saga).await.step, "reserve");
}

#[tokio::test]
async fn a_line_of_the_log_that_cannot_be_read_is_shown_as_that() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    for sql in [
        "alter table saga_event drop constraint saga_event_kind",
        "update saga_event set kind = 'signal', entry = '{\"kind\":\"signal\",\"name\":\"x\"}' where revision = 2",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    let view = world.engine.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
    let lines: Vec<_> = view.timeline.iter().map(|line| line.what).collect();
    assert_eq!(lines, ["started", "ran", "sent", "unreadable"]);
    assert!(view.summary.readable);
}

#[tokio::test]
async fn a_reply_of_a_source_that_is_not_declared_is_refused_before_its_saga_sees_it() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let engine = builder_of(world.database.pool.clone(), &world.reply_topic, 1)
        .takes_replies_of(["payments"])
        .takes_replies_of(vec!["stock".to_owned()]);
    let engine = engine.build().unwrap();
    let says = |source: &str, sent: &Sent| {
        let mut reply = succeeded(sent);
        reply.envelope.source = source.into();
        reply
    };
    let sent = world.last(saga).await;
    let strangers = [says("elsewhere", &sent), says("payments.", &sent)];
    let answer = deliver(&world.database.pool, &engine.handler(), &strangers).await;
    let Err(HandleError::Several(unfit)) = answer else { panic!("{answer:?}") };
    assert!(unfit.iter().all(|unfit| unfit.class == UNDECLARED_SOURCE && unfit.reason.contains("REPLY_SOURCES")));
    assert_eq!((unfit.len(), world.last(saga).await.step.as_str()), (2, "authorize"));
    for (source, next) in [("payments", "reserve"), ("stock", "capture")] {
        let reply = says(source, &world.last(saga).await);
        deliver(&world.database.pool, &engine.handler(), &[reply]).await.unwrap();
        assert_eq!(world.last(saga).await.step, next, "{source}");
    }
}

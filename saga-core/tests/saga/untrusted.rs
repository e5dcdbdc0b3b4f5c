//! What others wrote, or what this build cannot read: it is cleaned or refused where it comes in, and stands alone.

use crate::support::*;
use async_trait::async_trait;
use saga_core::{
    consumer::HandleError,
    envelope::Outcome,
    id::SagaId,
    outbox::Tx,
    saga::{Engine, LocalCall, LocalEffect, LocalError, StartError, saga, view::Payloads},
    testkit::deliver,
};
use serde_json::{Value, json};

/// `levels` arrays within one another.
fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |value, _| json!([value]))
}

/// Says a NUL in its error, or in its panic for odd orders.
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
    for (saga, _) in sagas {
        assert_eq!(world.status(saga).await, "stuck");
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
            // Beside the fields that are expected, where types do not look.
            let deep = json!({ "reference": "1", "why": "no", "more": nested(levels - 1) });
            let told = world.try_deliver(&[reply(&sent, outcome, &deep)]).await;
            assert!(matches!(told, Err(HandleError::Poison(_))), "{levels}: {told:?}");
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
        let told = engine.start(SagaId::new(), &of_input, &nested(levels), "too deep").await;
        assert!(matches!(told, Err(StartError::Input(_))), "{levels}: {told:?}");
        let told = engine.start(SagaId::new(), &of_command, &(levels as u64), "too deep").await;
        assert!(matches!(told, Err(StartError::Input(_))), "{levels}: {told:?}");
    }
    let saga = SagaId::new();
    engine.start(saga, &of_input, &nested(100), "deep enough").await.unwrap();
    let view = engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
    assert_eq!(view.input, Some(nested(100)));
    engine.start(SagaId::new(), &of_command, &99, "deep enough").await.unwrap();
}

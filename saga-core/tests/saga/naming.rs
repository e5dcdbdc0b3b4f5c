//! The names of a saga's commands. They come from a secret of its row, kept to its end. The derivation of the build
//! before holds to the end of the sagas that began with it.

use crate::support::*;
use metrics_exporter_prometheus::PrometheusBuilder;
use saga_core::{
    command::Op,
    id::{CommandId, SagaId},
    saga::view::Payloads,
};
use serde_json::Value;
use std::collections::BTreeSet;

/// Turns a saga's row into one that the build before would have stored.
async fn of_the_first_format(world: &World, saga: SagaId) {
    let fingerprint = order_saga(1).fingerprint().to_owned();
    sqlx::query("update saga set state = state - 'format' - 'naming', fingerprint = $2 where saga_id = $1")
        .bind(saga.0)
        .bind(fingerprint)
        .execute(&world.database.pool)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_reply_that_is_forged_from_what_is_public_is_ignored_and_counted() {
    let metrics = PrometheusBuilder::new().build_recorder();
    let (shown, _metrics) = (metrics.handle(), metrics::set_default_local_recorder(&metrics));
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    // A forger knows the order's id, the step's name, and the derivation of any build that was ever published.
    for op in [Op::Do, Op::Undo] {
        let forged = Sent { command: CommandId::derive(saga, &sent.step, op, 0), ..sent.clone() };
        world.deliver(&[succeeded(&forged)]).await;
        world.deliver(&[rejected(&forged)]).await;
        world.deliver(&[failed(&forged)]).await;
    }
    assert_eq!((world.status(saga).await.as_str(), world.trail(saga).await), ("running", vec!["authorize".to_owned()]));
    let ignored = "saga_replies_ignored_total{saga=\"order\",reason=\"unknown\"} 6";
    assert!(shown.render().contains(ignored), "{}", shown.render());
    world.succeed(saga).await;
    assert_eq!(world.last(saga).await.step, "reserve", "the true one is still waited for");
}

#[tokio::test]
async fn a_secret_is_a_sagas_own_and_nothing_shows_it() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let secret: Value =
        sqlx::query_scalar("select state -> 'naming' from saga").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!(secret["orchestrator"], world.reply_topic);
    let nonce = secret["nonce"].as_str().unwrap().to_owned();
    world.succeed(saga).await;
    world.cancel(saga).await;
    let view = world.engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
    assert!(!serde_json::to_string(&view).unwrap().contains(&nonce));
    let messages: Vec<String> = sqlx::query_scalar("select headers::text || convert_from(payload, 'utf8') from outbox")
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
    assert!(messages.len() >= 3 && !messages.iter().any(|message| message.contains(&nonce)));

    // Every resend of a command has the same id; each command and each saga has another one.
    world.time_out().await;
    let mut ids = BTreeSet::new();
    for saga in [saga, world.start(2).await] {
        for sent in world.sent(saga).await {
            ids.insert((sent.saga, sent.step, sent.op == Op::Undo, sent.command));
        }
    }
    assert_eq!(ids.len(), 4, "{ids:?}");
    assert_eq!(ids.iter().map(|(.., id)| id).collect::<BTreeSet<_>>().len(), 4);
}

#[tokio::test]
async fn a_saga_keeps_the_derivation_that_it_began_with_to_its_end() {
    let world = World::new().await;
    let saga = world.start(1).await;
    of_the_first_format(&world, saga).await;
    let old = |step: &str, op| CommandId::derive(saga, step, op, 0);
    // The command was sent by the build before, and is answered to this one.
    let first = Sent { command: old("authorize", Op::Do), ..world.last(saga).await };
    world.deliver(&[succeeded(&first)]).await;
    assert_eq!(world.last(saga).await.command, old("reserve", Op::Do));
    world.time_out().await;
    assert_eq!((world.last(saga).await.command, world.last(saga).await.attempt), (old("reserve", Op::Do), 2));
    world.cancel(saga).await;
    assert_eq!(world.last(saga).await.command, old("reserve", Op::Undo));
    world.succeed(saga).await;
    assert_eq!(world.last(saga).await.command, old("authorize", Op::Undo));
    world.succeed(saga).await;
    assert_eq!(world.status(saga).await, "compensated");
    let state: Value = sqlx::query_scalar("select state from saga").fetch_one(&world.database.pool).await.unwrap();
    assert!(state.get("format").is_none() && state.get("naming").is_none(), "the build before can read it: {state}");
    world.audit().await;
}

#[tokio::test]
async fn a_saga_of_this_format_is_left_alone_by_a_build_that_knows_only_the_first() {
    let world = World::new().await;
    world.start(1).await;
    let (fingerprint, format): (String, Value) = sqlx::query_as("select fingerprint, state -> 'format' from saga")
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    // Such a build takes sagas whose fingerprint is that of their shape.
    assert_eq!((fingerprint, format), (format!("{}.2", order_saga(1).fingerprint()), Value::from(2)));
}

#[tokio::test]
async fn a_state_of_a_later_format_under_a_known_fingerprint_is_not_read() {
    let world = World::new().await;
    let (later, other) = (world.start(1).await, world.start(2).await);
    sqlx::query("update saga set state = jsonb_set(state, '{format}', '3') where saga_id = $1")
        .bind(later.0)
        .execute(&world.database.pool)
        .await
        .unwrap();
    world.deliver(&[succeeded(&world.last(later).await), succeeded(&world.last(other).await)]).await;
    assert_eq!(
        (world.last(later).await.step.as_str(), world.last(other).await.step.as_str()),
        ("authorize", "reserve")
    );
    let view = world.engine.inspect(later, Payloads::Redacted).await.unwrap().unwrap();
    assert!(!view.summary.readable && view.undecided_replies == 1);
}

#[tokio::test]
async fn a_saga_keeps_its_namespace_when_the_reply_topic_is_changed() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let before = world.last(saga).await;
    let moved = engine_of(&world.database, "replies.v2", 1);
    world.time_passes().await;
    assert_eq!(moved.tick().await.unwrap().due, 1);
    assert_eq!(world.last(saga).await.command, before.command);
    let headers: Vec<Value> =
        sqlx::query_scalar("select headers from outbox order by id").fetch_all(&world.database.pool).await.unwrap();
    assert_eq!(headers[0].get("ce_sagaorchestrator"), None, "its reply topic says it");
    assert_eq!(headers[1]["ce_replyto"], "replies.v2");
    assert_eq!(headers[1]["ce_sagaorchestrator"], world.reply_topic);
}

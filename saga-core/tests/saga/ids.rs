//! With `RUST_LOG=warn` there are no spans: a saga that does not go on by itself has its ids on its own log line.

use crate::support::*;
use saga_core::{
    command::Outcome,
    consumer::{HandleError, NO_SAGA},
    id::SagaId,
    service::telemetry,
    testkit::Log,
};
use serde_json::{Value, json};

/// A log of a process whose sagas are declared.
fn hear() -> Log {
    telemetry::name_sagas(["order"]);
    Log::hear("warn")
}

fn is_of(line: &Value, saga: SagaId) {
    let id = json!(saga.to_string());
    assert_eq!((&line["saga"], &line["saga_type"], &line["order"]), (&id, &json!("order"), &id), "{line}");
    assert_eq!(line["trace_id"], "", "there are spans: {line}");
}

#[tokio::test]
async fn a_stuck_saga_says_its_id_and_its_step_on_the_line_itself() {
    let log = hear();
    let world = World::new().await;
    let saga = world.start(1).await;
    world.cancel(saga).await;
    world.time_out().await;
    world.deliver(&[failed(&world.last(saga).await)]).await;
    assert_eq!(world.status(saga).await, "stuck");
    let [line] = &log.said("a saga is stuck")[..] else { panic!("{:?}", log.warnings()) };
    is_of(line, saga);
    assert_eq!((&line["level"], &line["step"], &line["undoing"]), (&json!("ERROR"), &json!("authorize"), &json!(true)));
}

#[tokio::test]
async fn a_reply_that_waits_for_another_replica_and_one_that_is_dropped_then_say_their_sagas_id() {
    let log = hear();
    let world = World::new().await;
    let saga = world.start(1).await;
    let (sent, other) = (world.last(saga).await, "another shape");
    let shape = async |shape: &str| -> String {
        sqlx::query_scalar(
            "update saga set fingerprint = $1
               from (select saga_id, fingerprint from saga for update) as before
             returning before.fingerprint",
        )
        .bind(shape)
        .fetch_one(&world.database.pool)
        .await
        .unwrap()
    };
    let ours = shape(other).await;
    let unreadable = reply(&sent, Outcome::Succeeded, &json!({ "referenz": "x" }));
    world.deliver(std::slice::from_ref(&unreadable)).await;
    let [line] = &log.said("replies to sagas of unknown definitions")[..] else { panic!("{:?}", log.warnings()) };
    is_of(line, saga);
    assert_eq!((&line["version"], &line["replies"]), (&json!(1), &json!(1)));

    // The replica that knows the definition is there.
    shape(&ours).await;
    sqlx::query("update saga_undecided set fingerprint = $1").bind(&ours).execute(&world.database.pool).await.unwrap();
    world.engine.tick().await.unwrap();
    let [line] = &log.said("a reply that was set aside cannot be understood")[..] else {
        panic!("{:?}", log.warnings())
    };
    is_of(line, saga);
    assert_eq!((&line["step"], &line["command"]), (&json!("authorize"), &json!(sent.command.to_string())));
    assert_eq!(line["message_id"], unreadable.envelope.id.to_string());
}

#[tokio::test]
async fn replies_to_sagas_that_do_not_exist_are_kept_and_hold_up_no_other() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let sent = world.last(saga).await;
    let strangers = [SagaId::new(), SagaId::new()].map(|saga| succeeded(&Sent { saga, ..sent.clone() }));
    let batch = [strangers[0].clone(), succeeded(&sent), strangers[1].clone()];
    // The consumer dead-letters the messages that are named, and hands in the others again.
    let answer = world.try_deliver(&batch).await;
    let Err(HandleError::Several(mut unfit)) = answer else { panic!("{answer:?}") };
    unfit.sort_by_key(|unfit| strangers.iter().position(|stranger| stranger.envelope.id == unfit.message));
    for (unfit, stranger) in unfit.iter().zip(&strangers) {
        let lost = stranger.envelope.saga.as_ref().unwrap().saga.to_string();
        assert_eq!((unfit.message, unfit.class), (stranger.envelope.id, NO_SAGA));
        assert!(unfit.reason.contains(&lost) && unfit.reason.contains("authorize succeeded"), "{}", unfit.reason);
    }
    assert_eq!(unfit.len(), 2);
    assert_eq!(world.last(saga).await.step, "authorize", "nothing of the batch was decided");
    world.deliver(&batch[1..2]).await;
    assert_eq!(world.last(saga).await.step, "reserve");
}

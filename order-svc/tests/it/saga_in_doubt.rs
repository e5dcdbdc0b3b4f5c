//! The order saga when its participants fail, are silent or answer too late. It resends, undoes as in doubt, or is
//! stuck until an operator retries.

use crate::support::{Shop, json_of};
use contracts::OrderId;
use saga_core::{
    command::Outcome::{Failed, Rejected, Succeeded},
    consumer::Message,
    envelope::Envelope,
    id::{MessageId, SagaId},
    testkit::time_passes,
};
use serde_json::{Value, json};

/// The way forward: each step with the reply that the saga waits for.
fn way() -> [(&'static str, Value); 4] {
    let amount = json!({ "amount": 4_498, "currency": "EUR" });
    [
        ("authorize-payment", json!({ "authorization": "auth_1", "amount": amount })),
        ("reserve-stock", json!({ "pieces": 3 })),
        ("capture-payment", json!({ "capture": "cap_1", "amount": amount })),
        ("commit-stock", json!({})),
    ]
}

/// An order whose saga waits for the answer to the step number `at` of the way.
async fn waiting_at(shop: &Shop, key: &str, at: usize) -> OrderId {
    let order = shop.place(key).await;
    for (_, reply) in &way()[..at] {
        shop.answer(order, Succeeded, reply.clone()).await;
    }
    order
}

async fn finishes(shop: &Shop, order: OrderId, from: usize) {
    for (_, reply) in &way()[from..] {
        shop.answer(order, Succeeded, reply.clone()).await;
    }
    assert_eq!((shop.status(order).await.as_str(), shop.saga_status(order).await.as_str()), ("confirmed", "completed"));
}

/// The commands that were sent: operation, step, attempt, command id.
async fn sent(shop: &Shop, order: OrderId) -> Vec<(String, String, String, String)> {
    sqlx::query_as(
        "select headers ->> 'ce_sagaop', headers ->> 'ce_sagastep', headers ->> 'ce_attempt', headers ->> 'ce_commandid'
           from outbox where key = $1 and topic like '%.commands' order by id",
    )
    .bind(order.to_string())
    .fetch_all(&shop.db.pool)
    .await
    .unwrap()
}

/// Lets the wait be over: a deadline, or the pause before a resend.
async fn time_out(shop: &Shop) {
    time_passes(&shop.db.pool).await;
    assert_eq!(shop.orders.engine.tick().await.unwrap().due, 1);
}

fn failed() -> Value {
    json!({ "error": "the participant is not well", "why": "unreachable" })
}

/// Checks that the last command was sent once more, under the same id and the next attempt.
async fn assert_resent(shop: &Shop, order: OrderId, step: &str) {
    let sent = sent(shop, order).await;
    let [.., first, second] = sent.as_slice() else { panic!("{sent:?}") };
    assert_eq!((first.1.as_str(), second.1.as_str()), (step, step), "{sent:?}");
    assert_eq!((first.2.as_str(), second.2.as_str()), ("1", "2"), "{sent:?}");
    assert_eq!(first.3, second.3, "{sent:?}");
}

#[tokio::test]
async fn every_step_that_fails_is_resent_and_recovers() {
    let shop = Shop::open().await;
    for (at, (step, _)) in way().into_iter().enumerate() {
        let order = waiting_at(&shop, step, at).await;
        shop.answer(order, Failed, failed()).await;
        time_out(&shop).await;
        assert_resent(&shop, order, step).await;
        finishes(&shop, order, at).await;
    }
}

#[tokio::test]
async fn every_step_that_is_silent_is_asked_again_and_its_late_and_second_replies_change_nothing() {
    let shop = Shop::open().await;
    for (at, (step, reply)) in way().into_iter().enumerate() {
        let order = waiting_at(&shop, step, at).await;
        let late = shop.reply(order, Succeeded, reply).await;
        time_out(&shop).await;
        assert_resent(&shop, order, step).await;
        finishes(&shop, order, at).await;
        let envelope = Envelope { id: MessageId::new(), ..late.envelope.clone() };
        let again = Message { envelope, ..late.clone() };
        shop.deliver(&[late, again]).await;
        assert_eq!(shop.saga_status(order).await, "completed", "{step}");
        assert_eq!(shop.history(order).await, ["pending", "confirmed"], "{step}");
    }
}

/// Lets the participant fail until its command is not sent any more.
async fn fail_until_given_up(shop: &Shop, order: OrderId, answer: &Value) {
    for _ in 0..100 {
        let before = sent(shop, order).await.len();
        shop.answer(order, Failed, answer.clone()).await;
        let last = sent(shop, order).await;
        // The next message is another command, or there is none: then nothing is due either.
        if last.len() > before || shop.saga_status(order).await == "stuck" {
            return;
        }
        time_out(shop).await;
    }
    panic!("it never gives up: {:?}", sent(shop, order).await);
}

#[tokio::test]
async fn a_step_before_the_pivot_that_fails_for_good_is_undone_as_in_doubt_with_all_before_it() {
    let shop = Shop::open().await;
    for (at, undone) in [(0, &["authorize-payment"][..]), (1, &["reserve-stock", "authorize-payment"])] {
        let order = waiting_at(&shop, way()[at].0, at).await;
        fail_until_given_up(&shop, order, &failed()).await;
        for step in undone {
            let (op, last, ..) = sent(&shop, order).await.pop().unwrap();
            assert_eq!((op.as_str(), last.as_str()), ("undo", *step));
            shop.answer(order, Succeeded, json!({})).await;
        }
        assert_eq!(shop.saga_status(order).await, "compensated");
        let view = json_of(shop.get(&format!("/v1/orders/{order}")).await).await;
        assert_eq!((&view["status"], &view["cause"]), (&json!("cancelled"), &json!("unreachable")), "{view}");
    }
}

#[tokio::test]
async fn an_orders_cause_is_what_its_participant_said_and_no_answer_is_one() {
    let shop = Shop::open().await;
    let ends = async |order: OrderId| {
        let view = json_of(shop.get(&format!("/v1/orders/{order}")).await).await;
        assert_eq!((&view["status"], &view["reason"]), (&json!("cancelling"), &json!("failed")), "{view}");
        shop.answer(order, Succeeded, json!({})).await;
        view["cause"].as_str().map(str::to_owned)
    };
    // The last two causes are of a build before causes, and of one after this.
    let said = ["unreachable", "faulty", "unreadable", "contradiction", "record_lost", "", "tired"];
    for (why, cause) in said.iter().zip([&said[..5], &["other", "other"]].concat()) {
        let order = waiting_at(&shop, &format!("k-{why}"), 0).await;
        let answer = if why.is_empty() { json!({ "error": "no" }) } else { json!({ "error": "no", "why": why }) };
        fail_until_given_up(&shop, order, &answer).await;
        assert_eq!(ends(order).await.as_deref(), Some(cause));
    }
    let silent = waiting_at(&shop, "silent", 0).await;
    while shop.status(silent).await == "pending" {
        time_out(&shop).await;
    }
    assert_eq!(ends(silent).await.as_deref(), Some("no_answer"));
}

/// Retries as an operator does, with the revision that the inspection shows.
async fn retry(shop: &Shop, order: OrderId) {
    let revision: i32 = sqlx::query_scalar("select revision from saga where saga_id = $1")
        .bind(order.0)
        .fetch_one(&shop.db.pool)
        .await
        .unwrap();
    shop.orders.engine.retry(SagaId(order.0), revision, "the provider is back", "ada").await.unwrap();
}

#[tokio::test]
async fn a_pivot_in_doubt_neither_undoes_nor_goes_on_and_an_operators_retry_settles_it() {
    let shop = Shop::open().await;
    for (key, outcome) in [("taken", Succeeded), ("refused", Rejected)] {
        let order = waiting_at(&shop, key, 2).await;
        fail_until_given_up(&shop, order, &failed()).await;
        assert_eq!((shop.status(order).await.as_str(), shop.saga_status(order).await.as_str()), ("pending", "stuck"));
        assert!(sent(&shop, order).await.iter().all(|(op, ..)| op == "do"), "nothing is undone");
        retry(&shop, order).await;
        if outcome == Succeeded {
            finishes(&shop, order, 2).await;
        } else {
            shop.answer(order, Rejected, json!({ "reason": "authorization_expired" })).await;
            shop.answer(order, Succeeded, json!({})).await;
            shop.answer(order, Succeeded, json!({})).await;
            assert_eq!(shop.saga_status(order).await, "compensated");
        }
    }
}

#[tokio::test]
async fn a_pivot_in_doubt_still_takes_its_late_reply_when_the_saga_is_stuck() {
    let shop = Shop::open().await;
    let order = waiting_at(&shop, "k", 2).await;
    fail_until_given_up(&shop, order, &failed()).await;
    assert_eq!(shop.saga_status(order).await, "stuck");
    finishes(&shop, order, 2).await;
}

#[tokio::test]
async fn an_undo_that_fails_for_good_is_stuck_and_never_called_compensated_until_a_retry_undoes_it() {
    let shop = Shop::open().await;
    let order = waiting_at(&shop, "k", 1).await;
    shop.answer(order, Rejected, json!({ "short": [{ "sku": "WIDGET-1", "requested": 2, "available": 1 }] })).await;
    fail_until_given_up(&shop, order, &failed()).await;
    assert_eq!((shop.status(order).await.as_str(), shop.saga_status(order).await.as_str()), ("cancelling", "stuck"));
    let stuck = shop.get(&format!("/v1/orders/{order}")).await;
    assert_eq!(stuck.headers()["etag"], "\"2-stuck\"");
    assert_eq!(json_of(stuck).await["waits_for_operator"], true, "its customer is told");
    retry(&shop, order).await;
    shop.answer(order, Succeeded, json!({})).await;
    assert_eq!(
        (shop.status(order).await.as_str(), shop.saga_status(order).await.as_str()),
        ("cancelled", "compensated")
    );
}

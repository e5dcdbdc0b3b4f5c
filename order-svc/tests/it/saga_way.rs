//! The order saga's way through this service. Replies go in by the engine's handler, commands and events come out of
//! the outbox, and the order has its status.

use crate::support::{PATIENCE, Shop, basket, id_of, json_of};
use contracts::OrderId;
use order_svc::domain::{CancelReason, OrderStatus, StatusChange, StatusName};
use reqwest::Response;
use saga_core::command::Outcome::{Rejected, Succeeded};
use saga_core::{
    saga::RetryPolicy,
    testkit::{eventually, time_passes},
};
use serde_json::{Value, json};

fn authorized() -> Value {
    json!({ "authorization": "auth_1", "amount": { "amount": 4_498, "currency": "EUR" } })
}

fn captured() -> Value {
    json!({ "capture": "cap_1", "amount": { "amount": 4_498, "currency": "EUR" } })
}

fn reserved() -> Value {
    json!({ "pieces": 3 })
}

fn out_of_stock() -> Value {
    json!({ "short": [{ "sku": "WIDGET-1", "requested": 2, "available": 1 }] })
}

async fn cancel(shop: &Shop, order: OrderId) -> Response {
    shop.client.post(shop.url(&format!("/v1/orders/{order}/cancel"))).json(&json!({})).send().await.unwrap()
}

/// The messages that were sent for an order: `step` and `undo step`, in order.
async fn sent(shop: &Shop, order: OrderId) -> Vec<String> {
    sqlx::query_scalar(
        "select case headers ->> 'ce_sagaop' when 'undo' then 'undo ' else '' end || (headers ->> 'ce_sagastep')
         from   outbox where key = $1 and topic like '%.commands' order by id",
    )
    .bind(order.to_string())
    .fetch_all(&shop.db.pool)
    .await
    .unwrap()
}

async fn events(shop: &Shop, order: OrderId) -> Vec<(String, Value)> {
    sqlx::query_as(
        "select type, convert_from(payload, 'UTF8')::jsonb from outbox
         where  key = $1 and topic = 'orders.events' order by id",
    )
    .bind(order.to_string())
    .fetch_all(&shop.db.pool)
    .await
    .unwrap()
}

/// The order is cancelled for this reason, its event was published, and its history is a path of the graph.
async fn assert_cancelled(shop: &Shop, order: OrderId, reason: &str) {
    let view = json_of(shop.get(&format!("/v1/orders/{order}")).await).await;
    assert_eq!((&view["status"], &view["reason"]), (&json!("cancelled"), &json!(reason)));
    let events = events(shop, order).await;
    assert_eq!(events.len(), 2);
    assert_eq!(events[1], ("orders.cancelled.v1".into(), json!({ "order": order, "reason": reason })));
    assert_path(&shop.history(order).await);
}

fn assert_path(history: &[String]) {
    let statuses: Vec<StatusName> = history.iter().map(|status| status.parse().unwrap()).collect();
    assert_eq!(statuses[0], StatusName::Pending);
    for pair in statuses.windows(2) {
        assert!(OrderStatus::GRAPH.contains(&(pair[0], pair[1])), "{history:?}");
    }
}

#[tokio::test]
async fn every_step_succeeds_and_the_order_is_confirmed() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    for (reply, status) in [(authorized(), "pending"), (reserved(), "pending"), (captured(), "confirmed")] {
        shop.answer(order, Succeeded, reply).await;
        assert_eq!(shop.status(order).await, status);
    }
    shop.answer(order, Succeeded, json!({})).await;
    let expected = ["authorize-payment", "reserve-stock", "capture-payment", "commit-stock"];
    assert_eq!(sent(&shop, order).await, expected);
    assert_eq!(events(&shop, order).await[1], ("orders.confirmed.v1".into(), json!({ "order": order })));
    assert_eq!(shop.history(order).await, ["pending", "confirmed"]);
    assert_eq!(shop.saga_status(order).await, "completed");
}

#[tokio::test]
async fn a_declined_payment_cancels_the_order_and_there_is_nothing_to_undo() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Rejected, json!({ "reason": "insufficient_funds" })).await;
    assert_eq!(sent(&shop, order).await, ["authorize-payment"]);
    assert_cancelled(&shop, order, "payment_declined").await;
    assert_eq!(shop.saga_status(order).await, "compensated");
}

#[tokio::test]
async fn out_of_stock_lets_the_money_go_before_the_order_is_cancelled() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Succeeded, authorized()).await;
    shop.answer(order, Rejected, out_of_stock()).await;
    assert_eq!(shop.status(order).await, "cancelling", "from the moment in which it is decided");
    let asked = cancel(&shop, order).await;
    assert_eq!(asked.status(), 202);
    assert_eq!(json_of(asked).await["reason"], "out_of_stock");
    shop.answer(order, Succeeded, json!({})).await;
    assert_eq!(sent(&shop, order).await, ["authorize-payment", "reserve-stock", "undo authorize-payment"]);
    assert_cancelled(&shop, order, "out_of_stock").await;
}

#[tokio::test]
async fn a_refused_capture_undoes_everything_newest_first() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Succeeded, authorized()).await;
    shop.answer(order, Succeeded, reserved()).await;
    shop.answer(order, Rejected, json!({ "reason": "authorization_expired" })).await;
    shop.answer(order, Succeeded, json!({})).await;
    shop.answer(order, Succeeded, json!({})).await;
    let expected =
        ["authorize-payment", "reserve-stock", "capture-payment", "undo reserve-stock", "undo authorize-payment"];
    assert_eq!(sent(&shop, order).await, expected);
    assert_cancelled(&shop, order, "payment_not_captured").await;
}

#[tokio::test]
async fn a_customer_cancels_in_time_and_asking_again_changes_nothing() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Succeeded, authorized()).await;
    for _ in 0..3 {
        let response = cancel(&shop, order).await;
        assert_eq!(response.status(), 202);
        assert_eq!(response.headers()["etag"], "\"2\"");
        let view = json_of(response).await;
        assert_eq!((&view["status"], &view["reason"]), (&json!("cancelling"), &json!("cancelled_by_customer")));
    }
    shop.answer(order, Succeeded, json!({})).await;
    shop.answer(order, Succeeded, json!({})).await;
    assert_cancelled(&shop, order, "cancelled_by_customer").await;
    assert_eq!(shop.history(order).await, ["pending", "cancelling", "cancelled"]);
    let response = cancel(&shop, order).await;
    assert_eq!(response.status(), 200);
    assert_eq!(json_of(response).await["status"], "cancelled");
    let expected = ["authorize-payment", "reserve-stock", "undo reserve-stock", "undo authorize-payment"];
    assert_eq!(sent(&shop, order).await, expected);
}

#[tokio::test]
async fn a_cancel_of_a_version_that_is_gone_does_nothing() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    let cancel_at = |etag: &'static str| {
        shop.client.post(shop.url(&format!("/v1/orders/{order}/cancel"))).header("If-Match", etag).send()
    };
    let rows = shop.rows().await;
    assert_eq!(cancel_at("\"2\"").await.unwrap().status(), 412);
    assert_eq!(cancel_at("1").await.unwrap().status(), 400);
    assert_eq!(shop.rows().await, rows);
    assert_eq!((shop.status(order).await, shop.saga_status(order).await), ("pending".into(), "running".into()));
    assert_eq!(cancel_at("\"1\"").await.unwrap().status(), 202);
    assert_eq!(cancel_at("\"1\"").await.unwrap().status(), 412);
    assert_eq!(cancel_at("*").await.unwrap().status(), 202);
}

#[tokio::test]
async fn an_order_that_cannot_be_confirmed_stops_its_own_saga_and_no_other() {
    let shop = Shop::open().await;
    let mut orders = Vec::new();
    for n in 0..3 {
        let order = shop.place(&format!("k{n}")).await;
        shop.answer(order, Succeeded, authorized()).await;
        shop.answer(order, Succeeded, reserved()).await;
        orders.push(order);
    }
    // A person wrote to the database by hand.
    shop.change(orders[1], StatusChange::Cancel(CancelReason::Failed)).await;
    let mut batch = Vec::new();
    for order in &orders {
        batch.push(shop.reply(*order, Succeeded, captured()).await);
    }
    shop.deliver(&batch).await;
    // The error may pass, so the effect is tried again; then an operator has to look.
    for _ in 1..RetryPolicy::LOCAL.attempts.unwrap() {
        assert_eq!(shop.saga_status(orders[1]).await, "running");
        time_passes(&shop.db.pool).await;
        shop.orders.engine.tick().await.unwrap();
    }
    for (order, status, saga) in
        [(orders[0], "confirmed", "running"), (orders[1], "cancelled", "stuck"), (orders[2], "confirmed", "running")]
    {
        assert_eq!((shop.status(order).await.as_str(), shop.saga_status(order).await.as_str()), (status, saga));
    }
}

#[tokio::test]
async fn a_cancel_while_the_money_is_taken_or_was_is_too_late() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Succeeded, authorized()).await;
    shop.answer(order, Succeeded, reserved()).await;
    for status in ["pending", "confirmed", "confirmed"] {
        let response = cancel(&shop, order).await;
        assert_eq!(response.status(), 409);
        assert_eq!(json_of(response).await["type"], "/problems/too-late");
        assert_eq!(shop.status(order).await, status);
        let step = sent(&shop, order).await.pop().unwrap();
        shop.answer(order, Succeeded, if step == "capture-payment" { captured() } else { json!({}) }).await;
    }
    assert_eq!(shop.saga_status(order).await, "completed");
}

#[tokio::test]
async fn a_cancel_of_an_order_that_is_being_undone_keeps_the_first_reason() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    shop.answer(order, Succeeded, authorized()).await;
    shop.answer(order, Rejected, out_of_stock()).await;
    assert_eq!(cancel(&shop, order).await.status(), 202);
    shop.answer(order, Succeeded, json!({})).await;
    assert_cancelled(&shop, order, "out_of_stock").await;
}

#[tokio::test]
async fn replies_that_come_twice_or_late_change_nothing() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    let authorize = shop.reply(order, Succeeded, authorized()).await;
    shop.deliver(std::slice::from_ref(&authorize)).await;
    assert_eq!(cancel(&shop, order).await.status(), 202);
    shop.deliver(&[authorize.clone(), authorize.clone()]).await;
    assert_eq!(shop.status(order).await, "cancelling");
    for _ in 0..2 {
        shop.answer(order, Succeeded, json!({})).await;
    }
    shop.deliver(&[authorize]).await;
    assert_cancelled(&shop, order, "cancelled_by_customer").await;
}

#[tokio::test]
async fn many_orders_in_one_batch_go_their_own_ways() {
    let shop = Shop::open().await;
    let mut orders = Vec::new();
    let mut batch = Vec::new();
    for n in 0..12 {
        let order = shop.place(&format!("k{n}")).await;
        orders.push(order);
        batch.push(match n % 2 {
            0 => shop.reply(order, Succeeded, authorized()).await,
            _ => shop.reply(order, Rejected, json!({ "reason": "do_not_honor" })).await,
        });
    }
    shop.deliver(&batch).await;
    for (n, order) in orders.into_iter().enumerate() {
        if n % 2 == 0 {
            assert_eq!(shop.status(order).await, "pending");
        } else {
            assert_cancelled(&shop, order, "payment_declined").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_races_with_the_pivot_gets_an_answer_that_stays_true() {
    let shop = Shop::open().await;
    let (mut cancelled, mut confirmed) = (0, 0);
    for round in 0..30 {
        let order = shop.place(&format!("k{round}")).await;
        shop.answer(order, Succeeded, authorized()).await;
        let reply = shop.reply(order, Succeeded, reserved()).await;
        let (response, ()) = tokio::join!(cancel(&shop, order), shop.deliver(std::slice::from_ref(&reply)));
        match response.status().as_u16() {
            202 => {
                shop.answer(order, Succeeded, json!({})).await;
                shop.answer(order, Succeeded, json!({})).await;
                assert_cancelled(&shop, order, "cancelled_by_customer").await;
                cancelled += 1;
            }
            409 => {
                shop.answer(order, Succeeded, captured()).await;
                assert_eq!(shop.status(order).await, "confirmed");
                confirmed += 1;
            }
            status => panic!("{status}"),
        }
        assert_path(&shop.history(order).await);
    }
    assert_eq!(cancelled + confirmed, 30);
}

#[tokio::test]
async fn a_client_that_prefers_to_wait_gets_the_outcome() {
    let shop = Shop::open().await;
    let request = shop.post_order("k", &basket()).header("Prefer", "wait=15");
    let answer = tokio::spawn(request.send());
    let order = eventually(PATIENCE, || async {
        let id: Option<uuid::Uuid> =
            sqlx::query_scalar("select id from orders").fetch_optional(&shop.db.pool).await.unwrap();
        id.map(OrderId)
    })
    .await;
    shop.answer(order, Rejected, json!({ "reason": "insufficient_funds" })).await;
    let response = answer.await.unwrap().unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.headers()["preference-applied"], "wait=15");
    assert_eq!(response.headers()["location"], format!("/v1/orders/{order}"));
    assert_eq!(response.headers()["etag"], "\"2\"");
    let view = json_of(response).await;
    assert_eq!((&view["status"], &view["reason"]), (&json!("cancelled"), &json!("payment_declined")));
}

#[tokio::test]
async fn a_client_that_has_waited_long_enough_gets_the_order_as_it_is() {
    let shop = Shop::open().await;
    let started = std::time::Instant::now();
    let response = shop.post_order("k", &basket()).header("Prefer", "wait=1").send().await.unwrap();
    assert!(started.elapsed() >= std::time::Duration::from_secs(1));
    assert_eq!(response.status(), 202);
    assert_eq!(response.headers()["preference-applied"], "wait=1");
    assert_eq!(json_of(response).await["status"], "pending");
}

#[tokio::test]
async fn a_waiting_client_does_not_keep_the_process_from_stopping() {
    let mut shop = Shop::open().await;
    let answer = tokio::spawn(shop.post_order("k", &basket()).header("Prefer", "wait=30").send());
    eventually(PATIENCE, || async { (shop.count("orders").await == 1).then_some(()) }).await;
    shop.shutdown.cancel();
    let response = answer.await.unwrap().unwrap();
    assert_eq!(response.status(), 202);
    id_of(&json_of(response).await);
    tokio::time::timeout(PATIENCE, &mut shop.server).await.expect("the server stops").unwrap().unwrap();
}

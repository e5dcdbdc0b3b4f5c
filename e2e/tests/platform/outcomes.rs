//! Each outcome of an order, through the real processes, and the audit after each.

use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone, beside_others, unaudited},
};
use saga_core::testkit::eventually;
use serde_json::{Value, json};
use sqlx::PgPool;
use stack::service::Service;
use std::time::Duration;
use uuid::Uuid;

/// How long a saga may take to come to a certain step.
const SOON: Duration = Duration::from_secs(30);

async fn saga_status(platform: &Platform, order: Uuid) -> String {
    platform.saga(order).await["status"].as_str().unwrap_or_default().to_owned()
}

/// The steps' states in their order, as in `done done not_done waiting`.
async fn steps(platform: &Platform, order: Uuid) -> String {
    let saga = platform.saga(order).await;
    let states = saga["steps"].as_array().into_iter().flatten().filter_map(|step| step["state"].as_str());
    states.collect::<Vec<_>>().join(" ")
}

/// Waits until payment-svc has begun to call the gateway for an order.
async fn calls_the_gateway(platform: &Platform, order: Uuid) {
    let payments = PgPool::connect(&platform.stack.database_url("payments")).await.expect("its database is there");
    eventually(SOON, || async {
        // The attempt is committed before the call, and the intent is gone when the call is settled.
        let called = sqlx::query("select from participant_intent where saga_id = $1 and attempts > 0").bind(order);
        called.fetch_optional(&payments).await.expect("it can be read").map(|_| ())
    })
    .await;
    payments.close().await;
}

#[test]
fn an_order_is_confirmed_paid_and_shipped() {
    beside_others(async |platform| {
        let sku = platform.item("confirmed", 1_250, 10).await;
        let order = platform.place(&Wish::of(&sku, 2)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        assert_eq!(saga_status(platform, order).await, "completed");
        assert_eq!(platform.stock_of(&sku).await, (8, 0));
        assert_eq!(platform.at_gateway(order).await, ["authorized 2500", "captured 2500"]);
    });
}

#[test]
fn several_items_are_reserved_and_shipped_together() {
    beside_others(async |platform| {
        let (one, other) = (platform.item("several", 100, 5).await, platform.item("several", 33, 50).await);
        let order = platform.place(&Wish::of(&one, 5).and(&other, 7)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        assert_eq!((platform.stock_of(&one).await, platform.stock_of(&other).await), ((0, 0), (43, 0)));
        assert_eq!(platform.at_gateway(order).await, ["authorized 731", "captured 731"]);
    });
}

#[test]
fn a_declined_payment_cancels_the_order_and_nothing_is_held() {
    beside_others(async |platform| {
        let sku = platform.item("declined", 500, 3).await;
        let order = platform.place(&Wish::of(&sku, 1).paid_with("tok_declined")).await;
        assert_eq!(platform.outcome(order).await, "payment_declined");
        assert_eq!(saga_status(platform, order).await, "compensated");
        assert_eq!(platform.stock_of(&sku).await, (3, 0));
        assert!(platform.at_gateway(order).await.is_empty());
    });
}

#[test]
fn when_one_of_several_items_is_out_of_stock_nothing_is_reserved_and_the_payment_is_voided() {
    beside_others(async |platform| {
        let (plenty, scarce) = (platform.item("plenty", 100, 9).await, platform.item("scarce", 100, 1).await);
        let order = platform.place(&Wish::of(&plenty, 1).and(&scarce, 2)).await;
        assert_eq!(platform.outcome(order).await, "out_of_stock");
        assert_eq!(saga_status(platform, order).await, "compensated");
        assert_eq!((platform.stock_of(&plenty).await, platform.stock_of(&scarce).await), ((9, 0), (1, 0)));
        assert_eq!(platform.at_gateway(order).await, ["authorized 300", "voided 300"]);
    });
}

#[test]
fn a_capture_that_is_refused_releases_the_stock_and_voids_the_payment() {
    beside_others(async |platform| {
        let sku = platform.item("refused", 500, 3).await;
        let order = platform.place(&Wish::of(&sku, 1).paid_with("tok_capture_refused")).await;
        assert_eq!(platform.outcome(order).await, "payment_not_captured");
        assert_eq!(platform.stock_of(&sku).await, (3, 0));
        assert_eq!(platform.at_gateway(order).await, ["authorized 500", "voided 500"]);
    });
}

#[test]
fn an_authorization_of_another_amount_confirms_no_order_and_is_let_go() {
    beside_others(async |platform| {
        let sku = platform.item("otherwise", 500, 3).await;
        for (token, moved) in [
            ("tok_authorize_answers_other_amount", ["authorized 499", "voided 499"]),
            ("tok_authorize_answers_other_currency", ["authorized 500", "voided 500"]),
        ] {
            let order = platform.place(&Wish::of(&sku, 1).paid_with(token)).await;
            let url = format!("{}/v1/payments/{order}", platform.stack.url(Service::Payments));
            let payment = eventually(SOON, || async {
                let payment: Value = platform.http.get(&url).send().await.ok()?.json().await.ok()?;
                payment["in_doubt"].is_object().then_some(payment)
            })
            .await;
            let reason = payment["in_doubt"]["reason"].as_str().unwrap_or_default();
            assert!(reason.starts_with("asked to authorize 500 EUR, the gateway answered"), "{payment}");
            assert_eq!(platform.outcome(order).await, "failed", "{token}");
            assert_eq!(saga_status(platform, order).await, "compensated", "{token}");
            assert!(platform.saga(order).await.to_string().contains(reason), "the saga's story has the reason");
            let shown = platform.order(order).await.expect("it is there");
            assert_eq!(shown["cause"], "contradiction", "{token}: {shown}");
            assert_eq!(platform.at_gateway(order).await, moved, "{token}");
            let ledger = platform.http.get(format!("{url}/ledger")).send().await.expect("an answer");
            let ledger: Value = ledger.json().await.expect("JSON");
            assert_eq!(ledger["differences"][0]["asked"]["amount"], 500, "{ledger}");
        }
        assert_eq!(platform.stock_of(&sku).await, (3, 0));
    });
}

/// Waits until a saga is stuck. Its pauses between two attempts are over at once; its waits for an answer last, so that
/// the last attempt's answer is the reason.
async fn is_stuck_without_pauses(platform: &Platform, order: Uuid) {
    let over = "with pausing as (
                  update saga set state = jsonb_set(state, '{status,open,due}', '1000'), armed_at = '2020-01-01'
                   where saga_id = $1 and state #>> '{status,open,wait}' = 'pause' returning saga_id)
                update saga_due d set due_at = '2020-01-01' from pausing where d.saga_id = pausing.saga_id";
    eventually(SETTLED_WITHIN, || async {
        sqlx::query(over).bind(order).execute(&platform.orders).await.expect("the saga can be hurried");
        (saga_status(platform, order).await == "stuck").then_some(())
    })
    .await;
}

/// The money was taken, and not as much as was asked for: only an operator can decide. The audit would find that the
/// provider's books and those of payment-svc differ.
#[test]
fn a_capture_of_another_amount_waits_for_an_operator_with_both_amounts_shown() {
    unaudited(async |platform| {
        let sku = platform.item("captured-otherwise", 500, 3).await;
        let order = platform.place(&Wish::of(&sku, 1).paid_with("tok_capture_answers_other_amount")).await;
        is_stuck_without_pauses(platform, order).await;
        let reason = "asked to capture 500 EUR, the gateway answered 499 EUR";
        let saga = platform.saga(order).await;
        assert!(saga["waits"]["why"].as_str().is_some_and(|why| why.contains(reason)), "{saga}");
        let shown = platform.order(order).await.expect("it is there");
        assert_eq!((&shown["status"], &shown["reason"]), (&json!("pending"), &Value::Null), "{shown}");
        let url = format!("{}/v1/payments/{order}", platform.stack.url(Service::Payments));
        let get = async |url: String| platform.http.get(url).send().await.expect("an answer").json::<Value>().await;
        let payment = get(url.clone()).await.expect("JSON");
        assert_eq!((&payment["status"], &payment["in_doubt"]["reason"]), (&json!("authorized"), &json!(reason)));
        let ledger = get(format!("{url}/ledger")).await.expect("JSON");
        let difference = &ledger["differences"][0];
        assert_eq!(
            (&difference["movement"], &difference["asked"]["amount"]),
            (&json!("capture"), &json!(500)),
            "{ledger}"
        );
        assert_eq!(difference["answered"]["amount"], 499, "{ledger}");
        // The books have the authorization, which is what both agree on.
        assert!(ledger["entries"].as_array().is_some_and(|entries| entries.len() == 2), "{ledger}");
        assert_eq!(platform.at_gateway(order).await, ["authorized 500", "captured 499"]);
        assert_eq!(platform.stock_of(&sku).await, (2, 1), "the stock stays put aside");
        assert_eq!(platform.cancel(order).await, 409, "the money may be taken");
    });
}

#[test]
fn refusals_with_strange_codes_are_refusals() {
    beside_others(async |platform| {
        let sku = platform.item("strange-code", 500, 3).await;
        for strange in ["dirty_code", "long_code"] {
            for (operation, reason, at_gateway) in [
                ("authorize", "payment_declined", &[][..]),
                ("capture", "payment_not_captured", &["authorized 500", "voided 500"]),
            ] {
                let token = format!("tok_{operation}_answers_{strange}");
                let order = platform.place(&Wish::of(&sku, 1).paid_with(&token)).await;
                assert_eq!(platform.outcome(order).await, reason, "{token}");
                assert_eq!(saga_status(platform, order).await, "compensated", "{token}");
                assert_eq!(platform.at_gateway(order).await, at_gateway, "{token}");
            }
        }
        assert_eq!(platform.stock_of(&sku).await, (3, 0));
    });
}

#[test]
fn a_customer_cancels_while_the_order_runs_and_everything_is_undone() {
    beside_others(async |platform| {
        let sku = platform.item("cancelled", 500, 3).await;
        // A slow gateway: there is time to change one's mind.
        let order = platform.place(&Wish::of(&sku, 1).paid_with("tok_slow")).await;
        assert_eq!(platform.cancel(order).await, 202);
        assert_eq!(platform.outcome(order).await, "cancelled_by_customer");
        assert_eq!(saga_status(platform, order).await, "compensated");
        assert_eq!(platform.stock_of(&sku).await, (3, 0));
        let left = platform.at_gateway(order).await;
        assert!(left.is_empty() || left == ["authorized 500", "voided 500"], "{left:?}");
        // The answer to a late second thought is the same as to the first.
        assert_eq!(platform.cancel(order).await, 200);
    });
}

#[test]
fn an_order_that_is_paid_can_no_longer_be_cancelled() {
    beside_others(async |platform| {
        let sku = platform.item("paid", 500, 3).await;
        let order = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        assert_eq!(platform.cancel(order).await, 409);
        assert_eq!(platform.outcome(order).await, "confirmed");
    });
}

#[test]
fn a_payment_service_that_is_killed_in_the_middle_and_comes_back_loses_nothing_and_takes_nothing_twice() {
    alone(async |platform| {
        let sku = platform.item("killed", 700, 3).await;
        platform.wants_fault("SIGKILL payment-svc", 1);
        // The gateway takes 1.5 s, so the service dies with the call under way.
        let order = platform.place(&Wish::of(&sku, 1).paid_with("tok_slow")).await;
        calls_the_gateway(platform, order).await;
        let payments = platform.stack.service(Service::Payments);
        payments.process.kill();
        platform.fault_fired("SIGKILL payment-svc");
        payments.start_again().await.expect("payment-svc comes back");
        assert_eq!(platform.outcome(order).await, "confirmed");
        assert_eq!(platform.at_gateway(order).await, ["authorized 700", "captured 700"]);
    });
}

#[test]
fn a_gateway_answer_that_is_lost_is_asked_for_again_and_the_money_is_held_once() {
    beside_others(async |platform| {
        let sku = platform.item("lost", 900, 9).await;
        for token in ["tok_lost_answer", "tok_capture_lost_answer"] {
            let order = platform.place(&Wish::of(&sku, 1).paid_with(token)).await;
            assert_eq!(platform.outcome(order).await, "confirmed", "{token}");
            assert_eq!(platform.at_gateway(order).await, ["authorized 900", "captured 900"], "{token}");
        }
    });
}

#[test]
fn the_inspection_tells_an_orders_whole_story() {
    beside_others(async |platform| {
        let sku = platform.item("story", 100, 1).await;
        let order = platform.place(&Wish::of(&sku, 2)).await;
        assert_eq!(platform.outcome(order).await, "out_of_stock");
        assert_eq!(steps(platform, order).await, "undone undone not_done waiting waiting waiting");
        let saga = platform.saga(order).await;
        let timeline = saga["timeline"].as_array().expect("a timeline").iter();
        let lines = timeline.map(|line| {
            let word = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            format!("{} {} {}", word("what"), word("op"), word("step")).trim_end().to_owned()
        });
        let lines: Vec<_> = lines.collect();
        for line in [
            "sent do authorize-payment",
            "reply do authorize-payment",
            "sent do reserve-stock",
            "reply do reserve-stock",
            "sent undo authorize-payment",
            "reply undo authorize-payment",
        ] {
            assert_eq!(lines.iter().filter(|lines| *lines == line).count(), 1, "{line} in {lines:#?}");
        }
        assert_eq!(saga["remaining"].as_array().map(Vec::len), Some(0), "{saga:#}");
    });
}

//! Every step of the order saga: it succeeds, is refused, fails and recovers, stays in doubt. Each command, undo and
//! reply comes twice or late, or never. Money and stock add up. (`edges.rs` kills the processes meanwhile.)
//!
//! One platform, many orders at once: a case is a line of a table, and the audit judges all of them together.

use contracts::topics::{INVENTORY_COMMANDS, ORDERS_REPLIES, PAYMENTS_COMMANDS};
use e2e::{
    audit::RecordFact,
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone},
    topics::{self, Echo},
};
use futures::future::join_all;
use saga_core::testkit::eventually;
use stack::service::Service;
use std::collections::BTreeSet;
use uuid::Uuid;

/// A step, the participant's behaviour, the order's end, and what the gateway has done by then.
struct Case {
    step: &'static str,
    fault: &'static str,
    /// The simulated provider's behaviour.
    token: &'static str,
    /// More pieces than there are: `reserve-stock` is refused, and the payment voided.
    too_many: bool,
    outcome: &'static str,
    gateway: &'static [&'static str],
}

const PAID: &[&str] = &["authorized 700", "captured 700"];
const VOIDED: &[&str] = &["authorized 700", "voided 700"];

const fn case(
    step: &'static str,
    fault: &'static str,
    token: &'static str,
    outcome: &'static str,
    gateway: &'static [&'static str],
) -> Case {
    Case { step, fault, token, too_many: false, outcome, gateway }
}

const fn short(mut case: Case) -> Case {
    case.too_many = true;
    case
}

const CASES: &[Case] = &[
    case("every step", "succeeds", "tok_visa", "confirmed", PAID),
    case("every step", "answers late", "tok_slow", "confirmed", PAID),
    case("authorize", "is refused", "tok_declined", "payment_declined", &[]),
    case("authorize", "fails and recovers", "tok_error_once", "confirmed", PAID),
    case("authorize", "is in doubt", "tok_lost_answer", "confirmed", PAID),
    short(case("reserve", "is refused", "tok_visa", "out_of_stock", VOIDED)),
    short(case("undo of authorize", "answers late", "tok_slow", "out_of_stock", VOIDED)),
    short(case("undo of authorize", "fails and recovers", "tok_void_error_once", "out_of_stock", VOIDED)),
    short(case("undo of authorize", "is in doubt", "tok_void_lost_answer", "out_of_stock", VOIDED)),
    case("capture", "is refused", "tok_capture_refused", "payment_not_captured", VOIDED),
    case("capture", "fails and recovers", "tok_capture_error_once", "confirmed", PAID),
    case("capture", "is in doubt", "tok_capture_lost_answer", "confirmed", PAID),
];

/// How many orders of each case run at once.
const COPIES: usize = 2;

/// An order of 7 pieces of its own item, at 100 each.
async fn run(platform: &Platform, case: &Case) -> Uuid {
    let pieces = if case.too_many { 6 } else { 20 };
    let sku = platform.item("step", 100, pieces).await;
    let order = platform.place(&Wish::of(&sku, 7).paid_with(case.token)).await;
    let name = format!("{} {} ({order})", case.step, case.fault);
    assert_eq!(platform.outcome(order).await, case.outcome, "{name}");
    assert_eq!(platform.at_gateway(order).await, case.gateway, "{name}");
    // The provider did misbehave, and was asked again under the same key.
    if matches!(case.fault, "fails and recovers" | "is in doubt") {
        assert!(platform.asked_under_one_key(order).await >= 2, "{name}: asked once");
    }
    let left = if case.outcome == "confirmed" { pieces - 7 } else { pieces };
    eventually(SETTLED_WITHIN, || async { (platform.stock_of(&sku).await == (left, 0)).then_some(()) }).await;
    order
}

async fn run_all(platform: &Platform) -> Vec<Uuid> {
    join_all(CASES.iter().flat_map(|case| std::iter::repeat_n(case, COPIES)).map(|case| run(platform, case))).await
}

#[test]
fn every_step_succeeds_is_refused_fails_and_recovers_and_stays_in_doubt() {
    alone(async |platform| {
        run_all(platform).await;
    });
}

#[test]
fn every_command_undo_and_reply_comes_twice_while_the_order_runs() {
    alone(async |platform| {
        let watched = [PAYMENTS_COMMANDS.name, INVENTORY_COMMANDS.name, ORDERS_REPLIES.name];
        platform.expected().foreign_sources.insert(topics::ECHO.to_owned());
        let echo = Echo::start(&platform.brokers(), &watched).await.expect("the topics can be read");
        run_all(platform).await;
        let payments = ["do authorize-payment", "undo authorize-payment", "do capture-payment"];
        let stock = ["do reserve-stock", "undo reserve-stock", "do commit-stock"];
        let of = |topic, steps: &[&str]| steps.iter().map(|step| format!("{step} in {topic}")).collect::<BTreeSet<_>>();
        let commands = &of(PAYMENTS_COMMANDS.name, &payments) | &of(INVENTORY_COMMANDS.name, &stock);
        let all = &commands | &of(ORDERS_REPLIES.name, &[payments, stock].concat());
        eventually(SETTLED_WITHIN, || async { (echo.repeated() == all).then_some(()) }).await;
        echo.stop().await.expect("the topics can be written");
    });
}

/// The records of orders in a topic, as they stand there.
async fn records_of(platform: &Platform, topic: &str, orders: &[Uuid]) -> Vec<RecordFact> {
    let names: Vec<_> = orders.iter().map(ToString::to_string).collect();
    let all = topics::read(&platform.brokers(), topic).await.expect("the topic can be read");
    all.into_iter().filter(|record| record.key.as_ref().is_some_and(|key| names.contains(key))).collect()
}

#[test]
fn every_command_undo_and_reply_comes_again_after_the_end() {
    alone(async |platform| {
        platform.expected().foreign_sources.insert(topics::ECHO.to_owned());
        let orders = run_all(platform).await;
        platform.passes_the_audit().await;
        let (before, _) = platform.judge().await.expect("the facts can be read");
        let mut replies = 0;
        for topic in [PAYMENTS_COMMANDS.name, INVENTORY_COMMANDS.name, ORDERS_REPLIES.name] {
            for record in records_of(platform, topic, &orders).await {
                // The record comes as it was: the inbox knows it. And as a resend: the fence, or the saga, does.
                topics::write(&platform.brokers(), &record).await.expect("it can be written");
                topics::write(&platform.brokers(), &topics::resent(&record)).await.expect("it can be written");
                replies += usize::from(topic == ORDERS_REPLIES.name);
            }
        }
        platform.passes_the_audit().await;
        let (after, _) = platform.judge().await.expect("the facts can be read");
        assert!(after.records.len() > before.records.len());
        assert_eq!(after.orders, before.orders);
        assert_eq!(after.movements, before.movements);
        assert_eq!(after.payments, before.payments);
        assert_eq!(after.stock, before.stock);
        let statuses = |facts: &e2e::audit::Facts| facts.sagas.values().map(|s| s.status.clone()).collect::<Vec<_>>();
        assert_eq!(statuses(&after), statuses(&before));
        // Replies that came again were noted as ignored, and so were the answers to commands that came again. Each kind
        // of them was once.
        let ignored = |order| after.sagas[order].log.iter().filter(|(_, kind)| kind == "ignored").count();
        assert!(replies > orders.len() && orders.iter().all(|order| ignored(order) > 0));
    });
}

#[test]
fn a_step_in_doubt_is_undone_at_once_when_the_customer_cancels_and_its_late_reply_changes_nothing() {
    alone(async |platform| {
        for (service, step) in [(Service::Payments, "authorize-payment"), (Service::Inventory, "reserve-stock")] {
            let sku = platform.item("doubt", 100, 20).await;
            let participant = platform.stack.service(service);
            participant.process.pause();
            let orders = join_all((0..4).map(|_| async { platform.place(&Wish::of(&sku, 2)).await })).await;
            for order in &orders {
                eventually(SETTLED_WITHIN, || async {
                    let saga = platform.saga(*order).await;
                    let steps = saga["steps"].as_array()?;
                    steps.iter().any(|s| s["name"] == step && s["state"] == "issued").then_some(())
                })
                .await;
                assert_eq!(platform.cancel(*order).await, 202, "{step}");
            }
            participant.process.resume();
            for order in &orders {
                assert_eq!(platform.outcome(*order).await, "cancelled_by_customer", "{step}");
            }
            assert_eq!(platform.stock_of(&sku).await, (20, 0), "{step}");
        }
    });
}

/// Whether the saga is stuck, and its participant has given up too: nothing moves by itself any more.
async fn is_stuck(platform: &Platform, order: Uuid) -> bool {
    let doubtful = "select exists (select from participant_intent where saga_id = $1 and state = 'in_doubt')";
    let mut payments = platform.database("payments").await;
    let doubtful: bool =
        sqlx::query_scalar(doubtful).bind(order).fetch_one(&mut payments).await.expect("the intents can be read");
    doubtful && platform.saga(order).await["status"] == "stuck"
}

#[test]
fn what_the_provider_never_answers_is_stuck_and_alarmed_until_an_operator_retries_it() {
    alone(async |platform| {
        for (token, pieces, why, shown, outcome, gateway) in [
            ("tok_capture_error", 20, "capture-payment", "pending", "confirmed", PAID),
            ("tok_void_error", 6, "authorize-payment", "cancelling", "out_of_stock", VOIDED),
        ] {
            let sku = platform.item("stuck", 100, pieces).await;
            let order = platform.place(&Wish::of(&sku, 7).paid_with(token)).await;
            platform.time_flies_until(async || is_stuck(platform, order).await).await;
            let saga = platform.saga(order).await;
            assert!(saga["waits"]["why"].as_str().is_some_and(|text| text.contains(why)), "{saga}");
            assert_eq!(platform.order(order).await.expect("it is there")["status"], shown, "{token}");
            eventually(SETTLED_WITHIN, || async {
                (platform.gauge(Service::Orders, "saga_stuck").await == 1.0).then_some(())
            })
            .await;
            platform.provider_is_well_for(order).await;
            platform.retries(order, "the provider is well again").await;
            assert_eq!(platform.outcome(order).await, outcome, "{token}");
            assert_eq!(platform.at_gateway(order).await, gateway, "{token}");
        }
    });
}

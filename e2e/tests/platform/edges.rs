//! The services' processes die before and after each commit that an order passes on its way, step by step. Transactions
//! fail for other reasons, too. Money and stock add up.
//!
//! A kill is tied to a step: the fail point fires when a batch has the step's command, or its reply, in it. The claim
//! of a call is one statement. The commit before it is `consumer.after-commit`, and what is after it
//! `participant.before-call`. The relay is killed in `crash.rs`. A saga or a reply that is taken alone, and a record
//! that failed, lose their commits in saga-core's own tests (`crash.rs`, `crashes.rs`).

use contracts::topics::ORDERS_REPLIES;
use e2e::{
    failpoint::{Edge, Wrong},
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone},
};
use saga_core::testkit::{eventually, time_passes};
use stack::{process::Process, service::Service};
use uuid::Uuid;

const PAYMENT_STEPS: [&str; 3] = ["do authorize-payment", "undo authorize-payment", "do capture-payment"];
const STOCK_STEPS: [&str; 3] = ["do reserve-stock", "undo reserve-stock", "do commit-stock"];

/// Goes wrong at the edges one after another. Each edge meets an order that is confirmed, one that is short of stock,
/// and one that is not captured.
async fn at(platform: &Platform, edges: Vec<Edge>) {
    let sku = platform.item("edge", 100, 1_000).await;
    for edge in edges {
        let orders = platform.goes_wrong_at(&edge, async {
            let paid = platform.place(&Wish::of(&sku, 1)).await;
            let short = platform.place(&Wish::of(&sku, 100_000)).await;
            let refused = platform.place(&Wish::of(&sku, 1).paid_with("tok_capture_refused")).await;
            [(paid, "confirmed"), (short, "out_of_stock"), (refused, "payment_not_captured")]
        });
        for (order, outcome) in orders.await {
            assert_eq!(platform.outcome(order).await, outcome, "{edge:?}");
        }
    }
}

/// A process dies at each of the points, once for each of the steps.
fn kills(service: Service, scope: &str, points: &[&str], steps: &[&str]) -> Vec<Edge> {
    let each = steps.iter().flat_map(|step| points.iter().map(move |point| format!("{point}@{scope}/{step}")));
    each.map(|name| Edge::kill(service, name)).collect()
}

/// The edges around a consumer's commits, for each step; and once where no record is committed.
fn consumer_kills(service: Service, group: &str, steps: &[&str]) -> Vec<Edge> {
    let commits = kills(service, group, &["consumer.before-commit", "consumer.after-commit"], steps);
    let others = ["consumer.before-begin", "consumer.after-inbox", "consumer.before-store"];
    let others = others.map(|point| Edge::kill(service, format!("{point}@{group}")));
    commits.into_iter().chain(others).collect()
}

#[test]
fn payment_svc_dies_before_and_after_each_commit_of_each_step() {
    alone(async |platform| at(platform, consumer_kills(Service::Payments, "payment-svc", &PAYMENT_STEPS)).await);
}

#[test]
fn payment_svc_dies_before_and_after_it_calls_the_gateway_for_each_step() {
    let calls = ["participant.before-call", "participant.after-call"];
    alone(async |platform| at(platform, kills(Service::Payments, "payment-svc", &calls, &PAYMENT_STEPS)).await);
}

#[test]
fn payment_svc_dies_before_and_after_it_commits_the_answer_of_each_step() {
    let commits = ["participant.before-settle-commit", "participant.after-settle-commit"];
    alone(async |platform| at(platform, kills(Service::Payments, "payment-svc", &commits, &PAYMENT_STEPS)).await);
}

#[test]
fn inventory_svc_dies_before_and_after_each_commit_of_each_step() {
    alone(async |platform| at(platform, consumer_kills(Service::Inventory, "inventory-svc", &STOCK_STEPS)).await);
}

#[test]
fn the_orchestrator_dies_before_and_after_each_commit_of_each_payment_step() {
    let commits = ["consumer.before-commit", "consumer.after-commit"];
    alone(async |platform| at(platform, kills(Service::Orders, "order-svc.saga", &commits, &PAYMENT_STEPS)).await);
}

#[test]
fn the_orchestrator_dies_before_and_after_each_commit_of_each_stock_step() {
    alone(async |platform| at(platform, consumer_kills(Service::Orders, "order-svc.saga", &STOCK_STEPS)).await);
}

#[test]
fn the_orchestrator_dies_around_its_decisions_and_before_it_records_what_it_read() {
    let decisions = ["saga.after-load", "saga.after-store"];
    let decisions = decisions.map(|point| Edge::kill(Service::Orders, format!("{point}@{}", ORDERS_REPLIES.name)));
    let read = Edge::kill(Service::Orders, "consumer.before-read-until@order-svc.saga");
    alone(async |platform| at(platform, decisions.into_iter().chain([read]).collect()).await);
}

#[test]
fn a_request_whose_process_dies_before_or_after_its_commit_has_one_effect_when_it_is_repeated() {
    alone(async |platform| {
        for point in ["outbox.before-commit", "outbox.after-commit"] {
            let (orders, stock) = (format!("{point}@orders"), format!("{point}@inventory"));
            let dies = Edge::kill(Service::Inventory, stock);
            // The first passage is the item's own POST, the second that of its first delivery.
            for skip in [0, 1] {
                let edge = Edge { skip, ..dies.clone() };
                let sku = platform.goes_wrong_at(&edge, platform.item("edge", 100, 20)).await;
                assert_eq!(platform.stock_of(&sku).await, (20, 0), "{edge:?}");
            }
            let sku = platform.item("edge", 100, 20).await;
            let dies = Edge::kill(Service::Orders, orders);
            let payments = &platform.stack.service(Service::Payments).process;
            let _goes_on = GoesOn(payments);
            payments.pause();
            let order = platform.goes_wrong_at(&dies, platform.place(&Wish::of(&sku, 2))).await;
            let cancelled =
                eventually(SETTLED_WITHIN, || async { (platform.cancel(order).await == 202).then_some(()) });
            platform.goes_wrong_at(&dies, cancelled).await;
            payments.resume();
            assert_eq!(platform.outcome(order).await, "cancelled_by_customer", "{point}");
        }
    });
}

/// The edges around the commits of payment-svc that are neither a batch's nor those of a gateway's answer.
const AROUND_OTHER_COMMITS: [&str; 2] = ["outbox.before-commit@payments", "outbox.after-commit@payments"];

/// How many calls of an order are in this state.
async fn calls(platform: &Platform, order: Uuid, state: &str) -> i64 {
    let count = sqlx::query_scalar("select count(*) from participant_intent where saga_id = $1 and state = $2");
    let count = count.bind(order).bind(state);
    count.fetch_one(&mut platform.database("payments").await).await.expect("the intents can be read")
}

#[test]
fn payment_svc_dies_before_and_after_it_commits_that_a_call_is_given_up_in_doubt() {
    alone(async |platform| {
        let sku = platform.item("doubt", 100, 100).await;
        for point in AROUND_OTHER_COMMITS {
            let edge = Edge::kill(Service::Payments, point);
            let given_up = async {
                let order = platform.place(&Wish::of(&sku, 2).paid_with("tok_capture_error")).await;
                platform.time_flies_until(async || calls(platform, order, "in_doubt").await == 1).await;
                order
            };
            let order = platform.goes_wrong_at(&edge, given_up).await;
            platform.time_flies_until(async || platform.saga(order).await["status"] == "stuck").await;
            assert_eq!(platform.at_gateway(order).await, ["authorized 200"], "{point}");
            platform.provider_is_well_for(order).await;
            platform.retries(order, "the provider is well again").await;
            assert_eq!(platform.outcome(order).await, "confirmed", "{point}");
            assert_eq!(platform.at_gateway(order).await, ["authorized 200", "captured 200"], "{point}");
        }
    });
}

#[test]
fn payment_svc_dies_before_and_after_it_commits_an_undo_that_waited_for_a_call() {
    alone(async |platform| {
        let gateway = &platform.stack.service(Service::Gateway).process;
        let _goes_on = GoesOn(gateway);
        let sku = platform.item("waits", 100, 100).await;
        for point in AROUND_OTHER_COMMITS {
            let undone = async {
                gateway.pause();
                let order = platform.place(&Wish::of(&sku, 2)).await;
                eventually(SETTLED_WITHIN, || async { (calls(platform, order, "open").await == 1).then_some(()) })
                    .await;
                assert_eq!(platform.cancel(order).await, 202, "{point}");
                eventually(SETTLED_WITHIN, || async { (calls(platform, order, "waiting").await == 1).then_some(()) })
                    .await;
                gateway.resume();
                order
            };
            let order = platform.goes_wrong_at(&Edge::kill(Service::Payments, point), undone).await;
            assert_eq!(platform.outcome(order).await, "cancelled_by_customer", "{point}");
            platform.settles().await;
            let [kept @ .., last] = &platform.at_gateway(order).await[..] else { panic!("{point}: nothing was asked") };
            assert_eq!((kept, last.as_str()), (&["authorized 200".to_owned()][..], "voided 200"), "{point}");
        }
    });
}

/// Lets a paused process go on, also when the test fails: the next test needs it.
struct GoesOn<'a>(&'a Process);

impl Drop for GoesOn<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

/// How often a command was sent.
async fn sent(platform: &Platform, order: Uuid, op: &str, step: &str) -> i64 {
    let count = sqlx::query_scalar(
        "select count(*)
           from outbox
          where key = $1 and topic like '%.commands' and headers ->> 'ce_sagaop' = $2 and headers ->> 'ce_sagastep' = $3",
    );
    let count = count.bind(order.to_string()).bind(op).bind(step);
    count.fetch_one(&platform.orders).await.expect("the outbox can be read")
}

/// Waits for a command that was sent and is not answered: its deadline passes, and order-svc dies in the timers'
/// transaction.
async fn is_late(platform: &Platform, edge: &Edge, order: Uuid, op: &str, step: &str) {
    let sent_times = async |times: i64| {
        let enough = || async { (sent(platform, order, op, step).await >= times).then_some(()) };
        eventually(SETTLED_WITHIN, enough).await;
    };
    sent_times(1).await;
    platform.goes_wrong_at(edge, time_passes(&platform.orders)).await;
    sent_times(2).await;
}

/// The command was sent once more, and not twice: now that the order has ended no process sends anything any more.
async fn was_resent_once(platform: &Platform, edge: &Edge, order: Uuid, op: &str, step: &str) {
    assert_eq!(sent(platform, order, op, step).await, 2, "{op} {step}, {edge:?}");
}

/// A command of each step is late, and the process dies at `point` around its commit of that.
async fn commands_are_late(platform: &Platform, point: &str) {
    let payments = &platform.stack.service(Service::Payments).process;
    let inventory = &platform.stack.service(Service::Inventory).process;
    let _go_on = (GoesOn(payments), GoesOn(inventory));
    let sku = platform.item("late", 100, 100).await;
    let wish = Wish::of(&sku, 2);
    let edge = Edge::kill(Service::Orders, format!("{point}@{}", ORDERS_REPLIES.name));
    // The process that has to answer stands still; and the next one does before this one goes on.
    payments.pause();
    let order = platform.place(&wish).await;
    let way = [
        ("authorize-payment", payments, inventory),
        ("reserve-stock", inventory, payments),
        ("capture-payment", payments, inventory),
        ("commit-stock", inventory, payments),
    ];
    for (step, answers, next) in way {
        is_late(platform, &edge, order, "do", step).await;
        next.pause();
        answers.resume();
    }
    payments.resume();
    assert_eq!(platform.outcome(order).await, "confirmed", "{point}");
    platform.settles().await;
    for (step, ..) in way {
        was_resent_once(platform, &edge, order, "do", step).await;
    }
    for (step, answers) in [("authorize-payment", payments), ("reserve-stock", inventory)] {
        answers.pause();
        let order = platform.place(&wish).await;
        let issued = || async { (sent(platform, order, "do", step).await == 1).then_some(()) };
        eventually(SETTLED_WITHIN, issued).await;
        assert_eq!(platform.cancel(order).await, 202, "{point}");
        is_late(platform, &edge, order, "undo", step).await;
        answers.resume();
        assert_eq!(platform.outcome(order).await, "cancelled_by_customer", "{point}");
        platform.settles().await;
        was_resent_once(platform, &edge, order, "undo", step).await;
    }
}

#[test]
fn order_svc_dies_before_it_commits_that_a_command_is_late_and_resends_it_once() {
    alone(async |platform| commands_are_late(platform, "saga.timers.before-commit").await);
}

#[test]
fn order_svc_dies_after_it_commits_that_a_command_is_late_and_resends_it_once() {
    alone(async |platform| commands_are_late(platform, "saga.timers.after-commit").await);
}

/// The edges at which a batch's transaction fails before its commit, one for each of the steps. Their records fail with
/// it, and are tried again.
fn failures(service: Service, group: &str, steps: &[&str]) -> Vec<Edge> {
    let name = |step| format!("consumer.before-commit@{group}/{step}");
    steps.iter().map(|step| Edge { service, name: name(step), skip: 0, wrong: Wrong::Error(2) }).collect()
}

#[test]
fn the_transaction_of_each_step_fails_for_its_own_reasons_and_recovers() {
    alone(async |platform| {
        let services = [Service::Orders, Service::Payments, Service::Inventory];
        let logs = services.map(|service| (service, platform.log_size(service)));
        let payments = failures(Service::Payments, "payment-svc", &PAYMENT_STEPS);
        let inventory = failures(Service::Inventory, "inventory-svc", &STOCK_STEPS);
        let saga = failures(Service::Orders, "order-svc.saga", &[PAYMENT_STEPS, STOCK_STEPS].concat());
        tokio::join!(at(platform, payments), at(platform, inventory), at(platform, saga));
        for (service, since) in logs {
            let log = platform.lines(service, since);
            let of_orders: Vec<_> = log.iter().filter(|line| line.get("saga").is_some()).collect();
            assert!(of_orders.iter().any(|line| line["level"] == "WARN"), "{service} says of no order what failed");
            for line in of_orders {
                assert_eq!(line["order"], line["saga"], "{service}: {line}");
                assert!(line["trace_id"].as_str().is_some_and(|trace| trace.len() == 32), "{service}: {line}");
            }
        }
    });
}

#[test]
fn a_connection_is_lost_at_any_edge_and_another_one_used() {
    let edges = |service, scope: &str, points: &[&str]| -> Vec<Edge> {
        let name = |point| format!("{point}@{scope}");
        points.iter().map(|point| Edge { service, name: name(point), skip: 0, wrong: Wrong::Outage(3) }).collect()
    };
    let consumer = ["consumer.after-inbox", "consumer.before-commit", "consumer.after-commit"];
    alone(async |platform| {
        let payments = edges(Service::Payments, "payment-svc", &[&consumer[..], &["participant.after-call"]].concat());
        let inventory = edges(Service::Inventory, "inventory-svc", &consumer);
        let mut saga = edges(Service::Orders, "order-svc.saga", &consumer);
        saga.extend(edges(Service::Orders, ORDERS_REPLIES.name, &["saga.after-store"]));
        tokio::join!(at(platform, payments), at(platform, inventory), at(platform, saga));
    });
}

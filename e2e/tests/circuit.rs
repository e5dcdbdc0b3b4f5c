//! The provider's behaviour towards some payments, and its effect on others.

use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone},
};
use futures::future::join_all;
use saga_core::testkit::{eventually, size};
use stack::service::Service;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// The pauses between two healthy orders, and between two whose captures fail.
const HEALTHY: Duration = Duration::from_millis(250);
const FAILING: Duration = Duration::from_millis(500);

/// A p99 below this is as good as any: on a busy machine it is noise.
const FAST: Duration = Duration::from_millis(300);

/// Places orders at their pace; returns how long the slowest but 1% took until they were confirmed.
async fn p99(platform: &Platform, sku: &str, orders: u32) -> Duration {
    let begun = Instant::now();
    let each = (0..orders).map(async |n| {
        let due = begun + HEALTHY * n;
        sleep_until(due).await;
        let order = platform.place(&Wish::of(sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        due.elapsed()
    });
    let mut took = join_all(each).await;
    took.sort();
    took[took.len() - 1 - took.len() / 100]
}

async fn failing(platform: &Platform, sku: &str, orders: u32) {
    let begun = Instant::now();
    let each = (0..orders).map(async |n| {
        sleep_until(begun + FAILING * n).await;
        platform.place(&Wish::of(sku, 1).paid_with("tok_capture_error")).await;
    });
    join_all(each).await;
}

#[test]
fn payments_whose_captures_fail_cost_healthy_orders_nothing() {
    alone(async |platform| {
        let sku = platform.item("beside-failing", 100, 10_000).await;
        let orders = u32::try_from(size(48, 192)).expect("few");
        let without = p99(platform, &sku, orders).await;
        let (with, ()) = tokio::join!(p99(platform, &sku, orders), failing(platform, &sku, orders / 2));
        println!("healthy orders' p99: {without:?} before the failing captures, {with:?} beside them");
        assert!(with <= 3 * without.max(FAST), "p99 {without:?} without failing ones, {with:?} beside them");
        assert_eq!(platform.gauge(Service::Payments, "gateway_circuit_opened_total").await, 0.0);

        // The provider recovers, and all the others are paid.
        sqlx::query("update gateway_authorization set method = 'tok_visa'")
            .execute(&mut platform.database("gateway").await)
            .await
            .expect("the gateway's books can be written");
        platform.settles().await;
    });
}

#[test]
fn a_provider_that_is_away_is_waited_for_and_calls_not_made_count_nothing() {
    alone(async |platform| {
        let sku = platform.item("away", 100, 10_000).await;
        let gateway = &platform.stack.service(Service::Gateway);
        gateway.process.kill();
        let orders = join_all((0..12).map(async |_| platform.place(&Wish::of(&sku, 1)).await)).await;
        let gauge = async |name: &str| platform.gauge(Service::Payments, name).await;
        eventually(SETTLED_WITHIN, || async { (gauge("gateway_circuit_open").await == 1.0).then_some(()) }).await;
        let not_made = gauge("gateway_calls_not_made_total").await;
        let attempts = async || -> i64 {
            sqlx::query_scalar("select sum(attempts)::int8 from participant_intent")
                .fetch_one(&mut platform.database("payments").await)
                .await
                .expect("the intents can be read")
        };
        let before = attempts().await;
        eventually(SETTLED_WITHIN, || async {
            (gauge("gateway_calls_not_made_total").await >= not_made + 50.0).then_some(())
        })
        .await;
        // Meanwhile one payment a second tried.
        assert!(attempts().await <= before + 25, "calls that were not made are counted");
        gateway.process.start_again().expect("the program is there");
        for order in orders {
            assert_eq!(platform.outcome(order).await, "confirmed");
        }
        eventually(SETTLED_WITHIN, || async { (gauge("gateway_circuit_open").await == 0.0).then_some(()) }).await;
    });
}

//! The executor stops as if its process had died, at every edge between the command and its reply; another one takes
//! over. `edges.rs` of e2e kills the real process.

use crate::support::{
    World, authorize, capture, do_authorize, do_capture, message, new_order, refund, undo_authorize, void,
};
use saga_core::{
    command::{
        Op::{Do, Undo},
        Outcome::Succeeded,
    },
    consumer::{Handler, Message},
    testkit::{FailPoint, failpoints::Fault},
};

const EDGES: [&str; 4] = [
    "participant.before-call",
    "participant.after-call",
    "participant.before-settle-commit",
    "participant.after-settle-commit",
];

/// One executor dies at `edge`; another one finishes.
async fn crash_and_recover(world: &World, edge: &str, command: Message) {
    world.deliver(&[command]).await;
    let armed = FailPoint::once(edge, world.name, Fault::Crash);
    assert_eq!(world.executor().run_once().await.unwrap(), 1);
    drop(armed);
    world.settle().await;
}

#[tokio::test]
async fn a_process_that_dies_anywhere_moves_the_money_exactly_once() {
    let world = World::new().await;
    for (edge, orders) in EDGES.into_iter().zip(1..) {
        let order = new_order();
        crash_and_recover(&world, edge, do_authorize(order, "tok_visa")).await;
        crash_and_recover(&world, edge, do_capture(order)).await;
        crash_and_recover(&world, edge, message(order, "refund", Do, &refund(order, 100))).await;
        assert_eq!(world.outcomes(order).await, [Succeeded; 3], "{edge}");
        let voided = new_order();
        crash_and_recover(&world, edge, do_authorize(voided, "tok_visa")).await;
        crash_and_recover(&world, edge, undo_authorize(voided)).await;
        assert_eq!(world.outcomes(voided).await, [Succeeded; 2], "{edge}");
        let expected = [2_000, 0, 1_000, 1_000, 100].map(|amount| amount * orders);
        assert_eq!(world.provider.totals().await, expected, "{edge}");
        world.books_agree().await;
    }
}

#[tokio::test]
async fn a_batch_that_was_not_committed_leaves_no_trace_and_comes_again() {
    let world = World::new().await;
    let order = new_order();
    let mut tx = world.database.pool.begin().await.unwrap();
    world.participant.handle(&mut tx, &[do_authorize(order, "tok_visa")]).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(world.executor().run_once().await.unwrap(), 0);
    assert_eq!(world.provider.totals().await, [0; 5]);
    let (outcome, _) = world.do_and_settle(order, "authorize-payment", Do, &authorize(order, "tok_visa")).await;
    assert_eq!(outcome, Succeeded);
    world.books_agree().await;
}

#[tokio::test]
async fn an_undo_that_waits_is_not_lost_when_the_process_dies() {
    let world = World::new().await;
    for edge in EDGES {
        let order = new_order();
        world.deliver(&[do_authorize(order, "tok_lost_answer"), undo_authorize(order)]).await;
        let armed = FailPoint::once(edge, world.name, Fault::Crash);
        world.executor().run_once().await.unwrap();
        drop(armed);
        world.settle().await;
        assert_eq!(world.outcomes(order).await, [Succeeded; 2], "{edge}");
        assert_eq!(world.status(order).await, "voided", "{edge}");
    }
    assert_eq!(world.provider.totals().await[1], 0);
    world.books_agree().await;
}

#[tokio::test]
async fn many_orders_with_a_provider_that_loses_answers_and_errs_add_up() {
    let behaviour = payment_svc::sim::Behaviour { lost_answer_rate: 0.1, error_rate: 0.1, ..Default::default() };
    let world = World::with(behaviour).await;
    let orders: Vec<_> = (0..60).map(|_| new_order()).collect();
    let batch: Vec<_> = orders.iter().map(|&order| do_authorize(order, "tok_visa")).collect();
    world.deliver(&batch).await;
    world.settle().await;
    let second: Vec<_> = orders
        .iter()
        .enumerate()
        .map(|(n, &order)| match n % 2 {
            0 => message(order, "capture-payment", Do, &capture(order)),
            _ => message(order, "authorize-payment", Undo, &void(order)),
        })
        .collect();
    world.deliver(&second).await;
    world.settle().await;
    for order in orders {
        assert_eq!(world.outcomes(order).await, [Succeeded; 2]);
    }
    assert_eq!(world.provider.totals().await, [60_000, 0, 30_000, 30_000, 0]);
    world.books_agree().await;
}

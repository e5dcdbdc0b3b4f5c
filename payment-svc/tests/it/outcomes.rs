//! The outcomes of each command; repeated, out of order, and in doubt.

use crate::support::{
    World, authorize, capture, do_authorize, do_capture, euros, message, new_order, refund, undo_authorize, void,
};
use contracts::{OrderId, money::Money, payments::AuthorizePayment};
use saga_core::command::{
    Op::{Do, Undo},
    Outcome::{Failed, Rejected, Succeeded},
};

const AUTHORIZE: &str = "authorize-payment";
const CAPTURE: &str = "capture-payment";

async fn authorized(world: &World, method: &str) -> OrderId {
    let order = new_order();
    let (outcome, _) = world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, method)).await;
    assert_eq!(outcome, Succeeded, "{method}");
    order
}

#[tokio::test]
async fn money_is_held_taken_and_given_back_in_parts() {
    let world = World::new().await;
    let order = authorized(&world, "tok_visa").await;
    assert_eq!(world.status(order).await, "authorized");
    let (outcome, reply) = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    assert_eq!(outcome, Succeeded);
    assert_eq!(reply["amount"]["amount"], 1_000);
    for (step, amount, expected) in
        [("a", 600, Succeeded), ("b", 500, Rejected), ("c", 400, Succeeded), ("d", 1, Rejected)]
    {
        let (outcome, _) = world.do_and_settle(order, step, Do, &refund(order, amount)).await;
        assert_eq!(outcome, expected, "{amount}");
    }
    assert_eq!(world.provider.totals().await, [1_000, 0, 1_000, 0, 1_000]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_refund_that_is_refused_can_be_tried_anew_and_one_whose_answer_is_lost_happens_once() {
    let world = World::new().await;
    let order = authorized(&world, "tok_refund_refused").await;
    world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    for step in ["a", "b"] {
        let (outcome, reply) = world.do_and_settle(order, step, Do, &refund(order, 1_000)).await;
        assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, "refund_window_closed"));
    }
    let order = authorized(&world, "tok_refund_lost_answer").await;
    world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    assert_eq!(world.do_and_settle(order, "a", Do, &refund(order, 700)).await.0, Succeeded);
    assert_eq!(world.provider.totals().await, [2_000, 0, 2_000, 0, 700]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_provider_that_never_answers_fails_every_attempt_and_moves_nothing() {
    let world = World::impatient().await;
    let order = authorized(&world, "tok_capture_error").await;
    for _ in 0..2 {
        assert_eq!(world.do_and_settle(order, CAPTURE, Do, &capture(order)).await.0, Failed);
        assert_eq!(world.status(order).await, "authorized");
    }
    let order = authorized(&world, "tok_void_error").await;
    for _ in 0..2 {
        assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Failed);
        assert_eq!(world.status(order).await, "authorized");
    }
    assert_eq!(world.provider.totals().await, [2_000, 2_000, 0, 0, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_decline_is_a_rejection_with_the_gateways_reason_and_moves_nothing() {
    let world = World::new().await;
    for (method, reason) in [
        ("tok_declined", "declined"),
        ("tok_insufficient_funds", "insufficient_funds"),
        ("tok_expired_card", "expired_card"),
        ("tok_nobody_knows", "invalid_payment_method"),
    ] {
        let order = new_order();
        let (outcome, reply) = world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, method)).await;
        assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, reason));
        assert_eq!(world.status(order).await, "declined");
    }
    assert_eq!(world.provider.totals().await, [0; 5]);
    world.books_agree().await;
}

#[tokio::test]
async fn whatever_happens_to_an_answer_the_money_is_held_once() {
    let world = World::impatient().await;
    for method in ["tok_lost_answer", "tok_error_once", "tok_slow"] {
        // The gateway is slower than the time-out: in doubt, then the stored answer. (The second answer is as slow, but
        // the first has been performed by then. After all attempts the command stays in doubt and fails.)
        let order = new_order();
        let (outcome, _) = world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, method)).await;
        let expected = if method == "tok_slow" { Failed } else { Succeeded };
        assert_eq!(outcome, expected, "{method}");
        world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await;
    }
    let order = authorized(&world, "tok_capture_lost_answer").await;
    assert_eq!(world.do_and_settle(order, CAPTURE, Do, &capture(order)).await.0, Succeeded);
    let order = authorized(&world, "tok_capture_error_once").await;
    assert_eq!(world.do_and_settle(order, CAPTURE, Do, &capture(order)).await.0, Succeeded);
    let [_, _, captured, ..] = world.provider.totals().await;
    assert_eq!(captured, 2_000);
}

#[tokio::test]
async fn a_capture_can_be_refused_by_the_gateway_or_for_good_reason_before_it() {
    let world = World::new().await;
    let order = authorized(&world, "tok_capture_refused").await;
    let (outcome, reply) = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, "authorization_expired"));
    // The money is still held, and can be voided.
    assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Succeeded);

    let order = new_order();
    let (outcome, reply) = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    assert_eq!(outcome, Failed, "a row that is absent does not show that nothing was captured");
    assert!(reply["error"].as_str().unwrap().contains("no record of an authorization"), "{reply}");
    let order = authorized(&world, "tok_visa").await;
    let other = contracts::payments::CapturePayment { order, amount: euros(999) };
    let (outcome, reply) = world.do_and_settle(order, CAPTURE, Do, &other).await;
    assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, "amount_differs"));
    world.books_agree().await;
}

#[tokio::test]
async fn a_void_lets_go_and_repeats_safely() {
    let world = World::new().await;
    for method in ["tok_visa", "tok_void_lost_answer", "tok_void_error_once"] {
        let order = authorized(&world, method).await;
        for _ in 0..3 {
            assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Succeeded, "{method}");
        }
        assert_eq!(world.status(order).await, "voided");
        let capture = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
        assert_eq!(capture.0, Rejected, "{method}");
    }
    assert_eq!(world.provider.totals().await, [3_000, 0, 0, 3_000, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_void_that_comes_first_keeps_the_money_from_ever_being_held() {
    let world = World::new().await;
    let order = new_order();
    world.deliver(&[undo_authorize(order)]).await;
    world.deliver(&[do_authorize(order, "tok_visa")]).await;
    world.settle().await;
    assert_eq!(world.outcomes(order).await, [Rejected, Succeeded]);
    assert_eq!(world.provider.totals().await, [0; 5]);
}

#[tokio::test]
async fn a_void_waits_for_the_authorization_that_is_under_way() {
    let world = World::new().await;
    for method in ["tok_visa", "tok_declined", "tok_lost_answer", "tok_error_once"] {
        let order = new_order();
        world.deliver(&[do_authorize(order, method), undo_authorize(order), undo_authorize(order)]).await;
        assert_eq!(world.outcomes(order).await, []);
        world.settle().await;
        let first = if method == "tok_declined" { Rejected } else { Succeeded };
        assert_eq!(world.outcomes(order).await, [first, Succeeded], "{method}");
    }
    assert_eq!(world.provider.totals().await[1], 0);
    world.books_agree().await;
}

#[tokio::test]
async fn a_void_of_what_stayed_in_doubt_takes_back_what_the_gateway_did_and_nobody_heard_of() {
    let world = World::impatient().await;
    // The money is held at the gateway, but no answer ever comes in time.
    let order = new_order();
    assert_eq!(world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, "tok_slow")).await.0, Failed);
    saga_core::testkit::eventually(crate::support::DEADLINE, async || {
        (world.provider.totals().await[1] == 1_000).then_some(())
    })
    .await;
    assert_eq!(world.status(order).await, "authorizing");
    // The gateway recovers: the same token now answers at once.
    sqlx::query("update gateway_authorization set method = 'tok_visa'")
        .execute(&world.provider.database.pool)
        .await
        .unwrap();
    assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Succeeded);
    assert_eq!(world.status(order).await, "voided");
    assert_eq!(world.provider.totals().await, [1_000, 0, 0, 1_000, 0]);

    // The request never reached the gateway: there is nothing to take back, and a straggler is refused there.
    let order = new_order();
    assert_eq!(world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, "tok_error")).await.0, Failed);
    assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Succeeded);
    let key = do_authorize(order, "tok_error").envelope.saga.unwrap().command.to_string();
    let straggler = reqwest::Client::new()
        .post(world.provider.url("/v1/authorizations"))
        .header("idempotency-key", key)
        .json(&serde_json::json!({ "order": order, "customer": "alice", "amount": euros(1_000), "method": "tok_visa" }))
        .send()
        .await
        .unwrap();
    assert_eq!(straggler.status(), 402);
    assert_eq!(world.provider.totals().await, [1_000, 0, 0, 1_000, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn every_command_repeated_has_one_effect_and_one_answer() {
    let world = World::new().await;
    let order = new_order();
    for _ in 0..3 {
        world.deliver(&[do_authorize(order, "tok_visa"), do_authorize(order, "tok_visa")]).await;
        world.settle().await;
    }
    for _ in 0..3 {
        world.deliver(&[do_capture(order), do_capture(order)]).await;
        world.settle().await;
    }
    for _ in 0..3 {
        world.deliver(&[message(order, "refund", Do, &refund(order, 10))]).await;
        world.settle().await;
    }
    let replies = world.replies(order).await;
    assert!(replies.iter().all(|(outcome, _)| *outcome == Succeeded));
    assert_eq!(world.provider.totals().await, [1_000, 0, 1_000, 0, 10]);
    world.books_agree().await;
}

#[tokio::test]
async fn commands_that_make_no_sense_are_rejected_and_never_reach_the_gateway() {
    let world = World::new().await;
    let wrong = |change: &dyn Fn(&mut AuthorizePayment)| {
        let order = new_order();
        let mut command = authorize(order, "tok_visa");
        change(&mut command);
        (order, command)
    };
    for (order, command) in [
        wrong(&|c| c.amount = euros(0)),
        wrong(&|c| c.amount = euros(-5)),
        wrong(&|c| c.customer = "a\0b".into()),
        wrong(&|c| c.customer = String::new()),
        wrong(&|c| c.method = "x".repeat(100_000)),
    ] {
        assert_eq!(world.do_and_settle(order, AUTHORIZE, Do, &command).await.0, Rejected);
    }
    // A second saga pays the same order.
    let order = authorized(&world, "tok_visa").await;
    let (outcome, reply) = world.do_and_settle(order, "again", Do, &authorize(order, "tok_visa")).await;
    assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, "already_paid"));
    // The refunds are of money that was not captured, in another currency, or of nothing.
    assert_eq!(
        world.do_and_settle(order, "r0", Do, &refund(order, 1)).await.0,
        Failed,
        "the row may be older than a capture"
    );
    world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    for (step, amount) in [("r1", euros(0)), ("r2", euros(-1)), ("r3", euros(i64::MAX)), ("r4", dollars(1))] {
        let command = contracts::payments::RefundPayment { order, amount };
        assert_eq!(world.do_and_settle(order, step, Do, &command).await.0, Rejected, "{step}");
    }
    assert_eq!(world.provider.totals().await, [1_000, 0, 1_000, 0, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_card_number_in_a_command_is_declined_and_neither_stored_nor_asked_for() {
    let world = World::new().await;
    for field in ["customer", "method"] {
        let order = new_order();
        let mut command = authorize(order, "tok_visa");
        *(if field == "method" { &mut command.method } else { &mut command.customer }) = "4111 1111 1111 1111".into();
        let (outcome, reply) = world.do_and_settle(order, AUTHORIZE, Do, &command).await;
        assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, "card_number"), "{field}");
    }
    let payments: i64 =
        sqlx::query_scalar("select count(*) from payment").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!((payments, world.open_intents().await), (0, 0));
    assert_eq!(world.provider.totals().await, [0; 5]);
    // An older build took such a command, and its fence is lost: what it held is found again.
    let order = authorized(&world, "tok_visa").await;
    world.lose_fences(order).await;
    let (outcome, _) = world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, "4111111111111111")).await;
    assert_eq!(outcome, Succeeded);
}

fn dollars(amount: i64) -> Money {
    Money { amount, currency: "USD".parse().unwrap() }
}

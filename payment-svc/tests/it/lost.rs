//! Rows are lost (an asynchronous failover, a restore), and the provider still knows what it did.

use crate::support::{World, do_authorize, do_capture, message, new_order, refund, undo_knowing};
use contracts::OrderId;
use saga_core::{
    command::{
        Happened,
        Op::Do,
        Outcome::{Failed, Rejected, Succeeded},
    },
    testkit::{FailPoint, failpoints::Fault},
};

/// The provider holds the money, and the process died before it could write that down.
async fn held_and_not_recorded(world: &World) -> OrderId {
    let order = new_order();
    world.deliver(&[do_authorize(order, "tok_visa")]).await;
    let armed = FailPoint::once("participant.after-call", world.name, Fault::Crash);
    assert_eq!(world.executor().run_once().await.unwrap(), 1);
    drop(armed);
    order
}

async fn lose_everything(world: &World, order: OrderId) {
    world.lose_fences(order).await;
    sqlx::query("delete from payment where order_id = $1").bind(order.0).execute(&world.database.pool).await.unwrap();
}

/// The whole of payments and their ledger: a restore to an empty database.
async fn lose_books(world: &World) {
    let sql =
        "begin; set local session_replication_role = replica; delete from ledger_entry; delete from payment; commit";
    sqlx::raw_sql(sql).execute(&world.database.pool).await.unwrap();
}

#[tokio::test]
async fn money_whose_every_row_was_lost_is_let_go_by_an_undo_in_doubt() {
    let world = World::new().await;
    let order = held_and_not_recorded(&world).await;
    assert_eq!(world.provider.totals().await, [1_000, 1_000, 0, 0, 0]);
    lose_everything(&world, order).await;

    // A command that comes late is refused before the provider is called; the undo's resend changes nothing.
    world.deliver(&[undo_knowing(order, Happened::InDoubt), do_authorize(order, "tok_visa")]).await;
    world.settle().await;
    world.deliver(&[undo_knowing(order, Happened::InDoubt), do_authorize(order, "tok_visa")]).await;
    world.settle().await;

    assert_eq!(world.outcomes(order).await, [Rejected, Succeeded, Succeeded, Rejected]);
    assert_eq!(world.provider.totals().await, [1_000, 0, 0, 1_000, 0], "nothing is held any more");
    assert_eq!(world.status(order).await, "voided");
    world.books_agree().await;
}

#[tokio::test]
async fn an_authorization_that_never_came_leaves_no_payment_behind_its_undo() {
    let world = World::new().await;
    let order = new_order();
    world.deliver(&[undo_knowing(order, Happened::InDoubt)]).await;
    world.settle().await;
    assert_eq!(world.outcomes(order).await, [Succeeded]);
    let payments: i64 =
        sqlx::query_scalar("select count(*) from payment").fetch_one(&world.database.pool).await.unwrap();
    assert_eq!((payments, world.provider.totals().await), (0, [0; 5]));
}

#[tokio::test]
async fn an_undo_whose_record_was_lost_after_it_is_asked_for_again_and_moves_nothing() {
    let world = World::new().await;
    let order = held_and_not_recorded(&world).await;
    for _ in 0..2 {
        world.deliver(&[undo_knowing(order, Happened::InDoubt)]).await;
        world.settle().await;
        assert_eq!(world.outcomes(order).await.last(), Some(&Succeeded));
        world.lose_fences(order).await;
    }
    assert_eq!(world.provider.totals().await, [1_000, 0, 0, 1_000, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_success_without_a_record_is_not_undone_on_a_guess() {
    let world = World::new().await;
    let order = held_and_not_recorded(&world).await;
    world.settle().await;
    world.lose_fences(order).await;
    world.deliver(&[undo_knowing(order, Happened::Yes(()))]).await;
    world.settle().await;
    assert_eq!(world.outcomes(order).await, [Succeeded, Failed]);
    assert_eq!(world.provider.totals().await, [1_000, 1_000, 0, 0, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn an_authorization_that_comes_again_without_its_record_is_answered_as_before() {
    let world = World::new().await;
    for (method, answer) in [("tok_visa", Succeeded), ("tok_declined", Rejected)] {
        let order = new_order();
        for _ in 0..2 {
            world.deliver(&[do_authorize(order, method)]).await;
            world.settle().await;
            world.lose_fences(order).await;
        }
        let replies = world.replies(order).await;
        assert_eq!((replies.len(), replies[0].0), (2, answer), "{method}");
        assert_eq!(replies[0], replies[1], "{method}: a refusal would say that nothing is held");
    }
    // The order's call was under way when the record was lost.
    let order = held_and_not_recorded(&world).await;
    world.lose_fences(order).await;
    world.deliver(&[do_authorize(order, "tok_visa")]).await;
    world.settle().await;
    assert_eq!((world.outcomes(order).await, world.status(order).await), (vec![Succeeded], "authorized"));
    assert_eq!(world.provider.totals().await, [2_000, 2_000, 0, 0, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_capture_whose_record_was_lost_is_never_refused_and_taken_once() {
    let world = World::new().await;
    let order = new_order();
    world.deliver(&[do_authorize(order, "tok_visa")]).await;
    world.settle().await;

    world.deliver(&[do_capture(order)]).await;
    world.settle().await;
    world.lose_fences(order).await;
    world.deliver(&[do_capture(order)]).await;
    world.settle().await;

    assert_eq!(world.outcomes(order).await, [Succeeded; 3], "the ledger has the capture");
    assert_eq!(world.provider.totals().await, [1_000, 0, 1_000, 0, 0]);
    world.books_agree().await;

    world.lose_fences(order).await;
    lose_books(&world).await;
    world.deliver(&[do_capture(order)]).await;
    world.settle().await;
    assert_eq!(world.outcomes(order).await.last(), Some(&Failed), "nothing says that no money was taken");
}

#[tokio::test]
async fn a_refund_whose_record_was_lost_is_never_refused_and_paid_once() {
    let world = World::new().await;
    let order = new_order();
    for command in [do_authorize(order, "tok_visa"), do_capture(order)] {
        world.deliver(&[command]).await;
        world.settle().await;
    }
    let give_back = |order| message(order, "refund-payment", Do, &refund(order, 1_000));

    let armed = FailPoint::once("participant.after-call", world.name, Fault::Crash);
    world.deliver(&[give_back(order)]).await;
    assert_eq!(world.executor().run_once().await.unwrap(), 1);
    drop(armed);
    world.lose_fences(order).await;
    world.deliver(&[give_back(order)]).await;
    world.settle().await;

    assert_eq!(world.outcomes(order).await.last(), Some(&Failed), "the lost one may have given it back");
    assert_eq!(world.provider.totals().await, [1_000, 0, 1_000, 0, 1_000]);

    let order = new_order();
    for command in [do_authorize(order, "tok_visa"), do_capture(order)] {
        world.deliver(&[command]).await;
        world.settle().await;
    }
    for _ in 0..2 {
        world.deliver(&[give_back(order)]).await;
        world.settle().await;
        assert_eq!(world.outcomes(order).await.last(), Some(&Succeeded), "the ledger has the refund");
        world.lose_fences(order).await;
    }
    assert_eq!(world.provider.totals().await, [2_000, 0, 2_000, 0, 2_000]);
}

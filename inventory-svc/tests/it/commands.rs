//! Reserve, release, commit: all or nothing, once, and the books balance.

use crate::support::{Warehouse, command, lines, order, problem};
use contracts::{
    OrderId,
    inventory::{CommitStock, ReleaseStock, ReserveStock},
};
use saga_core::{command::Op, consumer::Message};
use serde_json::json;

fn reserve(order: OrderId, wanted: &[(&str, i64)]) -> Message {
    command(order, "reserve-stock", Op::Do, &ReserveStock { order, lines: lines(wanted) })
}

fn release(order: OrderId) -> Message {
    command(order, "reserve-stock", Op::Undo, &ReleaseStock { order })
}

fn commit(order: OrderId) -> Message {
    command(order, "commit-stock", Op::Do, &CommitStock { order })
}

#[tokio::test]
async fn a_reservation_puts_every_line_aside_and_its_commit_ships_them() {
    let warehouse = Warehouse::stocked(&[("A", 10), ("B", 5)]).await;
    let mine = order();
    let reply = warehouse.send(&reserve(mine, &[("B", 2), ("A", 3)])).await;
    assert_eq!((reply.outcome.as_str(), reply.body), ("succeeded", json!({"pieces": 5})));
    assert_eq!((warehouse.balance("A").await, warehouse.balance("B").await), ((7, 3), (3, 2)));
    warehouse.books_balance().await;

    assert_eq!(warehouse.send(&commit(mine)).await.outcome, "succeeded");
    assert_eq!((warehouse.balance("A").await, warehouse.balance("B").await), ((7, 0), (3, 0)));
    warehouse.books_balance().await;
}

#[tokio::test]
async fn one_line_that_falls_short_leaves_every_line_where_it_was() {
    let warehouse = Warehouse::stocked(&[("A", 10), ("B", 1)]).await;
    let reply = warehouse.send(&reserve(order(), &[("A", 3), ("B", 2), ("NOBODY-KNOWS", 1)])).await;
    assert_eq!(reply.outcome, "rejected");
    assert_eq!(
        reply.body["short"],
        json!([
            {"sku": "B", "requested": 2, "available": 1},
            {"sku": "NOBODY-KNOWS", "requested": 1, "available": 0},
        ])
    );
    assert_eq!(warehouse.balance("A").await, (10, 0));
    let reservations: i64 =
        sqlx::query_scalar("select count(*) from reservation").fetch_one(&warehouse.db.pool).await.unwrap();
    assert_eq!(reservations, 0, "a refusal leaves nothing behind");
    warehouse.books_balance().await;
}

#[tokio::test]
async fn a_release_puts_everything_back_and_a_repeat_of_each_changes_nothing() {
    let warehouse = Warehouse::stocked(&[("A", 10)]).await;
    let mine = order();
    for _ in 0..3 {
        assert_eq!(warehouse.send(&reserve(mine, &[("A", 4)])).await.body, json!({"pieces": 4}));
        assert_eq!(warehouse.balance("A").await, (6, 4));
    }
    for _ in 0..3 {
        assert_eq!(warehouse.send(&release(mine)).await.outcome, "succeeded");
        assert_eq!(warehouse.balance("A").await, (10, 0));
    }
    warehouse.books_balance().await;
}

#[tokio::test]
async fn a_release_that_overtakes_its_reservation_keeps_it_from_happening() {
    let warehouse = Warehouse::stocked(&[("A", 10)]).await;
    let mine = order();
    assert_eq!(warehouse.send(&release(mine)).await.outcome, "succeeded");
    assert_ne!(warehouse.send(&reserve(mine, &[("A", 4)])).await.outcome, "succeeded");
    assert_eq!(warehouse.balance("A").await, (10, 0));
    warehouse.books_balance().await;
}

#[tokio::test]
async fn what_cannot_be_committed_fails_visibly_and_ships_nothing() {
    let warehouse = Warehouse::stocked(&[("A", 10)]).await;
    let (never, released) = (order(), order());
    assert_eq!(warehouse.send(&commit(never)).await.outcome, "failed");
    warehouse.send(&reserve(released, &[("A", 1)])).await;
    warehouse.send(&release(released)).await;
    assert_eq!(warehouse.send(&commit(released)).await.outcome, "failed");
    assert_eq!(warehouse.balance("A").await, (10, 0));
    warehouse.books_balance().await;
}

#[tokio::test]
async fn what_is_put_aside_finds_its_place_again_however_much_was_delivered_meanwhile() {
    let warehouse = Warehouse::stocked(&[("A", 10)]).await;
    let mine = order();
    warehouse.send(&reserve(mine, &[("A", 10)])).await;
    let fill = "update stock set on_hand = 1000000000000 - reserved";
    sqlx::query(fill).execute(&warehouse.db.pool).await.unwrap();
    let more = warehouse.adjust("A", "more", &json!({"delta": 1, "reason": "delivery"})).send().await.unwrap();
    assert_eq!(problem(more).await, (409, "/problems/too-many".into(), vec!["delta".into()]));
    assert_eq!(warehouse.send(&release(mine)).await.outcome, "succeeded");
    assert_eq!(warehouse.balance("A").await, (1_000_000_000_000, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_that_want_the_same_items_the_other_way_round_do_not_deadlock() {
    let warehouse = std::sync::Arc::new(Warehouse::stocked(&[("A", 1_000), ("B", 1_000), ("C", 1_000)]).await);
    let workers = (0..4_usize).map(|worker| {
        let warehouse = std::sync::Arc::clone(&warehouse);
        tokio::spawn(async move {
            for _ in 0..10 {
                let mut skus = ["A", "B", "C"];
                skus.rotate_left(worker % 3);
                if worker % 2 == 0 {
                    skus.reverse();
                }
                let orders: Vec<_> = skus.into_iter().map(|sku| (order(), sku)).collect();
                let reserves: Vec<_> = orders.iter().map(|(order, sku)| reserve(*order, &[(sku, 1)])).collect();
                warehouse.handle(&reserves).await;
                let end = |(n, (order, _)): (usize, &(OrderId, &str))| match n {
                    0 => release(*order),
                    _ => commit(*order),
                };
                warehouse.handle(&orders.iter().enumerate().map(end).collect::<Vec<_>>()).await;
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    warehouse.books_balance().await;
}

#[tokio::test]
async fn a_batch_reserves_in_its_order_until_nothing_is_left() {
    let warehouse = Warehouse::stocked(&[("A", 10), ("B", 100)]).await;
    let orders: Vec<_> = (0..7).map(|_| order()).collect();
    let batch: Vec<_> = orders.iter().map(|order| reserve(*order, &[("B", 1), ("A", 2)])).collect();
    warehouse.handle(&batch).await;
    let mut outcomes = Vec::new();
    for message in &batch {
        outcomes.push(warehouse.replies(message.envelope.saga.as_ref().unwrap().command).await.pop().unwrap().outcome);
    }
    assert_eq!(outcomes.iter().filter(|outcome| *outcome == "succeeded").count(), 5);
    assert_eq!(outcomes[5..], ["rejected", "rejected"]);
    assert_eq!((warehouse.balance("A").await, warehouse.balance("B").await), ((0, 10), (95, 5)));
    warehouse.books_balance().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_in_any_order_of_lines_never_take_more_than_there_is() {
    let warehouse = std::sync::Arc::new(Warehouse::stocked(&[("A", 30), ("B", 30), ("C", 30)]).await);
    let tasks = (0..40_usize).map(|n| {
        let warehouse = std::sync::Arc::clone(&warehouse);
        tokio::spawn(async move {
            let wanted = [[("A", 1), ("B", 1), ("C", 1)], [("C", 1), ("B", 1), ("A", 1)]];
            let mine = order();
            let reserved = warehouse.send(&reserve(mine, &wanted[n % 2])).await.outcome == "succeeded";
            if reserved && n % 3 == 0 {
                warehouse.send(&release(mine)).await;
            } else if reserved {
                warehouse.send(&commit(mine)).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    warehouse.books_balance().await;
    for sku in ["A", "B", "C"] {
        assert_eq!(warehouse.balance(sku).await.1, 0, "{sku}");
    }
}

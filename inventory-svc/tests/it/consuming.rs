//! Commands through a real Kafka: the consumer, the inbox, the fence, the stock.

use crate::support::{Warehouse, command, lines, order};
use contracts::inventory::ReserveStock;
use inventory_svc::commands::Commands;
use saga_core::{
    command::Op,
    consumer::{Consumer, ConsumerConfig},
    testkit::{Record, TestTopic, brokers, eventually, produce, unique},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_command_on_the_topic_moves_stock_once_and_is_answered_and_garbage_stops_nobody() {
    let warehouse = Warehouse::stocked(&[("A", 10)]).await;
    let topic = TestTopic::create("inventory-commands", 1).await;
    let config = ConsumerConfig::new(&brokers(), &unique("inventory-svc"), [topic.name()]);
    let stop = CancellationToken::new();
    let consumer = Consumer::new(config, warehouse.db.pool.clone(), Arc::new(Commands::new()));
    let running = tokio::spawn(consumer.run(stop.clone()));

    let mine = order();
    let message = command(mine, "reserve-stock", Op::Do, &ReserveStock { order: mine, lines: lines(&[("A", 4)]) });
    let record = Record::from(&message);
    let garbage = Record { value: Some(b"garbage".to_vec()), ..Record::default() };
    produce(topic.name(), &[garbage, record.clone(), record]).await;

    let id = message.envelope.saga.as_ref().unwrap().command;
    let replies = eventually(Duration::from_secs(60), || async {
        let replies = warehouse.replies(id).await;
        let dead: i64 = sqlx::query_scalar("select count(*) from outbox where topic = $1")
            .bind(topic.dead_letters())
            .fetch_one(&warehouse.db.pool)
            .await
            .unwrap();
        (!replies.is_empty() && dead == 1).then_some(replies)
    })
    .await;
    assert_eq!(replies[0].outcome, "succeeded");
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(warehouse.balance("A").await, (6, 4));
    assert_eq!(warehouse.replies(id).await.len(), 1, "the same message twice is one message");
    warehouse.books_balance().await;
}

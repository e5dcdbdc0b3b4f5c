//! The whole way of a command: Kafka, consumer, intent, gateway, reply in the outbox; with a process that dies.

use crate::support::{DEADLINE, World, do_authorize, do_capture, new_order};
use contracts::OrderId;
use saga_core::{
    command::Outcome::Succeeded,
    consumer::{Consumer, ConsumerConfig},
    testkit::{FailPoint, Record, TestTopic, brokers, eventually, failpoints::Fault, produce, unique},
};
use tokio_util::sync::CancellationToken;

/// Reads commands and executes intents, as the service's process does.
fn run(world: &World, config: ConsumerConfig, stop: &CancellationToken) {
    let consumer = Consumer::new(config, world.database.pool.clone(), world.participant.clone());
    tokio::spawn(consumer.run(stop.clone()));
    let (executor, stop) = (world.executor(), stop.clone());
    tokio::spawn(async move { executor.run(stop).await });
}

async fn answered(world: &World, orders: &[OrderId], replies: usize) {
    eventually(DEADLINE * 2, async || {
        for order in orders {
            if world.outcomes(*order).await.len() < replies {
                return None;
            }
        }
        Some(())
    })
    .await;
}

#[tokio::test]
async fn commands_from_kafka_are_answered_once_although_the_process_dies_in_between() {
    let world = World::new().await;
    let topic = TestTopic::create("payments.commands", 3).await;
    let group = unique("payment-svc");
    let config = || ConsumerConfig::new(&brokers(), &group, [topic.name()]);
    let orders: Vec<_> = (0..30).map(|_| new_order()).collect();

    // The first process dies after the gateway's answer and before its record, five times; its claims run out.
    let first = CancellationToken::new();
    let armed = FailPoint::arm("participant.after-call", world.name, Fault::Crash, 0, 5);
    run(&world, config(), &first);
    let records: Vec<_> = orders.iter().map(|&order| Record::from(&do_authorize(order, "tok_visa"))).collect();
    // Everything comes twice, as from a producer that repeats itself (same message id).
    produce(topic.name(), &[records.clone(), records].concat()).await;
    eventually(DEADLINE, async || (world.provider.totals().await[0] > 0).then_some(())).await;
    first.cancel();

    let second = CancellationToken::new();
    run(&world, config(), &second);
    answered(&world, &orders, 1).await;
    drop(armed);
    // A resend of each command comes (new message id), and the captures.
    let again: Vec<_> = orders
        .iter()
        .flat_map(|&order| [Record::from(&do_authorize(order, "tok_visa")), Record::from(&do_capture(order))])
        .collect();
    produce(topic.name(), &again).await;
    answered(&world, &orders, 3).await;
    second.cancel();
    for order in orders {
        assert_eq!(world.outcomes(order).await, [Succeeded; 3]);
    }
    assert_eq!(world.provider.totals().await, [30_000, 0, 30_000, 0, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn what_is_no_command_is_a_dead_letter_and_what_is_not_known_yet_waits() {
    let world = World::new().await;
    let topic = TestTopic::create("payments.commands", 1).await;
    let stop = CancellationToken::new();
    run(&world, ConsumerConfig::new(&brokers(), &unique("payment-svc"), [topic.name()]), &stop);
    let order = new_order();
    let mut unknown = do_authorize(new_order(), "tok_visa");
    unknown.envelope.kind = "payments.authorize.v9".into();
    let mut broken = do_authorize(new_order(), "tok_visa");
    broken.payload = Some(b"{\"order\":".to_vec());
    let garbage = Record { value: Some(vec![0, 159, 146]), ..Record::default() };
    let good = Record::from(&do_authorize(order, "tok_visa"));
    produce(topic.name(), &[Record::from(&unknown), garbage, Record::from(&broken), good]).await;
    answered(&world, &[order], 1).await;
    // A type that this build does not know may be one of the next: the record waits.
    let dead: Vec<String> = eventually(DEADLINE, async || {
        let dead: Vec<String> = sqlx::query_scalar("select topic from outbox where topic like '%.dlt'")
            .fetch_all(&world.database.pool)
            .await
            .unwrap();
        let waiting: i64 =
            sqlx::query_scalar("select count(*) from inbox_parked").fetch_one(&world.database.pool).await.unwrap();
        (dead.len() >= 2 && waiting == 1).then_some(dead)
    })
    .await;
    stop.cancel();
    assert_eq!(dead, vec![topic.dead_letters(); 2]);
    assert_eq!(world.provider.totals().await[0], 1_000);
}

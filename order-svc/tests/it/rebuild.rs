//! The catalogue made anew from its topic, while its consumer runs and orders are priced.

use crate::catalogue::{item, price};
use contracts::inventory::ItemChanged;
use order_svc::{
    catalogue::{
        CatalogueHandler,
        rebuild::{Missing, RebuildError, Rebuilt, rebuild},
    },
    migrations,
};
use saga_core::{
    consumer::{Consumer, ConsumerConfig, RereadingError, TooOld},
    service::database::pool_options,
    testkit::{Record, TestDatabase, TestTopic, brokers, eventually, produce, unique},
};
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    db: TestDatabase,
    topic: TestTopic,
    /// The connection of `order-svc rebuild`: one alone.
    own: PgPool,
}

impl World {
    async fn new() -> Self {
        let db = TestDatabase::new(&migrations::all()).await;
        let topic = TestTopic::create("inventory-items", 3).await;
        let own = pool_options(1).connect_lazy(&db.url).unwrap();
        Self { db, topic, own }
    }

    async fn publish(&self, items: &[(&str, i64, i64)]) {
        let records: Vec<_> =
            items.iter().map(|(sku, sequence, amount)| Record::from(&item(sku, *sequence, *amount))).collect();
        produce(self.topic.name(), &records).await;
    }

    async fn rebuild(&self, missing: Missing) -> Rebuilt {
        rebuild(&self.own, &brokers(), self.topic.name(), missing).await.unwrap()
    }

    async fn price(&self, sku: &str) -> Option<i64> {
        price(&self.db.pool, sku).await
    }

    async fn run(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.db.pool).await.unwrap();
    }

    fn consume(&self, stop: &CancellationToken) -> tokio::task::JoinHandle<()> {
        let config = ConsumerConfig {
            too_old: TooOld::Handle,
            ..ConsumerConfig::new(&brokers(), &unique("catalogue"), [self.topic.name()])
        };
        let consumer = Consumer::new(config, self.db.pool.clone(), Arc::new(CatalogueHandler));
        let stop = stop.clone();
        tokio::spawn(async move { consumer.run(stop).await.unwrap() })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_catalogue_that_was_lost_or_is_wrong_is_made_anew_beside_its_consumer() {
    let world = World::new().await;
    let stop = CancellationToken::new();
    let running = world.consume(&stop);
    world.publish(&[("A", 1, 100), ("B", 2, 200), ("A", 3, 300), ("C", 4, 400)]).await;
    // Each item is in a partition of its own.
    for (sku, price) in [("A", 300), ("B", 200), ("C", 400)] {
        eventually(PATIENCE, || async { (world.price(sku).await == Some(price)).then_some(()) }).await;
    }
    // The copy has lost an item, has a wrong price, and is frozen by a sequence that was never this source's.
    world.run("delete from catalogue where sku = 'B'").await;
    world.run("update catalogue set unit_price = 7 where sku = 'A'").await;
    world.run("update catalogue_seen set sequence = 9000000 where sku = 'C'").await;
    let rebuilt = world.rebuild(Missing::Stay).await;
    assert_eq!(rebuilt, Rebuilt { records: 4, items: 3, changed: 2, missing: 0, unreadable: 0 });
    assert_eq!([world.price("A").await, world.price("B").await], [Some(300), Some(200)]);
    // The consumer goes on where it was, also with the item that stood still.
    world.publish(&[("C", 5, 500), ("B", 6, 600)]).await;
    eventually(PATIENCE, || async {
        (world.price("C").await == Some(500) && world.price("B").await == Some(600)).then_some(())
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_come_while_it_is_made_anew_are_neither_lost_nor_undone() {
    let world = World::new().await;
    let stop = CancellationToken::new();
    let running = world.consume(&stop);
    let skus: Vec<String> = (0..20).map(|n| format!("S-{n}")).collect();
    let rounds = 40;
    let publishing = async {
        for round in 1..=rounds {
            let changes: Vec<_> = skus.iter().map(|sku| (sku.as_str(), round, round * 100)).collect();
            world.publish(&changes).await;
        }
    };
    let rebuilding = async {
        for _ in 0..5 {
            world.rebuild(Missing::Stay).await;
        }
    };
    tokio::join!(publishing, rebuilding);
    world.rebuild(Missing::Stay).await;
    for sku in &skus {
        eventually(PATIENCE, || async { (world.price(sku).await == Some(rounds * 100)).then_some(()) }).await;
    }
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_topic_has_not_stays_unless_it_is_to_be_withdrawn() {
    let world = World::new().await;
    world
        .run("insert into catalogue (sku, name, unit_price, currency, sequence) values ('OLD', 'Old', 50, 'EUR', 1)")
        .await;
    let gone = world.rebuild(Missing::Stay).await;
    assert_eq!(
        (gone, world.price("OLD").await),
        (Rebuilt { missing: 1, ..Rebuilt::default() }, Some(50)),
        "an empty topic"
    );
    let garbage = Record { key: Some(b"A".to_vec()), value: Some(b"garbage".to_vec()), ..Record::default() };
    let mut nameless = item("A", 2, 200);
    nameless.payload = Some(b"{}".to_vec());
    let mut later = item("A", 3, 300);
    later.envelope.kind = format!("{}.next", ItemChanged::TYPE);
    let records = [Record::from(&item("A", 1, 100)), garbage, Record::from(&nameless), Record::from(&later)];
    produce(world.topic.name(), &records).await;
    let rebuilt = world.rebuild(Missing::Withdraw).await;
    assert_eq!(rebuilt, Rebuilt { records: 4, items: 1, changed: 1, missing: 1, unreadable: 3 });
    assert_eq!([world.price("A").await, world.price("OLD").await], [Some(100), None]);
}

#[tokio::test]
async fn a_topic_that_is_not_there_changes_nothing_and_is_named() {
    let world = World::new().await;
    world
        .run("insert into catalogue (sku, name, unit_price, currency, sequence) values ('OLD', 'Old', 50, 'EUR', 1)")
        .await;
    let none = rebuild(&world.own, &brokers(), "no.such.topic", Missing::Withdraw).await.unwrap_err();
    assert!(matches!(none, RebuildError::Topic(RereadingError::NoTopic(_))), "{none}");
    assert_eq!(world.price("OLD").await, Some(50));
}

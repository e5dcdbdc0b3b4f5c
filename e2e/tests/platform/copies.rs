//! order-svc's copy of the items, by which it prices orders: made anew by a command, and right after a failover.

use contracts::topics::INVENTORY_ITEMS;
use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone, beside_others},
    topics,
};
use saga_core::{envelope::header, testkit::eventually};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use stack::service::{Service, binary};
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Output},
};
use uuid::Uuid;

async fn total(platform: &Platform, order: Uuid) -> i64 {
    let view = platform.order(order).await.expect("it was placed");
    view["total"]["amount"].as_i64().expect("an amount")
}

/// What an order of one piece costs.
async fn price_of(platform: &Platform, sku: &str) -> i64 {
    total(platform, platform.place(&Wish::of(sku, 1)).await).await
}

/// Runs the program as an operator does, and places an order after the other meanwhile. Returns the prices.
async fn rebuilt_while_orders_are_priced(platform: &Platform, sku: &str) -> (Output, BTreeSet<i64>) {
    let mut command = Command::new(binary("order-svc").expect("it is built"));
    command.args(["rebuild", "catalogue"]).env_clear().env("KAFKA_BROKERS", platform.brokers());
    command.env("DATABASE_URL", platform.stack.database_url("orders"));
    let running = tokio::task::spawn_blocking(move || command.output());
    let mut prices = BTreeSet::new();
    while !running.is_finished() {
        let order = platform.place(&Wish::of(sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        prices.insert(total(platform, order).await);
    }
    (running.await.expect("it does not panic").expect("it starts"), prices)
}

#[test]
fn rebuild_catalogue_mends_the_copy_while_the_service_prices_orders() {
    beside_others(async |platform| {
        let right = platform.item("right", 100, 1_000).await;
        let (lost, wrong) = (platform.item("lost", 200, 5).await, platform.item("wrong", 300, 5).await);
        for (sql, sku) in [
            ("delete from catalogue where sku = $1", &lost),
            ("update catalogue set unit_price = 7 where sku = $1", &wrong),
        ] {
            sqlx::query(sql).bind(sku).execute(&platform.orders).await.expect("the copy can be spoilt");
        }
        let (output, prices) = rebuilt_while_orders_are_priced(platform, &right).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("the catalogue is rebuilt"), "{said}");
        assert_eq!(prices, BTreeSet::from([100]));
        assert_eq!([price_of(platform, &lost).await, price_of(platform, &wrong).await], [200, 300]);
    });
}

/// Kills PostgreSQL, starts it as a standby and promotes it. What was there is there; its log has a new timeline.
async fn fails_over(platform: &Platform) {
    let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
    let mut db = platform.database("orders").await;
    let data: String = sqlx::query_scalar("show data_directory").fetch_one(&mut db).await.expect("it can be read");
    postgres.process.kill();
    fs::write(Path::new(&data).join("standby.signal"), "").expect("the directory can be written to");
    postgres.restart().await.expect("PostgreSQL comes back");
    let mut standby = PgConnection::connect(&platform.stack.database_url("orders")).await.expect("it can be read from");
    let promoted: bool =
        sqlx::query_scalar("select pg_promote()").fetch_one(&mut standby).await.expect("a superuser may");
    assert!(promoted);
}

/// The epochs of an item's records, in the order of its partition.
async fn epochs_of(platform: &Platform, sku: &str) -> Vec<String> {
    let records = topics::read(&platform.brokers(), INVENTORY_ITEMS.name).await.expect("the topic can be read");
    let own = records.iter().filter(|record| record.key.as_deref() == Some(sku));
    own.map(|record| record.header(header::EPOCH).expect("every record has one").to_owned()).collect()
}

#[test]
fn a_promotion_begins_another_epoch_and_prices_and_orders_go_on() {
    alone(async |platform| {
        let sku = platform.item("promoted", 100, 20).await;
        assert_eq!(price_of(platform, &sku).await, 100);
        platform.settles().await;
        fails_over(platform).await;
        let change = json!({ "unit_price": { "amount": 250, "currency": "EUR" } });
        let url = format!("{}/v1/items/{sku}", platform.stack.url(Service::Inventory));
        eventually(SETTLED_WITHIN, || async {
            let changed = platform.http.patch(&url).header("if-match", "*").json(&change).send().await.ok()?;
            changed.status().is_success().then_some(())
        })
        .await;
        // order-svc takes the record of the new epoch for what it is: later.
        eventually(SETTLED_WITHIN, || async {
            let priced = sqlx::query_scalar("select unit_price from catalogue where sku = $1").bind(&sku);
            priced.fetch_one(&platform.orders).await.is_ok_and(|price: i64| price == 250).then_some(())
        })
        .await;
        let order = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        let epochs = epochs_of(platform, &sku).await;
        let [before, after] = [epochs.first(), epochs.last()].map(|epoch| epoch.expect("there are records"));
        let parts = |epoch: &str| epoch.split('-').map(str::to_owned).collect::<Vec<_>>();
        let (mut before, after) = (parts(before), parts(after));
        assert_eq!((before.len(), before[1] == after[1]), (4, false), "the timeline is another: {epochs:?}");
        before[1].clone_from(&after[1]);
        assert_eq!(before, after, "and nothing else");
    });
}

//! The copy of the catalogue: of one item, the record with the highest `ce_sequence` wins, however records arrive.

use contracts::{inventory::ItemChanged, money::Money};
use order_svc::{
    catalogue::{self, CatalogueHandler},
    migrations,
};
use saga_core::{
    consumer::{Coordinates, HandleError, Message},
    envelope::Envelope,
    id::MessageId,
    testkit::{TestDatabase, deliver},
};
use sqlx::PgPool;

fn message(sku: &str, sequence: i64, payload: Option<Vec<u8>>) -> Message {
    let envelope = Envelope {
        id: MessageId::new(),
        source: "inventory".into(),
        kind: ItemChanged::TYPE.into(),
        subject: None,
        time: None,
        sequence: Some(sequence),
        content_type: None,
        traceparent: None,
        tracestate: None,
        saga: None,
        other: Default::default(),
    };
    let at = Coordinates { topic: "inventory.items".into(), partition: 0, offset: sequence };
    Message { envelope, key: Some(sku.into()), payload, at }
}

pub(crate) fn item(sku: &str, sequence: i64, amount: i64) -> Message {
    let unit_price = Money { amount, currency: "EUR".parse().unwrap() };
    let changed = ItemChanged { sku: sku.parse().unwrap(), name: format!("{sku} {sequence}"), unit_price };
    message(sku, sequence, Some(serde_json::to_vec(&changed).unwrap()))
}

async fn take(pool: &PgPool, batch: &[Message]) -> Result<(), HandleError> {
    deliver(pool, &CatalogueHandler, batch).await
}

pub(crate) async fn price(pool: &PgPool, sku: &str) -> Option<i64> {
    catalogue::prices(pool, &[sku]).await.unwrap().values().next().map(|price| price.amount)
}

async fn database() -> TestDatabase {
    TestDatabase::new(&migrations::all()).await
}

#[tokio::test]
async fn the_last_word_wins_in_whatever_order_and_batches_it_comes() {
    let db = database().await;
    let orders = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]];
    for (n, order) in orders.iter().enumerate() {
        let (together, apart) = (format!("T{n}"), format!("A{n}"));
        let batch: Vec<_> = order.iter().map(|sequence| item(&together, *sequence, sequence * 100)).collect();
        take(&db.pool, &batch).await.unwrap();
        for sequence in order {
            take(&db.pool, &[item(&apart, *sequence, sequence * 100)]).await.unwrap();
        }
        take(&db.pool, &[item(&apart, 3, 1)]).await.unwrap();
        assert_eq!(price(&db.pool, &together).await, Some(300), "{order:?} together");
        assert_eq!(price(&db.pool, &apart).await, Some(300), "{order:?} apart, then a repeat");
    }
}

#[tokio::test]
async fn an_item_that_is_gone_cannot_be_ordered_and_an_old_record_does_not_bring_it_back() {
    let db = database().await;
    take(&db.pool, &[item("A", 1, 100)]).await.unwrap();
    take(&db.pool, &[message("A", 3, None)]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, None);
    take(&db.pool, &[item("A", 2, 200)]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, None);
    take(&db.pool, &[item("A", 4, 400)]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(400));
    // The item is gone before it was ever seen.
    take(&db.pool, &[message("B", 2, None), item("B", 1, 100)]).await.unwrap();
    assert_eq!(price(&db.pool, "B").await, None);
}

#[tokio::test]
async fn what_is_no_item_is_poison() {
    let db = database().await;
    let mut other_type = item("A", 1, 100);
    other_type.envelope.kind = "inventory.item-changed.v2".into();
    let mut no_sequence = item("A", 1, 100);
    no_sequence.envelope.sequence = None;
    let mut nul = item("A", 1, 100);
    nul.payload = Some(br#"{"sku":"A","name":"a\u0000","unit_price":{"amount":1,"currency":"EUR"}}"#.to_vec());
    let unknown = take(&db.pool, std::slice::from_ref(&other_type)).await.unwrap_err();
    assert!(matches!(unknown, HandleError::Failed(_)), "a later build may know that type: {unknown}");
    let poisons = [
        no_sequence,
        nul,
        item("A", 1, -1),
        message("A", 1, Some(b"{".to_vec())),
        message("A", 1, Some(b"{}".to_vec())),
        message("not a sku", 1, None),
    ];
    for poison in poisons {
        let error = take(&db.pool, std::slice::from_ref(&poison)).await.unwrap_err();
        assert!(matches!(error, HandleError::Poison(_)), "{poison:?}: {error}");
    }
    assert_eq!(price(&db.pool, "A").await, None);
}

#[tokio::test]
async fn an_item_with_its_fields_in_an_array_sets_no_price_and_one_more_field_does() {
    let db = database().await;
    for positional in [r#"["A","a",[1,"EUR"]]"#, r#"{"sku":"A","name":"a","unit_price":[1,"EUR"]}"#] {
        let refused = take(&db.pool, &[message("A", 1, Some(positional.into()))]).await.unwrap_err();
        let why = "an object with its fields by their names";
        assert!(matches!(&refused, HandleError::Poison(reason) if reason.contains(why)), "{refused:?}");
    }
    assert_eq!(price(&db.pool, "A").await, None);
    let more = r#"{"sku":"A","name":"a","unit_price":{"amount":2,"currency":"EUR","digits":2},"later":[1]}"#;
    take(&db.pool, &[message("A", 1, Some(more.into()))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(2));
}

/// The message as a relay publishes it that names its epoch.
fn in_epoch(epoch: &str, mut message: Message) -> Message {
    message.envelope.other.insert("ce_epoch".into(), epoch.to_owned());
    message
}

/// A dead letter of order-svc's own outbox that was sent to its topic again, with everything that it carries.
fn redriven(epoch: &str, original: Message) -> Message {
    let sequence = original.envelope.sequence.unwrap().to_string();
    let mut again =
        in_epoch("orders", Message { envelope: Envelope { id: MessageId::new(), ..original.envelope }, ..original });
    again.envelope.sequence = Some(9_000_000);
    let said = [("topic", "inventory.items"), ("sequence", sequence.as_str()), ("epoch", epoch)];
    again.envelope.other.extend(said.map(|(name, value)| (format!("x-original-{name}").into(), value.to_owned())));
    again
}

#[tokio::test]
async fn a_source_whose_ids_begin_again_is_heard_and_repeats_of_before_are_not() {
    let db = database().await;
    take(&db.pool, &[in_epoch("1", item("A", 700, 100)), in_epoch("1", item("A", 701, 200))]).await.unwrap();
    // The source is restored, or another database: ids are given a second time.
    take(&db.pool, &[in_epoch("2", item("A", 3, 300))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(300));
    for repeat in [in_epoch("1", item("A", 700, 100)), in_epoch("1", item("A", 701, 200))] {
        take(&db.pool, &[repeat]).await.unwrap();
        assert_eq!(price(&db.pool, "A").await, Some(300), "what was seen is no news");
    }
    take(&db.pool, &[in_epoch("2", item("A", 2, 1)), in_epoch("2", item("A", 4, 400))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(400));
    // All of it comes in one batch, with an older relay's records between, which name no epoch.
    let batch = [item("B", 9, 1), in_epoch("1", item("B", 5, 2)), in_epoch("2", item("B", 1, 3)), item("B", 9, 1)];
    take(&db.pool, &batch).await.unwrap();
    assert_eq!(price(&db.pool, "B").await, Some(3));
}

#[tokio::test]
async fn a_redriven_record_counts_by_its_originals_sequence_and_freezes_nothing() {
    let db = database().await;
    take(&db.pool, &[in_epoch("1", item("A", 5, 500))]).await.unwrap();
    take(&db.pool, &[redriven("1", item("A", 4, 400))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(500), "a later record came meanwhile");
    take(&db.pool, &[redriven("1", item("A", 6, 600))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(600));
    take(&db.pool, &[in_epoch("1", item("A", 7, 700))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(700), "9,000,000 was the sequence of another outbox");
    // The dead letter cannot be compared with the records of the restored source since.
    take(&db.pool, &[in_epoch("2", item("A", 1, 100)), redriven("1", item("A", 9, 900))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(100));
    // Records from before epochs were named have the lower ids: the newest record of an old item is not lost for good.
    take(&db.pool, &[item("C", 900, 1), redriven("1", item("C", 899, 2))]).await.unwrap();
    assert_eq!(price(&db.pool, "C").await, Some(1));
    take(&db.pool, &[redriven("1", item("C", 901, 3))]).await.unwrap();
    assert_eq!(price(&db.pool, "C").await, Some(3));
}

#[tokio::test]
async fn an_item_of_before_the_epochs_is_changed_by_the_first_record_that_names_one() {
    let db = database().await;
    sqlx::query(
        "with known as (insert into catalogue (sku, name, unit_price, currency, sequence) values ('A', 'A', 1, 'EUR', 900))
         insert into catalogue_seen values ('A', 'inventory', '', 900)",
    )
    .execute(&db.pool)
    .await
    .unwrap();
    take(&db.pool, &[item("A", 900, 2)]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(1), "it is a repeat");
    take(&db.pool, &[in_epoch("1", item("A", 5, 500))]).await.unwrap();
    assert_eq!(price(&db.pool, "A").await, Some(500));
}

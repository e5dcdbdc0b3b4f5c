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
    // Gone before it was ever seen.
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

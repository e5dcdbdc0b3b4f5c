//! Every bad input is a problem that names its field, and nothing is written.

use crate::support::{Warehouse, item, problem};
use reqwest::Method;
use serde_json::{Value, json};

/// `good` with the value at a JSON pointer replaced.
fn with(mut good: Value, pointer: &str, value: Value) -> Value {
    *good.pointer_mut(pointer).unwrap() = value;
    good
}

#[tokio::test]
async fn a_bad_item_is_refused_by_its_field_and_nothing_is_written() {
    let warehouse = Warehouse::open().await;
    let good = || item("A");
    let extra = {
        let mut extra = good();
        extra["colour"] = json!("red");
        extra
    };
    for (field, body) in [
        ("sku", with(good(), "/sku", json!("a b"))),
        ("sku", with(good(), "/sku", json!(""))),
        ("sku", with(good(), "/sku", json!("a\0b"))),
        ("sku", with(good(), "/sku", json!("x".repeat(65)))),
        ("sku", with(good(), "/sku", json!(7))),
        ("name", with(good(), "/name", json!(""))),
        ("name", with(good(), "/name", json!("a\0b"))),
        ("name", with(good(), "/name", json!("for 4111 1111 1111 1111"))),
        ("name", with(good(), "/name", json!("x".repeat(201)))),
        ("unit_price.amount", with(good(), "/unit_price/amount", json!(-1))),
        ("unit_price.amount", with(good(), "/unit_price/amount", json!(i64::MAX))),
        ("unit_price.amount", with(good(), "/unit_price/amount", json!(1.5))),
        ("unit_price.amount", with(good(), "/unit_price/amount", json!("1"))),
        ("unit_price.currency", with(good(), "/unit_price/currency", json!("XXX"))),
        ("unit_price", with(good(), "/unit_price", Value::Null)),
        ("colour", extra),
    ] {
        let answer = warehouse.create("k", &body).send().await.unwrap();
        assert_eq!(problem(answer).await, (422, "/problems/validation".into(), vec![field.into()]), "{body}");
    }
    let both = with(with(good(), "/name", json!("")), "/unit_price/amount", json!(-1));
    let answer = warehouse.create("k", &both).send().await.unwrap();
    assert_eq!(problem(answer).await.2, ["name", "unit_price.amount"], "all of them at once");

    let raw = |body: &str, kind: &str| {
        let request = warehouse.request(Method::POST, "/v1/items").header("idempotency-key", "k");
        request.header("content-type", kind.to_owned()).body(body.to_owned()).send()
    };
    assert_eq!(problem(raw("{\"sku\":", "application/json").await.unwrap()).await.0, 400);
    assert_eq!(problem(raw("{}", "text/plain").await.unwrap()).await.0, 415);
    assert_eq!(problem(raw(&" ".repeat(70_000), "application/json").await.unwrap()).await.0, 413);

    assert_eq!(problem(warehouse.create("", &good()).send().await.unwrap()).await.0, 400);
    assert_eq!(problem(warehouse.create(&"k".repeat(201), &good()).send().await.unwrap()).await.0, 400);

    let rows = sqlx::query_scalar(
        "select (select count(*) from item) + (select count(*) from outbox)
              + (select count(*) from idempotency_answer)",
    );
    let rows: i64 = rows.fetch_one(&warehouse.db.pool).await.unwrap();
    assert_eq!(rows, 0);
}

#[tokio::test]
async fn a_bad_adjustment_is_refused_by_its_field_and_nothing_is_written() {
    let warehouse = Warehouse::stocked(&[("A", 5)]).await;
    for (field, delta, reason) in [
        ("delta", json!(0), "r"),
        ("delta", json!(1_000_000_001_i64), "r"),
        ("delta", json!(-1_000_000_001_i64), "r"),
        ("delta", json!(1e30), "r"),
        ("delta", json!("1"), "r"),
        ("reason", json!(1), ""),
        ("reason", json!(1), "a\0b"),
        ("reason", json!(1), "paid with 4111 1111 1111 1111"),
    ] {
        let body = json!({"delta": delta, "reason": reason});
        let answer = warehouse.adjust("A", "k", &body).send().await.unwrap();
        assert_eq!(problem(answer).await, (422, "/problems/validation".into(), vec![field.into()]), "{body}");
    }
    let good = json!({"delta": 1, "reason": "r"});
    assert_eq!(problem(warehouse.adjust("B", "k", &good).send().await.unwrap()).await.0, 404);
    assert_eq!(problem(warehouse.adjust("a%20b", "k", &good).send().await.unwrap()).await.0, 404);
    assert_eq!(problem(warehouse.adjust("%00", "k", &good).send().await.unwrap()).await.0, 400);
    assert_eq!(problem(warehouse.adjust("A", "", &good).send().await.unwrap()).await.0, 400);
    assert_eq!(problem(warehouse.adjust("A", &"k".repeat(201), &good).send().await.unwrap()).await.0, 400);
    assert_eq!(warehouse.balance("A").await, (5, 0));
    for path in [
        "/v1/items?limit=0",
        "/v1/items?limit=201",
        "/v1/items?limit=x",
        "/v1/items?cursor=x",
        "/v1/items?cursor=ImFcdTAwMDAi",
        "/v1/items?a=b",
    ] {
        assert_eq!(problem(warehouse.get(path).await).await.0, 400, "{path}");
    }
    let wrong_method = warehouse.request(Method::DELETE, "/v1/items/A").send().await.unwrap();
    assert_eq!(problem(wrong_method).await.0, 405);
    warehouse.books_balance().await;
}

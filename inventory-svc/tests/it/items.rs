//! Items and adjustments over HTTP.

use crate::support::{Warehouse, item, problem};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Row;

/// The events that were announced of a sku, in order.
async fn announced(warehouse: &Warehouse, sku: &str) -> Vec<Value> {
    let rows = sqlx::query("select payload, type from outbox where topic = 'inventory.items' and key = $1 order by id");
    let rows = rows.bind(sku).fetch_all(&warehouse.db.pool).await.unwrap();
    rows.iter()
        .map(|row| {
            assert_eq!(row.get::<String, _>("type"), "inventory.item-changed.v1");
            serde_json::from_slice(row.get("payload")).unwrap()
        })
        .collect()
}

#[tokio::test]
async fn an_item_is_created_read_and_announced_once() {
    let warehouse = Warehouse::open().await;
    let created = warehouse.create("k1", &item("A-1")).send().await.unwrap();
    assert_eq!(created.status(), 201);
    assert_eq!(created.headers()["location"], "/v1/items/A-1");
    assert_eq!(created.headers()["etag"], "\"1\"");
    let expected = json!({"sku": "A-1", "name": "The A-1", "unit_price": {"amount": 1999, "currency": "EUR"},
                          "on_hand": 0, "reserved": 0, "version": 1});
    assert_eq!(created.json::<Value>().await.unwrap(), expected);
    assert_eq!(warehouse.get("/v1/items/A-1").await.json::<Value>().await.unwrap(), expected);

    let taken = warehouse.create("k2", &item("A-1")).send().await.unwrap();
    assert_eq!(problem(taken).await, (409, "/problems/item-exists".into(), vec!["sku".into()]));
    assert_eq!(announced(&warehouse, "A-1").await, [item("A-1")]);
}

#[tokio::test]
async fn a_repeated_creation_gets_the_same_answer_and_announces_nothing_more() {
    let warehouse = Warehouse::open().await;
    let mut answers = Vec::new();
    for replayed in [false, true, true] {
        let answer = warehouse.create("k1", &item("A")).send().await.unwrap();
        assert_eq!(answer.headers().contains_key("idempotency-replayed"), replayed);
        let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
        let head = (answer.status().as_u16(), header("location"), header("etag"), header("content-type"));
        answers.push((head, answer.text().await.unwrap()));
        // An answer stays the same, whatever became of the item since.
        sqlx::query("update stock set on_hand = on_hand + 1").execute(&warehouse.db.pool).await.unwrap();
    }
    assert_eq!(answers[0].0, (201, "/v1/items/A".into(), "\"1\"".into(), "application/json".into()));
    assert_eq!((&answers[1], &answers[2]), (&answers[0], &answers[0]));
    assert_eq!(announced(&warehouse, "A").await, [item("A")]);
}

#[tokio::test]
async fn a_creations_key_is_needed_and_is_good_for_that_item_only() {
    let warehouse = Warehouse::open().await;
    let keyless = warehouse.request(Method::POST, "/v1/items").json(&item("A")).send().await.unwrap();
    assert_eq!(problem(keyless).await, (400, "/problems/idempotency-key".into(), vec!["Idempotency-Key".into()]));

    assert_eq!(warehouse.create("k1", &item("A")).send().await.unwrap().status(), 201);
    let dearer = json!({"sku": "A", "name": "The A", "unit_price": {"amount": 2999, "currency": "EUR"}});
    let reused = (422, "/problems/idempotency-key-reused".into(), vec!["Idempotency-Key".into()]);
    for other in [item("B"), dearer] {
        assert_eq!(problem(warehouse.create("k1", &other).send().await.unwrap()).await, reused, "{other}");
    }
    assert_eq!(problem(warehouse.create("k2", &item("A")).send().await.unwrap()).await.0, 409);
    let made = warehouse.create("k2", &item("B")).send().await.unwrap();
    assert_eq!(made.status(), 201, "a refusal does not use the key up");
    let delivery = json!({"delta": 1, "reason": "delivery"});
    let delivered = warehouse.adjust("A", "k1", &delivery).send().await.unwrap();
    assert_eq!(delivered.status(), 201, "each operation has keys of its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_repeats_at_once_create_once() {
    let warehouse = Warehouse::open().await;
    let body = item("A");
    let repeats = (0..20).map(|_| warehouse.create("same", &body).send());
    let mut created = 0;
    for response in futures::future::join_all(repeats).await {
        let response = response.unwrap();
        match response.status().as_u16() {
            201 => created += 1,
            // The answer is not that the sku is taken: a repeat gets the answer to its own first request only.
            _ => assert_eq!(problem(response).await.1, "/problems/in-flight"),
        }
    }
    assert!(created > 0);
    assert_eq!(announced(&warehouse, "A").await, [item("A")]);
}

#[tokio::test]
async fn a_price_changes_for_whoever_read_the_current_one_and_is_announced() {
    let warehouse = Warehouse::stocked(&[("A", 3)]).await;
    let patch = |tag: Option<&str>, body: Value| {
        let request = warehouse.request(Method::PATCH, "/v1/items/A").json(&body);
        match tag {
            Some(tag) => request.header("if-match", tag),
            None => request,
        }
        .send()
    };
    let price = |amount: i64| json!({"unit_price": {"amount": amount, "currency": "EUR"}});

    assert_eq!(problem(patch(None, price(1)).await.unwrap()).await.0, 428);
    let changed = patch(Some("\"1\""), price(5)).await.unwrap();
    assert_eq!((changed.status().as_u16(), &changed.headers()["etag"]), (200, &"\"2\"".parse().unwrap()));
    let body: Value = changed.json().await.unwrap();
    assert_eq!((&body["unit_price"]["amount"], &body["on_hand"]), (&json!(5), &json!(3)));

    for (tag, status) in [("\"1\"", 412), ("\"1\", \"3\"", 412), ("W/\"2\"", 412), ("2", 400), ("", 400)] {
        assert_eq!(problem(patch(Some(tag), price(7)).await.unwrap()).await.0, status, "{tag}");
    }
    assert_eq!(problem(patch(Some("\"2\""), price(-1)).await.unwrap()).await.2, ["unit_price.amount"]);
    let misspelt = json!({"unit_price": {"amount": 5, "currency": "EUR", "digits": 2}});
    let (status, _, fields) = problem(patch(Some("\"2\""), misspelt).await.unwrap()).await;
    assert_eq!((status, fields), (422, vec!["unit_price.digits".to_owned()]), "people's requests are read strictly");
    for seen in ["\"2\"", "\"1\", \"2\"", "*"] {
        let same = patch(Some(seen), price(5)).await.unwrap();
        assert_eq!(same.headers()["etag"], "\"2\"", "a change to what it is changes nothing");
    }

    let prices: Vec<_> =
        announced(&warehouse, "A").await.iter().map(|item| item["unit_price"]["amount"].clone()).collect();
    assert_eq!(prices, [1999, 5]);
}

#[tokio::test]
async fn items_are_listed_page_by_page_in_the_order_of_their_skus() {
    let warehouse = Warehouse::stocked(&[("C", 0), ("A", 0), ("E", 0), ("B", 0), ("D", 0)]).await;
    let (mut skus, mut path, mut pages) = (Vec::new(), "/v1/items?limit=2".to_owned(), 0);
    loop {
        let page: Value = warehouse.get(&path).await.json().await.unwrap();
        skus.extend(page["items"].as_array().unwrap().iter().map(|item| item["sku"].as_str().unwrap().to_owned()));
        pages += 1;
        match page["next_cursor"].as_str() {
            Some(cursor) => path = format!("/v1/items?limit=2&cursor={cursor}"),
            None => break,
        }
    }
    assert_eq!((skus.join(""), pages), ("ABCDE".into(), 3));
}

#[tokio::test]
async fn an_adjustment_is_made_once_and_stands_in_the_ledger() {
    let warehouse = Warehouse::stocked(&[("A", 0)]).await;
    let body = json!({"delta": 10, "reason": "delivery"});
    let first = warehouse.adjust("A", "k1", &body).send().await.unwrap();
    let again = warehouse.adjust("A", "k1", &body).send().await.unwrap();
    assert_eq!((first.status().as_u16(), again.status().as_u16()), (201, 201));
    assert_eq!(first.text().await.unwrap(), again.text().await.unwrap());
    assert_eq!(warehouse.balance("A").await, (10, 0));

    let other = warehouse.adjust("A", "k1", &json!({"delta": 11, "reason": "delivery"})).send().await.unwrap();
    assert_eq!(problem(other).await.0, 422);
    let keyless = warehouse.request(Method::POST, "/v1/items/A/adjustments").json(&body).send().await.unwrap();
    assert_eq!(problem(keyless).await, (400, "/problems/idempotency-key".into(), vec!["Idempotency-Key".into()]));

    let too_much = warehouse.adjust("A", "k2", &json!({"delta": -11, "reason": "theft"})).send().await.unwrap();
    assert_eq!(problem(too_much).await, (409, "/problems/out-of-stock".into(), vec!["delta".into()]));
    let some = warehouse.adjust("A", "k2", &json!({"delta": -4, "reason": "theft"})).send().await.unwrap();
    assert_eq!(some.status(), 201, "a refusal does not use the key up");

    let ledger: Value = warehouse.get("/v1/items/A/movements").await.json().await.unwrap();
    let deltas: Vec<_> = ledger["items"].as_array().unwrap().iter().map(|row| row["on_hand_delta"].clone()).collect();
    assert_eq!(deltas, [-4, 10]);
    assert_eq!(ledger["items"][0]["reason"], "theft");
    warehouse.books_balance().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_repeats_at_once_never_finds_its_own_key_in_flight() {
    let warehouse = Warehouse::stocked(&[("A", 0)]).await;
    let (delivery, theft) = (json!({"delta": 1, "reason": "delivery"}), json!({"delta": -9, "reason": "theft"}));
    for round in 0..100 {
        let key = format!("k{round}");
        for (body, status) in [(&theft, 409), (&delivery, 201), (&delivery, 201), (&theft, 422), (&delivery, 201)] {
            let response = warehouse.adjust("A", &key, body).send().await.unwrap();
            assert_eq!(response.status(), status, "{}", response.text().await.unwrap());
        }
        sqlx::query("update stock set on_hand = 0").execute(&warehouse.db.pool).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_repeats_at_once_adjust_once() {
    let warehouse = Warehouse::stocked(&[("A", 0)]).await;
    let body = json!({"delta": 1, "reason": "delivery"});
    let repeats = (0..20).map(|_| warehouse.adjust("A", "same", &body).send());
    let mut statuses: Vec<u16> = Vec::new();
    for response in futures::future::join_all(repeats).await {
        statuses.push(response.unwrap().status().as_u16());
    }
    assert!(statuses.iter().all(|status| matches!(status, 201 | 409)), "{statuses:?}");
    assert!(statuses.contains(&201));
    assert_eq!(warehouse.balance("A").await, (1, 0));
}

#[tokio::test]
async fn the_openapi_document_has_every_route_and_the_docs_show_it() {
    let warehouse = Warehouse::open().await;
    let document: Value = warehouse.get("/openapi.json").await.json().await.unwrap();
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(paths, ["/v1/items", "/v1/items/{sku}", "/v1/items/{sku}/adjustments", "/v1/items/{sku}/movements"]);
    assert!(document["components"]["schemas"]["Problem"].is_object());
    for path in ["/v1/items", "/v1/items/{sku}/adjustments"] {
        let post = &document["paths"][path]["post"];
        let mut parameters = post["parameters"].as_array().unwrap().iter();
        let key = parameters.find(|parameter| parameter["name"] == "idempotency-key").unwrap();
        assert_eq!((&key["in"], &key["required"]), (&json!("header"), &json!(true)), "{path}");
        assert!(post["responses"]["400"].is_object(), "{path}");
    }
    let docs = warehouse.get("/docs/").await;
    assert_eq!(docs.status(), 200);
    assert!(docs.text().await.unwrap().contains("swagger-ui"));
}

#[tokio::test]
async fn requests_for_items_need_no_more_than_readiness_asks_for() {
    let warehouse = Warehouse::of_least_rights().await;
    let created = warehouse.create("k1", &item("A-1")).send().await.unwrap();
    assert_eq!(created.status(), 201, "{}", created.text().await.unwrap());
    let adjusted = warehouse.adjust("A-1", "k2", &json!({ "delta": 3, "reason": "delivery" })).send().await.unwrap();
    assert_eq!(adjusted.status(), 201, "{}", adjusted.text().await.unwrap());
    let renamed = warehouse.request(Method::PATCH, "/v1/items/A-1").header("if-match", "\"1\"");
    let renamed = renamed.json(&json!({ "name": "another" })).send().await.unwrap();
    assert_eq!(renamed.status(), 200, "{}", renamed.text().await.unwrap());
    for path in ["/v1/items", "/v1/items/A-1", "/v1/items/A-1/movements"] {
        let read = warehouse.get(path).await;
        assert_eq!(read.status(), 200, "{path}: {}", read.text().await.unwrap());
    }
}

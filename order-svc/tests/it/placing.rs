//! `POST /v1/orders`: one transaction, one effect per Idempotency-Key.

use crate::support::{PATIENCE, Shop, basket, id_of, json_of};
use futures::{StreamExt, future::join_all, stream};
use saga_core::testkit::eventually;
use serde_json::{Value, json};
use std::collections::BTreeSet;

#[tokio::test]
async fn a_placed_order_is_written_with_its_history_its_event_its_saga_and_its_first_command() {
    let shop = Shop::open().await;
    let response = shop.post_order("k", &basket()).send().await.unwrap();
    assert_eq!(response.status(), 202);
    let headers = response.headers().clone();
    let order = json_of(response).await;
    let id = id_of(&order);
    assert_eq!(headers["location"], format!("/v1/orders/{id}"));
    assert_eq!(headers["etag"], "\"1\"");
    assert_eq!(id.0.get_version_num(), 7);
    assert_eq!(order["total"], json!({ "amount": 4_498, "currency": "EUR" }));

    assert_eq!(json_of(shop.get(headers["location"].to_str().unwrap()).await).await, order);
    assert_eq!(shop.history(id).await, ["pending"]);
    let messages: Vec<(String, String, String, Value)> =
        sqlx::query_as("select topic, key, type, convert_from(payload, 'UTF8')::jsonb from outbox order by topic desc")
            .fetch_all(&shop.db.pool)
            .await
            .unwrap();
    let sent: Vec<_> =
        messages.iter().map(|(topic, key, kind, _)| (topic.as_str(), key.as_str(), kind.as_str())).collect();
    let key = id.to_string();
    assert_eq!(
        sent,
        [
            ("payments.commands", key.as_str(), "payments.authorize.v1"),
            ("orders.events", key.as_str(), "orders.placed.v1"),
        ]
    );
    assert_eq!(messages[0].3["amount"], order["total"]);
    assert_eq!(messages[1].3["lines"].as_array().unwrap().len(), 2);
    let saga: (uuid::Uuid, String) =
        sqlx::query_as("select saga_id, status from saga").fetch_one(&shop.db.pool).await.unwrap();
    assert_eq!(saga, (id.0, "running".to_owned()));
}

#[tokio::test]
async fn the_same_key_gets_the_same_answer_and_places_nothing_more() {
    let shop = Shop::open().await;
    let first = shop.post_order("k", &basket()).send().await.unwrap();
    let (location, etag) = (first.headers()["location"].clone(), first.headers()["etag"].clone());
    let first = json_of(first).await;
    let rows = shop.rows().await;
    for _ in 0..20 {
        let again = shop.post_order("k", &basket()).send().await.unwrap();
        assert_eq!(again.status(), 202);
        assert_eq!((&again.headers()["location"], &again.headers()["etag"]), (&location, &etag));
        assert_eq!(again.headers()["idempotency-replayed"], "true");
        assert_eq!(json_of(again).await, first);
    }
    assert_eq!(shop.rows().await, rows);
}

#[tokio::test]
async fn a_repeat_that_prefers_to_wait_gets_the_first_answer_at_once() {
    let shop = Shop::open().await;
    let first = shop.post_order("k", &basket()).send().await.unwrap();
    assert_eq!(first.status(), 202);
    let again = shop.post_order("k", &basket()).header("Prefer", "wait=30").send();
    let again = tokio::time::timeout(std::time::Duration::from_secs(10), again).await.expect("nobody waits").unwrap();
    assert_eq!((again.status().as_u16(), &again.headers()["idempotency-replayed"]), (202, &"true".parse().unwrap()));
    assert_eq!(first.text().await.unwrap(), again.text().await.unwrap());
}

#[tokio::test]
async fn the_same_key_with_another_body_is_refused_and_another_key_is_another_order() {
    let shop = Shop::open().await;
    let first = shop.place("k").await;
    let rows = shop.rows().await;
    let mut other = basket();
    other["items"][0]["quantity"] = json!(3);
    let response = shop.post_order("k", &other).send().await.unwrap();
    assert_eq!(response.status(), 422);
    assert_eq!(json_of(response).await["type"], "/problems/idempotency-key-reused");
    assert_eq!(shop.rows().await, rows);
    assert_ne!(shop.place("k2").await, first);
}

#[tokio::test]
async fn a_refused_order_does_not_use_up_its_key() {
    let shop = Shop::open().await;
    let mut wrong = basket();
    wrong["items"][0]["sku"] = json!("NOSUCH-9");
    for n in 0..20 {
        let key = format!("k{n}");
        assert_eq!(shop.post_order(&key, &wrong).send().await.unwrap().status(), 422);
        shop.place(&key).await;
    }
}

#[tokio::test]
async fn while_a_request_is_being_worked_on_its_key_is_in_flight() {
    let shop = Shop::open().await;
    // Another transaction changes the widget's price and has not committed: the first request does not wait for that.
    // So a lock that only writers of orders meet holds it up at the order itself.
    let mut blocker = shop.db.pool.begin().await.unwrap();
    sqlx::query("lock table orders in share mode").execute(&mut *blocker).await.unwrap();
    let first = tokio::spawn(shop.post_order("k", &basket()).send());
    eventually(PATIENCE, || async {
        let waiting = "pg_locks where relation = 'orders'::regclass and not granted";
        (shop.count(waiting).await == 1).then_some(())
    })
    .await;
    let second = shop.post_order("k", &basket()).send().await.unwrap();
    assert_eq!(second.status(), 409);
    assert!(second.headers().contains_key("retry-after"));
    assert_eq!(json_of(second).await["type"], "/problems/in-flight");
    blocker.rollback().await.unwrap();
    assert_eq!(first.await.unwrap().unwrap().status(), 202);
    assert_eq!(shop.count("orders").await, 1);
}

#[tokio::test]
async fn of_many_requests_under_one_key_at_once_one_places_the_order() {
    let shop = Shop::open().await;
    for round in 0..10 {
        let key = format!("k{round}");
        let answers = join_all((0..12).map(|_| shop.post_order(&key, &basket()).send())).await;
        let mut placed = BTreeSet::new();
        for answer in answers {
            let answer = answer.unwrap();
            match answer.status().as_u16() {
                202 => drop(placed.insert(id_of(&json_of(answer).await))),
                409 => {}
                status => panic!("{status}"),
            }
        }
        assert_eq!(placed.len(), 1, "{placed:?}");
    }
    assert_eq!(shop.count("orders").await, 10);
    assert_eq!(shop.count("saga").await, 10);
}

#[tokio::test]
async fn connections_that_break_anywhere_leave_one_order_per_key_for_whoever_repeats() {
    let shop = Shop::open().await;
    let client = |n: usize| {
        let shop = &shop;
        async move {
            // The request is refused for a moment, or its fate is not known: the same key finds out.
            eventually(PATIENCE, || async {
                let answer = shop.post_order(&format!("k{n}"), &basket()).send().await.unwrap();
                match answer.status().as_u16() {
                    202 => Some(id_of(&json_of(answer).await)),
                    409 | 500 | 503 => None,
                    status => panic!("{status}"),
                }
            })
            .await
        }
    };
    let cuts = async {
        for orders in [5, 20, 40, 60] {
            eventually(PATIENCE, || async {
                let placed = sqlx::query_scalar::<_, i64>("select count(*) from orders").fetch_one(&shop.db.pool).await;
                placed.is_ok_and(|placed| placed >= orders).then_some(())
            })
            .await;
            assert!(shop.db.cut_connections().await > 0);
        }
    };
    let placing = stream::iter(0..80).map(client).buffer_unordered(6).collect::<BTreeSet<_>>();
    let (placed, ()) = tokio::join!(placing, cuts);
    assert_eq!(placed.len(), 80);
    for table in ["orders", "saga", "idempotency_answer", "outbox where topic = 'payments.commands'"] {
        assert_eq!(shop.count(table).await, 80, "{table}");
    }
}

#[tokio::test]
async fn requests_for_orders_need_no_more_than_readiness_asks_for() {
    let shop = Shop::of_least_rights().await;
    let order = shop.place("k").await;
    for path in [format!("/v1/orders/{order}"), "/v1/orders".to_owned(), format!("/v1/orders/{order}/events")] {
        let read = shop.get(&path).await;
        assert_eq!(read.status(), 200, "{path}");
    }
    for etag in ["\"1\"", "*"] {
        let cancel = shop.client.post(shop.url(&format!("/v1/orders/{order}/cancel"))).header("if-match", etag);
        let cancelled = cancel.json(&json!({})).send().await.unwrap();
        assert!(cancelled.status().is_success(), "{}", cancelled.text().await.unwrap());
    }
}

//! Payments and their ledger over HTTP.

use crate::support::{World, authorize, capture, new_order};
use payment_svc::{api, app::NEEDS};
use saga_core::{command::Op::Do, service};
use serde_json::Value;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

async fn open(world: &World) -> impl AsyncFn(&str) -> (u16, Value) {
    open_over(world.database.pool.clone()).await
}

async fn open_over(pool: PgPool) -> impl AsyncFn(&str) -> (u16, Value) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let api = saga_core::http::Api::new(api::router(pool));
    tokio::spawn(service::serve(listener, api, CancellationToken::new()));
    async move |path: &str| {
        let response = reqwest::get(format!("{base}{path}")).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap_or_default())
    }
}

#[tokio::test]
async fn a_payment_is_shown_with_the_ledger_that_explains_it() {
    let world = World::new().await;
    let get = open(&world).await;
    let order = new_order();
    assert_eq!(get(&format!("/v1/payments/{order}")).await.0, 404);
    world.do_and_settle(order, "authorize-payment", Do, &authorize(order, "tok_visa")).await;
    world.do_and_settle(order, "capture-payment", Do, &capture(order)).await;
    let (status, payment) = get(&format!("/v1/payments/{order}")).await;
    assert_eq!((status, payment["status"].as_str().unwrap()), (200, "captured"));
    assert_eq!((payment["held"].as_i64(), payment["captured"].as_i64()), (Some(0), Some(1_000)));
    let (_, ledger) = get(&format!("/v1/payments/{order}/ledger")).await;
    let entries: Vec<_> = ledger["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["movement"].as_str().unwrap(), e["account"].as_str().unwrap(), e["amount"].as_i64().unwrap()))
        .collect();
    assert_eq!(
        entries,
        [
            ("authorize", "customer", -1_000),
            ("authorize", "held", 1_000),
            ("capture", "held", -1_000),
            ("capture", "merchant", 1_000)
        ]
    );
}

#[tokio::test]
async fn the_list_is_paged_newest_first_and_filtered() {
    let world = World::new().await;
    let get = open(&world).await;
    let mut orders = Vec::new();
    for method in ["tok_visa", "tok_declined", "tok_visa"] {
        let order = new_order();
        world.do_and_settle(order, "authorize-payment", Do, &authorize(order, method)).await;
        orders.insert(0, order.to_string());
    }
    let (_, page) = get("/v1/payments?limit=2").await;
    let cursor = page["next_cursor"].as_str().unwrap();
    let (_, rest) = get(&format!("/v1/payments?limit=2&cursor={cursor}")).await;
    assert_eq!(rest["next_cursor"], Value::Null);
    let seen: Vec<_> = [&page, &rest]
        .iter()
        .flat_map(|page| page["items"].as_array().unwrap())
        .map(|payment| payment["order"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(seen, orders);
    let (_, declined) = get("/v1/payments?status=declined").await;
    assert_eq!(declined["items"].as_array().unwrap().len(), 1);
    assert_eq!(declined["items"][0]["decline_reason"], "declined");
    // The cursor holds as large a number as there is, and the nil UUID, in base64.
    let beyond = "cursor=WzkyMjMzNzIwMzY4NTQ3NzU4MDcsIjAwMDAwMDAwLTAwMDAtMDAwMC0wMDAwLTAwMDAwMDAwMDAwMCJd";
    for wrong in ["status=paid", "limit=0", "limit=x", "cursor=zz", beyond, "unknown=1"] {
        assert_eq!(get(&format!("/v1/payments?{wrong}")).await.0, 400, "{wrong}");
    }
    assert_eq!(get("/v1/payments/not-an-id").await.0, 400);
    assert_eq!(get(&format!("/v1/payments/{}/ledger", Uuid::nil())).await.0, 404);
}

#[tokio::test]
async fn the_api_describes_itself() {
    let world = World::new().await;
    let get = open(&world).await;
    let (status, document) = get("/openapi.json").await;
    assert_eq!(status, 200);
    assert!(document["paths"]["/v1/payments/{order}/ledger"]["get"].is_object());
}

#[tokio::test]
async fn the_ledger_cannot_be_rewritten() {
    let world = World::new().await;
    let order = new_order();
    world.do_and_settle(order, "authorize-payment", Do, &authorize(order, "tok_visa")).await;
    for sql in ["update ledger_entry set amount = amount * 2", "delete from ledger_entry", "truncate ledger_entry"] {
        let refused = sqlx::query(sql).execute(&world.database.pool).await.unwrap_err();
        assert!(refused.to_string().contains("append-only"), "{refused}");
    }
}

#[tokio::test]
async fn reads_of_payments_need_no_more_than_readiness_asks_for() {
    let world = World::new().await;
    let order = new_order();
    world.do_and_settle(order, "authorize-payment", Do, &authorize(order, "tok_visa")).await;
    let get = open_over(world.database.limited_to(NEEDS).await).await;
    for path in ["/v1/payments".to_owned(), format!("/v1/payments/{order}"), format!("/v1/payments/{order}/ledger")] {
        let (status, answer) = get(&path).await;
        assert_eq!(status, 200, "{path}: {answer}");
    }
}

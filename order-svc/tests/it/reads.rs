//! Reading orders: one, with its ETag; lists, page by page.

use crate::support::{Shop, json_of};
use order_svc::domain::{CancelReason, StatusChange};
use serde_json::Value;

/// All pages of a list, and how many there were.
async fn pages(shop: &Shop, query: &str) -> (Vec<String>, usize) {
    let (mut ids, mut pages, mut cursor) = (Vec::new(), 0, String::new());
    loop {
        let page = json_of(shop.get(&format!("/v1/orders?limit=2{query}{cursor}")).await).await;
        pages += 1;
        ids.extend(page["items"].as_array().unwrap().iter().map(|order| order["id"].as_str().unwrap().to_owned()));
        match &page["next_cursor"] {
            Value::String(next) => cursor = format!("&cursor={next}"),
            _ => return (ids, pages),
        }
    }
}

#[tokio::test]
async fn an_order_is_shown_with_its_items_and_an_etag_that_changes_with_its_status() {
    let shop = Shop::open().await;
    let order = shop.write_order("c-1").await;
    let path = format!("/v1/orders/{order}");

    let response = shop.get(&path).await;
    assert_eq!(response.headers()["etag"], "\"1\"");
    let mut view = json_of(response).await;
    for field in ["id", "placed_at"] {
        assert!(view.as_object_mut().unwrap().remove(field).is_some());
    }
    insta::assert_json_snapshot!(view, @r#"
    {
      "customer_id": "c-1",
      "items": [
        {
          "quantity": 2,
          "sku": "WIDGET-1",
          "unit_price": {
            "amount": 250,
            "currency": "EUR"
          }
        }
      ],
      "status": "pending",
      "total": {
        "amount": 500,
        "currency": "EUR"
      },
      "version": 1
    }
    "#);

    let unchanged = |etag: &'static str| shop.client.get(shop.url(&path)).header("If-None-Match", etag).send();
    assert_eq!(unchanged("\"1\"").await.unwrap().status(), 304);
    assert_eq!(unchanged("\"7\", W/\"1\"").await.unwrap().status(), 304);
    shop.change(order, StatusChange::Cancel(CancelReason::OutOfStock)).await;
    let response = unchanged("\"1\"").await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["etag"]), (200, &"\"2\"".parse().unwrap()));
    let view = json_of(response).await;
    assert_eq!((&view["status"], &view["reason"]), (&"cancelled".into(), &"out_of_stock".into()));
    assert!(view["closed_at"].is_string());
}

#[tokio::test]
async fn lists_are_newest_first_by_customer_and_status_and_turn_pages_without_gaps_or_repeats() {
    let shop = Shop::open().await;
    let mut orders = Vec::new();
    for n in 0..7 {
        let customer = if n % 2 == 0 { "even" } else { "odd" };
        let order = shop.write_order(customer).await;
        if n < 3 {
            shop.change(order, StatusChange::Confirm).await;
        }
        orders.push((order.to_string(), customer, n < 3));
    }
    orders.reverse();
    let expect = |customer: Option<&str>, confirmed: Option<bool>| -> Vec<String> {
        let fits = |order: &&(String, &str, bool)| {
            customer.is_none_or(|customer| order.1 == customer) && confirmed.is_none_or(|is| order.2 == is)
        };
        orders.iter().filter(fits).map(|order| order.0.clone()).collect()
    };
    for (query, expected) in [
        ("", expect(None, None)),
        ("&customer_id=even", expect(Some("even"), None)),
        ("&status=confirmed", expect(None, Some(true))),
        ("&status=pending", expect(None, Some(false))),
        ("&customer_id=odd&status=pending", expect(Some("odd"), Some(false))),
        ("&customer_id=nobody", vec![]),
    ] {
        let (ids, count) = pages(&shop, query).await;
        assert_eq!(count, expected.len().div_ceil(2).max(1), "{query}");
        assert_eq!(ids, expected, "{query}");
    }
}

#[tokio::test]
async fn each_list_is_one_range_of_its_index() {
    let shop = Shop::open().await;
    let mut tx = shop.db.pool.begin().await.unwrap();
    // The planner reads a small table as a whole when it may.
    sqlx::raw_sql("set local enable_seqscan = off; set local enable_bitmapscan = off; set local enable_sort = off")
        .execute(&mut *tx)
        .await
        .unwrap();
    for (filter, index) in [
        ("", "orders_pkey"),
        ("and customer = 'c'", "orders_by_customer"),
        ("and status = 'pending'", "orders_by_status"),
    ] {
        let explain =
            format!("explain select id from orders where id < gen_random_uuid() {filter} order by id desc limit 2");
        let plan: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).fetch_all(&mut *tx).await.unwrap();
        let plan = plan.join("\n");
        assert!(plan.contains(index) && !plan.contains("Sort"), "{filter}: {plan}");
    }
}

#[tokio::test]
async fn the_api_describes_itself_and_a_change_of_the_description_is_seen() {
    let shop = Shop::open().await;
    let served = json_of(shop.get("/openapi.json").await).await;
    assert_eq!(served, serde_json::to_value(order_svc::api::document()).unwrap());
    insta::assert_json_snapshot!("openapi", served);
    let docs = shop.get("/docs/").await;
    assert_eq!(docs.status(), 200);
    assert!(docs.text().await.unwrap().contains("swagger"));
}

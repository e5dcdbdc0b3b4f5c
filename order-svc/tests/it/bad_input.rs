//! Bad requests of every kind: 4xx, a problem that names the field, and nothing written.

use crate::support::{Shop, basket, json_of};
use reqwest::Method;
use saga_core::testkit::Log;
use serde_json::{Value, json};

struct Case {
    name: &'static str,
    request: reqwest::RequestBuilder,
    status: u16,
    kind: &'static str,
    field: Option<&'static str>,
}

fn with(pointer: &str, value: Value) -> Value {
    let mut body = basket();
    *body.pointer_mut(pointer).unwrap() = value;
    body
}

fn plus(pointer: &str, field: &str) -> Value {
    let mut body = basket();
    body.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert(field.into(), json!(1));
    body
}

fn without(pointer: &str, field: &str) -> Value {
    let mut body = basket();
    body.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(field).unwrap();
    body
}

/// Bodies that are JSON, and the field that each answer has to name.
fn bad_bodies() -> Vec<(&'static str, Value, &'static str)> {
    let items = |pairs: &[(&str, i64)]| -> Value {
        pairs.iter().map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity })).collect()
    };
    let many: Vec<_> = (0..101).map(|i| json!({ "sku": format!("S{i}"), "quantity": 1 })).collect();
    vec![
        ("unknown field", plus("", "discount"), "discount"),
        ("unknown field of an item", plus("/items/1", "price"), "items[1].price"),
        ("no customer", without("", "customer_id"), "customer_id"),
        ("no items field", without("", "items"), "items"),
        ("no payment method", without("", "payment_method"), "payment_method"),
        ("no sku", without("/items/0", "sku"), "items[0].sku"),
        ("no quantity", without("/items/1", "quantity"), "items[1].quantity"),
        ("no items", with("/items", json!([])), "items"),
        ("too many items", with("/items", json!(many)), "items"),
        ("items is no list", with("/items", json!({})), "items"),
        ("quantity zero", with("/items/0/quantity", json!(0)), "items[0].quantity"),
        ("quantity negative", with("/items/0/quantity", json!(-1)), "items[0].quantity"),
        ("quantity most negative", with("/items/0/quantity", json!(i64::MIN)), "items[0].quantity"),
        ("quantity too large", with("/items/1/quantity", json!(1_000_001)), "items[1].quantity"),
        ("quantity huge", with("/items/1/quantity", json!(i64::MAX)), "items[1].quantity"),
        ("quantity beyond 64 bits", with("/items/1/quantity", json!(u64::MAX)), "items[1].quantity"),
        ("quantity astronomic", with("/items/1/quantity", json!(1e300)), "items[1].quantity"),
        ("quantity a fraction", with("/items/1/quantity", json!(1.5)), "items[1].quantity"),
        ("quantity a text", with("/items/1/quantity", json!("1")), "items[1].quantity"),
        ("quantity null", with("/items/1/quantity", json!(null)), "items[1].quantity"),
        ("sku empty", with("/items/0/sku", json!("")), "items[0].sku"),
        ("sku malformed", with("/items/0/sku", json!("a b'; --")), "items[0].sku"),
        ("sku too long", with("/items/0/sku", json!("x".repeat(65))), "items[0].sku"),
        ("sku with NUL", with("/items/0/sku", json!("WIDGET-1\0")), "items[0].sku"),
        ("sku a number", with("/items/0/sku", json!(1)), "items[0].sku"),
        ("unknown product", with("/items/1/sku", json!("NOSUCH-9")), "items[1].sku"),
        (
            "duplicate items",
            with("/items", items(&[("WIDGET-1", 1), ("GADGET-2", 1), ("WIDGET-1", 2)])),
            "items[2].sku",
        ),
        ("mixed currencies", with("/items", items(&[("WIDGET-1", 1), ("TEAPOT-3", 1)])), "items[1].sku"),
        ("overflow of a line", with("/items", items(&[("GOLD-4", 2)])), "items"),
        ("overflow of the sum", with("/items", items(&[("GOLD-4", 1), ("WIDGET-1", 1)])), "items"),
        ("more than JSON keeps exact", with("/items", items(&[("GOLD-4", 1)])), "items"),
        ("nothing to pay", with("/items", items(&[("AIR-5", 3)])), "items"),
        ("customer empty", with("/customer_id", json!("")), "customer_id"),
        ("customer with NUL", with("/customer_id", json!("a\0b")), "customer_id"),
        ("customer with a space", with("/customer_id", json!("a b")), "customer_id"),
        ("customer too long", with("/customer_id", json!("x".repeat(101))), "customer_id"),
        ("payment method with NUL", with("/payment_method", json!("tok\0")), "payment_method"),
        ("payment method too long", with("/payment_method", json!("x".repeat(201))), "payment_method"),
        ("an item as an array", with("/items", json!([["WIDGET-1", 1]])), "items[0]"),
        ("all as an array", json!(["c-1", [["WIDGET-1", 1]], "tok_visa"]), "."),
    ]
}

fn bad_requests(shop: &Shop) -> Vec<Case> {
    let post = |body: &'static str, kind: Option<&str>| {
        let request = shop.client.post(shop.url("/v1/orders")).header("Idempotency-Key", "k").body(body);
        match kind {
            Some(kind) => request.header("content-type", kind),
            None => request,
        }
    };
    let key = |key: Vec<u8>| {
        let request = shop.client.post(shop.url("/v1/orders")).json(&basket());
        request.header("Idempotency-Key", reqwest::header::HeaderValue::from_bytes(&key).unwrap())
    };
    let get = |path: &str| shop.client.get(shop.url(path));
    let id = uuid::Uuid::now_v7();
    let case = |name, request, status, kind, field| Case { name, request, status, kind, field };
    let json = Some("application/json");
    let large = shop.post_order("k", &with("/customer_id", json!("x".repeat(70_000))));
    let malformed = "/problems/malformed";
    let no_key = "/problems/idempotency-key";
    let (cancel, events) = (format!("/v1/orders/{id}/cancel"), format!("/v1/orders/{id}/events"));
    vec![
        case("empty body", post("", json), 400, malformed, None),
        case("half a body", post("{\"customer_id\": \"c\", \"items\": [", json), 400, malformed, None),
        case("not JSON", post("customer_id=c", json), 400, malformed, None),
        case("two values", post("{} {}", json), 422, "/problems/validation", None),
        case("raw NUL", post("{\"customer_id\": \"a\0b\"}", json), 400, malformed, None),
        case("not an object", post("[]", json), 422, "/problems/validation", None),
        case("form", post("{}", Some("application/x-www-form-urlencoded")), 415, "/problems/content-type", None),
        case("text", post("{}", Some("text/plain")), 415, "/problems/content-type", None),
        case("no content type", post("{}", None), 415, "/problems/content-type", None),
        case("oversized", large, 413, "/problems/too-large", None),
        case("no key", shop.client.post(shop.url("/v1/orders")).json(&basket()), 400, no_key, Some("Idempotency-Key")),
        case("empty key", key(vec![]), 400, no_key, Some("Idempotency-Key")),
        case("long key", key(vec![b'k'; 201]), 400, no_key, Some("Idempotency-Key")),
        case("key of bytes", key(vec![0xff, 0xfe]), 400, no_key, Some("Idempotency-Key")),
        case("wrong method", shop.client.request(Method::PUT, shop.url("/v1/orders")), 405, "/problems/method", None),
        case("no such route", get("/v1/nothing"), 404, "/problems/not-found", None),
        case("no such order", get(&format!("/v1/orders/{id}")), 404, "/problems/not-found", None),
        case("cancel of none", shop.client.post(shop.url(&cancel)).json(&json!({})), 404, "/problems/not-found", None),
        case("events of none", get(&events), 404, "/problems/not-found", None),
        case("not an id", get("/v1/orders/1"), 400, malformed, Some("id")),
        case("NUL in the path", get("/v1/orders/%00"), 400, malformed, None),
        case("status", get("/v1/orders?status=lost"), 400, malformed, Some("status")),
        case("limit 0", get("/v1/orders?limit=0"), 400, malformed, Some("limit")),
        case("limit 201", get("/v1/orders?limit=201"), 400, malformed, Some("limit")),
        case("limit text", get("/v1/orders?limit=x"), 400, malformed, Some("limit")),
        case("cursor", get("/v1/orders?cursor=x"), 400, malformed, Some("cursor")),
        case("unknown parameter", get("/v1/orders?customer=x"), 400, malformed, Some("customer")),
        case("customer", get("/v1/orders?customer_id=a%20b"), 400, malformed, Some("customer_id")),
        case("NUL in a parameter", get("/v1/orders?customer_id=a%00b"), 400, malformed, None),
    ]
}

#[tokio::test]
async fn bad_input_is_refused_by_name_and_nothing_is_written() {
    let shop = Shop::open().await;
    let before = shop.rows().await;
    let bodies = bad_bodies().into_iter().map(|(name, body, field)| Case {
        name,
        request: shop.post_order("k", &body),
        status: 422,
        kind: "/problems/validation",
        field: Some(field),
    });
    let mut wrong = Vec::new();
    for case in bodies.chain(bad_requests(&shop)) {
        let response = case.request.send().await.unwrap();
        let status = response.status().as_u16();
        let media = response.headers().get("content-type").cloned();
        let problem = json_of(response).await;
        let fields: Vec<_> =
            problem["errors"].as_array().into_iter().flatten().map(|error| error["field"].as_str().unwrap()).collect();
        let right = status == case.status
            && media.is_some_and(|media| media == "application/problem+json")
            && problem["type"] == case.kind
            && problem["status"] == case.status
            && case.field.is_none_or(|field| fields.contains(&field));
        if !right {
            wrong.push(format!("{}: {status} {problem}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(shop.rows().await, before, "something was written");
}

#[tokio::test]
async fn a_card_number_is_refused_in_words_and_neither_stored_nor_logged() {
    let log = Log::hear("debug");
    let shop = Shop::open().await;
    let before = shop.rows().await;
    for card in ["4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111"] {
        for field in ["customer_id", "payment_method"] {
            let response = shop.post_order("k", &with(&format!("/{field}"), json!(card))).send().await.unwrap();
            assert_eq!(response.status(), 422, "{field}: {card}");
            let problem = json_of(response).await;
            assert_eq!(problem["errors"][0]["field"], field);
            let said = problem.to_string();
            assert!(said.contains("card number") && !said.contains("1111"), "{said}");
        }
    }
    assert_eq!(shop.rows().await, before, "something was written");
    let log = log.said("");
    assert!(!log.is_empty() && log.iter().all(|line| !line.to_string().contains("1111")), "{log:?}");
}

#[tokio::test]
async fn a_request_with_many_mistakes_hears_of_all_of_them() {
    let shop = Shop::open().await;
    let body = json!({
        "customer_id": "",
        "items": [{ "sku": "a b", "quantity": 0 }, { "sku": "GADGET-2", "quantity": -5 }],
        "payment_method": "",
    });
    let problem = json_of(shop.post_order("k", &body).send().await.unwrap()).await;
    let fields: Vec<_> = problem["errors"].as_array().unwrap().iter().map(|error| &error["field"]).collect();
    let expected = ["customer_id", "payment_method", "items[0].sku", "items[0].quantity", "items[1].quantity"];
    assert_eq!(fields, expected);
}

//! A customer's and a clerk's requests to a platform that is up.

use super::{PATIENCE, wait_until};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use stack::{service::Service, state::StateDirectory};
use std::path::Path;
use tokio::runtime::Runtime;

pub(crate) struct Shop {
    runtime: Runtime,
    http: reqwest::Client,
    orders: String,
    inventory: String,
}

impl Shop {
    /// The shop of the platform that is up in this directory.
    pub(crate) fn of(state: &Path) -> Self {
        let services = StateDirectory::at(state).running().unwrap().expect("it is up").services;
        let url = |wanted| services.iter().find(|(service, _)| *service == wanted).unwrap().1.url();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, http: reqwest::Client::new(), orders: url(Service::Orders), inventory: url(Service::Inventory) }
    }

    fn answer(
        &self,
        method: Method,
        url: String,
        with: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> (StatusCode, Value) {
        self.runtime.block_on(async {
            let answer = with(self.http.request(method, url).timeout(PATIENCE)).send().await.unwrap();
            (answer.status(), answer.json().await.unwrap())
        })
    }

    fn post(&self, url: String, key: &str, body: &Value) -> (StatusCode, Value) {
        self.answer(Method::POST, url, |request| request.header("idempotency-key", key).json(body))
    }

    fn get(&self, url: String) -> Value {
        let (status, value) = self.answer(Method::GET, url, |request| request);
        assert!(status.is_success(), "{status}: {value}");
        value
    }

    /// Adds an item with ten pieces.
    pub(crate) fn add_item(&self, sku: &str) {
        let item = json!({ "sku": sku, "name": sku, "unit_price": { "amount": 100, "currency": "EUR" } });
        let delivery = json!({ "delta": 10, "reason": "delivered" });
        for (url, body) in [("/v1/items".to_owned(), item), (format!("/v1/items/{sku}/adjustments"), delivery)] {
            let (status, answer) = self.post(format!("{}{url}", self.inventory), sku, &body);
            assert!(status.is_success(), "{status}: {answer}");
        }
    }

    /// Orders a piece, or repeats the request under its key, and waits until the order is confirmed.
    pub(crate) fn order(&self, sku: &str, key: &str) -> Value {
        let order =
            json!({ "customer_id": "ada", "items": [{ "sku": sku, "quantity": 1 }], "payment_method": "tok_visa" });
        let mut placed = Value::Null;
        wait_until("the order is placed: its item is unknown to order-svc until the record of it arrives", || {
            let (status, answer) = self.post(format!("{}/v1/orders", self.orders), key, &order);
            assert!(status.is_success() || status == StatusCode::UNPROCESSABLE_ENTITY, "{status}: {answer}");
            placed = answer;
            status.is_success()
        });
        wait_until("the order is confirmed", || self.find(&placed)["status"] == "confirmed");
        self.find(&placed)
    }

    /// An order as it is now.
    pub(crate) fn find(&self, order: &Value) -> Value {
        self.get(format!("{}/v1/orders/{}", self.orders, order["id"].as_str().unwrap()))
    }
}

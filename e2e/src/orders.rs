//! A customer's actions: orders, cancellations, looks. Also a shop's actions before: items and stock.

use crate::{
    audit::{PostAnswer, Request},
    platform::{Platform, SETTLED_WITHIN},
};
use contracts::topics::PAYMENTS_COMMANDS;
use saga_core::testkit::{eventually, unique, within};
use serde_json::{Value, json};
use stack::service::Service;
use std::time::Duration;
use uuid::Uuid;

/// How long a customer repeats a request that got no answer.
const REPEATED_FOR: Duration = Duration::from_secs(60);

/// An order to be placed.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The id of the ordering customer.
    pub customer: String,
    /// The items to order: (sku, pieces).
    pub items: Vec<(String, i64)>,
    /// The payment provider's test token, which decides how the provider behaves.
    pub payment_method: String,
    /// The W3C trace context to send along; `None`: none.
    pub traceparent: Option<String>,
}

impl Wish {
    /// An order of so many pieces of one item.
    pub fn of(sku: &str, pieces: i64) -> Self {
        let items = vec![(sku.to_owned(), pieces)];
        Self { customer: "customer-1".into(), items, payment_method: "tok_visa".into(), traceparent: None }
    }

    /// Adds so many pieces of another item.
    #[must_use]
    pub fn and(mut self, sku: &str, pieces: i64) -> Self {
        self.items.push((sku.to_owned(), pieces));
        self
    }

    /// Sets the token that pays.
    #[must_use]
    pub fn paid_with(mut self, token: &str) -> Self {
        token.clone_into(&mut self.payment_method);
        self
    }

    /// The JSON body of the request.
    pub fn body(&self) -> Value {
        let items = self.items.iter().map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity }));
        let items: Vec<_> = items.collect();
        json!({ "customer_id": self.customer, "items": items, "payment_method": self.payment_method })
    }
}

impl Platform {
    /// Creates an item with so many pieces on hand, known to order-svc too; returns its sku.
    ///
    /// # Panics
    /// When inventory-svc refuses, or order-svc does not hear of the item.
    pub async fn item(&self, name: &str, price: i64, pieces: i64) -> String {
        let sku = unique(name);
        let item = json!({
            "sku": sku, "name": name, "unit_price": { "amount": price, "currency": "EUR" }
        });
        let url = format!("{}/v1/items", self.stack.url(Service::Inventory));
        self.insists(&url, &unique("item"), &item).await;
        if pieces > 0 {
            let delivery = json!({ "delta": pieces, "reason": "first delivery" });
            self.insists(&format!("{url}/{sku}/adjustments"), &unique("delivery"), &delivery).await;
        }
        eventually(SETTLED_WITHIN, || async {
            let known = sqlx::query_scalar("select exists (select from catalogue where sku = $1)").bind(&sku);
            known.fetch_one(&self.orders).await.unwrap_or(false).then_some(())
        })
        .await;
        sku
    }

    /// Repeats a request under one key until it succeeds: the service may be down.
    async fn insists(&self, url: &str, key: &str, body: &Value) {
        eventually(REPEATED_FOR, || async {
            let answer = self.http.post(url).header("idempotency-key", key).json(body).send().await.ok()?;
            let status = answer.status();
            assert!(!status.is_client_error() || matches!(status.as_u16(), 408 | 409 | 429), "{status}");
            status.is_success().then_some(())
        })
        .await;
    }

    /// Places an order as a patient customer does: without an answer it asks again under the same key.
    ///
    /// # Panics
    /// When the order is refused, or there is no answer for a long time.
    pub async fn place(&self, wish: &Wish) -> Uuid {
        match self.ask(wish).await {
            PostAnswer::Accepted(order) => order,
            other => panic!("{wish:?}: {other:?}"),
        }
    }

    /// Asks for an order once, whatever the answer: something is broken, and no audit follows.
    pub async fn try_place(&self, wish: &Wish) {
        self.ask_once(wish, &unique("order")).await;
    }

    /// Places an order, and notes the answer for the audit.
    pub async fn ask(&self, wish: &Wish) -> PostAnswer {
        let key = unique("order");
        let answered = within(REPEATED_FOR, || async {
            match self.ask_once(wish, &key).await {
                // The request is in flight, or something is out of order: the same request again brings the answer.
                unsure @ (PostAnswer::Unknown | PostAnswer::Refused(409 | 500..=599)) => Err(unsure),
                answer => Ok(answer),
            }
        });
        let answer = answered.await.unwrap_or_else(|unsure| unsure);
        self.expected().requests.push(Request { key, answer: answer.clone() });
        answer
    }

    async fn ask_once(&self, wish: &Wish, key: &str) -> PostAnswer {
        let url = format!("{}/v1/orders", self.stack.url(Service::Orders));
        let mut request = self.http.post(url).header("idempotency-key", key).json(&wish.body());
        if let Some(traceparent) = &wish.traceparent {
            request = request.header("traceparent", traceparent);
        }
        let Ok(answer) = request.send().await else { return PostAnswer::Unknown };
        let status = answer.status();
        let Ok(body) = answer.json::<Value>().await else { return PostAnswer::Unknown };
        match body["id"].as_str().and_then(|id| id.parse().ok()) {
            Some(order) if status.is_success() => PostAnswer::Accepted(order),
            _ => PostAnswer::Refused(status.as_u16()),
        }
    }

    /// The order as the API shows it; `None` while the service does not answer.
    pub async fn order(&self, order: Uuid) -> Option<Value> {
        let url = format!("{}/v1/orders/{order}", self.stack.url(Service::Orders));
        let answer = self.http.get(url).send().await.ok()?;
        answer.status().is_success().then_some(())?;
        answer.json().await.ok()
    }

    /// Cancels as a customer; returns the answer's status, 0 for none.
    pub async fn cancel(&self, order: Uuid) -> u16 {
        let url = format!("{}/v1/orders/{order}/cancel", self.stack.url(Service::Orders));
        self.http.post(url).json(&json!({})).send().await.map_or(0, |answer| answer.status().as_u16())
    }

    /// Waits until the order is confirmed or cancelled; returns its status, and why it was cancelled.
    pub async fn end_of(&self, order: Uuid) -> (String, Option<String>) {
        eventually(SETTLED_WITHIN, || async {
            let order = self.order(order).await?;
            let status = order["status"].as_str()?;
            let reason = order["reason"].as_str().map(str::to_owned);
            matches!(status, "confirmed" | "cancelled").then(|| (status.to_owned(), reason))
        })
        .await
    }

    /// The order's end, in short: `confirmed`, or why it was cancelled.
    pub async fn outcome(&self, order: Uuid) -> String {
        let (status, reason) = self.end_of(order).await;
        reason.unwrap_or(status)
    }

    /// The saga as its inspection shows it.
    ///
    /// # Panics
    /// When the inspection does not know the saga.
    pub async fn saga(&self, order: Uuid) -> Value {
        let url = self.admin(Service::Orders, &format!("/v1/sagas/{order}"));
        eventually(SETTLED_WITHIN, || async {
            let answer = self.http.get(&url).send().await.ok()?;
            answer.status().is_success().then_some(())?;
            answer.json().await.ok()
        })
        .await
    }

    /// Gives a stuck saga a fresh start, as an operator does that has inspected it.
    ///
    /// # Panics
    /// When the engine refuses that.
    pub async fn retries(&self, order: Uuid, reason: &str) {
        let seen = self.saga(order).await["revision"].clone();
        let retry = self.http.post(self.admin(Service::Orders, &format!("/v1/sagas/{order}/retry")));
        let answer = retry.json(&json!({ "reason": reason, "expected_revision": seen })).send().await;
        let answer = answer.expect("the admin listener answers");
        assert!(answer.status().is_success(), "{}: {:?}", answer.status(), answer.text().await);
        *self.expected().operator_actions.entry("retry-saga".to_owned()).or_default() += 1;
    }

    /// The pieces of an item: (on hand, reserved).
    pub async fn stock_of(&self, sku: &str) -> (i64, i64) {
        let url = format!("{}/v1/items/{sku}", self.stack.url(Service::Inventory));
        eventually(SETTLED_WITHIN, || async {
            let item: Value = self.http.get(&url).send().await.ok()?.json().await.ok()?;
            Some((item["on_hand"].as_i64()?, item["reserved"].as_i64()?))
        })
        .await
    }

    /// The gateway's movements for an order, in their order: `authorized 100`, `captured 100`, …
    ///
    /// # Panics
    /// When the gateway's database cannot be read.
    pub async fn at_gateway(&self, order: Uuid) -> Vec<String> {
        let facts = self.sources().read_databases().await.expect("the databases can be read");
        let name = order.to_string();
        let theirs: Vec<_> = facts.authorizations.iter().filter(|a| a.order == name).map(|a| &a.reference).collect();
        let movements = facts.movements.iter().filter(|m| theirs.contains(&&m.reference));
        movements.map(|movement| format!("{} {}", movement.kind, movement.amount)).collect()
    }

    /// How often the payment provider was asked under one key, at most, of the keys of an order's commands.
    pub async fn asked_under_one_key(&self, order: Uuid) -> i32 {
        let keys: Vec<String> =
            sqlx::query_scalar("select headers ->> 'ce_commandid' from outbox where topic = $1 and key = $2")
                .bind(PAYMENTS_COMMANDS.name)
                .bind(order.to_string())
                .fetch_all(&mut self.database("orders").await)
                .await
                .expect("the outbox can be read");
        sqlx::query_scalar("select coalesce(max(count), 0) from gateway_arrival where key = any($1)")
            .bind(keys)
            .fetch_one(&mut self.database("gateway").await)
            .await
            .expect("the arrivals can be read")
    }
}

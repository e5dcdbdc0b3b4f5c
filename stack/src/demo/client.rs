//! The calls of a customer, a clerk and an operator.

use super::totals::Totals;
use anyhow::{Context, bail};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use stack::{platform::Stack, service::Service};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long anything may take, on a busy machine too.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// The pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The platform's HTTP interfaces.
pub(crate) struct Client {
    http: reqwest::Client,
    orders: String,
    orders_admin: String,
    inventory: String,
    gateway: String,
    payments: String,
}

impl Client {
    /// A client of the processes of `stack`.
    pub(crate) fn new(stack: &Stack) -> Self {
        Self {
            http: reqwest::Client::new(),
            orders: stack.url(Service::Orders),
            orders_admin: stack.admin_url(Service::Orders),
            inventory: stack.url(Service::Inventory),
            gateway: stack.url(Service::Gateway),
            payments: stack.url(Service::Payments),
        }
    }

    fn request(&self, method: Method, url: String) -> RequestBuilder {
        self.http.request(method, url).timeout(WAIT_MAX)
    }

    async fn answer(request: RequestBuilder) -> anyhow::Result<(StatusCode, Value)> {
        let answer = request.send().await?;
        let (status, url) = (answer.status(), answer.url().clone());
        let text = answer.text().await?;
        let value = serde_json::from_str(&text).with_context(|| format!("{url} answered {status}: {text}"))?;
        Ok((status, value))
    }

    /// The answer to a request that has to succeed.
    async fn good(request: RequestBuilder) -> anyhow::Result<Value> {
        match Self::answer(request).await? {
            (status, value) if status.is_success() => Ok(value),
            (status, value) => bail!("answered {status}: {value}"),
        }
    }

    async fn get(&self, url: String) -> anyhow::Result<Value> {
        Self::good(self.request(Method::GET, url.clone())).await.with_context(|| format!("GET {url}"))
    }

    /// Creates an item with so many pieces.
    pub(crate) async fn add_item(&self, sku: &str, name: &str, cents: i64, pieces: i64) -> anyhow::Result<()> {
        let item = json!({ "sku": sku, "name": name, "unit_price": { "amount": cents, "currency": "EUR" } });
        self.post(format!("{}/v1/items", self.inventory), &item).await?;
        let delivery = json!({ "delta": pieces, "reason": "delivered for the demo" });
        self.post(format!("{}/v1/items/{sku}/adjustments", self.inventory), &delivery).await.map(drop)
    }

    async fn post(&self, url: String, body: &Value) -> anyhow::Result<Value> {
        let request = self.request(Method::POST, url.clone()).header("idempotency-key", Uuid::new_v4().to_string());
        Self::good(request.json(body)).await.with_context(|| format!("POST {url}"))
    }

    /// The items with their stock.
    pub(crate) async fn items(&self) -> anyhow::Result<Value> {
        self.get(format!("{}/v1/items?limit=100", self.inventory)).await
    }

    /// The provider's own ledger, summed up by the provider.
    pub(crate) async fn providers_books(&self) -> anyhow::Result<Totals> {
        let list = self.get(format!("{}/v1/ledger", self.gateway)).await?;
        let lines = list.as_array().with_context(|| format!("no list of totals: {list}"))?;
        // The demo sells in euros only; before the first payment there is no line of them.
        let Some(line) = lines.iter().find(|line| line["currency"] == "EUR") else { return Ok(Totals::default()) };
        let sum = |name: &str| line[name].as_i64().with_context(|| format!("totals without {name}: {line}"));
        let (authorized, captured) = (sum("authorized")?, sum("captured")?);
        Ok(Totals { authorized, captured, voided: sum("voided")?, refunded: sum("refunded")? })
    }

    /// payment-svc's ledger, summed up here from each payment's entries.
    pub(crate) async fn our_books(&self) -> anyhow::Result<Totals> {
        let payments = self.get(format!("{}/v1/payments?limit=200", self.payments)).await?;
        let mut totals = Totals::default();
        for payment in payments["items"].as_array().with_context(|| format!("no list of payments: {payments}"))? {
            let order = payment["order"].as_str().with_context(|| format!("a payment of no order: {payment}"))?;
            let ledger = self.get(format!("{}/v1/payments/{order}/ledger", self.payments)).await?;
            for entry in ledger["entries"].as_array().with_context(|| format!("no list of entries: {ledger}"))? {
                totals.enter(entry).with_context(|| format!("an entry of order {order}: {entry}"))?;
            }
        }
        Ok(totals)
    }

    /// Places an order. The request is repeated while order-svc has not heard of an item yet: its record is under way.
    pub(crate) async fn place(&self, customer: &str, items: &[(&str, i64)], method: &str) -> anyhow::Result<Uuid> {
        let items: Vec<Value> = items.iter().map(|(sku, n)| json!({ "sku": sku, "quantity": n })).collect();
        let order = json!({ "customer_id": customer, "items": items, "payment_method": method });
        let key = Uuid::new_v4().to_string();
        let start = Instant::now();
        loop {
            let request = self.request(Method::POST, format!("{}/v1/orders", self.orders));
            match Self::answer(request.header("idempotency-key", &key).json(&order)).await? {
                (status, answer) if status.is_success() => return id(&answer),
                (StatusCode::UNPROCESSABLE_ENTITY, _) if start.elapsed() < WAIT_MAX => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                (status, answer) => bail!("POST /v1/orders answered {status}: {answer}"),
            }
        }
    }

    /// Asks for the cancellation of an order.
    pub(crate) async fn cancel(&self, order: Uuid) -> anyhow::Result<()> {
        self.post(format!("{}/v1/orders/{order}/cancel", self.orders), &json!({})).await.map(drop)
    }

    /// An order as it is now.
    pub(crate) async fn order(&self, order: Uuid) -> anyhow::Result<Value> {
        self.get(format!("{}/v1/orders/{order}", self.orders)).await
    }

    /// The order once it is confirmed or cancelled.
    pub(crate) async fn settled(&self, order: Uuid) -> anyhow::Result<Value> {
        let start = Instant::now();
        loop {
            let now = self.order(order).await?;
            if matches!(now["status"].as_str(), Some("confirmed" | "cancelled")) {
                return Ok(now);
            }
            if start.elapsed() > WAIT_MAX {
                bail!("order {order} did not settle: {now}; its saga: {}", self.saga(order).await?);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// An order's saga with its timeline.
    pub(crate) async fn saga(&self, order: Uuid) -> anyhow::Result<Value> {
        self.get(format!("{}/v1/sagas/{order}", self.orders_admin)).await
    }

    /// Waits until every one of these sagas has ended: after the pivot an order is confirmed before its saga is done.
    pub(crate) async fn all_sagas_ended(&self, orders: &[Uuid]) -> anyhow::Result<()> {
        let start = Instant::now();
        for &order in orders {
            loop {
                let saga = self.saga(order).await?;
                match saga["status"].as_str() {
                    Some("completed" | "compensated") => break,
                    _ if start.elapsed() > WAIT_MAX => bail!("the saga of order {order} did not end: {saga}"),
                    _ => tokio::time::sleep(LOOK_EVERY).await,
                }
            }
        }
        Ok(())
    }
}

fn id(order: &Value) -> anyhow::Result<Uuid> {
    order["id"].as_str().and_then(|id| id.parse().ok()).with_context(|| format!("an order without an id: {order}"))
}

//! A shop of one test's own: its database, its orders, its API on a real port.

use contracts::{OrderId, money::Money, product::Quantity};
use order_svc::{
    api::{ApiState, router},
    app::NEEDS,
    domain::{PlacedOrder, PricedLine, StatusChange},
    live::nudging,
    migrations,
    orders::Orders,
    store,
};
use reqwest::{Client, RequestBuilder, Response};
use saga_core::{
    command::Outcome,
    consumer::{Coordinates, Message},
    envelope::{Envelope, Headers, SagaHeaders},
    id::MessageId,
    service,
    testkit::{TestDatabase, deliver, eventually},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use std::{net::SocketAddr, time::Duration};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Shop {
    pub(crate) db: TestDatabase,
    pub(crate) orders: Orders,
    pub(crate) addr: SocketAddr,
    pub(crate) client: Client,
    pub(crate) shutdown: CancellationToken,
    pub(crate) server: JoinHandle<Result<(), std::io::Error>>,
}

impl Shop {
    /// Opens a shop that sells `WIDGET-1` for 19.99 EUR, `GADGET-2` for 5.00 EUR and `TEAPOT-3` for 30.00 USD. It also
    /// sells two things that cannot be paid for: `GOLD-4` costs all the money there is, `AIR-5` nothing.
    pub(crate) async fn open() -> Self {
        let db = TestDatabase::new(&migrations::all()).await;
        let pool = db.pool.clone();
        Self::over(db, pool).await
    }

    /// Opens a shop whose requests have the rights alone that readiness asks for.
    pub(crate) async fn of_least_rights() -> Self {
        let db = TestDatabase::new(&migrations::all()).await;
        let pool = db.limited_to(NEEDS).await;
        Self::over(db, pool).await
    }

    async fn over(db: TestDatabase, pool: PgPool) -> Self {
        sqlx::query(
            "insert into catalogue (sku, name, unit_price, currency, sequence) values
                ('WIDGET-1', 'A widget', 1999, 'EUR', 1),
                ('GADGET-2', 'A gadget', 500, 'EUR', 1),
                ('TEAPOT-3', 'A teapot', 3000, 'USD', 1),
                ('GOLD-4', 'All the gold', 9223372036854775807, 'EUR', 1),
                ('AIR-5', 'Air', 0, 'EUR', 1)",
        )
        .execute(&db.pool)
        .await
        .unwrap();
        let orders = Orders::new(pool).unwrap();
        let shutdown = CancellationToken::new();
        let live = orders.live.clone();
        tokio::spawn({
            let shutdown = shutdown.clone();
            async move { live.run(shutdown).await }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = ApiState { orders: orders.clone(), shutdown: shutdown.clone() };
        let server = tokio::spawn(service::serve(listener, router(state), shutdown.clone()));
        let client = Client::builder().timeout(PATIENCE).build().unwrap();
        Self { db, orders, addr, client, shutdown, server }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) fn post_order(&self, key: &str, body: &Value) -> RequestBuilder {
        self.client.post(self.url("/v1/orders")).header("Idempotency-Key", key).json(body)
    }

    /// Places an order for two widgets and one gadget.
    pub(crate) async fn place(&self, key: &str) -> OrderId {
        let response = self.post_order(key, &basket()).send().await.unwrap();
        assert_eq!(response.status(), 202);
        id_of(&json_of(response).await)
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    pub(crate) async fn status(&self, order: OrderId) -> String {
        let order = json_of(self.get(&format!("/v1/orders/{order}")).await).await;
        order["status"].as_str().unwrap().to_owned()
    }

    /// How many rows there are in all tables that an order could have written to.
    pub(crate) async fn rows(&self) -> i64 {
        let tables: Vec<String> = sqlx::query_scalar(
            "select relname::text from pg_class
             where  relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition
             and    relname <> 'catalogue' and relname not like 'refinery_%'",
        )
        .fetch_all(&self.db.pool)
        .await
        .unwrap();
        assert!(tables.len() > 5, "{tables:?}");
        let counts: Vec<_> = tables.iter().map(|table| format!("(select count(*) from {table})")).collect();
        let sql = AssertSqlSafe(format!("select {}", counts.join(" + ")));
        sqlx::query_scalar(sql).fetch_one(&self.db.pool).await.unwrap()
    }

    pub(crate) async fn count(&self, from: &str) -> i64 {
        // A test may have cut the pool's connections a moment ago: the next one is another.
        eventually(PATIENCE, || async {
            let sql = AssertSqlSafe(format!("select count(*) from {from}"));
            sqlx::query_scalar(sql).fetch_one(&self.db.pool).await.ok()
        })
        .await
    }

    /// An order's statuses, in order.
    pub(crate) async fn history(&self, order: OrderId) -> Vec<String> {
        sqlx::query_scalar("select status from order_status_history where order_id = $1 order by sequence")
            .bind(order.0)
            .fetch_all(&self.db.pool)
            .await
            .unwrap()
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub(crate) fn basket() -> Value {
    json!({
        "customer_id": "customer-17",
        "items": [{ "sku": "WIDGET-1", "quantity": 2 }, { "sku": "GADGET-2", "quantity": 1 }],
        "payment_method": "tok_visa",
    })
}

pub(crate) async fn json_of(response: Response) -> Value {
    let text = response.text().await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"))
}

pub(crate) fn id_of(order: &Value) -> OrderId {
    OrderId(order["id"].as_str().expect("an order has an id").parse().unwrap())
}

/// Orders as the store writes them, without a saga: for tests that only read.
impl Shop {
    pub(crate) async fn write_order(&self, customer: &str) -> OrderId {
        let unit_price = Money { amount: 250, currency: "EUR".parse().unwrap() };
        let quantity = Quantity::try_from(2).unwrap();
        let order = PlacedOrder {
            id: OrderId(uuid::Uuid::now_v7()),
            customer: customer.parse().unwrap(),
            lines: vec![PricedLine { sku: "WIDGET-1".parse().unwrap(), quantity, unit_price }],
            total: unit_price.checked_mul(2).unwrap(),
            payment_method: "tok_visa".parse().unwrap(),
            placed_at: saga_core::clock::now(),
        };
        let mut tx = self.db.pool.begin().await.unwrap();
        store::insert_in(&mut tx, &order).await.unwrap();
        tx.commit().await.unwrap();
        order.id
    }

    pub(crate) async fn change(&self, order: OrderId, change: StatusChange) {
        let mut tx = self.db.pool.begin().await.unwrap();
        store::change_in(&mut tx, &[(order, change)], saga_core::clock::now()).await.unwrap();
        tx.commit().await.unwrap();
    }
}

/// Replies to the order saga, as the participants would give them.
impl Shop {
    /// The reply to the last command that was sent for an order.
    pub(crate) async fn reply(&self, order: OrderId, outcome: Outcome, payload: Value) -> Message {
        let (kind, headers): (String, sqlx::types::Json<Headers>) = sqlx::query_as(
            "select type, headers from outbox where key = $1 and topic like '%.commands' order by id desc limit 1",
        )
        .bind(order.to_string())
        .fetch_one(&self.db.pool)
        .await
        .unwrap();
        let command = SagaHeaders::read_from(&headers).unwrap().expect("a command names its saga");
        let mut envelope = Envelope::new(MessageId::new(), "payments", &format!("{kind}.reply"));
        envelope.saga = Some(SagaHeaders { reply_to: None, outcome: Some(outcome), ..command });
        let at = Coordinates { topic: "orders.replies".into(), partition: 0, offset: 0 };
        Message { envelope, key: Some(order.to_string().into()), payload: Some(payload.to_string().into()), at }
    }

    /// Handles a batch of replies as the consumer does.
    pub(crate) async fn deliver(&self, replies: &[Message]) {
        let handler = nudging(self.orders.engine.handler(), self.orders.live.clone());
        deliver(&self.db.pool, &handler, replies).await.unwrap();
    }

    /// Answers the last command that was sent for an order.
    pub(crate) async fn answer(&self, order: OrderId, outcome: Outcome, payload: Value) {
        let reply = self.reply(order, outcome, payload).await;
        self.deliver(&[reply]).await;
    }

    pub(crate) async fn saga_status(&self, order: OrderId) -> String {
        let status = sqlx::query_scalar("select status from saga where saga_id = $1").bind(order.0);
        status.fetch_one(&self.db.pool).await.unwrap()
    }
}

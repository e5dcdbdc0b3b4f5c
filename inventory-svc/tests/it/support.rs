//! A warehouse of one test's own: its database, its API on a real port, and commands as the saga sends them.

use contracts::{
    OrderId,
    product::{Line, Quantity},
};
use inventory_svc::{api, app::NEEDS, commands::Commands, migrations};
use reqwest::{Client, Method, RequestBuilder, Response};
use saga_core::{
    command::{Command, Op, Outcome},
    consumer::{Coordinates, Message},
    envelope::{Envelope, SagaHeaders},
    http::Api,
    id::{CommandId, MessageId, SagaId},
    service,
    testkit::{TestDatabase, deliver},
};
use serde_json::{Value, json};
use sqlx::{PgPool, Row};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) struct Warehouse {
    pub(crate) db: TestDatabase,
    pub(crate) client: Client,
    commands: Commands,
    url: String,
    stop: CancellationToken,
}

impl Drop for Warehouse {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A reply as it stands in the outbox.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reply {
    pub(crate) outcome: String,
    pub(crate) body: Value,
}

impl Warehouse {
    pub(crate) async fn open() -> Self {
        let db = TestDatabase::new(&migrations::all()).await;
        let pool = db.pool.clone();
        Self::over(db, pool).await
    }

    /// Opens a warehouse whose requests have the rights alone that readiness asks for.
    pub(crate) async fn of_least_rights() -> Self {
        let db = TestDatabase::new(&migrations::all()).await;
        let pool = db.limited_to(NEEDS).await;
        Self::over(db, pool).await
    }

    async fn over(db: TestDatabase, pool: PgPool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(service::serve(listener, Api::new(api::router(pool)), stop.clone()));
        Self { db, client: Client::new(), commands: Commands::new(), url, stop }
    }

    /// Opens a warehouse with so many pieces of each item.
    pub(crate) async fn stocked(pieces: &[(&str, i64)]) -> Self {
        let warehouse = Self::open().await;
        for (sku, on_hand) in pieces {
            let created = warehouse.create(&Uuid::now_v7().to_string(), &item(sku)).send().await.unwrap();
            assert_eq!(created.status(), 201);
            if *on_hand > 0 {
                let made =
                    warehouse.adjust(sku, &Uuid::now_v7().to_string(), &json!({"delta": on_hand, "reason": "first"}));
                assert_eq!(made.send().await.unwrap().status(), 201);
            }
        }
        warehouse
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub(crate) fn create(&self, key: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, "/v1/items").header("idempotency-key", key).json(body)
    }

    pub(crate) fn adjust(&self, sku: &str, key: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, &format!("/v1/items/{sku}/adjustments")).header("idempotency-key", key).json(body)
    }

    /// The pieces of an item on hand, and those reserved.
    pub(crate) async fn balance(&self, sku: &str) -> (i64, i64) {
        let row = sqlx::query("select on_hand, reserved from stock where sku = $1").bind(sku);
        let row = row.fetch_one(&self.db.pool).await.unwrap();
        (row.get("on_hand"), row.get("reserved"))
    }

    /// Handles `messages` as one batch of the consumer, and commits.
    pub(crate) async fn handle(&self, messages: &[Message]) {
        deliver(&self.db.pool, &self.commands, messages).await.unwrap();
    }

    /// Handles one command; returns the last reply to it.
    pub(crate) async fn send(&self, message: &Message) -> Reply {
        self.handle(std::slice::from_ref(message)).await;
        let command = message.envelope.saga.as_ref().unwrap().command;
        self.replies(command).await.pop().expect("every command is answered")
    }

    pub(crate) async fn replies(&self, command: CommandId) -> Vec<Reply> {
        let rows = sqlx::query(
            "select headers->>'ce_outcome' as outcome, payload
               from outbox
              where topic = 'orders.replies' and headers->>'ce_causationid' = $1
              order by id",
        )
        .bind(command.to_string())
        .fetch_all(&self.db.pool)
        .await
        .unwrap();
        let reply = |row: &sqlx::postgres::PgRow| Reply {
            outcome: row.get("outcome"),
            body: serde_json::from_slice(row.get("payload")).unwrap_or(Value::Null),
        };
        rows.iter().map(reply).collect()
    }

    /// The ledger explains every balance, and no item has fewer pieces than none.
    pub(crate) async fn books_balance(&self) {
        let wrong: i64 = sqlx::query_scalar(
            "select count(*)
               from stock s
               left join (select sku, sum(on_hand_delta) as on_hand, sum(reserved_delta) as reserved
                            from stock_movement
                           group by sku) m using (sku)
              where (s.on_hand, s.reserved) is distinct from (coalesce(m.on_hand, 0), coalesce(m.reserved, 0))",
        )
        .fetch_one(&self.db.pool)
        .await
        .unwrap();
        assert_eq!(wrong, 0, "balances that the ledger does not explain");
        let open: i64 = sqlx::query_scalar(
            "select count(*)
               from stock s
              where reserved <> (select coalesce(sum(quantity), 0)
                                   from reservation_line l
                                   join reservation r on r.id = l.reservation_id and r.status = 'reserved'
                                  where l.sku = s.sku)",
        )
        .fetch_one(&self.db.pool)
        .await
        .unwrap();
        assert_eq!(open, 0, "reserved pieces that belong to no open reservation");
    }
}

pub(crate) fn item(sku: &str) -> Value {
    json!({"sku": sku, "name": format!("The {sku}"), "unit_price": {"amount": 1999, "currency": "EUR"}})
}

pub(crate) fn lines(wanted: &[(&str, i64)]) -> Vec<Line> {
    let line = |(sku, pieces): &(&str, i64)| Line {
        sku: sku.parse().unwrap(),
        quantity: Quantity::try_from(*pieces).unwrap(),
    };
    wanted.iter().map(line).collect()
}

pub(crate) fn order() -> OrderId {
    OrderId(Uuid::now_v7())
}

/// A command as the saga of `order` sends it; a second call is a resend: a new message, the same command.
pub(crate) fn command<C: Command>(order: OrderId, step: &str, op: Op, command: &C) -> Message {
    let saga = SagaId(order.0);
    let mut envelope = Envelope::new(MessageId::new(), "orders", C::TYPE);
    envelope.saga = Some(SagaHeaders {
        saga,
        definition: "order".into(),
        version: 1,
        step: step.into(),
        op,
        occurrence: 0,
        command: CommandId::derive(saga, step, op, 0),
        attempt: 1,
        undoes: None,
        happened: None,
        orchestrator: None,
        reply_to: Some("orders.replies".into()),
        outcome: None::<Outcome>,
    });
    Message {
        envelope,
        key: Some(saga.to_string().into_bytes()),
        payload: Some(serde_json::to_vec(command).unwrap()),
        at: Coordinates { topic: C::TOPIC.name.into(), partition: 0, offset: 0 },
    }
}

/// The status, the problem's type and the fields that it names.
pub(crate) async fn problem(response: Response) -> (u16, String, Vec<String>) {
    let status = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/problem+json", "{status}");
    let body: Value = response.json().await.unwrap();
    let fields = body["errors"].as_array().cloned().unwrap_or_default();
    let fields = fields.iter().map(|error| error["field"].as_str().unwrap().to_owned()).collect();
    (status, body["type"].as_str().unwrap().to_owned(), fields)
}

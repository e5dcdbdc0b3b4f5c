//! A payment service and its provider, each with a database of its own.

use contracts::{
    OrderId,
    money::Money,
    payments::{AuthorizePayment, CapturePayment, RefundPayment, VoidPayment},
};
use payment_svc::{
    effects,
    gateway::{Guarded, HttpGateway, breaker::BreakerConfig},
    migrations,
    sim::{self, Behaviour},
    store,
};
use saga_core::{
    command::{Command, Happened, Op, Outcome},
    consumer::{Coordinates, Message},
    envelope::{Envelope, Headers, SagaHeaders},
    id::{CommandId, MessageId, SagaId},
    participant::{IntentConfig, Intents, Participant},
    service::{self, config::Secret},
    testkit::{TestDatabase, deliver, unique},
};
use serde_json::Value;
use sqlx::PgPool;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How long a test waits for an event that must come.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// The provider: its server, on a free port, and its books.
pub(crate) struct Provider {
    pub(crate) database: TestDatabase,
    pub(crate) addr: SocketAddr,
}

impl Provider {
    pub(crate) async fn new(behaviour: Behaviour) -> Self {
        Self::with_token(behaviour, None).await
    }

    /// A gateway that lets in callers that show the token.
    pub(crate) async fn with_token(behaviour: Behaviour, token: Option<Secret>) -> Self {
        let database = TestDatabase::new(&[migrations::gateway()]).await;
        let pool = database.pool.clone();
        Self::over(database, pool, behaviour, token).await
    }

    /// A gateway whose requests have the rights alone that readiness asks for.
    pub(crate) async fn of_least_rights() -> Self {
        let database = TestDatabase::new(&[migrations::gateway()]).await;
        let pool = database.limited_to(sim::NEEDS).await;
        Self::over(database, pool, Behaviour::default(), None).await
    }

    async fn over(database: TestDatabase, pool: PgPool, behaviour: Behaviour, token: Option<Secret>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let api = sim::api(pool, behaviour, token.as_ref());
        tokio::spawn(service::serve(listener, api, CancellationToken::new()));
        Self { database, addr }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        reqwest::get(self.url(path)).await.unwrap().json().await.unwrap()
    }

    /// The sums of all euros: (authorized, held, captured, voided, refunded).
    pub(crate) async fn totals(&self) -> [i64; 5] {
        let ledger = self.get("/v1/ledger").await;
        let Some(euros) = ledger.as_array().unwrap().iter().find(|totals| totals["currency"] == "EUR") else {
            return [0; 5];
        };
        ["authorized", "held", "captured", "voided", "refunded"].map(|name| euros[name].as_i64().unwrap())
    }
}

pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) provider: Provider,
    pub(crate) name: &'static str,
    pub(crate) participant: Arc<Participant>,
    /// The most calls of one intent: more than are ever needed, unless giving up is what a test is about. On a busy
    /// machine some calls take longer than they may.
    attempts: u32,
    /// How long one call may take.
    patience: Duration,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Behaviour::default()).await
    }

    /// A service that soon gives up a provider that is slow, or has no good answer.
    pub(crate) async fn impatient() -> Self {
        let slow = Behaviour { slow: Duration::from_millis(700), ..Behaviour::default() };
        Self { attempts: 4, ..Self::with(slow).await }
    }

    /// A service that waits for answers that take long.
    pub(crate) async fn patient() -> Self {
        Self::waiting(Behaviour::default(), DEADLINE).await
    }

    /// A service that waits for answers that take long, and asks twice.
    pub(crate) async fn asking_twice() -> Self {
        Self { attempts: 2, ..Self::patient().await }
    }

    pub(crate) async fn with(behaviour: Behaviour) -> Self {
        Self::waiting(behaviour, Duration::from_millis(400)).await
    }

    async fn waiting(behaviour: Behaviour, patience: Duration) -> Self {
        Self::before(Provider::new(behaviour).await, patience).await
    }

    /// A service before this provider, which it shows no token.
    pub(crate) async fn before(provider: Provider, patience: Duration) -> Self {
        let database = TestDatabase::new(&migrations::all()).await;
        let http = HttpGateway::new(&provider.url("/").parse().unwrap(), patience).unwrap();
        // The breaker never opens: its behaviour is tested apart.
        let breaker = BreakerConfig { payments: usize::MAX, ..BreakerConfig::default() };
        let name = unique("payments").leak();
        let guarded = Arc::new(Guarded::new(http, breaker));
        let participant = Arc::new(effects::participant(name, guarded, database.pool.clone()));
        Self { database, provider, name, participant, attempts: 100, patience }
    }

    /// The service's next process, which shows the provider this token.
    pub(crate) fn showing(self, token: &Secret) -> Self {
        let http = HttpGateway::new(&self.provider.url("/").parse().unwrap(), self.patience).unwrap();
        let guarded = Guarded::new(http.with_token(token).unwrap(), BreakerConfig::default());
        let participant = effects::participant(self.name, Arc::new(guarded), self.database.pool.clone());
        Self { participant: Arc::new(participant), ..self }
    }

    /// Delivers messages in one batch, as the consumer would.
    pub(crate) async fn deliver(&self, messages: &[Message]) {
        deliver(&self.database.pool, &*self.participant, messages).await.unwrap();
    }

    pub(crate) fn executor(&self) -> Intents {
        self.participant.intents(self.database.pool.clone()).with_config(IntentConfig {
            max_attempts: self.attempts,
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(400),
            call_timeout: self.patience + Duration::from_millis(100),
            claim_margin: Duration::from_millis(100),
            poll: Duration::from_millis(20),
            ..IntentConfig::default()
        })
    }

    /// Runs an executor until no intent is left to be executed.
    pub(crate) async fn settle(&self) {
        let (executor, token) = (self.executor(), CancellationToken::new());
        let running = tokio::spawn({
            let token = token.clone();
            async move { executor.run(token).await }
        });
        saga_core::testkit::eventually(DEADLINE, async || (self.open_intents().await == 0).then_some(())).await;
        token.cancel();
        running.await.unwrap();
    }

    /// Deletes the participant's record of an order's commands.
    pub(crate) async fn lose_fences(&self, order: OrderId) {
        for sql in
            ["delete from participant_intent where saga_id = $1", "delete from participant_fence where saga_id = $1"]
        {
            sqlx::query(sql).bind(order.0).execute(&self.database.pool).await.unwrap();
        }
    }

    pub(crate) async fn open_intents(&self) -> i64 {
        sqlx::query_scalar("select count(*) from participant_intent where state <> 'in_doubt'")
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn do_and_settle<C: Command>(
        &self,
        order: OrderId,
        step: &str,
        op: Op,
        command: &C,
    ) -> (Outcome, Value) {
        self.deliver(&[message(order, step, op, command)]).await;
        self.settle().await;
        self.replies(order).await.pop().unwrap()
    }

    pub(crate) async fn replies(&self, order: OrderId) -> Vec<(Outcome, Value)> {
        let rows: Vec<(Value, Vec<u8>)> = sqlx::query_as(
            "select headers, payload from outbox where key = $1 and topic = 'orders.replies' order by id",
        )
        .bind(order.to_string())
        .fetch_all(&self.database.pool)
        .await
        .unwrap();
        rows.into_iter()
            .map(|(headers, payload)| {
                let outcome = headers["ce_outcome"].as_str().unwrap().parse().unwrap();
                (outcome, serde_json::from_slice(&payload).unwrap())
            })
            .collect()
    }

    pub(crate) async fn outcomes(&self, order: OrderId) -> Vec<Outcome> {
        self.replies(order).await.into_iter().map(|(outcome, _)| outcome).collect()
    }

    pub(crate) async fn status(&self, order: OrderId) -> &'static str {
        store::find(&self.database.pool, order).await.unwrap().unwrap().payment.status.name()
    }

    /// Checks that the service's ledger explains its balances, and agrees with the provider's.
    pub(crate) async fn books_agree(&self) {
        assert_eq!(store::imbalances(&self.database.pool).await.unwrap(), []);
        let sums: Vec<(String, i64)> = sqlx::query_as(
            "select movement, sum(amount)::int8 from ledger_entry where amount > 0 and currency = 'EUR' group by movement",
        )
        .fetch_all(&self.database.pool)
        .await
        .unwrap();
        let sum = |movement: &str| sums.iter().find(|(name, _)| name == movement).map_or(0, |(_, sum)| *sum);
        let [authorized, held, captured, voided, refunded] = self.provider.totals().await;
        assert_eq!(
            [sum("authorize"), sum("capture"), sum("void"), sum("refund")],
            [authorized, captured, voided, refunded],
            "authorized, captured, voided, refunded: here and at the provider"
        );
        assert_eq!(held, authorized - captured - voided);
    }
}

pub(crate) fn new_order() -> OrderId {
    OrderId(Uuid::now_v7())
}

pub(crate) fn euros(amount: i64) -> Money {
    Money { amount, currency: "EUR".parse().unwrap() }
}

pub(crate) fn authorize(order: OrderId, method: &str) -> AuthorizePayment {
    AuthorizePayment { order, customer: "alice".into(), amount: euros(1_000), method: method.into() }
}

pub(crate) fn void(order: OrderId) -> VoidPayment {
    VoidPayment { order }
}

pub(crate) fn capture(order: OrderId) -> CapturePayment {
    CapturePayment { order, amount: euros(1_000) }
}

pub(crate) fn refund(order: OrderId, amount: i64) -> RefundPayment {
    RefundPayment { order, amount: euros(amount) }
}

pub(crate) fn message<C: Command>(order: OrderId, step: &str, op: Op, command: &C) -> Message {
    let saga = SagaId(order.0);
    let headers = SagaHeaders {
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
        outcome: None,
    };
    Message {
        envelope: Envelope {
            id: MessageId::new(),
            source: "orders".into(),
            kind: C::TYPE.into(),
            subject: None,
            time: None,
            sequence: None,
            content_type: None,
            traceparent: None,
            tracestate: None,
            saga: Some(headers),
            other: Headers::new(),
        },
        key: Some(saga.to_string().into_bytes()),
        payload: Some(serde_json::to_vec(command).unwrap()),
        at: Coordinates { topic: C::TOPIC.name.into(), partition: 0, offset: 0 },
    }
}

pub(crate) fn do_authorize(order: OrderId, method: &str) -> Message {
    message(order, "authorize-payment", Op::Do, &authorize(order, method))
}

pub(crate) fn undo_authorize(order: OrderId) -> Message {
    message(order, "authorize-payment", Op::Undo, &void(order))
}

/// The undo of an orchestrator that sends what it knows.
pub(crate) fn undo_knowing(order: OrderId, happened: Happened) -> Message {
    let mut message = undo_authorize(order);
    if let Some(headers) = &mut message.envelope.saga {
        headers.happened = Some(happened);
        headers.undoes = Some(CommandId::derive(headers.saga, &headers.step, Op::Do, 0));
    }
    message
}

pub(crate) fn do_capture(order: OrderId) -> Message {
    message(order, "capture-payment", Op::Do, &capture(order))
}

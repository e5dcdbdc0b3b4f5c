//! An order-like saga on a real database; the test plays the participants.

use async_trait::async_trait;
use saga_core::{
    command::{Command, Done, Never, Op, Outcome},
    consumer::{Coordinates, HandleError, Message},
    envelope::{Envelope, Headers, SagaHeaders},
    id::{CommandId, MessageId, SagaId},
    outbox::Tx,
    saga::{Cancelled, Engine, EngineBuilder, Happened, LocalCall, LocalEffect, LocalError, RetryPolicy, Saga, saga},
    service::{messaging_migrations, saga_migrations},
    testkit::{self, TestDatabase, deliver, unique},
    topic::Topic,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};

static COMMANDS: Topic = Topic::events("commands", 1);

macro_rules! command {
    ($name:ident, $kind:literal, $reply:ty, $rejection:ty) => {
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        pub(crate) struct $name {
            pub(crate) order: u32,
            pub(crate) with: Option<String>,
        }
        impl Command for $name {
            const TYPE: &'static str = $kind;
            const TOPIC: &'static Topic = &COMMANDS;
            type Reply = $reply;
            type Rejection = $rejection;
        }
    };
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ref {
    pub(crate) reference: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct No {
    pub(crate) why: String,
}

command!(Authorize, "pay.authorize.v1", Ref, No);
command!(Void, "pay.void.v1", Done, Never);
command!(Reserve, "stock.reserve.v1", Ref, No);
command!(Release, "stock.release.v1", Done, Never);
command!(Capture, "pay.capture.v1", Ref, No);
command!(Ship, "stock.ship.v1", Done, Never);

/// A command that nests as deep as it is asked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Deep {
    pub(crate) more: Value,
}
impl Command for Deep {
    const TYPE: &'static str = "test.deep.v1";
    const TOPIC: &'static Topic = &COMMANDS;
    type Reply = Done;
    type Rejection = Never;
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) order: u32,
}

pub(crate) const SOON: Duration = Duration::from_secs(40);

pub(crate) fn order_saga(version: u32) -> Saga<Order> {
    let twice = RetryPolicy::exponential(2, Duration::from_millis(10), Duration::from_secs(1));
    saga::<Order>("order", version)
        .local_retry(twice)
        .local_with_undo("open order", "cancel order")
        .step("authorize", |order, ()| Authorize { order: order.order, with: None })
        .retry(twice)
        .undo_retry(twice)
        .undo(|order, (), happened| Void { order: order.order, with: Some(what_happened(&happened)) })
        .step("reserve", |order, (payment,)| Reserve { order: order.order, with: Some(payment.reference.clone()) })
        .retry(twice)
        .undo_retry(twice)
        .undo(|order, (_payment,), happened| Release { order: order.order, with: Some(what_happened(&happened)) })
        .pivot("capture", |order, (payment, _stock)| Capture {
            order: order.order,
            with: Some(payment.reference.clone()),
        })
        .retry(twice)
        .local("confirm order")
        .then("ship", |order, (_payment, stock, _capture)| Ship {
            order: order.order,
            with: Some(stock.reference.clone()),
        })
        .retry(twice)
        .build()
}

pub(crate) fn what_happened(happened: &Happened<&Ref>) -> String {
    match happened {
        Happened::Yes(reply) => format!("undo {}", reply.reference),
        Happened::InDoubt => "in doubt".into(),
    }
}

/// An effect that writes a row with its name; it fails for orders that ask for that, after writing.
pub(crate) struct Note;

#[async_trait]
impl LocalEffect for Note {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        sqlx::query("insert into note (saga_id, effect, failure) values ($1, $2, $3)")
            .bind(call.saga.0)
            .bind(call.name)
            .bind(call.failure.map(|failure| serde_json::to_value(failure).unwrap()))
            .execute(&mut **tx)
            .await?;
        let panics: Option<bool> = sqlx::query_scalar("select panics from broken where effect = $1 and saga_id = $2")
            .bind(call.name)
            .bind(call.saga.0)
            .fetch_optional(&mut **tx)
            .await?;
        assert_ne!(panics, Some(true), "a mistake in the effect");
        if panics == Some(false) {
            // An error of the database spoils the transaction up to the savepoint.
            sqlx::query("select 1 / 0").execute(&mut **tx).await?;
        }
        Ok(())
    }
}

/// A command as it stands in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) saga: SagaId,
    pub(crate) kind: String,
    pub(crate) step: String,
    pub(crate) op: Op,
    pub(crate) command: CommandId,
    pub(crate) attempt: u32,
    pub(crate) with: Option<String>,
}

pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) engine: Arc<Engine>,
    pub(crate) reply_topic: String,
}

pub(crate) fn engine_of(database: &TestDatabase, reply_topic: &str, version: u32) -> Arc<Engine> {
    builder_of(database.pool.clone(), reply_topic, version).build().unwrap()
}

pub(crate) fn builder_of(pool: PgPool, reply_topic: &str, version: u32) -> EngineBuilder {
    Engine::builder(pool, reply_topic)
        .define(&order_saga(version))
        .local("open order", Note)
        .local("cancel order", Note)
        .local("confirm order", Note)
}

impl World {
    pub(crate) async fn new() -> Self {
        let database = TestDatabase::new(&[messaging_migrations(), saga_migrations()]).await;
        for table in [
            "create table note (saga_id uuid, effect text, failure jsonb)",
            "create table broken (effect text, saga_id uuid, panics boolean)",
        ] {
            sqlx::query(table).execute(&database.pool).await.unwrap();
        }
        let reply_topic = unique("replies");
        let engine = engine_of(&database, &reply_topic, 1);
        Self { database, engine, reply_topic }
    }

    pub(crate) async fn start(&self, number: u32) -> SagaId {
        let id = SagaId::new();
        let mut tx = self.database.pool.begin().await.unwrap();
        let order = Order { order: number };
        self.engine.start_in(&mut tx, id, &order_saga(1), &order, &number.to_string()).await.unwrap();
        tx.commit().await.unwrap();
        id
    }

    /// All commands of a saga, oldest first.
    pub(crate) async fn sent(&self, saga: SagaId) -> Vec<Sent> {
        let rows: Vec<(String, Value, Vec<u8>)> =
            sqlx::query_as("select type, headers, payload from outbox where key = $1 order by id")
                .bind(saga.to_string())
                .fetch_all(&self.database.pool)
                .await
                .unwrap();
        let text = |headers: &Value, name: &str| headers[name].as_str().unwrap().to_owned();
        rows.into_iter()
            .map(|(kind, headers, payload)| Sent {
                saga,
                kind,
                step: text(&headers, "ce_sagastep"),
                op: text(&headers, "ce_sagaop").parse().unwrap(),
                command: text(&headers, "ce_commandid").parse().unwrap(),
                attempt: text(&headers, "ce_attempt").parse().unwrap(),
                with: serde_json::from_slice::<Value>(&payload).unwrap()["with"].as_str().map(str::to_owned),
            })
            .collect()
    }

    pub(crate) async fn last(&self, saga: SagaId) -> Sent {
        self.sent(saga).await.pop().unwrap()
    }

    /// The steps of the commands sent so far, `name` for a do and `-name` for an undo, with the attempt when resent.
    pub(crate) async fn trail(&self, saga: SagaId) -> Vec<String> {
        let name = |sent: Sent| {
            let sign = if sent.op == Op::Undo { "-" } else { "" };
            let attempt = if sent.attempt > 1 { format!(" #{}", sent.attempt) } else { String::new() };
            format!("{sign}{}{attempt}", sent.step)
        };
        self.sent(saga).await.into_iter().map(name).collect()
    }

    pub(crate) async fn try_deliver(&self, replies: &[Message]) -> Result<(), HandleError> {
        deliver(&self.database.pool, &self.engine.handler(), replies).await
    }

    pub(crate) async fn deliver(&self, replies: &[Message]) {
        self.try_deliver(replies).await.unwrap();
    }

    /// Answers the last command of a saga with success.
    pub(crate) async fn succeed(&self, saga: SagaId) {
        let sent = self.last(saga).await;
        self.deliver(&[succeeded(&sent)]).await;
    }

    pub(crate) async fn status(&self, saga: SagaId) -> String {
        sqlx::query_scalar("select status from saga where saga_id = $1")
            .bind(saga.0)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn revision(&self, saga: SagaId) -> i32 {
        sqlx::query_scalar("select revision from saga where saga_id = $1")
            .bind(saga.0)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn kinds(&self, saga: SagaId) -> Vec<String> {
        sqlx::query_scalar("select kind from saga_event where saga_id = $1 order by revision")
            .bind(saga.0)
            .fetch_all(&self.database.pool)
            .await
            .unwrap()
    }

    pub(crate) async fn notes(&self, saga: SagaId) -> Vec<(String, Option<Value>)> {
        sqlx::query_as("select effect, failure from note where saga_id = $1")
            .bind(saga.0)
            .fetch_all(&self.database.pool)
            .await
            .unwrap()
    }

    /// Breaks an effect of a saga, with an error or a panic.
    pub(crate) async fn break_effect(&self, effect: &str, saga: SagaId, panics: bool) {
        sqlx::query("insert into broken values ($1, $2, $3)")
            .bind(effect)
            .bind(saga.0)
            .bind(panics)
            .execute(&self.database.pool)
            .await
            .unwrap();
    }

    pub(crate) async fn mend(&self) {
        sqlx::query("delete from broken").execute(&self.database.pool).await.unwrap();
    }

    pub(crate) async fn cancel(&self, saga: SagaId) -> Cancelled {
        self.cancel_with(&self.engine, saga).await
    }

    pub(crate) async fn cancel_with(&self, engine: &Engine, saga: SagaId) -> Cancelled {
        let mut tx = self.database.pool.begin().await.unwrap();
        let cancelled = engine.cancel_in(&mut tx, saga, "changed my mind").await.unwrap();
        tx.commit().await.unwrap();
        cancelled
    }

    /// Lets the open wait of every saga be over, without waiting.
    pub(crate) async fn time_passes(&self) {
        testkit::time_passes(&self.database.pool).await;
    }

    /// Lets the open waits be over, and runs the timers.
    pub(crate) async fn time_out(&self) -> usize {
        self.time_passes().await;
        self.engine.tick().await.unwrap().due
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.database.pool).await.unwrap()
    }

    /// Checks the conditions that hold in every database at any time.
    pub(crate) async fn audit(&self) {
        for (what, sql) in [
            (
                "every saga that has not ended is in saga_due, and no other",
                "select count(*) from saga s full join saga_due d using (saga_id)
                  where (s.finished_at is null) is distinct from (d.saga_id is not null)",
            ),
            (
                "saga_due never says later than the state",
                "select count(*) from saga s join saga_due d using (saga_id)
                  where s.status <> d.status or s.armed_at is distinct from d.due_at
                     or d.due_at > to_timestamp((s.state #>> '{status,open,due}')::numeric / 1000)",
            ),
            (
                "the log has one row per revision",
                "select count(*) from saga s
                  where s.revision <> (select count(*) from saga_event e where e.saga_id = s.saga_id)",
            ),
        ] {
            assert_eq!(self.count(sql).await, 0, "{what}");
        }
    }
}

pub(crate) fn reply(sent: &Sent, outcome: Outcome, payload: &Value) -> Message {
    let saga = SagaHeaders {
        saga: sent.saga,
        definition: "order".into(),
        version: 1,
        step: sent.step.clone(),
        op: sent.op,
        occurrence: 0,
        command: sent.command,
        attempt: sent.attempt,
        undoes: None,
        happened: None,
        orchestrator: None,
        reply_to: None,
        outcome: Some(outcome),
    };
    let envelope = Envelope {
        id: MessageId::new(),
        source: "test".into(),
        kind: format!("{}.reply", sent.kind),
        subject: None,
        time: None,
        sequence: None,
        content_type: None,
        traceparent: None,
        tracestate: None,
        saga: Some(saga),
        other: Headers::new(),
    };
    Message {
        envelope,
        key: Some(sent.saga.to_string().into_bytes()),
        payload: Some(payload.to_string().into_bytes()),
        at: Coordinates { topic: "replies".into(), partition: 0, offset: 0 },
    }
}

pub(crate) fn succeeded(sent: &Sent) -> Message {
    let payload = if sent.op == Op::Undo || sent.step == "ship" {
        json!({})
    } else {
        json!({ "reference": format!("{} 1", sent.step) })
    };
    reply(sent, Outcome::Succeeded, &payload)
}

pub(crate) fn rejected(sent: &Sent) -> Message {
    reply(sent, Outcome::Rejected, &json!({ "why": "no" }))
}

pub(crate) fn failed(sent: &Sent) -> Message {
    reply(sent, Outcome::Failed, &json!({ "error": "not today" }))
}

//! A database with an outbox, a topic, and relays on them.
#![allow(dead_code, unreachable_pub, clippy::missing_panics_doc)]

use outbox_relay::{OutboxSettings, Relay, Settings, admin};
use saga_core::{
    service::{Role, messaging_migrations},
    testkit::{Record, TestDatabase, TestTopic, brokers, eventually, read_to_end},
};
use serde_json::Value;
use sqlx::{PgPool, postgres::PgConnectOptions};
use std::{str::FromStr, time::Duration};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

pub const PATIENCE: Duration = Duration::from_secs(60);
/// Short, so that a fail-over does not take long.
pub const LEASE: Duration = Duration::from_secs(2);

pub struct World {
    pub database: TestDatabase,
    pub topic: TestTopic,
    pub name: String,
}

impl World {
    pub async fn new() -> Self {
        Self::with_partitions(3).await
    }

    pub async fn with_partitions(partitions: i32) -> Self {
        // `RUST_LOG` shows what the relay says.
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init()
            .ok();
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let topic = TestTopic::create("relay", partitions).await;
        Self { database, topic, name: "orders".to_owned() }
    }

    pub fn db(&self) -> &PgPool {
        &self.database.pool
    }

    pub fn settings(&self) -> Settings {
        let database = PgConnectOptions::from_str(&self.database.url).expect("the test's own URL");
        let outbox = OutboxSettings { name: self.name.clone(), database };
        Settings { lease: LEASE, reading: LEASE, ..Settings::new(brokers(), vec![outbox]) }
    }

    pub fn relay(&self) -> Running {
        Running::start(&self.settings())
    }

    /// Appends one row in a transaction of its own.
    pub async fn append(&self, key: &str, payload: &str) -> i64 {
        append(self.db(), &self.topic, key, payload).await
    }

    /// What the topic holds, once it holds `count` distinct ids.
    pub async fn published(&self, count: usize) -> Vec<Record> {
        published(&self.topic, count).await
    }

    pub async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(self.db()).await.expect("the count can be taken")
    }
}

pub async fn append<'e>(db: impl sqlx::PgExecutor<'e>, topic: &str, key: &str, payload: &str) -> i64 {
    sqlx::query_scalar(
        "insert into outbox (message_id, topic, key, type, payload)
         values (outbox_message_id(), $1, $2, 'test.v1', convert_to($3, 'UTF8'))
         returning id",
    )
    .bind(topic)
    .bind(key)
    .bind(payload)
    .fetch_one(db)
    .await
    .expect("the row can be appended")
}

pub async fn published(topic: &str, count: usize) -> Vec<Record> {
    eventually(PATIENCE, || async {
        let records = read_to_end(topic).await;
        let mut ids = ids(&records);
        ids.sort_unstable();
        ids.dedup();
        (ids.len() >= count).then_some(records)
    })
    .await
}

/// The outbox ids of the records, in their order.
pub fn ids(records: &[Record]) -> Vec<i64> {
    records
        .iter()
        .map(|record| record.header("ce_sequence").expect("every record has it").parse().expect("a number"))
        .collect()
}

/// Payloads of one key, each at its first occurrence.
pub fn payloads(records: &[Record], key: &str) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    records
        .iter()
        .filter(|record| record.key.as_deref() == Some(key.as_bytes()))
        .filter(|record| seen.insert(record.header("ce_id")))
        .map(|record| String::from_utf8(record.value.clone().unwrap_or_default()).expect("text"))
        .collect()
}

/// Calls an admin endpoint of `relay` as an operator.
pub async fn call(relay: &Relay, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let router = admin::routes(relay).layer(axum::Extension(Role::Operator));
    let request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    let body = body.map_or_else(axum::body::Body::empty, |body| body.to_string().into());
    let answer = tokio::time::timeout(PATIENCE, router.oneshot(request.body(body).unwrap()));
    let response = answer.await.expect("it answers").unwrap();
    let status = response.status().as_u16();
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

/// A relay in this process.
pub struct Running {
    pub stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(settings: &Settings) -> Self {
        Self::of(Relay::new(settings).expect("the settings are good"))
    }

    /// Runs a relay that the test goes on to ask.
    pub fn of(relay: Relay) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { relay.run(stop).await }
        });
        Self { stop, task: Some(task) }
    }

    /// Stops it as a SIGTERM would.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let task = self.task.take().expect("stopped once");
        tokio::time::timeout(PATIENCE, task).await.expect("it stops in time").expect("it does not panic");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

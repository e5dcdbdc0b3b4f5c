//! A database with an outbox, a topic, and relays on them.
#![allow(dead_code, unreachable_pub, clippy::missing_panics_doc)]

use outbox_relay::{OutboxSettings, Relay, RelaySettings, admin};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
};
use saga_core::{
    http::Role,
    service::messaging_migrations,
    testkit::{
        Record, TestDatabase, TestTopic, brokers, count_to_end, eventually, map_to_end, read_to_end, size, unique,
    },
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool, postgres::PgConnectOptions};
use std::{
    collections::HashSet,
    str::FromStr,
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

pub const PATIENCE: Duration = Duration::from_secs(60);
/// The lease of the tests: short, so that a fail-over does not take long.
pub const LEASE: Duration = Duration::from_secs(2);

pub struct World {
    pub database: TestDatabase,
    pub topic: TestTopic,
    pub name: String,
    /// The role that relays connect as; `None`: the owner.
    pub role: Option<String>,
}

/// The password of such a role, where the server asks for one.
const PASSWORD: &str = "of-a-test";

impl World {
    pub async fn new() -> Self {
        Self::with_partitions(3).await
    }

    pub async fn with_partitions(partitions: i32) -> Self {
        // `RUST_LOG` shows the relay's log.
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init()
            .ok();
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let topic = TestTopic::create("relay", partitions).await;
        Self { database, topic, name: "orders".to_owned(), role: None }
    }

    /// A world whose relays have a role with nothing but the rights that a relay needs. It lacks even the rights that
    /// every role has by default.
    pub async fn of_least_rights() -> Self {
        let world = Self::new().await;
        let role = unique("relay").replace(['-', '.'], "_");
        let make = format!(
            "revoke all on schema public from public; revoke all on all routines in schema public from public;
             create role {role} login password '{PASSWORD}'; select outbox_grant('{role}')"
        );
        sqlx::raw_sql(AssertSqlSafe(make)).execute(world.db()).await.expect("the role can be made");
        Self { role: Some(role), ..world }
    }

    /// Drops the role: roles are the server's, and outlive a test's database.
    pub async fn drop_role(&self) {
        let Some(role) = &self.role else { return };
        let drop = format!("drop owned by {role}; drop role {role}");
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(self.db()).await.expect("the role can be dropped");
    }

    /// The settings with a lease that a busy machine does not lose, and as much time to read as a relay has.
    pub fn unhurried(&self) -> RelaySettings {
        let settings = self.settings();
        RelaySettings { lease: Duration::from_secs(20), ..RelaySettings::new(brokers(), settings.outboxes) }
    }

    pub fn db(&self) -> &PgPool {
        &self.database.pool
    }

    pub fn settings(&self) -> RelaySettings {
        let mut database = PgConnectOptions::from_str(&self.database.url).expect("the test's own URL");
        if let Some(role) = &self.role {
            database = database.username(role).password(PASSWORD);
        }
        let outbox = OutboxSettings { name: self.name.clone(), database };
        RelaySettings { lease: LEASE, reading: LEASE, ..RelaySettings::new(brokers(), vec![outbox]) }
    }

    pub fn relay(&self) -> Running {
        Running::start(&self.settings())
    }

    /// Appends one row in a transaction of its own.
    pub async fn append(&self, key: &str, payload: &str) -> i64 {
        append(self.db(), &self.topic, key, payload).await
    }

    /// The topic's records, once it holds `count` distinct ids.
    pub async fn published(&self, count: usize) -> Vec<Record> {
        published(&self.topic, count).await
    }

    pub async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(self.db()).await.expect("the count can be taken")
    }

    /// Waits until `sql` counts `count`.
    pub async fn counts(&self, sql: &'static str, count: i64) {
        eventually(patience(), || async { (self.count(sql).await == count).then_some(()) }).await;
    }

    /// How many rows the batch log has recorded.
    pub async fn recorded(&self) -> i64 {
        self.count(RECORDED).await
    }

    /// Waits until so many rows are parked.
    pub async fn parked(&self, rows: i64) {
        self.counts("select count(*) from outbox_parked where status = 'parked'", rows).await;
    }

    /// Calls an admin endpoint as an operator, of a replica that does not publish.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        call(&Relay::new(&self.settings()).expect("the settings are good"), method, path, body).await
    }
}

/// The number of rows that the batch log has recorded.
pub const RECORDED: &str = "select coalesce(sum(rows), 0)::bigint from outbox_batch";

/// The longest wait, where the sizes are those of `make soak`.
pub fn patience() -> Duration {
    PATIENCE * u32::try_from(size(1, 20)).expect("it is small")
}

/// Rows that one statement appends, with payloads that begin with 1 and so on, of seven keys.
pub struct Rows<'a> {
    topic: &'a str,
    rows: usize,
    rare: Option<(&'a str, usize)>,
    bytes: usize,
}

impl<'a> Rows<'a> {
    pub fn of(topic: &'a str, rows: usize) -> Self {
        Self { topic, rows, rare: None, bytes: 0 }
    }

    /// Makes each `every`th row one of the topic `rare` instead.
    pub fn each(self, every: usize, rare: &'a str) -> Self {
        Self { rare: Some((rare, every)), ..self }
    }

    /// Makes the payloads longer by so many bytes.
    pub fn of_bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    pub async fn append<'e>(self, db: impl sqlx::PgExecutor<'e>) {
        let (rare, every) = self.rare.unwrap_or((self.topic, 1));
        sqlx::query(
            "insert into outbox (message_id, topic, key, type, payload)
             select gen_random_uuid(), case when i % $3 = 0 then $2 else $1 end, 'k' || i % 7, 'test.v1',
                    convert_to(i || repeat('x', $5), 'UTF8')
               from generate_series(1, $4) as i",
        )
        .bind(self.topic)
        .bind(rare)
        .bind(i64::try_from(every).unwrap())
        .bind(i64::try_from(self.rows).unwrap())
        .bind(i32::try_from(self.bytes).unwrap())
        .execute(db)
        .await
        .expect("the rows can be appended");
    }
}

/// Parks rows 1 to `rows`, as if their topic had been too small for them. They are in so many lanes, or without keys
/// where there are none.
pub async fn park(world: &World, topic: &str, rows: usize, lanes: usize) {
    let rows = i64::try_from(rows).unwrap();
    sqlx::query(
        "insert into outbox_parked (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason)
         select 'orders', id, gen_random_uuid(), $1, 'k' || id % nullif($3, 0), 'test.v1', 'x', '{}', now(), 'a test'
           from generate_series(1, $2) as id",
    )
    .bind(topic)
    .bind(rows)
    .bind(i64::try_from(lanes).unwrap())
    .execute(world.db())
    .await
    .expect("the rows can be parked");
    sqlx::query("select setval('outbox_id_seq', greatest($1, (select last_value from outbox_id_seq)))")
        .bind(rows)
        .execute(world.db())
        .await
        .expect("their ids are given");
}

pub fn kafka() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers()).create().expect("an admin client needs only brokers")
}

/// Makes a topic with this value of a setting.
pub async fn topic_with(partitions: i32, setting: &str, value: &str) -> String {
    let name = unique(&setting.replace('.', "-"));
    create_with(&name, partitions, setting, value).await;
    name
}

/// Makes a topic of this name, with this value of a setting.
pub async fn create_with(name: &str, partitions: i32, setting: &str, value: &str) {
    let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1)).set(setting, value);
    let created = kafka().create_topics([&topic], &AdminOptions::new()).await.expect("the brokers answer");
    created.into_iter().for_each(|created| drop(created.expect("the topic is new")));
}

/// Makes a topic whose records may have so many bytes.
pub async fn limited_topic(bytes: &str) -> String {
    topic_with(2, "max.message.bytes", bytes).await
}

/// Limits the topic's records to so many bytes from now on.
pub async fn limit_topic(topic: &str, bytes: &str) {
    set_topic(topic, "max.message.bytes", bytes).await;
}

/// Gives a setting of the topic this value from now on.
pub async fn set_topic(topic: &str, setting: &str, value: &str) {
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(setting, value);
    let altered = kafka().alter_configs([&change], &AdminOptions::new()).await.expect("the brokers answer");
    altered.into_iter().for_each(|altered| drop(altered.expect("the topic is there")));
    // The broker learns of the change a moment later.
    eventually(PATIENCE, || async {
        let (topic, options) = (ResourceSpecifier::Topic(topic), AdminOptions::new());
        let described = kafka().describe_configs([&topic], &options).await.expect("the brokers answer");
        (described[0].as_ref().ok()?.get(setting)?.value.as_deref() == Some(value)).then_some(())
    })
    .await;
}

/// Reads a topic of other brokers from the beginning, until it has `count` distinct payloads.
pub async fn read_from(brokers: String, topic: &str, partitions: i32, count: usize) {
    let topic = topic.to_owned();
    let begin = move || {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("group.id", "test")
            // A partition whose leader changes may be looked up anew: that must skip nothing.
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        let mut all = TopicPartitionList::new();
        (0..partitions).for_each(|partition| {
            all.add_partition_offset(&topic, partition, Offset::Beginning).expect("the beginning is an offset");
        });
        consumer.assign(&all).unwrap();
        consumer
    };
    let read = move || {
        let (mut consumer, mut seen) = (begin(), HashSet::new());
        let (mut last, mut came) = (Instant::now(), Instant::now());
        while seen.len() < count {
            assert!(last.elapsed() < PATIENCE, "{} of {count} arrived", seen.len());
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => {
                    came = Instant::now();
                    if seen.insert(message.payload().unwrap().to_vec()) {
                        last = came;
                    }
                }
                // Tells a record that the relay lost, which stays missing, from one that this client did not deliver.
                _ if came.elapsed() > PATIENCE / 6 => (consumer, came) = (begin(), Instant::now()),
                _ => {}
            }
        }
    };
    tokio::task::spawn_blocking(read).await.expect("reading does not panic");
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
    eventually(patience(), || async {
        if count_to_end(topic).await < count {
            return None;
        }
        let records = read_to_end(topic).await;
        let distinct: HashSet<i64> = records.iter().map(id).collect();
        (distinct.len() >= count).then_some(records)
    })
    .await
}

/// The ids in the topic, once it holds `count` records; for topics that hold very many.
pub async fn published_ids(topic: &str, count: usize) -> Vec<i64> {
    eventually(patience(), || async { (count_to_end(topic).await >= count).then_some(()) }).await;
    map_to_end(topic, |record| id(&record)).await
}

fn id(record: &Record) -> i64 {
    record.header("ce_sequence").expect("every record has it").parse().expect("a number")
}

/// The outbox ids of the records, in their order.
pub fn ids(records: &[Record]) -> Vec<i64> {
    records.iter().map(id).collect()
}

/// The payloads of one key, each at its first occurrence.
pub fn payloads(records: &[Record], key: &str) -> Vec<String> {
    let mut seen = HashSet::new();
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

/// A relay that runs in this process.
pub struct Running {
    pub stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(settings: &RelaySettings) -> Self {
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

    /// Stops the relay as a SIGTERM would.
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

/// Asks health once; the reason, if this part is red with this reason.
pub async fn is_red(health: &saga_core::service::Health, part: &str, reason: &str) -> Option<String> {
    health.look().await;
    assert!(health.readiness().ready, "{:?}", health.readiness());
    let part = health.healthiness().parts.remove(part).expect("there is such a part");
    assert_eq!(part.since.is_some(), part.cause.is_some(), "{part:?}");
    part.reason.filter(|said| said.contains(reason))
}

/// Asks health once, whether the outbox `orders` is, or is not, in order; callers are served all the time.
pub async fn is_healthy(health: &saga_core::service::Health, wanted: bool) -> Option<()> {
    health.look().await;
    assert!(health.readiness().ready, "{:?}", health.readiness());
    let cause = health.healthiness().parts["outbox:orders"].cause;
    (cause.is_none() == wanted).then_some(())
}

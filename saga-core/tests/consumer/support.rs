//! A consumer whose handler writes down, in its transaction, what it handled and in which order.

use saga_core::{
    consumer::{Consumer, ConsumerConfig, ConsumerError, ConsumerHealth, HandleError, Handler, Message},
    envelope::Envelope,
    id::MessageId,
    outbox::Tx,
    retry::Backoff,
    service::messaging_migrations,
    testkit::{Record, TestDatabase, TestTopic, brokers, eventually, produce, unique},
};
use sqlx::PgPool;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const SOON: Duration = Duration::from_secs(40);

/// The answer of a handler to one message; `Ok` lets it be written down.
pub(crate) type Opinion = dyn Fn(&Message) -> Result<(), HandleError> + Send + Sync;

pub(crate) struct Recorder {
    opinion: Box<Opinion>,
    gate: tokio::sync::watch::Receiver<bool>,
    pub(crate) commits: AtomicUsize,
    /// The sizes of the batches that came in, handled or not.
    pub(crate) batches: Mutex<Vec<usize>>,
}

impl Handler for Recorder {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        self.batches.lock().unwrap().push(batch.len());
        let partition = batch[0].at.partition;
        if partition == 0 {
            // The gate stands before partition 0 alone; it is open unless a test closed it.
            self.gate.clone().wait_for(|open| *open).await.map_err(|_| anyhow::anyhow!("the gate is gone"))?;
        }
        let text = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        sqlx::query(
            "insert into handled (key, value, message_id)
             select key, value, message_id
               from unnest($1::text[], $2::text[], $3::uuid[]) with ordinality as m (key, value, message_id, n)
              order by n",
        )
        .bind(batch.iter().map(|message| text(&message.key)).collect::<Vec<_>>())
        .bind(batch.iter().map(|message| text(&message.payload)).collect::<Vec<_>>())
        .bind(batch.iter().map(|message| message.envelope.id.0).collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
        batch.iter().try_for_each(|message| (self.opinion)(message))
    }

    fn committed(&self) {
        self.commits.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) struct Fixture {
    pub(crate) database: TestDatabase,
    pub(crate) topic: TestTopic,
    pub(crate) config: ConsumerConfig,
}

pub(crate) struct Running {
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) gate: tokio::sync::watch::Sender<bool>,
    pub(crate) health: ConsumerHealth,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ConsumerError>>,
}

impl Running {
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// Drops the future that runs the consumer, as a `select!` would.
    pub(crate) async fn drop_it(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    /// Waits until a fail point has let the consumer die.
    pub(crate) async fn dies(self) {
        let ended = tokio::time::timeout(SOON, self.task).await.expect("it dies soon").unwrap();
        assert!(matches!(ended, Err(ConsumerError::Crashed)), "{ended:?}");
    }

    /// Whether the consumer has died meanwhile.
    pub(crate) fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

impl Fixture {
    pub(crate) async fn new(partitions: i32) -> Self {
        let migrations = [messaging_migrations()];
        let (database, topic) =
            futures::future::join(TestDatabase::new(&migrations), TestTopic::create("events", partitions)).await;
        sqlx::query(
            "create table handled (n bigint generated always as identity, key text, value text, message_id uuid,
                                   began timestamptz not null default now())",
        )
        .execute(&database.pool)
        .await
        .unwrap();
        let mut config = ConsumerConfig::new(&brokers(), &unique("group"), [topic.name()]);
        config.backoff = Backoff::doubling(Duration::from_millis(50), Duration::from_millis(200));
        config.attempts = 3;
        Self { database, topic, config }
    }

    pub(crate) fn start(&self) -> Running {
        self.start_with(|_| Ok(()))
    }

    /// Starts a consumer with a pool of its own.
    pub(crate) fn start_on(&self, pool: &PgPool) -> Running {
        self.start_on_with(pool, |_| Ok(()))
    }

    pub(crate) fn start_with(
        &self,
        opinion: impl Fn(&Message) -> Result<(), HandleError> + Send + Sync + 'static,
    ) -> Running {
        self.start_on_with(&self.database.pool, opinion)
    }

    fn start_on_with(
        &self,
        pool: &PgPool,
        opinion: impl Fn(&Message) -> Result<(), HandleError> + Send + Sync + 'static,
    ) -> Running {
        let (gate, gated) = tokio::sync::watch::channel(true);
        let recorder = Arc::new(Recorder {
            opinion: Box::new(opinion),
            gate: gated,
            commits: AtomicUsize::default(),
            batches: Mutex::default(),
        });
        let consumer = Consumer::new(self.config.clone(), pool.clone(), Arc::clone(&recorder));
        let (health, stop) = (consumer.health(), CancellationToken::new());
        let task = tokio::spawn(consumer.run(stop.clone()));
        Running { recorder, gate, health, stop, task }
    }

    pub(crate) async fn send(&self, records: &[Record]) {
        produce(&self.topic, records).await;
    }

    /// The keys and values of the handled messages, in the order of the handling.
    pub(crate) async fn handled(&self) -> Vec<(String, String)> {
        self.rows("select coalesce(key, ''), coalesce(value, '') from handled order by n").await
    }

    pub(crate) async fn until_handled(&self, count: usize) -> Vec<(String, String)> {
        eventually(SOON, || async {
            // The tests cut connections: the question is repeated when its answer is lost.
            let handled: i64 =
                sqlx::query_scalar("select count(*) from handled").fetch_one(&self.database.pool).await.ok()?;
            (usize::try_from(handled).unwrap() >= count).then_some(())
        })
        .await;
        self.handled().await
    }

    /// Sends a message; returns whether the transaction in which it was handled had begun before.
    pub(crate) async fn handles_in_what_has_begun(&self, nth: usize) -> bool {
        let sent: OffsetDateTime =
            sqlx::query_scalar("select clock_timestamp()").fetch_one(&self.database.pool).await.unwrap();
        self.send(&[event("a", &nth.to_string())]).await;
        self.until_handled(nth).await;
        let began = sqlx::query_scalar("select began < $1 from handled order by n desc limit 1").bind(sent);
        began.fetch_one(&self.database.pool).await.unwrap()
    }

    pub(crate) async fn parked(&self) -> Vec<(String, i32, bool)> {
        self.rows(
            "select convert_from(payload, 'utf8'), attempts, next_attempt_at is not null
               from inbox_parked order by record_offset",
        )
        .await
    }

    /// Reads rows. The tests cut connections: the question is repeated when its answer is lost.
    async fn rows<R>(&self, sql: &'static str) -> Vec<R>
    where
        R: Send + Unpin + for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow>,
    {
        eventually(SOON, || async { sqlx::query_as(sql).fetch_all(&self.database.pool).await.ok() }).await
    }

    /// Waits until no record is parked any more.
    pub(crate) async fn until_unparked(&self) {
        eventually(SOON, || async { self.parked().await.is_empty().then_some(()) }).await;
    }

    /// Waits until a session waits for this advisory lock.
    pub(crate) async fn until_somebody_waits_for(&self, lock: i64) {
        eventually(SOON, || async { self.locks(false).await.contains(&lock).then_some(()) }).await;
    }

    /// The advisory locks in this database that a session has (`granted`), or waits for.
    pub(crate) async fn locks(&self, granted: bool) -> Vec<i64> {
        sqlx::query_scalar(
            "select (classid::bigint << 32) | objid::bigint
               from pg_locks
              where locktype = 'advisory' and granted = $1
                and database = (select oid from pg_database where datname = current_database())",
        )
        .bind(granted)
        .fetch_all(&self.database.pool)
        .await
        .unwrap()
    }

    /// The dead letters, in their order: key, value, headers.
    pub(crate) async fn dead_letters(&self) -> Vec<(Option<String>, Option<String>, serde_json::Value)> {
        let topic = self.topic.dead_letters();
        // The question is repeated for the reason that `rows` names.
        eventually(SOON, || async {
            sqlx::query_as(
                "select key, convert_from(payload, 'utf8'), headers || jsonb_build_object('id', message_id)
                   from outbox where topic = $1 order by id",
            )
            .bind(&topic)
            .fetch_all(&self.database.pool)
            .await
            .ok()
        })
        .await
    }

    pub(crate) async fn until_dead_letters(
        &self,
        count: usize,
    ) -> Vec<(Option<String>, Option<String>, serde_json::Value)> {
        eventually(SOON, || async {
            let letters = self.dead_letters().await;
            (letters.len() >= count).then_some(letters)
        })
        .await
    }
}

/// An event of `key` with the payload `value`.
pub(crate) fn event(key: &str, value: &str) -> Record {
    with_id(MessageId::new(), key, value)
}

pub(crate) fn with_id(id: MessageId, key: &str, value: &str) -> Record {
    let envelope = Envelope::new(id, "orders", "test.happened.v1");
    Record { key: Some(key.into()), value: Some(value.into()), ..Record::of(&envelope) }
}

/// `count` events of `keys` keys in turn; the values of one key count up.
pub(crate) fn events(keys: usize, count: usize) -> Vec<Record> {
    (0..count).map(|n| event(&format!("k{}", n % keys), &format!("{:06}", n / keys))).collect()
}

/// Every event of [`events`] once, each key's in order.
#[track_caller]
pub(crate) fn assert_complete(handled: &[(String, String)], keys: usize, count: usize) {
    for k in 0..keys {
        let key = format!("k{k}");
        let values: Vec<_> = handled.iter().filter(|(of, _)| *of == key).map(|(_, value)| value.clone()).collect();
        let expected: Vec<_> = (0..count).filter(|n| n % keys == k).map(|n| format!("{:06}", n / keys)).collect();
        assert_eq!(values, expected, "{key}");
    }
    assert_eq!(handled.len(), count);
}

pub(crate) fn says(message: &Message, value: &str) -> bool {
    message.payload.as_deref() == Some(value.as_bytes())
}

//! Topics from outside: read to their end, written into, and how far a consumer group is.
//!
//! saga-core's test kit does the same on the brokers of the environment; a platform under test has its own.

use anyhow::{Context, Result, ensure};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, StreamConsumer},
    error::KafkaError,
    message::{BorrowedMessage, Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use saga_core::envelope::header;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How long the broker may take for each question.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The consumer groups, each with the topic that it reads.
pub const GROUPS: [(&str, &str); 4] = [
    ("payment-svc", contracts::topics::PAYMENTS_COMMANDS.name),
    ("inventory-svc", contracts::topics::INVENTORY_COMMANDS.name),
    ("order-svc.saga", contracts::topics::ORDERS_REPLIES.name),
    ("order-svc.catalogue", contracts::topics::INVENTORY_ITEMS.name),
];

/// A record of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordFact {
    /// The name of the topic.
    pub topic: String,
    /// The number of the partition.
    pub partition: i32,
    /// The offset in the partition.
    pub offset: i64,
    /// The key; `None` if it has none.
    pub key: Option<String>,
    /// The value; `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    /// The headers; of several of a name, the last.
    pub headers: BTreeMap<String, String>,
}

impl RecordFact {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The record's place, as in `topic/partition@offset`.
    pub fn coordinates(&self) -> String {
        format!("{}/{}@{}", self.topic, self.partition, self.offset)
    }
}

/// Every record of every topic that is not Kafka's own, ordered within each partition.
pub async fn read_all(brokers: &str) -> Result<Vec<RecordFact>> {
    let brokers = brokers.to_owned();
    tokio::task::spawn_blocking(move || read_all_blocking(&brokers)).await?
}

/// Every record of one topic, from its beginning to its end at the moment.
pub async fn read(brokers: &str, topic: &str) -> Result<Vec<RecordFact>> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    tokio::task::spawn_blocking(move || {
        let consumer = consumer(&brokers, "e2e")?;
        read_topics(&consumer, &[topic])
    })
    .await?
}

fn consumer(brokers: &str, group: &str) -> Result<BaseConsumer> {
    // Assigning and asking for offsets want a group; the client joins none, and commits nothing.
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", group).set("enable.auto.commit", "false");
    config.set("enable.partition.eof", "true").set("log_level", "2");
    Ok(config.create()?)
}

fn read_all_blocking(brokers: &str) -> Result<Vec<RecordFact>> {
    let consumer = consumer(brokers, "e2e")?;
    let metadata = consumer.fetch_metadata(None, ANSWER_MAX).context("the broker does not tell its topics")?;
    let topics: Vec<_> = metadata.topics().iter().map(|topic| topic.name().to_owned()).collect();
    let ours: Vec<_> = topics.into_iter().filter(|name| !name.starts_with("__")).collect();
    read_topics(&consumer, &ours)
}

fn read_topics(consumer: &BaseConsumer, topics: &[String]) -> Result<Vec<RecordFact>> {
    let mut positions = TopicPartitionList::new();
    let mut open = BTreeMap::new();
    for topic in topics {
        for partition in partitions(consumer, topic)? {
            let (low, high) = consumer.fetch_watermarks(topic, partition, ANSWER_MAX)?;
            if high > low {
                positions.add_partition_offset(topic, partition, Offset::Beginning)?;
                open.insert((topic.clone(), partition), high);
            }
        }
    }
    consumer.assign(&positions)?;
    let mut records = Vec::new();
    let started = Instant::now();
    while !open.is_empty() {
        ensure!(started.elapsed() < ANSWER_MAX, "reading {open:?} to their ends took longer than {ANSWER_MAX:?}");
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                let record = own(&message);
                let place = (record.topic.clone(), record.partition);
                if open.get(&place).is_some_and(|high| record.offset + 1 >= *high) {
                    open.remove(&place);
                }
                records.push(record);
            }
            // A compacted topic, or a transaction's marker, ends before its high watermark.
            Some(Err(KafkaError::PartitionEOF(at))) => {
                open.retain(|place, _| place.1 != at || !ended(consumer, place));
            }
            Some(Err(error)) => return Err(error).context("reading topics"),
            None => {}
        }
    }
    records.sort_by(|a, b| (&a.topic, a.partition, a.offset).cmp(&(&b.topic, b.partition, b.offset)));
    Ok(records)
}

/// Whether the reader is at a partition's end. The library's event of it names no topic; the reader's position shows
/// it.
fn ended(consumer: &BaseConsumer, (topic, partition): &(String, i32)) -> bool {
    let high = consumer.fetch_watermarks(topic, *partition, ANSWER_MAX).map(|(_, high)| high);
    let position = consumer.position().ok().and_then(|all| all.find_partition(topic, *partition).map(|p| p.offset()));
    matches!((position, high), (Some(Offset::Offset(at)), Ok(high)) if at >= high)
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>> {
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_MAX)?;
    Ok(metadata.topics().iter().flat_map(|topic| topic.partitions()).map(|partition| partition.id()).collect())
}

fn own(message: &BorrowedMessage<'_>) -> RecordFact {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    RecordFact {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(text),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(text).unwrap_or_default())).collect(),
    }
}

/// How many records each group has not taken yet, per partition; 0 where it has taken all.
pub async fn lag(brokers: &str) -> Result<Vec<(String, String, i32, i64)>> {
    let brokers = brokers.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut lag = Vec::new();
        for (group, topic) in GROUPS {
            let consumer = consumer(&brokers, group)?;
            let mut asked = TopicPartitionList::new();
            for partition in partitions(&consumer, topic)? {
                asked.add_partition(topic, partition);
            }
            let committed = consumer.committed_offsets(asked, ANSWER_MAX)?;
            for place in committed.elements() {
                let (low, high) = consumer.fetch_watermarks(topic, place.partition(), ANSWER_MAX)?;
                let taken = if let Offset::Offset(taken) = place.offset() { taken } else { low };
                lag.push((group.to_owned(), topic.to_owned(), place.partition(), high - taken));
            }
        }
        Ok(lag)
    })
    .await?
}

/// The producer of a set of brokers, made once: making one takes longer than using it.
fn producer(brokers: &str) -> Result<FutureProducer> {
    static PRODUCERS: Mutex<BTreeMap<String, FutureProducer>> = Mutex::new(BTreeMap::new());
    let mut producers = PRODUCERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(producer) = producers.get(brokers) {
        return Ok(producer.clone());
    }
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", brokers).set("linger.ms", "0").create()?;
    producers.insert(brokers.to_owned(), producer.clone());
    Ok(producer)
}

/// Writes one record as it is and waits until it is acknowledged.
pub async fn write(brokers: &str, record: &RecordFact) -> Result<()> {
    let producer = producer(brokers)?;
    let headers = record
        .headers
        .iter()
        .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value.as_str()) }));
    let mut outgoing = FutureRecord::<str, [u8]>::to(&record.topic).headers(headers);
    outgoing.partition = (record.partition >= 0).then_some(record.partition);
    outgoing.key = record.key.as_deref();
    outgoing.payload = record.value.as_deref();
    producer.send(outgoing, ANSWER_MAX).await.map_err(|(error, _)| error).context("writing a record")?;
    Ok(())
}

/// The `ce_source` of records that an [`Echo`], or a test, wrote.
pub const ECHO: &str = "e2e-echo";

/// The message of `record` as a resend would bring it: a new message id, everything else as it was.
#[must_use]
pub fn resent(record: &RecordFact) -> RecordFact {
    let mut record = record.clone();
    record.headers.insert(header::ID.to_owned(), Uuid::now_v7().to_string());
    record.headers.insert(header::SOURCE.to_owned(), ECHO.to_owned());
    record
}

/// Writes every record of some topics again, as soon as it sees it.
#[derive(Debug)]
pub struct Echo {
    stop: CancellationToken,
    repeated: Arc<Mutex<BTreeSet<String>>>,
    echoing: JoinHandle<Result<()>>,
}

impl Echo {
    /// Begins with the records that are written from now on.
    pub async fn start(brokers: &str, topics: &[&str]) -> Result<Self> {
        let (stop, brokers) = (CancellationToken::new(), brokers.to_owned());
        let consumer: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("group.id", "e2e-echo")
            .set("enable.auto.commit", "false")
            .create()?;
        let ends = topics.iter().map(|topic| (*topic).to_owned()).collect::<Vec<_>>();
        let asked = brokers.clone();
        let positions = tokio::task::spawn_blocking(move || positions_at_end(&asked, &ends)).await??;
        consumer.assign(&positions)?;
        let (token, repeated) = (stop.clone(), Arc::<Mutex<BTreeSet<String>>>::default());
        let said = Arc::clone(&repeated);
        let echoing = tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    message = consumer.recv() => message?,
                };
                let record = own(&message);
                if record.header(header::SOURCE) != Some(ECHO) {
                    write(&brokers, &resent(&record)).await?;
                    let [op, step] =
                        [header::SAGA_OP, header::SAGA_STEP].map(|name| record.header(name).unwrap_or_default());
                    let what = format!("{op} {step} in {}", record.topic);
                    said.lock().unwrap_or_else(PoisonError::into_inner).insert(what);
                }
            }
        });
        Ok(Self { stop, repeated, echoing })
    }

    /// The records that it has written again by now: `do authorize-payment in payments.commands`.
    ///
    /// # Panics
    /// When the echo has ended: the topics could not be read, or written.
    pub fn repeated(&self) -> BTreeSet<String> {
        assert!(!self.echoing.is_finished(), "the echo has ended");
        self.repeated.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the echo, and returns its error.
    pub async fn stop(self) -> Result<()> {
        self.stop.cancel();
        self.echoing.await?
    }
}

fn positions_at_end(brokers: &str, topics: &[String]) -> Result<TopicPartitionList> {
    let consumer = consumer(brokers, "e2e")?;
    let mut positions = TopicPartitionList::new();
    for topic in topics {
        for partition in partitions(&consumer, topic)? {
            let (_, high) = consumer.fetch_watermarks(topic, partition, ANSWER_MAX)?;
            positions.add_partition_offset(topic, partition, Offset::Offset(high))?;
        }
    }
    Ok(positions)
}

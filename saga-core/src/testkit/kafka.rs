//! Topics of a test's own on the brokers of `KAFKA_BROKERS`; functions that write raw records and read a topic to its
//! end.

use crate::{consumer::Message, envelope::Envelope};
use rdkafka::{
    ClientConfig, Message as _, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::{Client, ClientContext, DefaultClientContext},
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use std::{ops::Deref, sync::LazyLock, time::Duration};

/// How long the broker may take for each request of a test.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The brokers that tests use.
///
/// # Panics
/// When `KAFKA_BROKERS` is not set.
pub fn brokers() -> String {
    std::env::var("KAFKA_BROKERS").expect("KAFKA_BROKERS names the Kafka brokers that tests use")
}

static ADMIN: LazyLock<AdminClient<DefaultClientContext>> = LazyLock::new(|| {
    ClientConfig::new().set("bootstrap.servers", brokers()).create().expect("an admin client needs only brokers")
});

static PRODUCER: LazyLock<FutureProducer> = LazyLock::new(|| {
    ClientConfig::new()
        .set("bootstrap.servers", brokers())
        .set("linger.ms", "1")
        .set("enable.idempotence", "true")
        .create()
        .expect("a producer needs only brokers")
});

/// A topic with a random name and its `.dlt`; both are deleted when this value is dropped.
#[derive(Debug)]
pub struct TestTopic {
    name: String,
}

impl TestTopic {
    /// Creates `<prefix>-<random>` and its dead letter topic.
    pub async fn create(prefix: &str, partitions: i32) -> Self {
        Self::create_named(&super::unique(prefix), partitions).await
    }

    /// Creates a topic with exactly this name, and its dead letter topic.
    pub async fn create_named(name: &str, partitions: i32) -> Self {
        let dead_letters = crate::topic::dead_letter_topic(name);
        futures::future::join(create_topic(name, partitions), create_topic(&dead_letters, 1)).await;
        Self { name: name.into() }
    }

    /// The topic's name, with its random part.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its dead letter topic.
    pub fn dead_letters(&self) -> String {
        crate::topic::dead_letter_topic(&self.name)
    }
}

impl Deref for TestTopic {
    type Target = str;
    fn deref(&self) -> &str {
        &self.name
    }
}

impl Drop for TestTopic {
    fn drop(&mut self) {
        let names = [self.name.clone(), self.dead_letters()];
        super::waiting::clean_up(move || {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            futures::executor::block_on(ADMIN.delete_topics(&names, &AdminOptions::new())).ok();
        });
    }
}

/// Creates a topic with exactly this name, and waits until the broker serves it.
///
/// # Panics
/// When the broker refuses.
pub async fn create_topic(name: &str, partitions: i32) {
    let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    let options = AdminOptions::new().operation_timeout(Some(Timeout::After(ANSWER_MAX)));
    let results = ADMIN.create_topics([&topic], &options).await.expect("the brokers of KAFKA_BROKERS answer");
    results.into_iter().for_each(|result| {
        result.expect("a topic of a new name can be created");
    });
    until_led(name, partitions).await;
}

/// Waits until the broker has leaders for so many partitions: it answers before its own metadata show the change.
async fn until_led(name: &str, partitions: i32) {
    super::eventually(ANSWER_MAX, || async {
        let name = name.to_owned();
        tokio::task::spawn_blocking(move || {
            let metadata = ADMIN.inner().fetch_metadata(Some(&name), ANSWER_MAX).ok()?;
            let topic = metadata.topics().first()?;
            let led = topic.partitions().iter().filter(|partition| partition.leader() >= 0).count();
            (led == usize::try_from(partitions).ok()?).then_some(())
        })
        .await
        .expect("asking for metadata does not panic")
    })
    .await;
}

/// Deletes a topic, and waits until the broker serves it no longer.
///
/// # Panics
/// When the broker refuses.
pub async fn delete_topic(name: &str) {
    let deleted =
        ADMIN.delete_topics(&[name], &AdminOptions::new()).await.expect("the brokers of KAFKA_BROKERS answer");
    deleted.into_iter().for_each(|deleted| drop(deleted.expect("a topic that is there can be deleted")));
    until_led(name, 0).await;
}

/// A record as it stands in a topic, or as it is to be written there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// The partition's number; when writing, `None` lets the key decide.
    pub partition: Option<i32>,
    /// The place in the partition; ignored when writing.
    pub offset: i64,
    /// The record key; `None`: without one.
    pub key: Option<Vec<u8>>,
    /// The record's value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The headers, in their order.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    /// A record with the headers of `envelope`, and nothing else yet.
    pub fn of(envelope: &Envelope) -> Self {
        let headers = envelope.encode().into_iter();
        let headers = headers.map(|(name, value)| (name.into_owned(), Some(value.into_bytes()))).collect();
        Self { headers, ..Self::default() }
    }

    /// The last value of a header, as text.
    pub fn header(&self, name: &str) -> Option<String> {
        let value = self.headers.iter().rev().find(|(header, _)| header == name)?.1.as_deref()?;
        Some(String::from_utf8_lossy(value).into_owned())
    }
}

/// Converts a message back to the record that it was, to be written.
impl From<&Message> for Record {
    fn from(message: &Message) -> Self {
        Self { key: message.key.clone(), value: message.payload.clone(), ..Self::of(&message.envelope) }
    }
}

/// Writes raw records in their order and waits until all are acknowledged.
///
/// # Panics
/// When one is refused.
pub async fn produce(topic: &str, records: &[Record]) {
    let mut deliveries = Vec::with_capacity(records.len());
    for record in records {
        let headers = record
            .headers
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: value.as_deref() }));
        let mut outgoing = FutureRecord::<[u8], [u8]>::to(topic).headers(headers);
        outgoing.partition = record.partition;
        outgoing.key = record.key.as_deref();
        outgoing.payload = record.value.as_deref();
        deliveries.push(PRODUCER.send_result(outgoing).map_err(|(error, _)| error).expect("the queue has room"));
    }
    for delivery in deliveries {
        delivery
            .await
            .expect("the producer lives as long as the process")
            .map_err(|(error, _)| error)
            .expect("written");
    }
}

/// Every record of a topic, from its beginning to what is its end now; ordered within each partition.
///
/// # Panics
/// When the topic does not exist or the broker does not answer.
pub async fn read_to_end(topic: &str) -> Vec<Record> {
    map_to_end(topic, |record| record).await
}

/// Maps every record of a topic, for topics whose records are too many to be kept.
///
/// # Panics
/// When the topic does not exist or the broker does not answer.
pub async fn map_to_end<T: Send + 'static>(topic: &str, map: impl Fn(Record) -> T + Send + 'static) -> Vec<T> {
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || read_blocking(&topic, map)).await.expect("reading a topic does not panic")
}

/// How many records a topic has had, if none of its offsets is a transaction's marker.
///
/// # Panics
/// When the topic does not exist or the broker does not answer.
pub async fn count_to_end(topic: &str) -> usize {
    let topic = topic.to_owned();
    let counting = tokio::task::spawn_blocking(move || {
        let client = ADMIN.inner();
        let metadata = client.fetch_metadata(Some(&topic), ANSWER_MAX).expect("the broker tells its topics");
        let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
        let ends = partitions.map(|partition| watermarks(client, &topic, partition.id()).1);
        usize::try_from(ends.sum::<i64>()).expect("no end is negative")
    });
    counting.await.expect("counting does not panic")
}

fn read_blocking<T>(topic: &str, map: impl Fn(Record) -> T) -> Vec<T> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers())
        .set("enable.auto.commit", "false")
        // librdkafka assigns only with a group, though this consumer joins none and commits nothing.
        .set("group.id", "testkit")
        .set("enable.partition.eof", "true")
        .create()
        .expect("a consumer needs only brokers");
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_MAX).expect("the broker tells its topics");
    let mut positions = TopicPartitionList::new();
    let mut open = Vec::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let (low, high) = watermarks(consumer.client(), topic, partition.id());
        if high > low {
            positions
                .add_partition_offset(topic, partition.id(), rdkafka::Offset::Beginning)
                .expect("the beginning is an offset");
            open.push((partition.id(), high));
        }
    }
    consumer.assign(&positions).expect("partitions that exist can be assigned");
    let mut records = Vec::new();
    let mut last = std::time::Instant::now();
    while !open.is_empty() {
        assert!(last.elapsed() < ANSWER_MAX, "reading {topic} to its end: no record came for {ANSWER_MAX:?}");
        match consumer.poll(Duration::from_millis(200)) {
            Some(Ok(message)) => {
                last = std::time::Instant::now();
                records.push(map(own(&message)));
                open.retain(|&(partition, high)| partition != message.partition() || message.offset() + 1 < high);
            }
            // Transaction markers take offsets too: the end of the partition may be one.
            Some(Err(rdkafka::error::KafkaError::PartitionEOF(at))) => open.retain(|&(partition, _)| partition != at),
            // A leader has just moved, or a broker is just starting: the error passes, or the deadline ends the loop.
            Some(Err(error)) => tracing::debug!(topic, %error, "reading a topic"),
            None => {}
        }
    }
    records
}

/// The offsets of the first record and after the last. Repeats: the leader of a new partition may not know yet that it
/// leads.
fn watermarks<C: ClientContext>(client: &Client<C>, topic: &str, partition: i32) -> (i64, i64) {
    let deadline = std::time::Instant::now() + ANSWER_MAX;
    loop {
        match client.fetch_watermarks(topic, partition, ANSWER_MAX) {
            Ok(watermarks) => return watermarks,
            Err(error) => {
                assert!(std::time::Instant::now() < deadline, "the ends of {topic} [{partition}]: {error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

fn own(message: &rdkafka::message::BorrowedMessage<'_>) -> Record {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    Record {
        partition: Some(message.partition()),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect(),
    }
}

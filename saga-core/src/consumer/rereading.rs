//! A topic read again from its beginning, beside its consumers: for rebuilding what is made of it.
//!
//! The reader is a member of no group and commits nothing, so it moves no consumer's offset. Records come in the order
//! of their partition. When the process dies, nothing is left of the reading.

use super::{
    Coordinates, Message,
    record::{Raw, RecordBatch},
};
use crate::clock;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, KafkaResult},
    metadata::MetadataPartition,
    types::RDKafkaErrorCode as Code,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// How long the brokers may take for an answer, and how long records may stay away that are known to be there.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long one poll waits for records.
const POLL_MAX: Duration = Duration::from_millis(250);
/// The most records that are handed on together.
const BATCH_MAX: usize = 500;

/// Why a topic could not be read again.
#[derive(Debug, thiserror::Error)]
pub enum RereadingError {
    /// The brokers returned this error.
    #[error("Kafka: {0}")]
    Kafka(#[from] KafkaError),
    /// There is no topic of this name.
    #[error("the topic {0:?} is not there: start the service that publishes to it, which creates it")]
    NoTopic(String),
    /// Records are there and do not come.
    #[error(
        "no record of the topic {topic:?} has come for {max:?}, and {left} are still to be read; is a broker away?",
        max = ANSWER_MAX
    )]
    Silent {
        /// The topic that is read.
        topic: String,
        /// The number of offsets still to be read; the topic may have fewer records.
        left: i64,
    },
    /// A bug of this crate.
    #[error("the thread that reads has ended")]
    Ended,
}

/// A batch of what was read.
#[derive(Debug, Default)]
pub struct Reread {
    /// The records, each partition's in their order.
    pub messages: Vec<Message>,
    /// Records that are no message, with what is wrong with them.
    pub unreadable: Vec<(Coordinates, String)>,
}

/// The reading of one topic, from its beginning to its end.
pub struct Rereading {
    client: Arc<BaseConsumer>,
    topic: String,
    /// For each partition: the offset that is read next, and where it ended when that was last asked.
    places: BTreeMap<i32, (i64, i64)>,
    /// The sum of the offsets at which the partitions began.
    begin: i64,
}

/// What one poll returned.
enum Came {
    Record(i32, Box<Raw>),
    /// All records of this partition that were there are read.
    End(i32),
}

impl Rereading {
    /// Begins with the first record that is there.
    ///
    /// # Errors
    /// When the topic is not there, or the brokers do not answer.
    pub async fn begin(brokers: &str, topic: &str) -> Result<Self, RereadingError> {
        let client: BaseConsumer = ClientConfig::new()
            .set_log_level(RDKafkaLogLevel::Emerg)
            .set("bootstrap.servers", brokers)
            // The library wants a group; the client never joins it and commits nothing.
            .set("group.id", format!("{topic}.rereading"))
            .set("client.id", "rereading")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("allow.auto.create.topics", "false")
            .set("auto.offset.reset", "earliest")
            .create()?;
        let (client, topic) = (Arc::new(client), topic.to_owned());
        let mut reading = Self { client, topic, places: BTreeMap::new(), begin: 0 };
        let ranges = reading.ranges().await?;
        if ranges.is_empty() {
            return Err(RereadingError::NoTopic(reading.topic));
        }
        reading.begin = ranges.values().map(|(first, _)| first).sum();
        reading.places = ranges;
        reading.assign()?;
        Ok(reading)
    }

    /// Asks where the topic ends now: records that have come since are read as well.
    ///
    /// # Errors
    /// When the brokers do not answer.
    pub async fn look_for_the_end(&mut self) -> Result<(), RereadingError> {
        for (partition, (first, end)) in self.ranges().await? {
            // A partition that is new comes with the next beginning.
            if let Some((next, known)) = self.places.get_mut(&partition) {
                (*next, *known) = ((*next).max(first), end);
            }
        }
        self.assign()
    }

    /// Assigns the partitions anew, so that an end that was reached before is not taken for the end that is known now.
    fn assign(&self) -> Result<(), RereadingError> {
        let mut list = TopicPartitionList::with_capacity(self.places.len());
        for (partition, (next, _)) in &self.places {
            list.add_partition_offset(&self.topic, *partition, Offset::Offset(*next))?;
        }
        Ok(self.client.assign(&list)?)
    }

    /// How many offsets lie between the beginning and what is read next, and between the beginning and the end as it
    /// was last looked for. A topic that is compacted has fewer records.
    pub fn progress(&self) -> (i64, i64) {
        let sum = |of: fn(&(i64, i64)) -> i64| self.places.values().map(of).sum::<i64>() - self.begin;
        (sum(|place| place.0), sum(|place| place.1))
    }

    /// Returns the next records; `None` at the end as it was last looked for.
    ///
    /// # Errors
    /// When the brokers refuse, or nothing comes.
    pub async fn next(&mut self) -> Result<Option<Reread>, RereadingError> {
        let until = clock::monotonic() + ANSWER_MAX;
        while self.places.values().any(|(next, end)| next < end) {
            let client = Arc::clone(&self.client);
            let came = blocking(move || poll(&client)).await?;
            let silent = came.is_empty() && clock::monotonic() > until;
            let mut raws: BTreeMap<i32, Vec<Raw>> = BTreeMap::new();
            for came in came {
                match came {
                    Came::End(partition) => {
                        // Records that were compacted away at the end have offsets and do not come.
                        self.places.entry(partition).and_modify(|(next, end)| *next = (*next).max(*end));
                    }
                    Came::Record(partition, raw) => {
                        self.places.entry(partition).and_modify(|(next, _)| *next = raw.offset + 1);
                        raws.entry(partition).or_default().push(*raw);
                    }
                }
            }
            if !raws.is_empty() {
                return Ok(Some(self.decode(raws)));
            }
            if silent {
                let (read, all) = self.progress();
                return Err(RereadingError::Silent { topic: self.topic.clone(), left: all - read });
            }
        }
        Ok(None)
    }

    fn decode(&self, raws: BTreeMap<i32, Vec<Raw>>) -> Reread {
        let mut read = Reread::default();
        for (partition, raws) in raws {
            let batch = RecordBatch::decode(&self.topic, partition, raws);
            read.messages.extend(batch.messages);
            read.unreadable.extend(batch.refused.into_iter().map(|refused| (refused.at, refused.reason)));
        }
        read
    }

    /// Where each partition begins and ends.
    async fn ranges(&self) -> Result<BTreeMap<i32, (i64, i64)>, RereadingError> {
        let (client, topic) = (Arc::clone(&self.client), self.topic.clone());
        blocking(move || {
            let metadata = client.fetch_metadata(Some(&topic), ANSWER_MAX)?;
            let found = metadata.topics().iter().filter(|found| found.name() == topic && found.error().is_none());
            let partitions = found.flat_map(|found| found.partitions().iter().map(MetadataPartition::id));
            let range = |id| Ok::<_, KafkaError>((id, client.fetch_watermarks(&topic, id, ANSWER_MAX)?));
            partitions.collect::<Vec<_>>().into_iter().map(range).collect()
        })
        .await
    }
}

/// Polls for a moment.
fn poll(client: &BaseConsumer) -> KafkaResult<Vec<Came>> {
    let (mut came, mut wait) = (Vec::new(), POLL_MAX);
    while came.len() < BATCH_MAX {
        match client.poll(wait) {
            None => break,
            Some(Ok(record)) => came.push(Came::Record(record.partition(), Box::new(Raw::copy(&record)))),
            Some(Err(KafkaError::PartitionEOF(partition))) => came.push(Came::End(partition)),
            // One broker of several is away, or comes back: whether nothing comes any more shows by itself.
            Some(Err(KafkaError::MessageConsumption(
                Code::BrokerTransportFailure | Code::AllBrokersDown | Code::OperationTimedOut | Code::Resolve,
            ))) => break,
            Some(Err(error)) => return Err(error),
        }
        wait = Duration::ZERO;
    }
    Ok(came)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> KafkaResult<T> + Send + 'static,
) -> Result<T, RereadingError> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| RereadingError::Ended)??)
}

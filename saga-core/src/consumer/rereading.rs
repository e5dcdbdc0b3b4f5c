//! A topic read again from its beginning, beside its consumers: for rebuilding what is made of it.
//!
//! It is a member of no group and commits nothing, so it moves no consumer's offset. Records come in the order of their partition.
//! When the process dies, nothing is left of it.

use super::{
    Coordinates, Message,
    record::{Batch, Raw},
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

/// How long the brokers may take for an answer, and how long nothing may come of what is known to be there.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long records are waited for at a time.
const POLL: Duration = Duration::from_millis(250);
/// Most records that are handed on together.
const BATCH_MAX: usize = 500;

/// Why a topic could not be read again.
#[derive(Debug, thiserror::Error)]
pub enum RereadingError {
    /// The brokers say so.
    #[error("Kafka: {0}")]
    Kafka(#[from] KafkaError),
    /// There is no such topic.
    #[error("the topic {0:?} is not there: start the service that publishes to it, which creates it")]
    NoTopic(String),
    /// Records are there and do not come.
    #[error(
        "no record of the topic {topic:?} has come for {max:?}, and {left} are still to be read; is a broker away?",
        max = ANSWER_MAX
    )]
    Silent {
        /// Which.
        topic: String,
        /// So many at most.
        left: i64,
    },
    /// A bug of this crate.
    #[error("the thread that reads has ended")]
    Ended,
}

/// What came of a topic.
#[derive(Debug, Default)]
pub struct Reread {
    /// Records, each partition's in their order.
    pub messages: Vec<Message>,
    /// Those that are no message, with what is wrong with them.
    pub unreadable: Vec<(Coordinates, String)>,
}

/// Reads a topic again.
pub struct Rereading {
    client: Arc<BaseConsumer>,
    topic: String,
    /// Of each partition: the offset that is read next, and where it ended when that was last asked.
    places: BTreeMap<i32, (i64, i64)>,
    /// The sum of where the partitions began.
    begin: i64,
}

/// What came in one look.
enum Came {
    Record(i32, Box<Raw>),
    /// All that was there is read.
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
            // The library wants one; it is never joined, and nothing is committed.
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

    /// Anew, so that no end is taken for this one that was reached before it was known.
    fn assign(&self) -> Result<(), RereadingError> {
        let mut list = TopicPartitionList::with_capacity(self.places.len());
        for (partition, (next, _)) in &self.places {
            list.add_partition_offset(&self.topic, *partition, Offset::Offset(*next))?;
        }
        Ok(self.client.assign(&list)?)
    }

    /// How many offsets lie between the beginning and what is read next, and between it and the end as it was last looked for. A
    /// topic that is compacted has fewer records.
    pub fn progress(&self) -> (i64, i64) {
        let sum = |of: fn(&(i64, i64)) -> i64| self.places.values().map(of).sum::<i64>() - self.begin;
        (sum(|place| place.0), sum(|place| place.1))
    }

    /// The next records; `None` at the end as it was last looked for.
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
                        // What was compacted away at the end has offsets and no records.
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
            let batch = Batch::decode(&self.topic, partition, raws);
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

/// What comes within a moment.
fn poll(client: &BaseConsumer) -> KafkaResult<Vec<Came>> {
    let (mut came, mut wait) = (Vec::new(), POLL);
    while came.len() < BATCH_MAX {
        match client.poll(wait) {
            None => break,
            Some(Ok(record)) => came.push(Came::Record(record.partition(), Box::new(Raw::copy(&record)))),
            Some(Err(KafkaError::PartitionEOF(partition))) => came.push(Came::End(partition)),
            // One broker of several, or one that comes back: whether nothing comes any more shows by itself.
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

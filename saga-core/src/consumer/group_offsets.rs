//! Where a consumer stands in its topics: what the group has come to, and whether that is of the topic that is there
//! now.
//!
//! Kafka keeps a group's offsets by the topic's name. An offset of a topic that was deleted means nothing in the one
//! that was made again. It may be committed after that: records were in hand. So each offset is committed with the id
//! of its topic. An offset of another topic is not used, in whichever process and however late. An offset without an
//! id, an operator's or that of an older version, is believed. So is one with other metadata, which another program
//! left. So is one that a mirror brought from another cluster, where the same topic has another id.

use super::{ConsumerConfig, client};
use crate::clock;
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often the consumer asks, and how long it waits after a failure.
const TRIES_MAX: usize = 3;
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long the brokers may take for each answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The library logs a topic's id when it has its metadata. The consumer waits no longer than this: some brokers know no
/// ids.
const ID_MAX: Duration = Duration::from_millis(500);
const ID_TICK: Duration = Duration::from_millis(5);

/// The identity of a topic behind its name: Kafka gives each topic that is made an id, and each cluster gives others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TopicId {
    /// The id of the cluster that gave the topic its id.
    pub(super) cluster: String,
    /// The topic's id, in base64.
    pub(super) topic: String,
}

impl TopicId {
    /// Reads the metadata that an offset was committed with; `None` if it is no id.
    fn parse(metadata: &str) -> Option<Self> {
        let (cluster, topic) = metadata.rsplit_once(':')?;
        let is_id =
            topic.len() == 22 && topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/-_".contains(&byte));
        is_id.then(|| Self { cluster: cluster.to_owned(), topic: topic.to_owned() })
    }
}

impl std::fmt::Display for TopicId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.cluster, self.topic)
    }
}

/// Where reading a partition begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// The topic, where its id is known.
    pub(super) id: Option<TopicId>,
    /// The offset that the group has come to; `None` where that does not count.
    pub(super) group: Option<i64>,
    /// Where to begin instead of the group's offset.
    pub(super) instead: Option<Offset>,
}

/// A part of a partition that this process has read, and that is no longer there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rewind {
    /// The topic that this process read, where its id is known.
    pub(super) of: Option<TopicId>,
    /// Where the partition ended when it had lost its tail, and how far this process had read by then. An offset of the
    /// group beyond that is of a member that has read what came since.
    pub(super) tail: Option<(i64, i64)>,
}

impl Start {
    /// Decides from `committed`, the offset that the group has come to, with the topic that it is of.
    fn of(id: Option<&TopicId>, committed: Option<(i64, Option<&TopicId>)>, rewind: Option<&Rewind>) -> Self {
        let of = committed.and_then(|(_, of)| of);
        let of_now = of.is_some() && of == id;
        let of_another = of.zip(id).is_some_and(|(of, id)| of.cluster == id.cluster && of.topic != id.topic);
        let instead = match rewind {
            _ if of_another => Some(Offset::Beginning),
            Some(Rewind { of: Some(of), tail }) if id == Some(of) => {
                let lost =
                    |(end, read): &(i64, i64)| committed.is_some_and(|(offset, _)| offset > *end && offset <= *read);
                tail.filter(lost).map(|(end, _)| Offset::Offset(end))
            }
            // Unless another member has read the topic that is there now.
            Some(_) if !of_now => Some(Offset::Beginning),
            _ => None,
        };
        let group = committed.map(|(offset, _)| offset).filter(|_| instead.is_none());
        Self { id: id.cloned(), group, instead }
    }

    /// The offset that is known to be read next; `None` before the first record.
    pub(super) fn next(&self) -> Option<i64> {
        match self.instead {
            Some(Offset::Offset(offset)) => Some(offset),
            _ => self.group,
        }
    }
}

/// What the brokers answered about partitions.
#[derive(Debug, Default)]
pub(super) struct GroupOffsets {
    ids: BTreeMap<String, TopicId>,
    committed: BTreeMap<(String, i32), (i64, Option<TopicId>)>,
}

impl GroupOffsets {
    pub(super) fn start(&self, topic: &str, partition: i32, rewind: Option<&Rewind>) -> Start {
        let committed = self.committed.get(&(topic.to_owned(), partition));
        let committed = committed.map(|(offset, of)| (*offset, of.as_ref()));
        Start::of(self.ids.get(topic), committed, rewind)
    }

    /// Whether it is known of each offset whether it is of the topic that is there now.
    fn is_whole(&self) -> bool {
        self.committed.iter().all(|((topic, _), (_, of))| of.is_none() || self.ids.contains_key(topic))
    }
}

/// Asks the brokers, up to [`TRIES_MAX`] times.
///
/// # Errors
/// In words, when the brokers did not answer.
pub(super) async fn ask(config: &Arc<ConsumerConfig>, partitions: &TopicPartitionList) -> Result<GroupOffsets, String> {
    let mut why = String::new();
    for _ in 0..TRIES_MAX {
        let (config, partitions) = (Arc::clone(config), partitions.clone());
        match tokio::task::spawn_blocking(move || look(&config, &partitions)).await {
            Ok(Ok(offsets)) => return Ok(offsets),
            Ok(Err(error)) => why = error.to_string(),
            Err(error) => why = error.to_string(),
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
    Err(why)
}

/// Asks with a client of its own: a client that has known a topic for long may take it for another one.
pub(super) fn look(config: &ConsumerConfig, partitions: &TopicPartitionList) -> KafkaResult<GroupOffsets> {
    let client: BaseConsumer<Ids> =
        client::telling_ids(&mut client::asking(config)).create_with_context(Ids::default())?;
    let mut offsets = GroupOffsets::default();
    let elements = partitions.elements();
    let topics: std::collections::BTreeSet<&str> = elements.iter().map(|element| element.topic()).collect();
    for topic in topics {
        let metadata = client.fetch_metadata(Some(topic), ANSWER_MAX)?;
        if metadata.topics().iter().all(|topic| topic.error().is_none())
            && let Some(id) = id(&client, topic)
            && let Some(cluster) = client.client().fetch_cluster_id(ANSWER_MAX)
        {
            offsets.ids.insert(topic.to_owned(), TopicId { cluster, topic: id });
        }
    }
    for found in client.committed_offsets(partitions.clone(), ANSWER_MAX)?.elements() {
        found.error()?;
        if let Offset::Offset(offset) = found.offset() {
            let partition = (found.topic().to_owned(), found.partition());
            offsets.committed.insert(partition, (offset, TopicId::parse(found.metadata())));
        }
    }
    // To believe an offset that may be of another topic would be to pass over records.
    if offsets.is_whole() { Ok(offsets) } else { Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicId)) }
}

fn id(client: &BaseConsumer<Ids>, topic: &str) -> Option<String> {
    let until = clock::monotonic() + ID_MAX;
    loop {
        // The client reads nothing; what it says is in its log.
        drop(client.poll(ID_TICK));
        let id = client.context().0.lock().unwrap_or_else(PoisonError::into_inner).get(topic).cloned();
        if id.is_some() || clock::monotonic() > until {
            return id;
        }
    }
}

/// The ids that a client logged, by the topic's name.
#[derive(Default)]
struct Ids(Mutex<BTreeMap<String, String>>);

impl ClientContext for Ids {
    fn log(&self, _: RDKafkaLogLevel, _: &str, text: &str) {
        if let Some((topic, _, id)) = client::topic_id(text) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(topic.to_owned(), id.to_owned());
        }
    }
}

impl ConsumerContext for Ids {}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(cluster: &str, topic: &str) -> TopicId {
        TopicId { cluster: cluster.to_owned(), topic: topic.to_owned() }
    }

    #[test]
    fn only_an_offset_of_the_topic_that_is_there_now_is_gone_on_from() {
        let instead = |id: Option<&TopicId>, metadata: &str| {
            Start::of(id, Some((5, TopicId::parse(metadata).as_ref())), None).instead
        };
        let (was, is) = (id("c", "XPPOU8MURl+b04EK7X3/Bw"), id("c", "bjYnyU1yQzmRY2QTJ8AxNA"));
        assert_eq!(instead(Some(&was), &was.to_string()), None);
        assert_eq!(instead(Some(&is), &was.to_string()), Some(Offset::Beginning));
        // An operator's offset, another program's, one that a mirror brought, and one where the brokers know no ids.
        assert_eq!(instead(Some(&is), ""), None);
        assert_eq!(instead(Some(&is), "moved: by hand on Monday"), None);
        assert_eq!(instead(Some(&is), &id("another", &was.topic).to_string()), None);
        assert_eq!(instead(None, ""), None);
        assert_eq!(Start::of(Some(&is), None, None).instead, None);
    }

    #[test]
    fn an_offset_whose_topic_cannot_be_compared_is_not_believed() {
        let mut offsets = GroupOffsets::default();
        offsets.committed.insert(("t".into(), 0), (5, None));
        assert!(offsets.is_whole(), "it is of no topic");
        offsets.committed.insert(("t".into(), 1), (5, Some(id("c", "a"))));
        assert!(!offsets.is_whole());
        offsets.ids.insert("t".into(), id("c", "b"));
        assert!(offsets.is_whole());
    }

    #[test]
    fn a_partition_is_read_again_from_the_end_that_it_had_or_from_its_begin() {
        let (a, b) = (id("c", "a"), id("c", "b"));
        let rewind = |of: Option<&TopicId>, tail| Rewind { of: of.cloned(), tail };
        let start = |id: Option<&TopicId>, offset, of: Option<&TopicId>, rewind: &Rewind| {
            Start::of(id, Some((offset, of)), Some(rewind))
        };
        let tail = rewind(Some(&a), Some((3, 6)));
        assert_eq!(start(Some(&a), 5, Some(&a), &tail).instead, Some(Offset::Offset(3)));
        assert_eq!(start(Some(&a), 5, Some(&a), &tail).next(), Some(3));
        assert_eq!(start(Some(&a), 2, Some(&a), &tail).group, Some(2));
        assert_eq!(start(Some(&a), 9, Some(&a), &tail).group, Some(9), "another member has read it");
        // The partition was another topic's, whatever it lost.
        for known in [&tail, &rewind(Some(&a), None)] {
            assert_eq!(start(Some(&b), 5, None, known).instead, Some(Offset::Beginning));
            assert_eq!(start(Some(&b), 5, Some(&b), known).group, Some(5), "another member has read it");
        }
        // The partition may have been another topic's.
        assert_eq!(start(None, 5, None, &rewind(None, Some((3, 6)))).instead, Some(Offset::Beginning));
    }
}

//! Where a consumer stands in its topics: what the group has come to, and whether that is of the topic that is there now.
//!
//! Kafka keeps a group's offsets by the topic's name. An offset of a topic that was deleted means nothing in the one that was made
//! again, and it may be committed after that: records were in hand. So each offset is committed with the id of its topic, and one
//! with another id is not used, in whichever process and however late. An offset without an id, an operator's or that of an older
//! version, is believed; so is one with metadata that is no id, which another program left.

use super::{ConsumerConfig, client};
use crate::clock;
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::KafkaResult,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often it is asked, and how long after one failure.
const TRIES: usize = 3;
const AGAIN: Duration = Duration::from_millis(500);
/// How long the brokers may take for each answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The library says a topic's id when it has its metadata. Brokers that know no ids are not waited for any longer.
const ID_MAX: Duration = Duration::from_millis(500);
const ID_TICK: Duration = Duration::from_millis(5);

/// Where reading a partition begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// The topic's id, where that is known.
    pub(super) id: Option<String>,
    /// The offset that the group has come to; `None` where that does not count.
    pub(super) group: Option<i64>,
    /// Where to begin instead of that.
    pub(super) instead: Option<Offset>,
}

/// What this process has read of a partition is no longer there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rewind {
    /// The id of the topic that it read, where that is known.
    pub(super) of: Option<String>,
    /// Where the partition ended when it had lost its tail.
    pub(super) end: Option<i64>,
}

impl Start {
    /// `committed` is what the group has come to, with the id of the topic that it is of.
    fn of(id: Option<&str>, committed: Option<(i64, &str)>, rewind: Option<&Rewind>) -> Self {
        let of_now = committed.is_some_and(|(_, of)| id == Some(of));
        let of_another = committed.is_some_and(|(_, of)| is_id(of) && id.is_some_and(|id| id != of));
        let instead = match rewind {
            _ if of_another => Some(Offset::Beginning),
            Some(Rewind { of: Some(of), end }) if id == Some(of) => {
                end.filter(|end| committed.is_some_and(|(offset, _)| offset > *end)).map(Offset::Offset)
            }
            // Unless another member has read what is there now.
            Some(_) if !of_now => Some(Offset::Beginning),
            _ => None,
        };
        let group = committed.map(|(offset, _)| offset).filter(|_| instead.is_none());
        Self { id: id.map(str::to_owned), group, instead }
    }
}

/// Whether a text may be a topic's id: 16 bytes in base64 without padding. librdkafka writes `+` and `/`, Kafka's own tools `-` and `_`.
fn is_id(text: &str) -> bool {
    text.len() == 22 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/-_".contains(&byte))
}

/// What the brokers said of partitions.
#[derive(Debug, Default)]
pub(super) struct Standing {
    ids: BTreeMap<String, String>,
    committed: BTreeMap<(String, i32), (i64, String)>,
}

impl Standing {
    pub(super) fn start(&self, topic: &str, partition: i32, rewind: Option<&Rewind>) -> Start {
        let committed = self.committed.get(&(topic.to_owned(), partition));
        let committed = committed.map(|(offset, of)| (*offset, of.as_str()));
        Start::of(self.ids.get(topic).map(String::as_str), committed, rewind)
    }
}

/// Asks a few times.
///
/// # Errors
/// In words, when it was not said.
pub(super) async fn ask(config: &Arc<ConsumerConfig>, partitions: &TopicPartitionList) -> Result<Standing, String> {
    let mut why = String::new();
    for _ in 0..TRIES {
        let (config, partitions) = (Arc::clone(config), partitions.clone());
        match tokio::task::spawn_blocking(move || look(&config, &partitions)).await {
            Ok(Ok(standing)) => return Ok(standing),
            Ok(Err(error)) => why = error.to_string(),
            Err(error) => why = error.to_string(),
        }
        tokio::time::sleep(AGAIN).await;
    }
    Err(why)
}

/// Asks with a client of its own: one that has known a topic for long may take it for another one.
pub(super) fn look(config: &ConsumerConfig, partitions: &TopicPartitionList) -> KafkaResult<Standing> {
    let client: BaseConsumer<Ids> =
        client::telling_ids(&mut client::asking(config)).create_with_context(Ids::default())?;
    let mut standing = Standing::default();
    let elements = partitions.elements();
    let topics: std::collections::BTreeSet<&str> = elements.iter().map(|element| element.topic()).collect();
    for topic in topics {
        let metadata = client.fetch_metadata(Some(topic), ANSWER_MAX)?;
        if metadata.topics().iter().all(|topic| topic.error().is_none())
            && let Some(id) = id(&client, topic)
        {
            standing.ids.insert(topic.to_owned(), id);
        }
    }
    for found in client.committed_offsets(partitions.clone(), ANSWER_MAX)?.elements() {
        found.error()?;
        if let Offset::Offset(offset) = found.offset() {
            let partition = (found.topic().to_owned(), found.partition());
            standing.committed.insert(partition, (offset, found.metadata().to_owned()));
        }
    }
    Ok(standing)
}

fn id(client: &BaseConsumer<Ids>, topic: &str) -> Option<String> {
    let until = clock::monotonic() + ID_MAX;
    loop {
        // It reads nothing; what it says is in its log.
        drop(client.poll(ID_TICK));
        let id = client.context().0.lock().unwrap_or_else(PoisonError::into_inner).get(topic).cloned();
        if id.is_some() || clock::monotonic() > until {
            return id;
        }
    }
}

/// The ids that a client says.
#[derive(Default)]
struct Ids(Mutex<BTreeMap<String, String>>);

impl ClientContext for Ids {
    fn log(&self, _: RDKafkaLogLevel, _: &str, text: &str) {
        if let Some((topic, id)) = client::topic_id(text) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(topic.to_owned(), id.to_owned());
        }
    }
}

impl ConsumerContext for Ids {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_offset_of_the_topic_that_is_there_now_is_gone_on_from() {
        let instead = |id, committed| Start::of(id, committed, None).instead;
        let (was, is) = ("XPPOU8MURl+b04EK7X3/Bw", "bjYnyU1yQzmRY2QTJ8AxNA");
        assert_eq!(instead(Some(was), Some((5, was))), None);
        assert_eq!(instead(Some(is), Some((5, was))), Some(Offset::Beginning));
        // An operator's, another program's, and where the brokers know no ids.
        assert_eq!(instead(Some(is), Some((5, ""))), None);
        assert_eq!(instead(Some(is), Some((5, "moved by hand on Monday"))), None);
        assert_eq!(instead(None, Some((5, was))), None);
        assert_eq!(instead(Some(is), None), None);
    }

    #[test]
    fn a_partition_is_read_again_from_the_end_that_it_had_or_from_its_begin() {
        let rewind = |of: Option<&str>, end| Rewind { of: of.map(str::to_owned), end };
        let start = |id, committed, rewind: &Rewind| Start::of(id, Some(committed), Some(rewind));
        let tail = rewind(Some("a"), Some(3));
        assert_eq!(start(Some("a"), (5, "a"), &tail).instead, Some(Offset::Offset(3)));
        assert_eq!(start(Some("a"), (2, "a"), &tail).group, Some(2));
        // It was another topic, whatever it lost.
        for known in [&tail, &rewind(Some("a"), None)] {
            assert_eq!(start(Some("b"), (5, ""), known).instead, Some(Offset::Beginning));
            assert_eq!(start(Some("b"), (5, "b"), known).group, Some(5), "another member has read it");
        }
        // It may have been.
        assert_eq!(start(None, (5, ""), &rewind(None, Some(3))).instead, Some(Offset::Beginning));
    }
}

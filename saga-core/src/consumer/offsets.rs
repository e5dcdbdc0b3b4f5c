//! How far a consumer is, committed to its group: offsets, each with the topic that it is of (`group_offsets.rs` says why).

use super::{
    client::Client,
    group_offsets::{Rewind, TopicId},
    health::HealthState,
};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer as _},
    error::KafkaResult,
};
use std::sync::Arc;
use tokio::sync::watch;

/// Stores the offsets of one worker.
pub(super) struct Offsets {
    client: Arc<Client>,
    /// The topic that the offsets are of, where that is known.
    id: Option<TopicId>,
    /// The offset after what is done.
    done: watch::Sender<i64>,
}

impl Offsets {
    pub(super) fn new(client: &Arc<Client>, id: Option<TopicId>, done: watch::Sender<i64>) -> Self {
        Self { client: Arc::clone(client), id, done }
    }

    /// The topic's id without its cluster.
    pub(super) fn topic_id(&self) -> Option<&str> {
        self.id.as_ref().map(|id| id.topic.as_str())
    }

    pub(super) fn store(&self, topic: &str, partition: i32, last: i64) {
        let next = last.saturating_add(1);
        self.done.send_replace(next);
        // The library refuses offsets of partitions that are not ours, as it should.
        let stored =
            place(topic, partition, next, self.id.as_ref()).and_then(|place| self.client.store_offsets(&place));
        if let Err(error) = stored {
            tracing::debug!(topic, partition, offset = last, %error, "an offset was not stored");
        }
    }
}

/// Takes the group back to the ends of partitions that lost their tail: another member may get them, and they may have
/// grown.
pub(super) fn give_back(client: &Client, health: &HealthState, held: Vec<(String, i32)>) {
    for (topic, partition) in held {
        let Some(Rewind { of: Some(id), tail: Some((end, _)) }) = health.rewind(&topic, partition) else { continue };
        // The stored offset goes back too: closing would commit it.
        let back = place(&topic, partition, end, Some(&id)).and_then(|place| {
            client.store_offsets(&place)?;
            client.commit(&place, CommitMode::Async)
        });
        if let Err(error) = back {
            tracing::warn!(topic, partition, %error, "the group was not taken back to where the partition ends");
        }
    }
}

/// An offset of a partition, with the id of its topic.
fn place(topic: &str, partition: i32, offset: i64, id: Option<&TopicId>) -> KafkaResult<TopicPartitionList> {
    let list = one(topic, partition);
    for mut element in list.elements() {
        element.set_offset(Offset::Offset(offset))?;
        if let Some(id) = id {
            element.set_metadata(id.to_string());
        }
    }
    Ok(list)
}

pub(super) fn names(list: &TopicPartitionList) -> Vec<(String, i32)> {
    list.elements().iter().map(|element| (element.topic().to_owned(), element.partition())).collect()
}

pub(super) fn one(topic: &str, partition: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(topic, partition);
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        consumer::{
            ConsumerConfig,
            buffer::Buffer,
            client::{self, Context},
            ends::Ends,
            group_offsets::{self, Start},
        },
        testkit::{Record, TestTopic, brokers, produce, unique},
    };
    use rdkafka::{
        Statistics,
        statistics::{Broker, Partition, Topic},
    };
    use std::{sync::atomic::AtomicBool, time::Duration};
    use tokio::sync::mpsc::unbounded_channel;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn closing_does_not_undo_that_the_group_was_taken_back() {
        let topic = TestTopic::create("tail", 1).await;
        produce(&topic, &[Record::default()]).await;
        let config = ConsumerConfig::new(&brokers(), &unique("group"), [topic.name()]);
        let pool = sqlx::PgPool::connect_lazy("postgres://nobody@localhost/offsets").unwrap();
        let health = Arc::new(HealthState::new(&config.group, &config.brokers, &pool));
        // The client answers rebalances itself.
        let context =
            Context { rebalances: unbounded_channel().0, health: Arc::clone(&health), closing: AtomicBool::new(true) };
        let client = Arc::new(client::connect(&config, context).unwrap());
        tokio::time::timeout(Duration::from_secs(40), client.recv()).await.unwrap().unwrap();
        let asks = || group_offsets::look(&config, &one(topic.name(), 0)).unwrap().start(topic.name(), 0, None);
        let id = tokio::task::block_in_place(asks).id;
        assert!(id.is_some());
        let (done, is_done) = watch::channel(-1);
        let offsets = Offsets::new(&client, id.clone(), done);
        offsets.store(topic.name(), 0, 9);
        tokio::task::block_in_place(|| client.commit_consumer_state(CommitMode::Sync)).unwrap();
        assert_eq!(tokio::task::block_in_place(asks).group, Some(10));
        // The record in hand is finished: its offset is stored, and not committed yet.
        offsets.store(topic.name(), 0, 11);
        health.reads(topic.name(), 0, Arc::new(Buffer::new(1, || {})), is_done, &Start { id, ..Start::default() });
        let mut said = Statistics::default();
        said.brokers.insert("b".into(), Broker { state: "UP".into(), ..Broker::default() });
        let partitions = [(0, Partition { next_offset: 12, ..Partition::default() })].into();
        said.topics.insert(topic.name().into(), Topic { partitions, ..Topic::default() });
        health.statistics(&said);
        health.asks();
        let ranges = [((topic.name().to_owned(), 0), (0, 8))].into();
        health.compare(Ends { ranges, ..Ends::default() }, clock::monotonic());

        give_back(&client, &health, vec![(topic.name().to_owned(), 0)]);
        drop(offsets);
        tokio::task::block_in_place(|| drop(client));

        assert_eq!(tokio::task::block_in_place(asks).group, Some(8));
    }
}

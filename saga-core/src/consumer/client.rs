//! The Kafka client: its settings, and what it calls back.
//!
//! A rebalance is answered by the polling task, not in the callback: a revoked partition's worker may have a transaction
//! open, and waiting for it must not block a thread of the runtime. The client library waits for the answer. Only while
//! the client is closed does the callback answer, because nobody polls any more.

use super::{ConsumerConfig, health::Pulse};
use rdkafka::{
    ClientConfig, ClientContext, Statistics, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext, StreamConsumer},
    error::{KafkaError, KafkaResult},
    types::RDKafkaRespErr,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::mpsc::UnboundedSender;

/// The client of a consumer.
pub(super) type Client = StreamConsumer<Context>;

/// A change of what we read.
#[derive(Debug, Clone)]
pub(super) enum Rebalance {
    /// These too.
    Assigned(TopicPartitionList),
    /// These no longer.
    Revoked(TopicPartitionList),
}

/// What the client library calls.
pub(super) struct Context {
    pub(super) rebalances: UnboundedSender<Rebalance>,
    pub(super) pulse: Arc<Pulse>,
    pub(super) closing: AtomicBool,
}

impl Context {
    /// From now on rebalances are answered at once.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }
}

impl ClientContext for Context {
    /// What matters of it we say ourselves, once; the library repeats itself for as long as a broker is away. That a topic is
    /// another one under its old name it says nowhere else.
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        if let Some((topic, was, is)) = topic_id(text) {
            self.pulse.topic_is(topic, was, is);
        }
        tracing::debug!(target: "librdkafka", ?level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }

    fn stats(&self, statistics: Statistics) {
        self.pulse.statistics(&statistics);
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, client: &BaseConsumer<Self>, code: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        let rebalance = match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Rebalance::Assigned(partitions.clone()),
            _ => Rebalance::Revoked(partitions.clone()),
        };
        if self.closing.load(Ordering::SeqCst) || self.rebalances.send(rebalance.clone()).is_err() {
            answer(client, &rebalance);
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        // An offset that is not committed is a record that comes again, which the inbox is for.
        if let Err(error) = result {
            tracing::debug!(%error, "offsets were not committed");
        }
    }
}

/// What the library says for a topic that has no id.
const NO_ID: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// A topic, the id that it had, and the one that it has now. The library says so in its log when it sees the topic for the first time, and when it was
/// deleted and made again: it then goes on at the offset, and the leader's epoch, that it had in the old one.
pub(super) fn topic_id(text: &str) -> Option<(&str, Option<&str>, &str)> {
    let (topic, ids) = text.split_once(" changed id from ")?;
    let topic = topic.rsplit(' ').next()?;
    let (was, is) = ids.split_once(" to ")?;
    let is = is.trim_end();
    (is != NO_ID && !topic.is_empty()).then_some((topic, Some(was).filter(|was| *was != NO_ID), is))
}

/// Tells the library that a rebalance has been taken note of.
pub(super) fn answer<C: rdkafka::consumer::Consumer<Context>>(client: &C, rebalance: &Rebalance) {
    let answered = match rebalance {
        Rebalance::Assigned(partitions) => client.incremental_assign(partitions),
        Rebalance::Revoked(partitions) => client.incremental_unassign(partitions),
    };
    // It fails when the library has changed its mind meanwhile; it then says what it wants now.
    if let Err(error) = answered {
        tracing::debug!(%error, ?rebalance, "a rebalance was not taken up");
    }
}

/// A client of the group, subscribed.
pub(super) fn connect(config: &ConsumerConfig, context: Context) -> KafkaResult<Client> {
    let client: Client = telling_ids(&mut ClientConfig::new())
        .set("bootstrap.servers", &config.brokers)
        .set("group.id", &config.group)
        .set("client.id", &config.group)
        // A group that is new must not miss what was said before it was there.
        .set("auto.offset.reset", "earliest")
        // An offset is stored by us after its transaction committed, and committed lazily by the library.
        .set("enable.auto.offset.store", "false")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        // Only what moves is taken away in a rebalance; the rest is read on.
        .set("partition.assignment.strategy", "cooperative-sticky")
        // A process that died is replaced after this, and its own successor waits as long: by default the least that brokers
        // allow. The heartbeats are a thread of the library, not a task of ours, so a busy process does not miss it.
        .set("session.timeout.ms", config.session_timeout.as_millis().to_string())
        // A member learns of a rebalance with its next heartbeat.
        .set("heartbeat.interval.ms", (config.session_timeout / 6).as_millis().to_string())
        // What is fetched ahead of the buffers, and how soon after they are emptied it is fetched on.
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        // A partition that is resumed is not fetched before the broker has answered the fetch that is under way; an idle
        // one is answered after this. (With the default of 500 ms a slow worker ran dry after each pause: measured.)
        .set("fetch.wait.max.ms", "100")
        .set("reconnect.backoff.max.ms", "2000")
        // A topic that is created later, or gets more partitions, is noticed within this.
        .set("topic.metadata.refresh.interval.ms", "10000")
        .set("allow.auto.create.topics", "false")
        .set("statistics.interval.ms", "2000")
        .create_with_context(context)?;
    let topics: Vec<&str> = config.topics.iter().map(String::as_str).collect();
    client.subscribe(&topics)?;
    Ok(client)
}

/// With a few lines of log for each refresh of the metadata: see [`topic_id`].
pub(super) fn telling_ids(config: &mut ClientConfig) -> &mut ClientConfig {
    config.set("debug", "topic").set_log_level(RDKafkaLogLevel::Debug)
}

/// Settings of a client that asks about topics and groups: one of its own, so that the one that polls is not held up, nor its
/// closing. It joins no group and says nothing.
pub(super) fn asking(config: &ConsumerConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set_log_level(RDKafkaLogLevel::Emerg)
        .set("bootstrap.servers", &config.brokers)
        .set("group.id", &config.group)
        .set("client.id", &config.group)
        .set("enable.auto.commit", "false")
        .set("allow.auto.create.topics", "false");
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topics_id_is_found_in_the_line_that_says_it() {
        let text = "[thrd:main]: Topic orders.replies changed id from AAAAAAAAAAAAAAAAAAAAAA to 0OdD4H3gTDSwv4tPVPwPCg";
        assert_eq!(topic_id(text), Some(("orders.replies", None, "0OdD4H3gTDSwv4tPVPwPCg")));
        let again = "Topic t changed id from 0OdD4H3gTDSwv4tPVPwPCg to XPPOU8MURl+b04EK7X3+Bw";
        assert_eq!(topic_id(again), Some(("t", Some("0OdD4H3gTDSwv4tPVPwPCg"), "XPPOU8MURl+b04EK7X3+Bw")));
        assert_eq!(topic_id("Topic t changed id from 0OdD4H3gTDSwv4tPVPwPCg to AAAAAAAAAAAAAAAAAAAAAA"), None);
        assert_eq!(topic_id("[thrd:main]: Topic orders.replies partition count is zero"), None);
    }
}

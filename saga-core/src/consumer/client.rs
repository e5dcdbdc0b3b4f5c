//! The Kafka client: its settings, and what it calls back.
//!
//! The polling task answers a rebalance, not the callback. A revoked partition's worker may have a transaction open,
//! and waiting for it must not block a thread of the runtime. The client library waits for the answer. The callback
//! answers only while the client is closed, because nothing polls any more.

use super::{ConsumerConfig, health::HealthState};
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

/// A change of the partitions that this member reads.
#[derive(Debug, Clone)]
pub(super) enum Rebalance {
    /// The member reads these partitions, too.
    Assigned(TopicPartitionList),
    /// The member no longer reads these partitions.
    Revoked(TopicPartitionList),
}

/// The callbacks of the client library.
pub(super) struct Context {
    pub(super) rebalances: UnboundedSender<Rebalance>,
    pub(super) health: Arc<HealthState>,
    pub(super) closing: AtomicBool,
}

impl Context {
    /// From now on the callback answers rebalances at once.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }
}

impl ClientContext for Context {
    /// The consumer itself logs what matters of this, once; the library repeats itself for as long as a broker is away.
    /// Only this log shows that a topic is another one under its old name.
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        if let Some((topic, was, is)) = topic_id(text).filter(|_| !self.closing.load(Ordering::SeqCst)) {
            self.health.topic_is(topic, was, is);
        }
        tracing::debug!(target: "librdkafka", ?level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }

    /// A client that does not close in time goes on saying that it reaches no broker. Its successor speaks for the
    /// consumer then.
    fn stats(&self, statistics: Statistics) {
        if !self.closing.load(Ordering::SeqCst) {
            self.health.statistics(&statistics);
        }
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
        // An offset that is not committed leads to a record that comes again, which the inbox is for.
        if let Err(error) = result {
            tracing::debug!(%error, "offsets were not committed");
        }
    }
}

/// The id that the library logs for a topic without an id.
const NO_ID: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// Parses a topic, the id that it had, and the id that it has now. The library logs them when it sees the topic for the
/// first time, and when the topic was deleted and made again. In the new topic it goes on at the offset and the
/// leader's epoch of the old one.
pub(super) fn topic_id(text: &str) -> Option<(&str, Option<&str>, &str)> {
    let (topic, ids) = text.split_once(" changed id from ")?;
    let topic = topic.rsplit(' ').next()?;
    let (was, is) = ids.split_once(" to ")?;
    let is = is.trim_end();
    (is != NO_ID && !topic.is_empty()).then_some((topic, Some(was).filter(|was| *was != NO_ID), is))
}

/// Answers the library that a rebalance has been taken note of.
pub(super) fn answer<C: rdkafka::consumer::Consumer<Context>>(client: &C, rebalance: &Rebalance) {
    let answered = match rebalance {
        Rebalance::Assigned(partitions) => client.incremental_assign(partitions),
        Rebalance::Revoked(partitions) => client.incremental_unassign(partitions),
    };
    // The answer fails when the library has changed its mind meanwhile; it then says what it wants now.
    if let Err(error) = answered {
        tracing::debug!(%error, ?rebalance, "a rebalance was not taken up");
    }
}

/// Makes a client of the group, subscribed to its topics.
pub(super) fn connect(config: &ConsumerConfig, context: Context) -> KafkaResult<Client> {
    let client: Client = telling_ids(&mut ClientConfig::new())
        .set("bootstrap.servers", &config.brokers)
        .set("group.id", &config.group)
        .set("client.id", &config.group)
        // A new group must not miss what was written before it was there.
        .set("auto.offset.reset", "earliest")
        // The worker stores an offset after its transaction committed; the library commits it lazily.
        .set("enable.auto.offset.store", "false")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        // A rebalance takes away only the partitions that move; the others are read on.
        .set("partition.assignment.strategy", "cooperative-sticky")
        // A process that died is replaced after this, and its own successor waits as long. The default is the least
        // that brokers allow. A thread of the library sends the heartbeats, not a task of ours, so a busy process does
        // not miss them.
        .set("session.timeout.ms", config.session_timeout.as_millis().to_string())
        // A member learns of a rebalance with its next heartbeat.
        .set("heartbeat.interval.ms", (config.session_timeout / 6).as_millis().to_string())
        // What is fetched ahead of the buffers, and how soon after they are emptied it is fetched on.
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        // A partition that is resumed is not fetched before the broker has answered the fetch under way. The broker
        // answers an idle fetch after this. (With the default of 500 ms a slow worker ran dry after each pause:
        // measured.)
        .set("fetch.wait.max.ms", "100")
        .set("reconnect.backoff.max.ms", "2000")
        // The client notices a new topic, or a topic's new partitions, within this.
        .set("topic.metadata.refresh.interval.ms", "10000")
        .set("allow.auto.create.topics", "false")
        .set("statistics.interval.ms", "2000")
        .create_with_context(context)?;
    let topics: Vec<&str> = config.topics.iter().map(String::as_str).collect();
    client.subscribe(&topics)?;
    Ok(client)
}

/// Has the client log a few lines for each refresh of the metadata: see [`topic_id`].
pub(super) fn telling_ids(config: &mut ClientConfig) -> &mut ClientConfig {
    config.set("debug", "topic").set_log_level(RDKafkaLogLevel::Debug)
}

/// The settings of a client that asks about topics and groups. It is a client of its own, so that it holds up neither
/// the polling client nor its closing. It joins no group and logs nothing.
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

    #[tokio::test]
    async fn a_client_that_is_closed_says_nothing_of_its_consumer_any_more() {
        let pool = sqlx::PgPool::connect_lazy("postgres://nobody@localhost/clients").unwrap();
        let health = Arc::new(HealthState::new("group", "localhost:3", &pool));
        let (rebalances, _) = tokio::sync::mpsc::unbounded_channel();
        let context = Context { rebalances, health: Arc::clone(&health), closing: AtomicBool::new(false) };
        context.close();
        context.stats(Statistics::default());
        assert!(health.kafka.issue().is_none(), "its successor may reach a broker");
        context.closing.store(false, Ordering::SeqCst);
        context.stats(Statistics::default());
        assert!(health.kafka.issue().is_some());
    }

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

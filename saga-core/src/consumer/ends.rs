//! What the brokers say of a consumer's topics: whether each is there and led, and where its partitions end.
//!
//! The polling client cannot be asked. It says nothing of a topic that is gone, and of a topic that was made again it
//! believes what it knew of the old. So a client of its own asks, every few seconds, and [`HealthState`] compares that with
//! how far the consumer is.

use super::{ConsumerConfig, health::HealthState};
use crate::{
    brokers::{Inquirer, Quiet},
    clock,
    part::{Cause, HealthIssue},
};
use rdkafka::{
    client::Client,
    error::{KafkaResult, RDKafkaErrorCode as Code},
};
use std::{collections::BTreeMap, convert::Infallible, time::Duration};

/// How long after one look the next one begins.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long the brokers may take for an answer; a process that stops may have to wait for it.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What the brokers said at one look.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// What is wrong with a topic, by its name.
    pub(super) issues: BTreeMap<String, HealthIssue>,
    /// The first offset of each partition, and the one after the last.
    pub(super) ranges: BTreeMap<(String, i32), (i64, i64)>,
    /// The partitions for which the brokers did not give a range, and why.
    pub(super) missed: BTreeMap<(String, i32), String>,
}

/// Asks the brokers, over and over.
pub(super) async fn keep_looking(config: &ConsumerConfig, health: &HealthState) -> Infallible {
    let brokers = match Inquirer::new(&config.brokers, &config.group) {
        Ok(brokers) => brokers,
        // The polling client has the same settings, and its error ends the consumer.
        Err(error) => {
            tracing::debug!(%error, "where partitions end cannot be asked");
            return std::future::pending().await;
        }
    };
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let (topics, held) = (config.topics.clone(), health.asks());
        let all = held.clone();
        match brokers.ask(move |client| look(client, &topics, held)).await {
            Ok(ends) => health.compare(ends, clock::monotonic()),
            Err(error) => {
                tracing::debug!(group = config.group, %error, "where partitions end is not known");
                health.unanswered(all, &error.to_string());
            }
        }
    }
}

fn look(client: &Client<Quiet>, topics: &[String], held: Vec<(String, i32)>) -> KafkaResult<Ends> {
    let mut ends = Ends::default();
    for name in topics {
        let metadata = client.fetch_metadata(Some(name), ANSWER_MAX)?;
        for topic in metadata.topics().iter().filter(|topic| topic.name() == name) {
            let leaderless = topic.partitions().iter().find(|partition| partition.leader() < 0);
            let issue = match (topic.error().map(Code::from), leaderless) {
                (Some(code), _) => issue(name, code),
                (None, Some(partition)) => {
                    let reason = format!("partition {} of {name} has no leader", partition.id());
                    Some(HealthIssue::new(Cause::Leaderless, reason))
                }
                (None, None) => None,
            };
            ends.issues.extend(issue.map(|issue| (name.clone(), issue)));
        }
    }
    for (topic, partition) in held {
        if ends.issues.contains_key(&topic) {
            continue;
        }
        match client.fetch_watermarks(&topic, partition, ANSWER_MAX) {
            Ok(range) => drop(ends.ranges.insert((topic, partition), range)),
            Err(error) => drop(ends.missed.insert((topic, partition), error.to_string())),
        }
    }
    Ok(ends)
}

fn issue(topic: &str, code: Code) -> Option<HealthIssue> {
    match code {
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
            Some(HealthIssue::new(Cause::TopicMissing, format!("the topic {topic} is not there")))
        }
        Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed | Code::ClusterAuthorizationFailed => {
            Some(HealthIssue::new(Cause::KafkaForbidden, format!("the brokers refuse the topic {topic}: {code}")))
        }
        Code::LeaderNotAvailable | Code::BrokerNotAvailable | Code::ReplicaNotAvailable => {
            Some(HealthIssue::new(Cause::Leaderless, format!("the topic {topic} has no leader: {code}")))
        }
        // The error passes, or the polling client reports it.
        _ => None,
    }
}

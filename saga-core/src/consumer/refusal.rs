//! What Kafka refuses a consumer until an operator acts, and whether it still does.
//!
//! The client library reports a refusal once for each partition, and nothing when it is over: a topic without news
//! looks the same. So while something is refused, a client of its own asks now and then for what the consumer needs.
//! Nothing of this survives the process; Kafka refuses the next one the same.

use super::{ConsumerConfig, client};
use crate::{clock, part::Cause};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, KafkaResult},
    types::RDKafkaErrorCode as Code,
};
use std::time::Duration;

/// How often the consumer asks whether Kafka still refuses.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(5);
/// How long the brokers may take to answer for one topic.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The kind of refusal, for health.
pub(super) fn cause(code: Code) -> Cause {
    match code {
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => Cause::TopicMissing,
        _ => Cause::KafkaForbidden,
    }
}

/// What is refused, and what an operator does about it, in words.
pub(super) fn reason(config: &ConsumerConfig, code: Code) -> String {
    let (group, topics) = (&config.group, config.topics.join(", "));
    let cure = match code {
        Code::TopicAuthorizationFailed => "grant this client the rights Read and Describe on the topics",
        Code::GroupAuthorizationFailed => "grant this client the right Read on the group",
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
            "create the topics that are missing, or correct their names"
        }
        Code::SaslAuthenticationFailed | Code::Authentication | Code::SSL => {
            "correct how this client identifies itself"
        }
        _ => "correct the settings of this client or of the brokers",
    };
    format!("Kafka refuses group {group} its topics ({topics}): {code:?}, {code}; {cure}")
}

/// Whether the consumer would be served now: the code that refuses it, or `None` where the brokers do not say.
pub(super) fn ask(config: &ConsumerConfig) -> Option<Result<(), Code>> {
    match serves(config) {
        Ok(true) => Some(Ok(())),
        Ok(false) => None,
        Err(error) => error.rdkafka_error_code().map(Err),
    }
}

fn serves(config: &ConsumerConfig) -> KafkaResult<bool> {
    let client: BaseConsumer = client::asking(config).set("enable.partition.eof", "true").create()?;
    for topic in &config.topics {
        let mut place = TopicPartitionList::with_capacity(1);
        place.add_partition_offset(topic, 0, Offset::End)?;
        // Checks the right to the group.
        for found in client.committed_offsets(place.clone(), ANSWER_MAX)?.elements() {
            found.error()?;
        }
        // Checks the right to the topic: a client reaches its end where reading is allowed.
        client.assign(&place)?;
        if !reaches_the_end(&client)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn reaches_the_end(client: &BaseConsumer) -> KafkaResult<bool> {
    let until = clock::monotonic() + ANSWER_MAX;
    while let Some(left) = until.checked_duration_since(clock::monotonic()) {
        match client.poll(left) {
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(true),
            Some(Ok(_)) => return Ok(true),
            Some(Err(error)) => return Err(error),
            None => {}
        }
    }
    Ok(false)
}

//! Creates declared topics; reports a topic that is not as declared, and never changes it.
//!
//! Each declared topic has its dead letter topic beside it, `<name>.dlt`, with as many partitions. That topic keeps its
//! records for ever: a dead letter must not go away before an operator has read it. A topic's owner creates it at
//! start. Several processes may try at once, or after one another: a topic that is there already is what was wanted. A
//! process that dies here has created some; the next start creates the rest.

use super::config::KafkaSettings;
use crate::{
    brokers::{Inquirer, Quiet},
    outage::Wait,
    part::{Cause, HealthIssue},
    retry::Backoff,
    topic::{Cleanup, Topic, dead_letter_topic},
};
use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication},
    error::{KafkaError, RDKafkaErrorCode},
};
use std::time::Duration;

/// How long one request to Kafka may take before it is asked again.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// How long Kafka may take to list its topics. The call blocks a thread, and a process that is asked to stop waits for
/// its threads.
const METADATA_MAX: Duration = Duration::from_secs(2);
/// The pauses between attempts while Kafka is away.
const WAIT: Backoff = Backoff::doubling(Duration::from_millis(200), Duration::from_secs(2));

/// What [`ensure`] found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicsReport {
    /// Topics that were created.
    pub created: Vec<String>,
    /// Topics that are not as declared: left alone.
    pub mismatches: Vec<Mismatch>,
}

/// A topic that is not as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// The name of the topic.
    pub topic: String,
    /// The setting: `partitions`, `cleanup.policy` or `retention.ms`.
    pub setting: &'static str,
    /// The value of the declaration.
    pub declared: String,
    /// The value that Kafka has.
    pub actual: String,
}

/// Topics that were not created.
#[derive(Debug, thiserror::Error)]
pub enum TopicError {
    /// Kafka refused to create a topic; waiting will not change it.
    #[error("topic `{topic}` cannot be created: {code}")]
    Refused {
        /// The name of the topic.
        topic: String,
        /// Kafka's error code.
        code: RDKafkaErrorCode,
    },
    /// The client could not be made, or failed.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
}

/// A topic as it is to be.
struct Wanted {
    name: String,
    partitions: i32,
    policy: &'static str,
    retention: String,
}

impl Wanted {
    /// A declared topic and its dead letters.
    fn pair(topic: &Topic) -> [Self; 2] {
        let forever = "-1".to_owned();
        let policy = match topic.cleanup {
            Cleanup::Delete => "delete",
            Cleanup::Compact => "compact",
        };
        let retention = topic.retention.map_or_else(|| forever.clone(), |kept| kept.as_millis().to_string());
        let partitions = topic.partitions;
        let dead = Self { name: dead_letter_topic(topic.name), partitions, policy: "delete", retention: forever };
        [Self { name: topic.name.to_owned(), partitions, policy, retention }, dead]
    }

    fn mismatch(&self, setting: &'static str, declared: &str, actual: &str) -> Mismatch {
        Mismatch { topic: self.name.clone(), setting, declared: declared.into(), actual: actual.into() }
    }
}

/// Makes sure that every topic of `declared` exists, and its dead letter topic. Waits for Kafka, and logs that once;
/// warns of each mismatch.
///
/// # Errors
/// Kafka refuses a topic, or the right to make it. While Kafka is away, the function waits.
pub async fn ensure(settings: &KafkaSettings, declared: &[Topic]) -> Result<TopicsReport, TopicError> {
    ensure_and_tell(settings, declared, |_| {}).await
}

/// Makes sure of the topics like [`ensure`]; `tell` gets what stands in the way.
pub(super) async fn ensure_and_tell(
    settings: &KafkaSettings,
    declared: &[Topic],
    tell: impl Fn(HealthIssue),
) -> Result<TopicsReport, TopicError> {
    let brokers = Inquirer::new(&settings.brokers, "topics")?;
    let wanted: Vec<Wanted> = declared.iter().flat_map(Wanted::pair).collect();
    let mut delays = WAIT.delays();
    let wait = Wait::default();
    loop {
        match attempt(&brokers, settings, &wanted).await {
            Ok(report) => {
                if wait.ends() {
                    tracing::info!("Kafka is there");
                }
                for Mismatch { topic, setting, declared, actual } in &report.mismatches {
                    tracing::warn!(topic, setting, declared, actual, "a topic is not as declared; it is left alone");
                }
                return Ok(report);
            }
            Err(TopicError::Kafka(error)) => {
                tell(HealthIssue::new(Cause::KafkaAway, error.to_string()));
                if wait.begins() {
                    tracing::warn!(brokers = settings.brokers, %error, "waiting for Kafka");
                }
                tokio::time::sleep(delays.next().unwrap_or(WAIT.max)).await;
            }
            Err(refused) => {
                let cause = match refused {
                    TopicError::Refused { code, .. } if is_a_right(code) => Cause::KafkaForbidden,
                    _ => Cause::TopicMissing,
                };
                tell(HealthIssue::new(cause, refused.to_string()));
                return Err(refused);
            }
        }
    }
}

fn is_a_right(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed | Code::PolicyViolation)
}

async fn attempt(brokers: &Inquirer, settings: &KafkaSettings, wanted: &[Wanted]) -> Result<TopicsReport, TopicError> {
    let existing = partitions(brokers).await?;
    let admin = &brokers.administrator()?;
    let partitions_of = |topic: &Wanted| existing.iter().find(|(name, _)| *name == topic.name).map(|(_, count)| *count);
    let (present, missing): (Vec<_>, Vec<_>) = wanted.iter().partition(|topic| partitions_of(topic).is_some());

    let created = create(admin, settings, &missing).await?;
    let mut mismatches = Vec::new();
    for topic in &present {
        let actual = partitions_of(topic).unwrap_or_default();
        if actual != topic.partitions {
            mismatches.push(topic.mismatch("partitions", &topic.partitions.to_string(), &actual.to_string()));
        }
    }
    mismatches.extend(compare_configs(admin, &present).await?);
    Ok(TopicsReport { created, mismatches })
}

/// Asks for every topic with its number of partitions.
async fn partitions(brokers: &Inquirer) -> Result<Vec<(String, i32)>, KafkaError> {
    let metadata = brokers.ask(|client| client.fetch_metadata(None, METADATA_MAX)).await?;
    let count = |partitions: usize| i32::try_from(partitions).unwrap_or(i32::MAX);
    Ok(metadata.topics().iter().map(|topic| (topic.name().to_owned(), count(topic.partitions().len()))).collect())
}

async fn create(
    admin: &AdminClient<Quiet>,
    settings: &KafkaSettings,
    missing: &[&Wanted],
) -> Result<Vec<String>, TopicError> {
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let new: Vec<NewTopic<'_>> = missing
        .iter()
        .map(|topic| {
            NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(settings.replication_factor))
                .set("cleanup.policy", topic.policy)
                .set("retention.ms", &topic.retention)
        })
        .collect();
    let options = AdminOptions::new().request_timeout(Some(REQUEST_MAX)).operation_timeout(Some(REQUEST_MAX));
    let mut created = Vec::new();
    for result in admin.create_topics(&new, &options).await? {
        match result {
            Ok(topic) => {
                tracing::info!(topic, "topic created");
                created.push(topic);
            }
            // Another process was faster.
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, code)) if waits(code) => {
                tracing::debug!(topic, %code, "not yet");
                return Err(KafkaError::AdminOp(code).into());
            }
            Err((topic, code)) => return Err(TopicError::Refused { topic, code }),
        }
    }
    Ok(created)
}

/// Whether Kafka may answer otherwise in a moment: it is starting, or has fewer brokers than copies for now.
fn waits(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        code,
        Code::RequestTimedOut
            | Code::BrokerTransportFailure
            | Code::AllBrokersDown
            | Code::NotController
            | Code::BrokerNotAvailable
            | Code::LeaderNotAvailable
            | Code::InvalidReplicationFactor
            | Code::OperationTimedOut
    )
}

async fn compare_configs(admin: &AdminClient<Quiet>, present: &[&Wanted]) -> Result<Vec<Mismatch>, KafkaError> {
    if present.is_empty() {
        return Ok(Vec::new());
    }
    let resources: Vec<_> = present.iter().map(|topic| ResourceSpecifier::Topic(&topic.name)).collect();
    let options = AdminOptions::new().request_timeout(Some(REQUEST_MAX));
    let described = admin.describe_configs(&resources, &options).await?;
    let mut mismatches = Vec::new();
    for (topic, config) in present.iter().zip(described) {
        // The process may not read the configuration: then there is nothing to compare.
        let Ok(config) = config else { continue };
        for (setting, declared) in [("cleanup.policy", topic.policy), ("retention.ms", topic.retention.as_str())] {
            let actual = config.get(setting).and_then(|entry| entry.value.clone()).unwrap_or_default();
            if actual != declared {
                mismatches.push(topic.mismatch(setting, declared, &actual));
            }
        }
    }
    Ok(mismatches)
}

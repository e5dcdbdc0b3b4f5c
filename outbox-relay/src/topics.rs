//! Questions to the brokers about a topic before the first row goes to it: is it there, may the relay write, how large
//! may a record be.

use rdkafka::{
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    error::{KafkaError, RDKafkaErrorCode},
    metadata::MetadataPartition,
    util::Timeout,
};
use saga_core::{
    brokers::{Inquirer, Quiet},
    clock,
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long the brokers may take to answer; then the relay asks again.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// How old the list of all topics' names may be.
const NAMED_MAX: Duration = Duration::from_secs(1);

/// The limit where the relay may not read the topic's `max.message.bytes`: the broker judges.
const UNKNOWN_LIMIT: usize = usize::MAX;

/// The state of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TopicState {
    /// The relay can write to the topic.
    Ready {
        /// Its `max.message.bytes`; `usize::MAX` where it may not be read.
        max_message_bytes: usize,
    },
    /// The topic is not there; with the reason.
    Missing(String),
    /// This process may not write to the topic; with the reason.
    Forbidden(String),
}

/// The names of all topics, and when the brokers gave them.
type Named = (Instant, Arc<HashSet<String>>);

/// Asks the brokers about topics.
#[derive(Clone)]
pub(crate) struct Topics {
    brokers: Arc<Inquirer>,
    /// The client for settings of topics.
    admin: Arc<Mutex<Arc<AdminClient<Quiet>>>>,
    /// All topics that the brokers name, and when they did; `None` before the first answer.
    named: Arc<Mutex<Option<Named>>>,
}

impl Topics {
    pub(crate) fn new(brokers: &str) -> Result<Self, KafkaError> {
        let brokers = Inquirer::new(brokers, "outbox-relay")?;
        let admin = Arc::new(Mutex::new(Arc::new(brokers.administrator()?)));
        Ok(Self { brokers: Arc::new(brokers), admin, named: Arc::default() })
    }

    /// Whether any broker answers.
    pub(crate) async fn reachable(&self) -> bool {
        self.brokers.ask(|client| client.fetch_metadata(Some("outbox-relay-ping"), ANSWER_MAX)).await.is_ok()
    }

    /// Asks about one topic; an error means that the brokers did not answer.
    pub(crate) async fn look(&self, topic: &str) -> Result<TopicState, KafkaError> {
        match self.limit(topic).await {
            Some(max_message_bytes) => Ok(TopicState::Ready { max_message_bytes }),
            // rdkafka 0.39 drops the broker's answer per topic. A topic that is missing then looks like one without
            // settings. So does one whose configuration may not be read (a right of its own, without which writing may
            // be allowed).
            None => self.look_without_configuration(topic).await,
        }
    }

    /// The topic's `max.message.bytes`; `None` where it is not known: the metadata shows whether the brokers are away, or
    /// only withhold a topic's settings.
    async fn limit(&self, topic: &str) -> Option<usize> {
        let options = AdminOptions::new().request_timeout(Some(Timeout::After(ANSWER_MAX)));
        let admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let described = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await;
        if described.is_err() {
            self.replace_admin(admin);
        }
        let described = described.ok()?.into_iter().next()?.ok()?;
        described.get("max.message.bytes")?.value.as_deref()?.parse().ok()
    }

    /// A client without an answer may never get one again: see [`saga_core::brokers`].
    fn replace_admin(&self, failed: Arc<AdminClient<Quiet>>) {
        let mut admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&admin, &failed)
            && let Ok(new) = self.brokers.administrator()
        {
            *admin = Arc::new(new);
        }
        // The last drop waits for the client's thread.
        std::thread::spawn(move || drop(failed));
    }

    /// Whether the brokers' list of all topics, of a moment ago, lacks this one. Where the brokers do not answer, the
    /// topic may be there.
    pub(crate) async fn lacks(&self, topic: &str) -> bool {
        self.named().await.is_some_and(|named| !named.contains(topic))
    }

    /// All topics that the brokers name, or named a moment ago; `None` when they do not answer.
    pub(crate) async fn named(&self) -> Option<Arc<HashSet<String>>> {
        let known = self.named.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, named)) = known.filter(|(at, _)| at.elapsed() < NAMED_MAX) {
            return Some(named);
        }
        let metadata = self.brokers.ask(|client| client.fetch_metadata(None, ANSWER_MAX)).await.ok()?;
        let named = Arc::new(metadata.topics().iter().map(|topic| topic.name().to_owned()).collect::<HashSet<_>>());
        *self.named.lock().unwrap_or_else(PoisonError::into_inner) = Some((clock::monotonic(), named.clone()));
        Some(named)
    }

    /// Whether a partition of the topic has no leader, by the brokers' answer.
    pub(crate) async fn lacks_leader(&self, topic: &str) -> Result<bool, KafkaError> {
        let name = topic.to_owned();
        let metadata = self.brokers.ask(move |client| client.fetch_metadata(Some(&name), ANSWER_MAX)).await?;
        let lacks = |partition: &MetadataPartition| partition.leader() < 0;
        Ok(metadata.topics().iter().any(|topic| topic.partitions().iter().any(lacks)))
    }

    async fn look_without_configuration(&self, topic: &str) -> Result<TopicState, KafkaError> {
        let name = topic.to_owned();
        let metadata = self.brokers.ask(move |client| client.fetch_metadata(Some(&name), ANSWER_MAX)).await?;
        match metadata.topics().first().and_then(|topic| topic.error()).map(RDKafkaErrorCode::from) {
            None => Ok(TopicState::Ready { max_message_bytes: UNKNOWN_LIMIT }),
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => {
                Ok(TopicState::Missing(format!("the topic {topic:?} does not exist")))
            }
            Some(RDKafkaErrorCode::InvalidTopic) => {
                Ok(TopicState::Missing(format!("{topic:?} is not a legal topic name")))
            }
            Some(code @ (RDKafkaErrorCode::LeaderNotAvailable | RDKafkaErrorCode::BrokerNotAvailable)) => {
                Err(KafkaError::MetadataFetch(code))
            }
            Some(code) => Ok(TopicState::Forbidden(format!("the brokers refuse the topic {topic:?}: {code}"))),
        }
    }
}

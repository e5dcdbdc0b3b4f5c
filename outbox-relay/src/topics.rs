//! What the brokers say about a topic before the first row goes to it: is it there, may we, how large may a record be.

use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    error::{KafkaError, RDKafkaErrorCode},
    util::Timeout,
};
use std::{sync::Arc, time::Duration};

/// How long the brokers may take to answer; they are asked again after that.
const PATIENCE: Duration = Duration::from_secs(5);

/// Kafka's default for `max.message.bytes`, used where the topic's may not be read.
const DEFAULT_LIMIT: usize = 1_048_588;

/// What a topic is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TopicState {
    /// It can be written to.
    Ready {
        /// Its `max.message.bytes`.
        max_message_bytes: usize,
    },
    /// It is not there.
    Missing(String),
    /// This process may not write to it.
    Forbidden(String),
}

/// Logs nothing by itself: who asks says what it means.
struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka admin client");
    }
}

/// Asks the brokers about topics.
#[derive(Clone)]
pub(crate) struct Topics {
    admin: Arc<AdminClient<Quiet>>,
}

impl Topics {
    pub(crate) fn new(brokers: &str) -> Result<Self, KafkaError> {
        let admin = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("client.id", "outbox-relay")
            .create_with_context(Quiet)?;
        Ok(Self { admin: Arc::new(admin) })
    }

    /// Whether any broker answers.
    pub(crate) async fn reachable(&self) -> bool {
        let admin = self.admin.clone();
        let asked =
            tokio::task::spawn_blocking(move || admin.inner().fetch_metadata(Some("outbox-relay-ping"), PATIENCE));
        matches!(asked.await, Ok(Ok(_)))
    }

    /// Asks about one topic; an error means that the brokers did not answer.
    pub(crate) async fn look(&self, topic: &str) -> Result<TopicState, KafkaError> {
        let options = AdminOptions::new().request_timeout(Some(Timeout::After(PATIENCE)));
        let described = self.admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await?;
        match described.into_iter().next() {
            Some(Ok(config)) => {
                let limit = config.get("max.message.bytes").and_then(|entry| entry.value.as_deref()?.parse().ok());
                Ok(TopicState::Ready { max_message_bytes: limit.unwrap_or(DEFAULT_LIMIT) })
            }
            // Reading a topic's configuration is a right of its own; writing may be allowed without it.
            Some(Err(RDKafkaErrorCode::TopicAuthorizationFailed)) => self.look_without_configuration(topic).await,
            Some(Err(RDKafkaErrorCode::UnknownTopicOrPartition)) => {
                Ok(TopicState::Missing(format!("the topic {topic:?} does not exist")))
            }
            Some(Err(RDKafkaErrorCode::InvalidTopic)) => {
                Ok(TopicState::Missing(format!("{topic:?} is not a legal topic name")))
            }
            Some(Err(code)) => Err(KafkaError::AdminOp(code)),
            None => Err(KafkaError::AdminOp(RDKafkaErrorCode::Unknown)),
        }
    }

    async fn look_without_configuration(&self, topic: &str) -> Result<TopicState, KafkaError> {
        let (admin, name) = (self.admin.clone(), topic.to_owned());
        let asked = tokio::task::spawn_blocking(move || {
            let metadata = admin.inner().fetch_metadata(Some(&name), PATIENCE)?;
            Ok::<_, KafkaError>(metadata.topics().first().and_then(|topic| topic.error()).map(RDKafkaErrorCode::from))
        });
        match asked.await.unwrap_or(Err(KafkaError::Canceled))? {
            None => Ok(TopicState::Ready { max_message_bytes: DEFAULT_LIMIT }),
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => {
                Ok(TopicState::Missing(format!("the topic {topic:?} does not exist")))
            }
            Some(code) => Ok(TopicState::Forbidden(format!("the brokers refuse the topic {topic:?}: {code}"))),
        }
    }
}

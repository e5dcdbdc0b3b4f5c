//! Questions to Kafka's brokers, by a client that is replaced when it gets no answer.
//!
//! A client forgets its brokers when one answers that the cluster has none, as the only broker of a cluster does just
//! after it stood still for long. It then begins anew with `bootstrap.servers`, unless the end of that same answer stops
//! the beginning first: a race in librdkafka (its issue 5301, seen in 2.12 and 2.13). Such a client has nothing left to
//! connect to, and no setting brings it back. So a client that asks is replaced after a question without an answer. A
//! consumer replaces its own when the brokers answer such questions and its own does not reach them.
//!
//! Nothing here survives the process; a new process connects by `bootstrap.servers`.
//!
//! ```no_run
//! use saga_core::brokers::Inquirer;
//! use std::time::Duration;
//!
//! # async fn ask() -> Result<(), rdkafka::error::KafkaError> {
//! let brokers = Inquirer::new("localhost:9092", "shop")?;
//! let metadata = brokers.ask(|client| client.fetch_metadata(None, Duration::from_secs(2))).await?;
//! println!("{} topics", metadata.topics().len());
//! # Ok(())
//! # }
//! ```

use crate::clock;
use rdkafka::{
    ClientConfig, ClientContext,
    admin::AdminClient,
    client::Client,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A client without an answer is replaced when it is older than this: during an outage a new one helps no more.
const REPLACED_AFTER: Duration = Duration::from_secs(5);

/// The client of an [`Inquirer`]. Its user knows what an error means, and logs it once.
pub struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }
}

/// Asks the brokers. It joins no group and creates no topic.
pub struct Inquirer {
    config: ClientConfig,
    current: Mutex<Current>,
}

struct Current {
    client: Arc<AdminClient<Quiet>>,
    made: Instant,
}

impl Current {
    fn make(config: &ClientConfig) -> KafkaResult<Self> {
        let client = AdminClient::from_config_and_context(config, Quiet)?;
        Ok(Self { client: Arc::new(client), made: clock::monotonic() })
    }
}

impl Inquirer {
    /// Connects with the first question.
    ///
    /// # Errors
    /// librdkafka does not accept the settings.
    pub fn new(brokers: &str, client_id: &str) -> KafkaResult<Self> {
        let mut config = ClientConfig::new();
        config
            .set_log_level(RDKafkaLogLevel::Emerg)
            .set("bootstrap.servers", brokers)
            .set("client.id", client_id)
            .set("log.connection.close", "false")
            // A question must not create a topic.
            .set("allow.auto.create.topics", "false");
        let current = Mutex::new(Current::make(&config)?);
        Ok(Self { config, current })
    }

    /// Asks with librdkafka's blocking calls, on a thread for such calls. `question` bounds its own time.
    ///
    /// # Errors
    /// Those of `question`. When no broker answered, the next question goes to a new client.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Client<Quiet>) -> KafkaResult<T> + Send + 'static,
    ) -> KafkaResult<T> {
        let client = self.client();
        let asked = tokio::task::spawn_blocking(move || question(client.inner()));
        let answer = asked.await.unwrap_or(Err(KafkaError::Canceled));
        answer.inspect_err(|error| self.unanswered(error))
    }

    /// The client, for an administrative request. Its error goes to [`Inquirer::unanswered`].
    pub fn client(&self) -> Arc<AdminClient<Quiet>> {
        Arc::clone(&self.lock().client)
    }

    /// Replaces the client if `error` says that no broker answered.
    pub fn unanswered(&self, error: &KafkaError) {
        let is_silence = matches!(
            error.rdkafka_error_code(),
            Some(Code::BrokerTransportFailure | Code::AllBrokersDown | Code::OperationTimedOut | Code::Resolve)
        );
        let mut current = self.lock();
        if !is_silence || clock::monotonic().saturating_duration_since(current.made) < REPLACED_AFTER {
            return;
        }
        match Current::make(&self.config) {
            Ok(new) => {
                let old = std::mem::replace(&mut *current, new);
                // The drop waits for the client's thread.
                std::thread::spawn(move || drop(old));
            }
            Err(error) => tracing::debug!(%error, "a client for questions could not be replaced"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

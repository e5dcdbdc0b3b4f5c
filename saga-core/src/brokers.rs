//! Questions to Kafka's brokers, by a client that is replaced when it reaches none.
//!
//! A client forgets its brokers when one answers that the cluster has none, as the only broker of a cluster does just
//! after it stood still for long. It then begins anew with `bootstrap.servers`, unless the end of that same answer stops
//! the beginning first: a race in librdkafka (its issue 5301, seen in 2.12 and 2.13). Such a client has nothing left to
//! connect to, and no setting brings it back. So a client that asks is replaced when a question reached no broker. A
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
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A client without an answer is replaced when it is older than this, so at most so often in an outage.
const REPLACED_AFTER: Duration = Duration::from_secs(5);

/// The context of such clients. Their user knows what an error means, and logs it once.
pub struct Quiet;

impl ClientContext for Quiet {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }
}

impl ConsumerContext for Quiet {}

/// Asks the brokers. It joins no group and creates no topic.
pub struct Inquirer(Arc<Inquiry>);

struct Inquiry {
    config: ClientConfig,
    current: Mutex<Current>,
}

struct Current {
    client: Arc<BaseConsumer<Quiet>>,
    made: Instant,
}

impl Current {
    fn make(config: &ClientConfig) -> KafkaResult<Self> {
        let client = BaseConsumer::from_config_and_context(config, Quiet)?;
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
        Ok(Self(Arc::new(Inquiry { config, current })))
    }

    /// Asks with librdkafka's blocking calls, on a thread for such calls. `question` bounds its own time.
    ///
    /// # Errors
    /// Those of `question`. When no broker could be reached, the next question goes to a new client.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Client<Quiet>) -> KafkaResult<T> + Send + 'static,
    ) -> KafkaResult<T> {
        let inquiry = Arc::clone(&self.0);
        let asked = tokio::task::spawn_blocking(move || {
            let client = Arc::clone(&inquiry.lock().client);
            // The client reads nothing; its events about connections must not pile up.
            while client.poll(Duration::ZERO).is_some() {}
            let answer = question(client.client());
            let is_replaced = answer.as_ref().is_err_and(|error| inquiry.replaces_for(error));
            (answer, is_replaced)
        });
        let (answer, is_replaced) = asked.await.unwrap_or((Err(KafkaError::Canceled), false));
        if is_replaced {
            tracing::debug!(brokers = self.0.config.get("bootstrap.servers"), "a client for questions is replaced");
        }
        answer
    }

    /// A client for one administrative request. Its drop waits for a thread of the client.
    ///
    /// # Errors
    /// librdkafka does not accept the settings.
    pub fn administrator(&self) -> KafkaResult<AdminClient<Quiet>> {
        AdminClient::from_config_and_context(&self.0.config, Quiet)
    }
}

impl Inquiry {
    /// Replaces the client if `error` says that it reached no broker. A question that ran out of time did: a partition
    /// without a leader has no answer. Returns whether it is replaced.
    fn replaces_for(&self, error: &KafkaError) -> bool {
        let unreached = [Code::BrokerTransportFailure, Code::AllBrokersDown, Code::Resolve];
        let is_unreached = error.rdkafka_error_code().is_some_and(|code| unreached.contains(&code));
        let mut current = self.lock();
        if !is_unreached || clock::monotonic().saturating_duration_since(current.made) < REPLACED_AFTER {
            return false;
        }
        Current::make(&self.config).is_ok_and(|new| {
            *current = new;
            true
        })
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

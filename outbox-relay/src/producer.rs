//! The Kafka producer: idempotent, gap-free, never giving a record up by itself.
//!
//! With librdkafka's defaults a record that times out or is refused is dropped from the middle, and its successors
//! overtake it. With the gap-free guarantee it makes the producer fatal instead; then it is dropped and rebuilt. Nobody
//! waits for its remaining reports: some never come.

use crate::{
    in_flight::{InFlight, Ticket},
    record,
    topics::Topics,
};
use rdkafka::{
    ClientConfig, ClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryResult, Producer as _, ProducerContext, ThreadedProducer},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tracing::{debug, info, warn};

/// Records in the producer's queue at most; the sender waits before that, so this is only a fence.
const QUEUE_RECORDS: &str = "1000000";

/// A batch's size at most, where every topic allows it. Also what librdkafka takes by default.
const BATCH_BYTES: usize = 1_000_000;

/// Whether the brokers are there, as the producer's last words said.
#[derive(Debug, Default)]
pub(crate) struct Brokers {
    away: AtomicBool,
    /// Somebody is asking.
    asking: AtomicBool,
}

impl Brokers {
    pub(crate) fn are_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    fn gone(&self, outbox: &str, reason: &str) {
        if !self.away.swap(true, Ordering::Relaxed) {
            warn!(outbox, reason, "Kafka is not there; waiting for it, nothing is lost");
        }
    }

    pub(crate) fn back(&self, outbox: &str) {
        if self.away.load(Ordering::Relaxed) && self.away.swap(false, Ordering::Relaxed) {
            info!(outbox, "Kafka is there again");
        }
    }
}

/// Receives the delivery reports, on the producer's polling thread.
pub(crate) struct Reports {
    outbox: String,
    in_flight: Arc<InFlight>,
    brokers: Arc<Brokers>,
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => self.brokers.gone(&self.outbox, reason),
            _ => debug!(outbox = %self.outbox, %error, reason, "kafka producer"),
        }
    }

    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, fac: &str, message: &str) {
        debug!(outbox = %self.outbox, ?level, fac, message, "librdkafka");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        match result {
            Ok(_) => {
                self.brokers.back(&self.outbox);
                self.in_flight.delivered(Ticket(ticket));
            }
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                // Purged by ourselves: the producer is being dropped.
                if !matches!(code, RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight) {
                    self.in_flight.failed(Ticket(ticket), code);
                }
            }
        }
    }
}

/// What a row became when it was offered to the producer.
pub(crate) enum Offered {
    /// It is on its way.
    Taken,
    /// The queue is full; try again when something was acknowledged.
    Full,
    /// It was refused on the spot.
    Refused(RDKafkaErrorCode),
}

/// Batches are no larger than this where a topic allows `limit` bytes.
fn batch_bytes(limit: usize) -> usize {
    BATCH_BYTES.min(limit.saturating_sub(record::BATCH_HEADER)).max(1)
}

/// How every producer of an outbox is configured.
pub(crate) fn config(outbox: &str, brokers: &str, compression: &str, limit: usize) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("client.id", format!("outbox-relay-{outbox}"))
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("enable.gapless.guarantee", "true")
        .set("message.timeout.ms", "0")
        // Rows come by the page, hundreds without a pause: there is nothing to wait for.
        .set("linger.ms", "0")
        .set("batch.size", batch_bytes(limit).to_string())
        .set("batch.num.messages", "20000")
        // Whether a row is too large is the topic's to say, and is known before it is offered.
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", QUEUE_RECORDS)
        .set("queue.buffering.max.kbytes", "2097151")
        .set("compression.type", compression)
        // As every Java producer does it: a key's partition must not depend on who writes.
        .set("partitioner", "murmur2_random")
        .set("allow.auto.create.topics", "false")
        .set("topic.metadata.propagation.max.ms", "10000");
    config
}

/// Publishes to Kafka; drop it to give up what it still holds.
pub(crate) struct Publisher {
    producer: Option<ThreadedProducer<Reports>>,
    pub(crate) in_flight: Arc<InFlight>,
    brokers: Arc<Brokers>,
    /// Batches are no larger than this.
    pub(crate) batch_bytes: usize,
}

impl Publisher {
    /// A producer whose batches fit topics that allow `limit` bytes.
    pub(crate) fn new(
        outbox: &str,
        brokers: &str,
        compression: &str,
        limit: usize,
        state: Arc<Brokers>,
    ) -> Result<Self, KafkaError> {
        let in_flight = Arc::new(InFlight::default());
        let context = Reports { outbox: outbox.to_owned(), in_flight: in_flight.clone(), brokers: state.clone() };
        let producer = config(outbox, brokers, compression, limit).create_with_context(context)?;
        Ok(Self { producer: Some(producer), in_flight, brokers: state, batch_bytes: batch_bytes(limit) })
    }

    fn producer(&self) -> &ThreadedProducer<Reports> {
        self.producer.as_ref().expect("it is taken only when this is dropped")
    }

    /// Offers a row; never blocks.
    pub(crate) fn offer(&self, row: &crate::row::Row, built: record::Built, ticket: Ticket) -> Offered {
        self.in_flight.sending();
        let Err((error, _)) = self.producer().send(record::of(row, built, ticket.0)) else { return Offered::Taken };
        self.in_flight.not_sent();
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::QueueFull) => Offered::Full,
            code => Offered::Refused(code.unwrap_or(RDKafkaErrorCode::Unknown)),
        }
    }

    /// While nothing is sent, no report tells that the brokers are back: they are asked.
    pub(crate) fn ask_for_brokers(&self, outbox: &str, topics: &Topics) {
        if !self.brokers.are_away() || self.brokers.asking.swap(true, Ordering::Relaxed) {
            return;
        }
        let (brokers, outbox, topics) = (self.brokers.clone(), outbox.to_owned(), topics.clone());
        tokio::spawn(async move {
            if topics.reachable().await {
                brokers.back(&outbox);
            }
            brokers.asking.store(false, Ordering::Relaxed);
        });
    }

    /// Why the producer will never send again, if so.
    pub(crate) fn fatal(&self) -> Option<String> {
        self.producer().client().fatal_error().map(|(code, reason)| format!("{code}: {reason}"))
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Dropping purges the queue and waits for the polling thread: not on a thread that drives futures.
        let producer = self.producer.take();
        std::thread::spawn(move || drop(producer));
    }
}

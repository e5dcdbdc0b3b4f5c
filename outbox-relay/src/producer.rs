//! The Kafka producer: idempotent, gap-free, never giving a record up by itself.
//!
//! With librdkafka's defaults a record that times out or is refused is dropped from the middle, and its successors
//! overtake it. With the gap-free guarantee it makes the producer fatal instead; then it is dropped and rebuilt. Nobody
//! waits for its remaining reports: some never come.

use crate::{
    in_flight::{InFlight, Ticket},
    record::BATCH_HEADER,
    topics::Topics,
};
use rdkafka::{
    ClientConfig, ClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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
                match code {
                    // Purged by ourselves: nothing is to be published now, or the producer is being dropped.
                    RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight => self.in_flight.purged(),
                    code => self.in_flight.failed(Ticket(ticket), code),
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

/// What producers of one outbox have in common.
#[derive(Clone)]
pub(crate) struct Kafka {
    pub(crate) outbox: String,
    /// `bootstrap.servers`.
    pub(crate) brokers: String,
    /// `compression.type`.
    pub(crate) compression: String,
    pub(crate) state: Arc<Brokers>,
}

/// Publishes one stream to Kafka; drop it to give up what it still holds.
///
/// A batch must be no larger than its topic takes, and a producer has one batch size for all topics. So topics that
/// take only small batches have a producer of their own. A topic's rows all go through one.
pub(crate) struct Publisher {
    kafka: Kafka,
    pub(crate) in_flight: Arc<InFlight>,
    /// By the largest batch that each makes, in bytes.
    producers: BTreeMap<usize, ThreadedProducer<Reports>>,
}

impl Publisher {
    /// With the producer that nearly all topics share.
    pub(crate) fn new(kafka: &Kafka) -> Result<Self, KafkaError> {
        let mut publisher =
            Self { kafka: kafka.clone(), in_flight: Arc::new(InFlight::default()), producers: BTreeMap::new() };
        publisher.producer(usize::MAX)?;
        Ok(publisher)
    }

    /// The producer of topics that take at most `limit` bytes; made when it is first needed.
    fn producer(&mut self, limit: usize) -> Result<&ThreadedProducer<Reports>, KafkaError> {
        let batch_bytes = batch_bytes(limit);
        Ok(match self.producers.entry(batch_bytes) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let Kafka { outbox, brokers: servers, compression, state } = &self.kafka;
                let (in_flight, brokers) = (self.in_flight.clone(), state.clone());
                let context = Reports { outbox: outbox.clone(), in_flight, brokers };
                new.insert(config(outbox, servers, compression, limit).create_with_context(context)?)
            }
        })
    }

    /// Offers a record to a topic that takes at most `limit` bytes; never blocks.
    pub(crate) fn offer(
        &mut self,
        record: BaseRecord<'_, [u8], [u8], usize>,
        ticket: Ticket,
        limit: usize,
    ) -> Result<Offered, KafkaError> {
        let in_flight = self.in_flight.clone();
        let producer = self.producer(limit)?;
        in_flight.sending();
        let Err((error, _)) = producer.send(record) else { return Ok(Offered::Taken) };
        in_flight.not_sent();
        Ok(match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::QueueFull) => Offered::Full,
            code => {
                let code = code.unwrap_or(RDKafkaErrorCode::Unknown);
                in_flight.refused_at_once(ticket, code);
                Offered::Refused(code)
            }
        })
    }

    /// Takes back what is not on its way to a broker yet.
    pub(crate) fn purge(&self) {
        self.producers.values().for_each(|producer| producer.purge(PurgeConfig::default().queue()));
    }

    /// While nothing is sent, no report tells that the brokers are back: they are asked.
    pub(crate) fn ask_for_brokers(&self, topics: &Topics) {
        let Kafka { outbox, state, .. } = &self.kafka;
        if !state.are_away() || state.asking.swap(true, Ordering::Relaxed) {
            return;
        }
        let (brokers, outbox, topics) = (state.clone(), outbox.clone(), topics.clone());
        tokio::spawn(async move {
            if topics.reachable().await {
                brokers.back(&outbox);
            }
            brokers.asking.store(false, Ordering::Relaxed);
        });
    }

    /// Why a producer will never send again, if so.
    pub(crate) fn fatal(&self) -> Option<String> {
        let fatal = self.producers.values().find_map(|producer| producer.client().fatal_error());
        fatal.map(|(code, reason)| format!("{code}: {reason}"))
    }
}

/// The largest batch for topics that take at most `limit` bytes: a power of two, so that there are few producers.
fn batch_bytes(limit: usize) -> usize {
    match limit.saturating_sub(BATCH_HEADER) {
        room @ BATCH_BYTES.. => BATCH_BYTES.min(room),
        // A batch of one byte is a batch of one record: there is none that is smaller.
        0 => 1,
        room => 1 << room.ilog2(),
    }
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
        // As every Java producer does it: a key's partition must not depend on the producer.
        .set("partitioner", "murmur2_random")
        .set("allow.auto.create.topics", "false")
        .set("topic.metadata.propagation.max.ms", "10000");
    config
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Dropping purges the queue and waits for the polling thread: not on a thread that drives futures.
        let producers = std::mem::take(&mut self.producers);
        std::thread::spawn(move || drop(producers));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_fit_their_topic_and_come_in_few_sizes() {
        let sizes = [0, 61, 62, 100, 2_000, 1_000_061, usize::MAX].map(batch_bytes);
        assert_eq!(sizes, [1, 1, 1, 32, 1_024, BATCH_BYTES, BATCH_BYTES]);
    }
}

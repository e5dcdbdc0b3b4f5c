//! The Kafka producer: idempotent, gap-free, and it never gives a record up by itself.
//!
//! With librdkafka's defaults a record that times out or is refused is dropped from the middle, and its successors
//! overtake it. With the gap-free guarantee it makes the producer fatal instead; then the relay drops and rebuilds it.
//! The relay does not wait for its remaining reports: some never come.

use crate::{
    brokers::Brokers,
    publish::{
        in_flight::{DeliveryTag, InFlight},
        kafka_record::BATCH_HEADER,
    },
    topics::Topics,
};
use rdkafka::{
    ClientConfig, ClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, atomic::Ordering},
};
use tracing::debug;

/// The most records in the producer's queue; the sender waits before that, so this is only a safeguard.
const QUEUE_RECORDS: &str = "1000000";

/// The largest batch, where every topic allows it. librdkafka's default is the same.
const BATCH_BYTES: usize = 1_000_000;

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

    fn delivery(&self, result: &DeliveryResult<'_>, tag: usize) {
        match result {
            Ok(_) => {
                self.brokers.back(&self.outbox);
                self.in_flight.delivered(DeliveryTag(tag));
            }
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                match code {
                    // The relay purged it: nothing is to be published now, or the producer is being dropped.
                    RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight => self.in_flight.purged(),
                    code => self.in_flight.failed(DeliveryTag(tag), code),
                }
            }
        }
    }
}

/// The result of offering a row to the producer.
pub(crate) enum Offered {
    /// The producer has the row.
    Taken,
    /// The queue is full; try again after an acknowledgement.
    Full,
    /// The producer refused the row on the spot.
    Refused(RDKafkaErrorCode),
}

/// The settings that producers of one outbox have in common.
#[derive(Clone)]
pub(crate) struct Kafka {
    pub(crate) outbox: String,
    /// `bootstrap.servers`.
    pub(crate) brokers: String,
    /// `compression.type`.
    pub(crate) compression: String,
    pub(crate) state: Arc<Brokers>,
}

/// Publishes one stream to Kafka; dropping it gives up what it still holds.
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
    /// Makes the producer that nearly all topics share.
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
        tag: DeliveryTag,
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
                in_flight.refused_at_once(tag, code);
                Offered::Refused(code)
            }
        })
    }

    /// Takes back records that are not on their way to a broker yet.
    pub(crate) fn purge(&self) {
        self.producers.values().for_each(|producer| producer.purge(PurgeConfig::default().queue()));
    }

    /// Asks whether the brokers are back: while nothing is sent, no report shows it.
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

    /// Why a producer will never send again; `None`: all can.
    pub(crate) fn fatal(&self) -> Option<String> {
        let fatal = self.producers.values().find_map(|producer| producer.client().fatal_error());
        fatal.map(|(code, reason)| format!("{code}: {reason}"))
    }
}

/// The largest batch for topics that take at most `limit` bytes: a power of two, so that there are few producers.
fn batch_bytes(limit: usize) -> usize {
    match limit.saturating_sub(BATCH_HEADER) {
        room @ BATCH_BYTES.. => BATCH_BYTES.min(room),
        // A batch of one byte is a batch of one record: no batch is smaller.
        0 => 1,
        room => 1 << room.ilog2(),
    }
}

/// The configuration of every producer of an outbox.
pub(crate) fn config(outbox: &str, brokers: &str, compression: &str, limit: usize) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("client.id", format!("outbox-relay-{outbox}"))
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("enable.gapless.guarantee", "true")
        .set("message.timeout.ms", "0")
        // Rows come by the page, hundreds without a pause, so the producer need not wait for more.
        .set("linger.ms", "0")
        .set("batch.size", batch_bytes(limit).to_string())
        .set("batch.num.messages", "20000")
        // The topic decides whether a row is too large, and the relay knows that before it offers the row.
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", QUEUE_RECORDS)
        .set("queue.buffering.max.kbytes", "2097151")
        .set("compression.type", compression)
        // Every Java producer does the same: a key's partition must not depend on the producer.
        .set("partitioner", "murmur2_random")
        .set("allow.auto.create.topics", "false")
        .set("topic.metadata.propagation.max.ms", "10000");
    config
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // The drop purges the queue and waits for the polling thread, so it must not run on a thread that drives
        // futures.
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

//! The producer of parked rows that are tried again: its own, so that a row that Kafka refuses costs no other row
//! anything. Rows that it holds when it is dropped, or when the process dies, are in doubt; they stay claimed and are
//! sent again.

use crate::{budget::Held, publish::producer, record::parking::Lane, row::Row};
use rdkafka::{
    ClientContext,
    error::RDKafkaErrorCode as Code,
    producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer},
};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// The rows of a lane that are being sent.
pub(crate) struct Sending {
    pub(crate) lane: Lane,
    pub(crate) requested: OffsetDateTime,
    pub(crate) rows: Vec<Row>,
}

/// The choice of rows to try of a lane.
pub(crate) enum Choice {
    /// The ids of the rows to send, and their bytes.
    Rows(Vec<i64>, usize),
    /// Its first row was refused unread.
    Refused,
    /// Its first row does not fit beside the rows of other lanes.
    NoRoom,
    /// None of its rows that were asked for is parked.
    Nothing,
}

/// A producer of parked rows, and its reports.
pub(crate) struct RetryProducer {
    producer: Option<ThreadedProducer<Reports>>,
    /// The room of the rows that the producer has.
    pub(crate) held: Option<Held>,
    pub(crate) reports: mpsc::UnboundedReceiver<(usize, Result<(), Code>)>,
}

impl RetryProducer {
    pub(crate) fn new(outbox: &str, brokers: &str, compression: &str) -> Option<Self> {
        let (report, reports) = mpsc::unbounded_channel();
        let made = producer::config(outbox, brokers, compression, usize::MAX).create_with_context(Reports(report));
        match made {
            Ok(producer) => Some(Self { producer: Some(producer), held: None, reports }),
            Err(error) => {
                warn!(outbox, %error, "parked rows cannot be tried again: the Kafka producer could not be made");
                None
            }
        }
    }

    pub(crate) fn send(&self, record: BaseRecord<'_, [u8], [u8], usize>) -> Result<(), Code> {
        let producer = self.producer.as_ref().expect("it is taken only when this is dropped");
        producer.send(record).map_err(|(error, _)| error.rdkafka_error_code().unwrap_or(Code::Unknown))
    }
}

impl Drop for RetryProducer {
    fn drop(&mut self) {
        // The drop purges the queue and waits for the polling thread, so it must not run on a thread that drives
        // futures.
        let (producer, held) = (self.producer.take(), self.held.take());
        std::thread::spawn(move || {
            drop(producer);
            drop(held);
        });
    }
}

struct Reports(mpsc::UnboundedSender<(usize, Result<(), Code>)>);

impl ClientContext for Reports {
    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        debug!(%error, reason, "the Kafka producer of parked rows");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        let report = match result {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(error.rdkafka_error_code().unwrap_or(Code::Unknown)),
        };
        // Rows are purged when the producer is given up; then no task waits for their reports.
        self.0.send((index, report)).ok();
    }
}

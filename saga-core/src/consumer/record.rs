//! From a Kafka record to what a transaction works on.

use super::{ConsumerConfig, Coordinates, Message, TooOld};
use crate::{
    clock,
    envelope::{Envelope, Headers},
    inbox::{self, Arrival, Inadmissible},
};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use sha2::{Digest, Sha256};
use std::panic::{AssertUnwindSafe, catch_unwind};
use time::OffsetDateTime;

/// A record as it was polled, its memory our own.
#[derive(Debug, Default)]
pub(super) struct Raw {
    pub(super) offset: i64,
    timestamp: Option<OffsetDateTime>,
    key: Option<Vec<u8>>,
    payload: Option<Vec<u8>>,
    /// `None` when a header's name is not UTF-8.
    headers: Option<Vec<(String, Option<Vec<u8>>)>>,
}

impl Raw {
    pub(super) fn copy(record: &BorrowedMessage<'_>) -> Self {
        // The client library panics at a header name that is not UTF-8: a record that anybody can write.
        let headers = catch_unwind(AssertUnwindSafe(|| {
            let headers = record.headers().into_iter().flat_map(|headers| headers.iter());
            headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect()
        }));
        // A producer may write any number there; what lies before 1970 is none.
        let timestamp = record.timestamp().to_millis().filter(|millis| *millis >= 0);
        Self {
            offset: record.offset(),
            timestamp: timestamp
                .and_then(|millis| OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).ok()),
            key: record.key().map(<[u8]>::to_vec),
            payload: record.payload().map(<[u8]>::to_vec),
            headers: headers.ok(),
        }
    }

    /// Roughly what it takes in memory.
    pub(super) fn size(&self) -> usize {
        let bytes = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let headers = self.headers.iter().flatten().map(|(name, value)| name.len() + bytes(value) + 64);
        bytes(&self.key) + bytes(&self.payload) + headers.sum::<usize>() + 128
    }
}

/// A record that no handler may see: it goes to the dead letter topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) at: Coordinates,
    pub(super) timestamp: Option<OffsetDateTime>,
    pub(super) key: Option<Vec<u8>>,
    pub(super) payload: Option<Vec<u8>>,
    pub(super) headers: Headers,
    pub(super) class: &'static str,
    pub(super) reason: String,
}

/// Records of one partition, in the order of their offsets. `messages` and `timestamps` go together.
#[derive(Debug, Clone, Default)]
pub(super) struct Batch {
    pub(super) messages: Vec<Message>,
    pub(super) timestamps: Vec<Option<OffsetDateTime>>,
    pub(super) refused: Vec<Refused>,
}

impl Batch {
    /// Whose steps it is about.
    #[cfg(feature = "testkit")]
    pub(super) fn sagas(&self) -> impl Iterator<Item = &crate::envelope::SagaHeaders> {
        self.messages.iter().filter_map(|message| message.envelope.saga.as_ref())
    }

    /// Decodes; what cannot be decoded, or is of an age that the inbox does not remember, is refused.
    pub(super) fn decode(
        topic: &str,
        partition: i32,
        raws: Vec<Raw>,
        config: &ConsumerConfig,
        now: OffsetDateTime,
    ) -> Self {
        let mut batch = Self::default();
        for raw in raws {
            let at = Coordinates { topic: topic.into(), partition, offset: raw.offset };
            let headers = raw.headers.as_deref();
            let decoded = headers.ok_or(("undecodable", "the name of a header is not UTF-8".to_owned()));
            let envelope = decoded.and_then(|headers| {
                let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_deref()));
                let envelope = Envelope::decode(headers).map_err(|error| ("undecodable", error.to_string()))?;
                match inbox::admissible(envelope.id, config.horizon, now) {
                    Ok(()) => Ok(envelope),
                    Err(Inadmissible::TooOld) if config.too_old == TooOld::Handle => Ok(envelope),
                    Err(error) => Err(("inadmissible", error.to_string())),
                }
            });
            match envelope {
                Ok(envelope) => {
                    batch.messages.push(Message { envelope, key: raw.key, payload: raw.payload, at });
                    batch.timestamps.push(raw.timestamp);
                }
                Err((class, reason)) => batch.refused.push(Refused {
                    at,
                    timestamp: raw.timestamp,
                    key: raw.key,
                    payload: raw.payload,
                    headers: lossy(raw.headers.unwrap_or_default()),
                    class,
                    reason,
                }),
            }
        }
        batch
    }

    pub(super) fn arrivals(&self, config: &ConsumerConfig) -> Vec<Arrival<'_>> {
        self.messages.iter().map(|message| arrival(message, config)).collect()
    }

    /// One batch per record, in the order of their offsets.
    pub(super) fn into_singles(self) -> Vec<Self> {
        let messages = self.messages.into_iter().zip(self.timestamps).map(|(message, timestamp)| {
            (message.at.offset, Self { messages: vec![message], timestamps: vec![timestamp], refused: Vec::new() })
        });
        let refused = self
            .refused
            .into_iter()
            .map(|refused| (refused.at.offset, Self { refused: vec![refused], ..Self::default() }));
        let mut singles: Vec<_> = messages.chain(refused).collect();
        singles.sort_by_key(|(offset, _)| *offset);
        singles.into_iter().map(|(_, single)| single).collect()
    }
}

/// What the inbox needs to know of a message.
pub(super) fn arrival<'m>(message: &'m Message, config: &ConsumerConfig) -> Arrival<'m> {
    let Envelope { source, id, .. } = &message.envelope;
    let remembered = config.too_old == TooOld::DeadLetter
        || inbox::admissible(*id, config.horizon, clock::now()) != Err(Inadmissible::TooOld);
    Arrival { source, id: *id, lane: lane(message), remembered }
}

/// A hash of the key: what must stay in order has the same.
pub(super) fn lane(message: &Message) -> Option<i64> {
    message.key.as_deref().map(hash)
}

/// The first 64 bits of a SHA-256.
pub(super) fn hash(bytes: &[u8]) -> i64 {
    let digest = Sha256::digest(bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    i64::from_be_bytes(first)
}

/// Headers as far as they can be said in text that PostgreSQL stores.
fn lossy(raw: Vec<(String, Option<Vec<u8>>)>) -> Headers {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}");
    let headers = raw.into_iter().filter_map(|(name, value)| Some((text(name.as_bytes()), text(&value?))));
    headers.filter(|(name, _)| !name.is_empty()).collect()
}

/// The headers of a decoded message, likewise.
pub(super) fn storable_headers(envelope: &Envelope) -> Headers {
    let headers = envelope.encode().into_iter().filter(|(name, _)| !name.is_empty());
    headers.map(|(name, value)| (name.replace('\0', "\u{fffd}"), value.replace('\0', "\u{fffd}"))).collect()
}

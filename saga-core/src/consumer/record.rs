//! From a Kafka record to what a transaction works on.

use super::{ConsumerConfig, Coordinates, Message, TooOld, failure::RecordFault};
use crate::{
    envelope::{Envelope, Headers, exact},
    id::MessageId,
    inbox::{self, Arrival, Inadmissible},
};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
};
use time::OffsetDateTime;

/// A record as it was polled, its memory our own.
#[derive(Debug, Default)]
pub(super) struct Raw {
    pub(super) offset: i64,
    pub(super) timestamp: Option<OffsetDateTime>,
    key: Option<Vec<u8>>,
    payload: Option<Vec<u8>>,
    headers: RawHeaders,
    /// One header has a name that is not UTF-8; it is not among `headers`.
    nameless: bool,
}

/// The parts of a record that a handler does not see: kept for parking and dead letters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RecordOrigin {
    pub(super) timestamp: Option<OffsetDateTime>,
    /// All headers, in their order.
    pub(super) headers: RawHeaders,
}

/// Headers in a few pieces of memory: a message has some twenty, and another thread frees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawHeaders {
    names: String,
    values: Vec<u8>,
    /// Where each header's name and value end; the value's end is `None` when it is null.
    ends: Vec<(usize, Option<usize>)>,
}

impl RawHeaders {
    /// Reserves room for the headers of a saga's message.
    fn with_room() -> Self {
        Self { names: String::with_capacity(256), values: Vec::with_capacity(512), ends: Vec::with_capacity(24) }
    }

    pub(super) fn push(&mut self, name: &str, value: Option<&[u8]>) {
        self.names.push_str(name);
        self.values.extend_from_slice(value.unwrap_or_default());
        self.ends.push((self.names.len(), value.map(|_| self.values.len())));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Option<&[u8]>)> {
        let (mut name, mut value) = (0, 0);
        self.ends.iter().map(move |&(name_end, value_end)| {
            let names = &self.names[std::mem::replace(&mut name, name_end)..name_end];
            (names, value_end.map(|end| &self.values[std::mem::replace(&mut value, end)..end]))
        })
    }

    /// The headers as they are stored, each as it was.
    pub(super) fn stored(&self) -> Headers {
        exact::from_record(self.iter())
    }

    /// The headers of a record, from how they were stored.
    pub(super) fn from_stored(headers: &Headers) -> Self {
        let mut raw = Self::with_room();
        exact::to_record(headers).iter().for_each(|(name, value)| raw.push(name, value.as_deref()));
        raw
    }
}

impl Raw {
    pub(super) fn copy(record: &BorrowedMessage<'_>) -> Self {
        let (headers, nameless) = copy_headers(record);
        // A producer may write any number as timestamp; one before 1970 counts as none.
        let timestamp = record.timestamp().to_millis().filter(|millis| *millis >= 0);
        Self {
            offset: record.offset(),
            timestamp: timestamp
                .and_then(|millis| OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).ok()),
            key: record.key().map(<[u8]>::to_vec),
            payload: record.payload().map(<[u8]>::to_vec),
            headers,
            nameless,
        }
    }

    /// Roughly the bytes that the record takes in memory.
    pub(super) fn size(&self) -> usize {
        let bytes = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let RawHeaders { names, values, ends } = &self.headers;
        let headers = names.capacity() + values.capacity() + ends.capacity() * size_of::<(usize, Option<usize>)>();
        bytes(&self.key) + bytes(&self.payload) + headers + 128
    }
}

/// Copies the headers; `true` if the name of one cannot be read.
fn copy_headers(record: &BorrowedMessage<'_>) -> (RawHeaders, bool) {
    let Some(headers) = record.headers() else { return (RawHeaders::default(), false) };
    // The client library panics at a header name that is not UTF-8, which any producer can write.
    let copied = catch_unwind(AssertUnwindSafe(|| {
        let mut copied = RawHeaders::with_room();
        headers.iter().for_each(|header| copied.push(header.key, header.value));
        copied
    }));
    if let Ok(copied) = copied {
        return (copied, false);
    }
    let mut copied = RawHeaders::with_room();
    for index in 0..headers.count() {
        if let Ok(header) = catch_unwind(AssertUnwindSafe(|| headers.get(index))) {
            copied.push(header.key, header.value);
        }
    }
    (copied, true)
}

/// A record that no handler may see: it goes to the dead letter topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RefusedRecord {
    pub(super) at: Coordinates,
    pub(super) key: Option<Vec<u8>>,
    pub(super) payload: Option<Vec<u8>>,
    pub(super) origin: RecordOrigin,
    pub(super) class: &'static str,
    pub(super) reason: String,
}

/// Records of one partition, in the order of their offsets. `messages` and `origins` go together.
#[derive(Debug, Clone, Default)]
pub(super) struct RecordBatch {
    pub(super) messages: Vec<Message>,
    pub(super) origins: Vec<RecordOrigin>,
    pub(super) refused: Vec<RefusedRecord>,
    pub(super) poison: Poison,
}

/// The messages that the handler called poison, and why: dead-lettered in the transaction that handles the others.
pub(super) type Poison = HashMap<MessageId, RecordFault>;

impl RecordBatch {
    /// The saga headers of the messages, whose steps the batch is about.
    #[cfg(feature = "testkit")]
    pub(super) fn sagas(&self) -> impl Iterator<Item = &crate::envelope::SagaHeaders> {
        self.messages.iter().filter_map(|message| message.envelope.saga.as_ref())
    }

    /// Decodes records; one that cannot be decoded is refused.
    pub(super) fn decode(topic: &str, partition: i32, raws: Vec<Raw>) -> Self {
        let mut batch = Self::default();
        for raw in raws {
            let at = Coordinates { topic: topic.into(), partition, offset: raw.offset };
            let readable = if raw.nameless { Err("the name of a header is not UTF-8".to_owned()) } else { Ok(()) };
            let envelope =
                readable.and_then(|()| Envelope::decode(raw.headers.iter()).map_err(|error| error.to_string()));
            let origin = RecordOrigin { timestamp: raw.timestamp, headers: raw.headers };
            match envelope {
                Ok(envelope) => {
                    batch.messages.push(Message { envelope, key: raw.key, payload: raw.payload, at });
                    batch.origins.push(origin);
                }
                Err(reason) => batch.refused.push(RefusedRecord {
                    at,
                    key: raw.key,
                    payload: raw.payload,
                    origin,
                    class: "undecodable",
                    reason,
                }),
            }
        }
        batch
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.refused.is_empty()
    }

    /// Whether the inbox remembers all messages of the age of these, at `now`.
    pub(super) fn is_admissible(&self, config: &ConsumerConfig, now: OffsetDateTime) -> bool {
        self.messages.iter().all(|message| inadmissible(message, config, now).is_none())
    }

    /// Whether [`RecordBatch::is_admissible`] depends on `now`.
    pub(super) fn has_doubtful_ages(&self, config: &ConsumerConfig, now: OffsetDateTime) -> bool {
        let doubtful = |error| error != Inadmissible::NotV7;
        self.messages.iter().any(|message| inadmissible(message, config, now).is_some_and(doubtful))
    }

    /// The position of a message in the batch, unless several have its id.
    pub(super) fn position(&self, id: MessageId) -> Option<usize> {
        let mut positions = self.messages.iter().enumerate().filter(|(_, message)| message.envelope.id == id);
        positions.next().map(|(position, _)| position).filter(|_| positions.next().is_none())
    }

    /// Refuses the messages that the inbox does not remember.
    pub(super) fn refuse_inadmissible(&mut self, config: &ConsumerConfig, now: OffsetDateTime) {
        let messages = std::mem::take(&mut self.messages).into_iter().zip(std::mem::take(&mut self.origins));
        for (message, origin) in messages {
            match inadmissible(&message, config, now) {
                None => {
                    self.messages.push(message);
                    self.origins.push(origin);
                }
                Some(error) => self.refused.push(RefusedRecord {
                    at: message.at,
                    key: message.key,
                    payload: message.payload,
                    origin,
                    class: "inadmissible",
                    reason: error.to_string(),
                }),
            }
        }
    }

    /// Splits off the first `count` messages; the others stay, and so does what is refused.
    pub(super) fn split_first(&mut self, count: usize) -> Self {
        let messages = self.messages.split_off(count.min(self.messages.len()));
        let origins = self.origins.split_off(count.min(self.origins.len()));
        let rest = Self { messages, origins, refused: std::mem::take(&mut self.refused), poison: self.poison.clone() };
        std::mem::replace(self, rest)
    }

    /// Puts `rest` behind this batch.
    pub(super) fn append(&mut self, rest: Self) {
        self.messages.extend(rest.messages);
        self.origins.extend(rest.origins);
        self.refused.extend(rest.refused);
    }

    pub(super) fn arrivals(&self, config: &ConsumerConfig, now: OffsetDateTime) -> Vec<Arrival<'_>> {
        self.messages.iter().map(|message| arrival(message, config, now)).collect()
    }
}

/// Why the inbox does not take a message at `now`.
fn inadmissible(message: &Message, config: &ConsumerConfig, now: OffsetDateTime) -> Option<Inadmissible> {
    let error = inbox::admissible(message.envelope.id, config.horizon, now).err()?;
    (error != Inadmissible::TooOld || config.too_old == TooOld::DeadLetter).then_some(error)
}

/// The parts of a message that the inbox needs.
pub(super) fn arrival<'m>(message: &'m Message, config: &ConsumerConfig, now: OffsetDateTime) -> Arrival<'m> {
    let Envelope { source, id, .. } = &message.envelope;
    let remembered = config.too_old == TooOld::DeadLetter
        || inbox::admissible(*id, config.horizon, now) != Err(Inadmissible::TooOld);
    Arrival { source, id: *id, lane: lane(message), remembered }
}

/// A hash of the key: records that must stay in order have the same. `None`: no key.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_that_are_copied_are_as_they_were(
            headers in proptest::collection::vec((".{0,6}", proptest::option::of(any::<Vec<u8>>())), 0..8),
        ) {
            let mut copied = RawHeaders::default();
            headers.iter().for_each(|(name, value)| copied.push(name, value.as_deref()));
            let read: Vec<_> = copied.iter().map(|(name, value)| (name.to_owned(), value.map(<[u8]>::to_vec))).collect();
            prop_assert_eq!(read, headers);
        }
    }
}

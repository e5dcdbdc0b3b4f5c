//! A row as a Kafka record: its headers (CloudEvents, binary mode) and its exact size on the broker.
//!
//! The payload passes through as it is. What the row's own headers say wins, except for what identifies the row.

use crate::row::Row;
use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::BaseRecord,
};
use saga_core::{
    clock::DatabaseClock,
    envelope::{Envelope, header},
    trace,
};
use serde::{
    Deserializer as _,
    de::{MapAccess, Visitor},
};
use std::{borrow::Cow, fmt, io::Write as _, sync::Arc};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// What the row's headers may not override.
const OURS: [&str; 5] = [header::SPECVERSION, header::ID, header::TYPE, header::TIME, header::SEQUENCE];

/// Builds records of one outbox. Reuses its buffers.
pub(crate) struct RecordBuilder {
    source: String,
    /// A record's timestamp is when it was sent, by the database's clock: Kafka refuses what is far ahead of its own, and
    /// keeps a record for so long after it.
    pub(crate) clock: Arc<DatabaseClock>,
    text: Vec<u8>,
}

/// A record's headers, and its size in a batch of its own, uncompressed, which is what a topic's `max.message.bytes` is
/// compared with. Compression may make it fit after all; then the answer would depend on the payload's luck.
pub(crate) struct Built {
    pub(crate) headers: OwnedHeaders,
    pub(crate) size: usize,
}

impl RecordBuilder {
    pub(crate) fn new(source: &str, clock: Arc<DatabaseClock>) -> Self {
        Self { source: source.to_owned(), clock, text: Vec::with_capacity(64) }
    }

    pub(crate) fn build(&mut self, row: &Row) -> Built {
        let own = row.headers().map(parse).unwrap_or_default();
        let mut headers = OwnedHeaders::new_with_capacity(8 + own.len());
        let mut count = 0;
        let mut size = 0;
        let mut add = |headers: OwnedHeaders, key: &str, value: &[u8]| {
            count += 1;
            size += varint(key.len()) + key.len() + varint(value.len()) + value.len();
            headers.insert(Header { key, value: Some(value) })
        };
        headers = add(headers, header::SPECVERSION, b"1.0");
        let mut id = uuid::Uuid::encode_buffer();
        headers = add(headers, header::ID, row.message_id().hyphenated().encode_lower(&mut id).as_bytes());
        headers = add(headers, header::TYPE, row.kind().as_bytes());
        headers = add(headers, header::TIME, self.time(row.created_at()));
        headers = add(headers, header::SEQUENCE, self.number(row.id()));
        if !own.iter().any(|(key, _)| key == header::SOURCE) {
            headers = add(headers, header::SOURCE, self.source.as_bytes());
        }
        for (key, value) in &own {
            if !OURS.contains(&key.as_ref()) {
                headers = add(headers, key, value.as_bytes());
            }
        }
        let key = row.key().map_or(0, str::len);
        let value = row.size().unwrap_or(0);
        // Attributes, and two deltas that are zero in a batch of one; a null length is -1, which also takes one byte.
        let body = 3 + varint(key) + key + varint(value) + value + varint(count) + size;
        Built { headers, size: BATCH_HEADER + varint(body) + body }
    }

    fn time(&mut self, at: OffsetDateTime) -> &[u8] {
        self.text.clear();
        if at.format_into(&mut self.text, &Rfc3339).is_err() {
            // Years beyond 9999 have no RFC 3339 form, and no such row was written by a working clock.
            self.text.clear();
            self.text.extend_from_slice(b"9999-12-31T23:59:59Z");
        }
        &self.text
    }

    /// Of records that are sent now: milliseconds since 1970.
    pub(crate) fn timestamp(&self) -> i64 {
        i64::try_from(self.clock.now().unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
    }

    fn number(&mut self, number: i64) -> &[u8] {
        self.text.clear();
        write!(self.text, "{number}").expect("writing to memory does not fail");
        &self.text
    }
}

/// What is said of a row within this has the ids that its consumers log, and its trace. A warning like what is said in it:
/// there are no other spans with `RUST_LOG=warn`.
pub(crate) fn span(row: &Row) -> tracing::Span {
    let own = row.headers().map(parse).unwrap_or_default();
    let id = row.message_id().to_string();
    let ours = [(header::SPECVERSION, "1.0"), (header::ID, &id), (header::TYPE, row.kind())];
    let theirs = own.iter().map(|(name, value)| (name.as_ref(), value.as_ref()));
    // Of a name that comes twice, the last counts.
    let all = [(header::SOURCE, "outbox")].into_iter().chain(theirs).chain(ours);
    // Whoever wrote the row may have written anything.
    let Ok(envelope) = Envelope::decode(all.map(|(name, value)| (name, Some(value.as_bytes())))) else {
        return tracing::warn_span!("row", message_id = id);
    };
    let saga = envelope.saga.as_ref();
    let span = tracing::warn_span!(
        "row",
        message_id = id,
        kind = envelope.kind,
        saga = saga.map(|saga| tracing::field::display(saga.saga)),
        saga_type = saga.map(|saga| saga.definition.as_str()),
        saga_step = saga.map(|saga| saga.step.as_str()),
        correlation_id = envelope.correlation_id()
    );
    trace::continue_from(&span, &envelope);
    span
}

/// The record of a row, to be given to a producer with what names it there.
pub(crate) fn of(row: &Row, built: Built, opaque: usize, timestamp: i64) -> BaseRecord<'_, [u8], [u8], usize> {
    let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(row.topic(), opaque).headers(built.headers);
    record.key = row.key().map(str::as_bytes);
    record.payload = row.payload();
    record.timestamp = Some(timestamp);
    record
}

/// What stands before the records of a batch (magic 2).
pub(crate) const BATCH_HEADER: usize = 61;

/// Bytes of a length as a zigzag varint.
fn varint(length: usize) -> usize {
    let zigzag = (length as u64) << 1;
    (64 - zigzag.max(1).leading_zeros() as usize).div_ceil(7)
}

/// A JSON object of strings as pairs. A value that is no string goes as its JSON text: a header must never be what keeps
/// a committed row from being published.
fn parse(json: &str) -> Vec<(Cow<'_, str>, Cow<'_, str>)> {
    struct Pairs;
    impl<'de> Visitor<'de> for Pairs {
        type Value = Vec<(Cow<'de, str>, Cow<'de, str>)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::with_capacity(8);
            while let Some(key) = map.next_key::<Text<'de>>()? {
                let value = map.next_value::<&'de serde_json::value::RawValue>()?.get();
                let value = match serde_json::from_str::<Text<'de>>(value) {
                    Ok(text) => text.0,
                    Err(_) => Cow::Borrowed(value),
                };
                pairs.push((key.0, value));
            }
            Ok(pairs)
        }
    }
    serde_json::Deserializer::from_str(json).deserialize_map(Pairs).unwrap_or_default()
}

/// A string, borrowed where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Text<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Borrowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_strings_and_what_is_not_goes_as_json() {
        let pairs = parse(r#"{"a": "x\ny", "b": "plain", "n": 1, "o": {"p": [true]}}"#);
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(k, v)| (k.as_ref(), v.as_ref())).collect();
        assert_eq!(pairs, [("a", "x\ny"), ("b", "plain"), ("n", "1"), ("o", r#"{"p": [true]}"#)]);
    }

    #[test]
    fn a_length_takes_as_many_bytes_as_its_zigzag_varint() {
        for (length, bytes) in [(0, 1), (1, 1), (63, 1), (64, 2), (8191, 2), (8192, 3), (1 << 20, 4)] {
            assert_eq!(varint(length), bytes, "{length}");
        }
    }
}

//! A row as a Kafka record: its headers (CloudEvents, binary mode) and its exact size on the broker.
//!
//! The payload passes through as it is. The row's own headers win, except over those that identify the row.

use crate::row::Row;
use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::BaseRecord,
};
use saga_core::{
    clock::DatabaseClock,
    consumer::dead_letter_header as letter,
    envelope::{
        Envelope,
        exact::{self, EXACT},
        header,
    },
    topic::dead_letter_topic,
    trace,
};
use serde::{
    Deserializer as _,
    de::{MapAccess, Visitor},
};
use std::{borrow::Cow, fmt, io::Write as _, sync::Arc};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Headers that the row's own may not override.
const OURS: [&str; 6] = [header::SPECVERSION, header::ID, header::TYPE, header::TIME, header::SEQUENCE, header::EPOCH];

/// Builds records of one outbox. Reuses its buffers.
pub(crate) struct RecordBuilder {
    source: String,
    /// The epoch that the rows' ids count in: the same for all that is published under one lease.
    epoch: Arc<str>,
    /// The database's clock gives a record's timestamp, which is when it was sent. Kafka refuses timestamps far ahead
    /// of its own clock, and keeps a record for a fixed time after its timestamp.
    pub(crate) clock: Arc<DatabaseClock>,
    text: Vec<u8>,
}

/// A record's headers, and its size in a batch of its own, uncompressed, which is what a topic's `max.message.bytes` is
/// compared with. Compression may make it fit after all; then the answer would depend on the payload's luck.
pub(crate) struct Built {
    pub(crate) headers: OwnedHeaders,
    pub(crate) size: usize,
    /// The part of a dead letter that is left out, because its topic does not take it whole.
    pub(crate) left_out: LeftOut,
}

/// The part of a row that its record lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LeftOut {
    #[default]
    Nothing,
    Payload,
    /// The payload, and the headers that the dead letter has of its original.
    Headers,
    /// The payload, those headers, and the key.
    Key,
}

impl RecordBuilder {
    pub(crate) fn new(source: &str, epoch: Arc<str>, clock: Arc<DatabaseClock>) -> Self {
        Self { source: source.to_owned(), epoch, clock, text: Vec::with_capacity(64) }
    }

    pub(crate) fn build(&mut self, row: &Row) -> Built {
        self.build_without(row, LeftOut::Nothing)
    }

    /// The record of a dead letter, with as little left out as makes it fit into `limit` bytes. It names the place of
    /// its original, and what is only to be read there. `None` where nothing helps, or the row is no dead letter.
    pub(crate) fn build_within(&mut self, row: &Row, limit: usize) -> Option<Built> {
        if !is_dead_letter(row) {
            return None;
        }
        let less = [LeftOut::Payload, LeftOut::Headers, LeftOut::Key];
        less.into_iter().map(|left_out| self.build_without(row, left_out)).find(|built| built.size <= limit)
    }

    /// The record, or as much of a dead letter as fits into `limit` bytes; the error is its size.
    pub(crate) fn fit(&mut self, row: &Row, limit: usize) -> Result<Built, usize> {
        let whole = self.build(row);
        if whole.size <= limit { Ok(whole) } else { self.build_within(row, limit).ok_or(whole.size) }
    }

    pub(crate) fn build_without(&mut self, row: &Row, left_out: LeftOut) -> Built {
        let own = row.headers().map(parse).unwrap_or_default();
        let exact = own.iter().find(|(name, _)| name == EXACT).and_then(|(_, text)| exact::read(text));
        let mut record = Headers::with_capacity(12 + own.len());
        record.add(header::SPECVERSION, b"1.0");
        let mut id = uuid::Uuid::encode_buffer();
        record.add(header::ID, row.message_id().hyphenated().encode_lower(&mut id).as_bytes());
        record.add(header::TYPE, row.kind().as_bytes());
        record.add(header::TIME, self.time(row.created_at()));
        record.add(header::SEQUENCE, self.number(row.id()));
        record.add(header::EPOCH, self.epoch.as_bytes());
        let has_source = own.iter().any(|(name, _)| name == header::SOURCE)
            || exact.iter().flatten().any(|(name, _)| name == header::SOURCE);
        if !has_source {
            record.add(header::SOURCE, self.source.as_bytes());
        }
        let goes = |name: &str| !OURS.contains(&name) && (left_out < LeftOut::Headers || letter::SAID.contains(&name));
        let mut left = 0;
        for (name, value) in exact.iter().flatten() {
            let value = value.as_deref();
            match goes(name) {
                true => record.push(name, value),
                false => left += name.len() + value.map_or(0, <[u8]>::len),
            }
        }
        for (name, value) in own.iter().filter(|(name, _)| exact.is_none() || name != EXACT) {
            match goes(name) {
                true => record.add(name, value.as_bytes()),
                false => left += name.len() + value.len(),
            }
        }
        if left_out >= LeftOut::Payload {
            record.add(letter::PAYLOAD_BYTES, self.number(row.size().unwrap_or(0)));
        }
        if left_out >= LeftOut::Headers {
            record.add(letter::HEADERS_BYTES, self.number(left));
        }
        let (mut key, mut value) = (row.key().map_or(0, str::len), row.size().unwrap_or(0));
        if left_out >= LeftOut::Key {
            record.add(letter::KEY_BYTES, self.number(key));
            key = 0;
        }
        if left_out >= LeftOut::Payload {
            value = 0;
        }
        let Headers { headers, count, size } = record;
        let headers = headers.unwrap_or_default();
        // Attributes, and two deltas that are zero in a batch of one; a null length is -1, which also takes one byte.
        let body = 3 + varint(key) + key + varint(value) + value + varint(count) + size;
        Built { headers, size: BATCH_HEADER + varint(body) + body, left_out }
    }

    fn time(&mut self, at: OffsetDateTime) -> &[u8] {
        self.text.clear();
        if at.format_into(&mut self.text, &Rfc3339).is_err() {
            // Years beyond 9999 have no RFC 3339 form, and no working clock wrote such a row.
            self.text.clear();
            self.text.extend_from_slice(b"9999-12-31T23:59:59Z");
        }
        &self.text
    }

    /// The timestamp of records that are sent now: milliseconds since 1970.
    pub(crate) fn timestamp(&self) -> i64 {
        i64::try_from(self.clock.now().unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
    }

    fn number(&mut self, number: impl fmt::Display) -> &[u8] {
        self.text.clear();
        write!(self.text, "{number}").expect("writing to memory does not fail");
        &self.text
    }
}

/// Headers as they are put together, and their size in a record.
struct Headers {
    /// `Some` between two calls.
    headers: Option<OwnedHeaders>,
    count: usize,
    size: usize,
}

impl Headers {
    fn with_capacity(headers: usize) -> Self {
        Self { headers: Some(OwnedHeaders::new_with_capacity(headers)), count: 0, size: 0 }
    }

    fn add(&mut self, key: &str, value: &[u8]) {
        self.push(key, Some(value));
    }

    /// A null value has the length -1, which takes one byte.
    fn push(&mut self, key: &str, value: Option<&[u8]>) {
        self.count += 1;
        self.size += varint(key.len()) + key.len() + value.map_or(1, |value| varint(value.len()) + value.len());
        self.headers = self.headers.take().map(|headers| headers.insert(Header { key, value }));
    }
}

/// Whether a topic of this name may take dead letters.
pub(crate) fn takes_dead_letters(topic: &str) -> bool {
    topic.ends_with(&dead_letter_topic(""))
}

/// Whether the row is a dead letter of a consumer: its headers name the place of the original.
fn is_dead_letter(row: &Row) -> bool {
    let own = row.headers().map(parse).unwrap_or_default();
    let of = |name: &str| own.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_ref());
    of(letter::TOPIC).is_some_and(|topic| dead_letter_topic(topic) == row.topic())
        && of(letter::PARTITION).is_some()
        && of(letter::OFFSET).is_some()
}

/// A span for log lines about a row, with the ids that its consumers log, and its trace. The span is a warning like the
/// lines in it: with `RUST_LOG=warn` there are no other spans.
pub(crate) fn span(row: &Row) -> tracing::Span {
    let own = row.headers().map(parse).unwrap_or_default();
    let id = row.message_id().to_string();
    let ours = [(header::SPECVERSION, "1.0"), (header::ID, &id), (header::TYPE, row.kind())];
    let theirs = own.iter().map(|(name, value)| (name.as_ref(), value.as_ref()));
    // Of headers with one name, the last counts.
    let all = [(header::SOURCE, "outbox")].into_iter().chain(theirs).chain(ours);
    // The row's writer may have written any headers.
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

/// The record of a row, for a producer, with the number that names it there.
pub(crate) fn of(row: &Row, built: Built, opaque: usize, timestamp: i64) -> BaseRecord<'_, [u8], [u8], usize> {
    let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(row.topic(), opaque).headers(built.headers);
    record.key = row.key().map(str::as_bytes).filter(|_| built.left_out < LeftOut::Key);
    record.payload = row.payload().filter(|_| built.left_out < LeftOut::Payload);
    record.timestamp = Some(timestamp);
    record
}

/// The bytes before the records of a batch (magic 2).
pub(crate) const BATCH_HEADER: usize = 61;

/// Bytes of a length as a zigzag varint.
fn varint(length: usize) -> usize {
    let zigzag = (length as u64) << 1;
    (64 - zigzag.max(1).leading_zeros() as usize).div_ceil(7)
}

/// A JSON object of strings as pairs. A value that is no string goes as its JSON text: a header must never be what
/// keeps a committed row from being published.
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

    #[test]
    fn headers_that_are_no_object_are_none_and_two_of_one_name_both_go() {
        for text in ["", "null", "[]", "7", "{"] {
            assert!(parse(text).is_empty(), "{text:?}");
        }
        let twice = parse(r#"{"a": "1", "a": null}"#);
        assert_eq!(twice.iter().map(|(_, value)| value.as_ref()).collect::<Vec<_>>(), ["1", "null"]);
    }

    #[test]
    fn headers_take_their_names_their_values_and_a_length_for_each() {
        let mut headers = Headers::with_capacity(3);
        headers.add("ab", b"xyz");
        assert_eq!((headers.count, headers.size), (1, 7));
        headers.push("k", None);
        assert_eq!((headers.count, headers.size), (2, 10), "a null takes its length alone");
        headers.add("long", &[0; 64]);
        assert_eq!((headers.count, headers.size), (3, 81), "a length from 64 on takes two bytes");
    }

    #[test]
    fn times_and_numbers_are_texts_in_a_buffer_that_is_used_again() {
        let mut builder = RecordBuilder::new("orders", "e1".into(), DatabaseClock::of("times_and_numbers"));
        assert_eq!(builder.time(OffsetDateTime::UNIX_EPOCH), b"1970-01-01T00:00:00Z");
        assert_eq!(builder.number(42), b"42");
        let before_christ = OffsetDateTime::UNIX_EPOCH - time::Duration::days(366 * 1_971);
        assert_eq!(builder.time(before_christ), b"9999-12-31T23:59:59Z", "it has no form in RFC 3339");
    }

    #[test]
    fn only_a_topic_whose_name_ends_so_takes_dead_letters() {
        assert!(takes_dead_letters("orders.events.dlt"));
        assert!(!takes_dead_letters("orders.events") && !takes_dead_letters("dlt.orders"));
    }
}

//! Headers to envelope and back.
//!
//! Decoding is strict about what this crate's correctness hangs on (id, source, type, a saga's coordinates). It is
//! lenient about the rest: an attribute that only informs (`ce_time`, `ce_sequence`) is dropped when it does not parse.

use super::{Envelope, EnvelopeError, Headers, SagaHeaders, SourcePosition, carried, header};
use crate::id::{CommandId, MessageId, SagaId};
use std::{borrow::Cow, collections::BTreeMap, str::FromStr};
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

/// The longest `correlation-id`, in bytes. Our own are trace ids, of 32.
const CORRELATION_MAX: usize = 200;

/// The headers that have a field of their own; whatever else a record carries is passed through.
const KNOWN: [&str; 23] = [
    header::SPECVERSION,
    header::ID,
    header::SOURCE,
    header::TYPE,
    header::SUBJECT,
    header::TIME,
    header::SEQUENCE,
    header::CONTENT_TYPE,
    header::TRACEPARENT,
    header::TRACESTATE,
    header::SAGA_ID,
    header::SAGA_TYPE,
    header::SAGA_VERSION,
    header::SAGA_STEP,
    header::SAGA_OP,
    header::SAGA_OCCURRENCE,
    header::SAGA_ORCHESTRATOR,
    header::SAGA_UNDOES,
    header::SAGA_HAPPENED,
    header::COMMAND_ID,
    header::ATTEMPT,
    header::REPLY_TO,
    header::OUTCOME,
];

impl Envelope {
    /// Makes an envelope with the required attributes alone.
    pub fn new(id: MessageId, source: &str, kind: &str) -> Self {
        Self {
            id,
            source: source.into(),
            kind: kind.into(),
            subject: None,
            time: None,
            sequence: None,
            content_type: None,
            traceparent: None,
            tracestate: None,
            saga: None,
            other: Headers::new(),
        }
    }

    /// Reads a record's headers, in their order. Of a header that is there twice the last counts; a header without a
    /// value counts as absent. Bytes that are not UTF-8 are replaced.
    ///
    /// # Errors
    /// When a required header is missing or a header that decides something does not parse.
    pub fn decode<'a>(headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>) -> Result<Self, EnvelopeError> {
        let mut found = Found(BTreeMap::new());
        for (name, value) in headers {
            match value {
                Some(value) => found.0.insert(name, String::from_utf8_lossy(value)),
                None => found.0.remove(name),
            };
        }
        found.parse::<Version>(header::SPECVERSION, "1.0")?.ok_or(EnvelopeError::Missing(header::SPECVERSION))?;
        let saga = found.saga()?;
        let envelope = Self {
            id: MessageId(found.require(header::ID, "a UUID")?),
            source: found.require::<Text>(header::SOURCE, A_TEXT)?.0,
            kind: found.require::<Text>(header::TYPE, A_TEXT)?.0,
            subject: found.text(header::SUBJECT),
            time: found.text(header::TIME).and_then(|text| OffsetDateTime::parse(&text, &Rfc3339).ok()),
            sequence: found.text(header::SEQUENCE).and_then(|text| text.parse().ok()),
            content_type: found.text(header::CONTENT_TYPE),
            traceparent: found.carried(header::TRACEPARENT),
            tracestate: found.carried(header::TRACESTATE),
            saga,
            other: found.rest(),
        };
        Ok(envelope)
    }

    /// The headers to write, each once.
    pub fn encode(&self) -> Headers {
        let mut headers = self.other.clone();
        if let Some(saga) = &self.saga {
            saga.write_to(&mut headers);
        }
        let mut set =
            |name: &'static str, value: Option<String>| value.and_then(|value| headers.insert(name.into(), value));
        set(header::SPECVERSION, Some("1.0".into()));
        set(header::ID, Some(self.id.to_string()));
        set(header::SOURCE, Some(self.source.clone()));
        set(header::TYPE, Some(self.kind.clone()));
        set(header::SUBJECT, self.subject.clone());
        set(header::TIME, self.time.and_then(|time| time.to_offset(UtcOffset::UTC).format(&Rfc3339).ok()));
        set(header::SEQUENCE, self.sequence.map(|sequence| sequence.to_string()));
        set(header::CONTENT_TYPE, self.content_type.clone());
        set(header::TRACEPARENT, self.traceparent.clone());
        set(header::TRACESTATE, self.tracestate.clone());
        headers
    }

    /// The message's place among all that its source has published. A dead letter that was sent again stands where its
    /// original stood. Its own place is in the outbox of the consumer that gave it up.
    pub fn standing(&self) -> SourcePosition<'_> {
        let said = |name: &str| self.other.get(name).map(String::as_str);
        let redriven = said(header::ORIGINAL_TOPIC).is_some();
        let (epoch, sequence) = match redriven {
            true => (header::ORIGINAL_EPOCH, said(header::ORIGINAL_SEQUENCE).and_then(|text| text.parse().ok())),
            false => (header::EPOCH, self.sequence),
        };
        SourcePosition { source: &self.source, epoch: said(epoch).unwrap_or_default(), sequence, redriven }
    }

    /// The id that ties together all that one request caused: the `correlation-id` header. An id that is too long or
    /// has control characters counts as none: it would go on into all that the message causes.
    pub fn correlation_id(&self) -> Option<&str> {
        let carried = |id: &&String| id.len() <= CORRELATION_MAX && !id.chars().any(char::is_control);
        self.other.get(header::CORRELATION_ID).filter(carried).map(String::as_str)
    }
}

impl SagaHeaders {
    /// Writes the saga headers into `headers`. Those of a reply (with an outcome) name the command as `ce_causationid`.
    pub fn write_to(&self, headers: &mut Headers) {
        let mut set = |name: &'static str, value: String| headers.insert(name.into(), value);
        set(header::SAGA_ID, self.saga.to_string());
        set(header::SAGA_TYPE, self.definition.clone());
        set(header::SAGA_VERSION, self.version.to_string());
        set(header::SAGA_STEP, self.step.clone());
        set(header::SAGA_OP, self.op.to_string());
        set(header::SAGA_OCCURRENCE, self.occurrence.to_string());
        set(header::ATTEMPT, self.attempt.to_string());
        let command = if self.outcome.is_some() { header::CAUSATION_ID } else { header::COMMAND_ID };
        set(command, self.command.to_string());
        if let Some(orchestrator) = &self.orchestrator {
            set(header::SAGA_ORCHESTRATOR, orchestrator.clone());
        }
        if let Some(undoes) = self.undoes {
            set(header::SAGA_UNDOES, undoes.to_string());
        }
        if let Some(happened) = self.happened {
            set(header::SAGA_HAPPENED, happened.as_str().to_owned());
        }
        if let Some(reply_to) = &self.reply_to {
            set(header::REPLY_TO, reply_to.clone());
        }
        if let Some(outcome) = self.outcome {
            set(header::OUTCOME, outcome.to_string());
        }
    }

    /// Reads the saga headers; `None` when there is no `ce_sagaid`.
    ///
    /// # Errors
    /// When there is one, and another saga header is missing or does not parse.
    pub fn read_from(headers: &Headers) -> Result<Option<Self>, EnvelopeError> {
        let borrowed = headers.iter().map(|(name, value)| (&**name, Cow::Borrowed(value.as_str())));
        Found(borrowed.collect()).saga()
    }
}

/// The headers, name to value, while they are taken out one by one.
struct Found<'a>(BTreeMap<&'a str, Cow<'a, str>>);

impl Found<'_> {
    fn parse<T: FromStr>(&self, name: &'static str, expected: &'static str) -> Result<Option<T>, EnvelopeError> {
        let Some(text) = self.0.get(name) else { return Ok(None) };
        let malformed = |_| EnvelopeError::Malformed { name, value: text.chars().take(100).collect(), expected };
        text.parse().map(Some).map_err(malformed)
    }

    fn require<T: FromStr>(&self, name: &'static str, expected: &'static str) -> Result<T, EnvelopeError> {
        self.parse(name, expected)?.ok_or(EnvelopeError::Missing(name))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|text| text.clone().into_owned())
    }

    /// The part of another program's trace context that may go on into all that the record causes.
    fn carried(&self, name: &str) -> Option<String> {
        self.0.get(name).and_then(|text| carried(name, text)).map(str::to_owned)
    }

    fn saga(&mut self) -> Result<Option<SagaHeaders>, EnvelopeError> {
        let Some(saga) = self.parse(header::SAGA_ID, "a UUID")? else { return Ok(None) };
        let outcome = self.parse(header::OUTCOME, "succeeded, rejected or failed")?;
        let command = if outcome.is_some() { header::CAUSATION_ID } else { header::COMMAND_ID };
        let headers = SagaHeaders {
            saga: SagaId(saga),
            definition: self.require::<Text>(header::SAGA_TYPE, A_TEXT)?.0,
            version: self.require(header::SAGA_VERSION, "a number")?,
            step: self.require::<Text>(header::SAGA_STEP, A_TEXT)?.0,
            op: self.require(header::SAGA_OP, "do or undo")?,
            occurrence: self.parse(header::SAGA_OCCURRENCE, "a number")?.unwrap_or(0),
            command: CommandId(self.require(command, "a UUID")?),
            attempt: self.parse(header::ATTEMPT, "a number")?.unwrap_or(1),
            undoes: self.parse(header::SAGA_UNDOES, "a UUID")?.map(CommandId),
            happened: self.parse(header::SAGA_HAPPENED, "yes or in_doubt")?,
            orchestrator: self.parse::<Text>(header::SAGA_ORCHESTRATOR, A_TEXT)?.map(|text| text.0),
            reply_to: self.text(header::REPLY_TO),
            outcome,
        };
        // A command's causation id is its sender's and passes through; a reply's is a field.
        self.0.remove(command);
        Ok(Some(headers))
    }

    fn rest(self) -> Headers {
        let unknown = self.0.into_iter().filter(|(name, _)| !KNOWN.contains(name));
        unknown.map(|(name, value)| (name.to_owned().into(), value.into_owned())).collect()
    }
}

/// `ce_specversion` 1.0, and later minor versions, which may only add.
struct Version;

impl FromStr for Version {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        text.starts_with("1.").then_some(Self).ok_or(())
    }
}

/// A text that PostgreSQL can store, in an index as well, and a reader can see.
struct Text(String);

/// What a [`Text`] has to be.
const A_TEXT: &str = "a text of 1 to 1000 bytes without NUL";
/// The longest text, in bytes. The inbox's key holds the source, and an index entry holds less than 2,700 bytes. A
/// longer source could neither be handled nor parked, and would stop its partition.
const TEXT_MAX: usize = 1_000;

impl FromStr for Text {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        ((1..=TEXT_MAX).contains(&text.len()) && !text.contains('\0')).then(|| Self(text.to_owned())).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Happened, Op, Outcome};
    use proptest::prelude::*;
    use uuid::Uuid;

    fn decode(headers: &Headers) -> Result<Envelope, EnvelopeError> {
        Envelope::decode(headers.iter().map(|(name, value)| (&**name, Some(value.as_bytes()))))
    }

    fn text() -> impl Strategy<Value = String> {
        "[^\0]{1,20}"
    }

    prop_compose! {
        fn saga_headers()(
            ids in any::<[u128; 2]>(), definition in text(), step in text(), version: u32, occurrence: u32, attempt: u32,
            undo: bool, undoes: Option<u128>, happened: Option<bool>,
            names in proptest::array::uniform2(proptest::option::of(text())),
            outcome in proptest::option::of(prop_oneof![
                Just(Outcome::Succeeded), Just(Outcome::Rejected), Just(Outcome::Failed)
            ]),
        ) -> SagaHeaders {
            SagaHeaders {
                saga: SagaId(Uuid::from_u128(ids[0])), definition, version, step,
                op: if undo { Op::Undo } else { Op::Do }, occurrence,
                command: CommandId(Uuid::from_u128(ids[1])), attempt, outcome,
                orchestrator: names[0].clone(), reply_to: names[1].clone(),
                undoes: undoes.map(|id| CommandId(Uuid::from_u128(id))),
                happened: happened.map(|yes| if yes { Happened::Yes(()) } else { Happened::InDoubt }),
            }
        }
    }

    prop_compose! {
        fn envelope()(
            id: u128, source in text(), kind in text(), texts in proptest::array::uniform2(proptest::option::of(".*")),
            traceparent in proptest::option::of("00-[0-9a-f]{31}1-[0-9a-f]{15}1-0[01]"),
            tracestate in proptest::option::of("[a-z]{1,8}=[!-+--<>-~]{1,20}"),
            time in proptest::option::of((-60_000_000_000i64..250_000_000_000, 0u32..1_000_000_000)),
            sequence: Option<i64>, saga in proptest::option::of(saga_headers()),
            other in proptest::collection::btree_map("x-[a-z]{1,8}|correlation-id", ".*", 0..4),
        ) -> Envelope {
            let [subject, content_type] = texts;
            let time = time.map(|(seconds, nanos)| {
                OffsetDateTime::from_unix_timestamp(seconds).unwrap().replace_nanosecond(nanos).unwrap()
            });
            let other = other.into_iter().map(|(name, value)| (name.into(), value)).collect();
            Envelope {
                id: MessageId(Uuid::from_u128(id)), source, kind, subject, time, sequence, content_type, traceparent,
                tracestate, saga, other,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(envelope in envelope()) {
            prop_assert_eq!(decode(&envelope.encode()), Ok(envelope));
        }

        #[test]
        fn saga_headers_survive_a_message_of_the_outbox(saga in saga_headers()) {
            let mut headers = Headers::new();
            saga.write_to(&mut headers);
            prop_assert_eq!(SagaHeaders::read_from(&headers), Ok(Some(saga)));
        }

        #[test]
        fn decoding_never_panics(headers in proptest::collection::vec(
            (prop_oneof![proptest::sample::select(&KNOWN[..]).prop_map(str::to_owned), ".*"],
             proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40))),
            0..30,
        )) {
            let _ = Envelope::decode(headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())));
        }
    }

    fn minimal() -> Headers {
        Envelope::new(MessageId::new(), "orders", "orders.placed.v1").encode()
    }

    #[test]
    fn the_last_of_two_values_counts_and_unknown_headers_pass_through() {
        let base = minimal();
        let first = base.iter().map(|(name, value)| (&**name, Some(value.as_bytes())));
        let again = [("ce_source", Some(&b"payments"[..])), ("x-shop", Some(&b"1"[..])), ("x-shop", Some(&b"2"[..]))];
        let envelope = Envelope::decode(first.chain(again)).unwrap();
        assert_eq!((envelope.source.as_str(), envelope.other["x-shop"].as_str()), ("payments", "2"));
    }

    #[test]
    fn what_is_missing_or_malformed_is_named() {
        for name in [header::SPECVERSION, header::ID, header::SOURCE, header::TYPE] {
            let mut headers = minimal();
            headers.remove(name);
            assert_eq!(decode(&headers), Err(EnvelopeError::Missing(name)));
        }
        for (name, value) in
            [(header::ID, "7"), (header::SPECVERSION, "0.3"), (header::SOURCE, "a\0b"), (header::TYPE, "")]
        {
            let mut headers = minimal();
            headers.insert(name.into(), value.into());
            assert!(matches!(decode(&headers), Err(EnvelopeError::Malformed { name: at, .. }) if at == name), "{name}");
        }
        let mut headers = minimal();
        headers.insert(header::SAGA_ID.into(), SagaId::new().to_string());
        assert_eq!(decode(&headers), Err(EnvelopeError::Missing(header::SAGA_TYPE)));
    }

    #[test]
    fn a_dead_letter_that_is_sent_again_stands_where_its_original_stood() {
        let mut headers = minimal();
        headers.extend([(header::SEQUENCE.into(), "700".into()), (header::EPOCH.into(), "theirs".into())]);
        let plain = decode(&headers).unwrap();
        assert_eq!(
            plain.standing(),
            SourcePosition { source: "orders", epoch: "theirs", sequence: Some(700), redriven: false }
        );
        headers.insert(header::ORIGINAL_TOPIC.into(), "items".into());
        headers.insert(header::ORIGINAL_SEQUENCE.into(), "9".into());
        headers.insert(header::ORIGINAL_EPOCH.into(), "ours".into());
        let again = decode(&headers).unwrap();
        assert_eq!(
            again.standing(),
            SourcePosition { source: "orders", epoch: "ours", sequence: Some(9), redriven: true }
        );
    }

    #[test]
    fn what_only_informs_may_be_garbage() {
        let mut headers = minimal();
        headers.insert(header::TIME.into(), "yesterday".into());
        headers.insert(header::SEQUENCE.into(), "many".into());
        let envelope = decode(&headers).unwrap();
        assert_eq!((envelope.time, envelope.sequence), (None, None));
    }
}

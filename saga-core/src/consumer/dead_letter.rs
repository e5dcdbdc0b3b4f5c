//! A record that could not be handled goes to `<topic>.dlt`, through the outbox: in the transaction that gives it up.
//!
//! A dead letter is the record as it was (key, value, every header, id). Further headers hold its coordinates and what
//! was wrong. The headers that the relay sets on each message are the dead letter's own; what the record had there
//! stands in `x-original-…`. A record without a readable id gets one derived from its coordinates, so that a repeat is
//! recognisable.

use super::{
    Coordinates, Message,
    failure::RecordFault,
    record::{RawHeaders, RecordOrigin, RefusedRecord},
};
use crate::{
    envelope::{Headers, exact, header},
    id::MessageId,
    outbox::{self, AppendError, NewMessage, Tx},
    topic::dead_letter_topic,
};
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// The names of a dead letter's headers.
pub mod dead_letter_header {
    /// The topic that the record was read from.
    pub const TOPIC: &str = crate::envelope::header::ORIGINAL_TOPIC;
    /// The partition in the original topic.
    pub const PARTITION: &str = "x-original-partition";
    /// The offset in the original partition.
    pub const OFFSET: &str = "x-original-offset";
    /// The original record's timestamp, RFC 3339.
    pub const TIMESTAMP: &str = "x-original-timestamp";
    /// The consumer group that gave the record up.
    pub const GROUP: &str = "x-original-group";
    /// The record's key, in hexadecimal digits, when it is no text.
    pub const KEY: &str = "x-original-key";
    /// What kind of thing was wrong, in one word.
    pub const ERROR_CLASS: &str = "x-error-class";
    /// What was wrong, in words.
    pub const ERROR_MESSAGE: &str = "x-error-message";
    /// How often the record was tried.
    pub const ATTEMPTS: &str = "x-attempts";
    /// The original's `ce_sequence`, `ce_epoch` and `ce_time`: the dead letter has its own. If the original's `ce_id`,
    /// `ce_type`, `ce_specversion` or `ce_source` could not be read, the dead letter has its own, too. The original's
    /// are then `x-original-id` and so on.
    pub const SEQUENCE: &str = crate::envelope::header::ORIGINAL_SEQUENCE;
    /// The original's `ce_epoch`: see [`SEQUENCE`].
    pub const EPOCH: &str = crate::envelope::header::ORIGINAL_EPOCH;
    /// The original's `ce_time`: see [`SEQUENCE`].
    pub const TIME: &str = "x-original-time";
    /// The size of the original's payload, in bytes. The relay sets it when the dead letter is too large for its topic
    /// with its payload, and leaves the payload out. The payload can be read at the coordinates above, for as long as
    /// that topic keeps it.
    pub const PAYLOAD_BYTES: &str = "x-original-payload-bytes";
    /// The size of the original's own headers, where the relay left them out: see [`PAYLOAD_BYTES`].
    pub const HEADERS_BYTES: &str = "x-original-headers-bytes";
    /// The size of the original's key, where the relay left it out: see [`PAYLOAD_BYTES`].
    pub const KEY_BYTES: &str = "x-original-key-bytes";

    /// The headers that a consumer sets on every dead letter, whatever else it carries.
    pub const SAID: [&str; 9] = [TOPIC, PARTITION, OFFSET, TIMESTAMP, GROUP, KEY, ERROR_CLASS, ERROR_MESSAGE, ATTEMPTS];
}

/// The headers that the relay sets on every message, and on a dead letter as on its original.
const SET_BY_THE_RELAY: [&str; 3] = [header::SPECVERSION, header::ID, header::TYPE];

/// The type of a dead letter whose record's type cannot be read.
const UNKNOWN_TYPE: &str = "undecodable";

/// The longest source that an envelope may have, in bytes.
const SOURCE_MAX: usize = 1_000;

/// A record that is given up.
pub(super) struct DeadLetter<'a> {
    at: &'a Coordinates,
    key: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
    origin: &'a RecordOrigin,
    class: &'a str,
    reason: &'a str,
    attempts: u32,
}

impl<'a> DeadLetter<'a> {
    /// The dead letter of a record that no handler saw.
    pub(super) fn refused(refused: &'a RefusedRecord) -> Self {
        Self {
            at: &refused.at,
            key: refused.key.as_deref(),
            payload: refused.payload.as_deref(),
            origin: &refused.origin,
            class: refused.class,
            reason: &refused.reason,
            attempts: 0,
        }
    }

    /// The dead letter of a record that was tried `attempts` times.
    pub(super) fn failed(
        message: &'a Message,
        origin: &'a RecordOrigin,
        fault: &'a RecordFault,
        attempts: u32,
    ) -> Self {
        Self {
            at: &message.at,
            key: message.key.as_deref(),
            payload: message.payload.as_deref(),
            origin,
            class: &fault.class,
            reason: &fault.reason,
            attempts,
        }
    }

    /// The text of a header, if it has one; of several headers of the name, the last.
    fn text(&self, name: &str) -> Option<&'a str> {
        text(&self.origin.headers, name)
    }

    fn into_message(self, group: &str) -> (NewMessage, Option<String>) {
        let key = self.key.and_then(|key| std::str::from_utf8(key).ok()).filter(|key| !key.contains('\0'));
        let id = self.text(header::ID).and_then(|id| id.parse().ok()).unwrap_or_else(|| derive_id(group, self.at));
        let kind = self.text(header::TYPE).unwrap_or(UNKNOWN_TYPE).to_owned();
        let mut headers = kept(&self.origin.headers, id, &kind);
        let mut set = |name: &'static str, value: String| headers.insert(name.into(), value);
        set(dead_letter_header::TOPIC, self.at.topic.clone());
        set(dead_letter_header::PARTITION, self.at.partition.to_string());
        set(dead_letter_header::OFFSET, self.at.offset.to_string());
        set(dead_letter_header::GROUP, group.to_owned());
        set(dead_letter_header::ERROR_CLASS, self.class.to_owned());
        set(dead_letter_header::ERROR_MESSAGE, self.reason.replace('\0', "\u{fffd}"));
        set(dead_letter_header::ATTEMPTS, self.attempts.to_string());
        if let Some(timestamp) = self.origin.timestamp.and_then(|timestamp| timestamp.format(&Rfc3339).ok()) {
            set(dead_letter_header::TIMESTAMP, timestamp);
        }
        if let (Some(bytes), None) = (self.key, key) {
            set(dead_letter_header::KEY, bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        let message = NewMessage {
            id,
            topic: dead_letter_topic(&self.at.topic),
            key: String::new(),
            kind,
            payload: self.payload.map(<[u8]>::to_vec),
            headers,
        };
        (message, key.map(str::to_owned))
    }
}

/// The text of the last of several headers of a name, if PostgreSQL can store it.
fn text<'a>(headers: &'a RawHeaders, name: &str) -> Option<&'a str> {
    let last = headers.iter().filter(|(of, _)| *of == name).last().and_then(|(_, value)| value)?;
    std::str::from_utf8(last).ok().filter(|text| !text.is_empty() && !text.contains('\0'))
}

/// Keeps every header of the record. Headers that the dead letter has of its own are renamed, and come first. A record
/// may be a dead letter that was sent again: then the last header of such a name is that of its first original.
fn kept(headers: &RawHeaders, id: MessageId, kind: &str) -> Headers {
    let alone = |name: &str| headers.iter().filter(|(of, _)| *of == name).take(2).count() == 1;
    let says = |name: &str, what: &str| alone(name) && text(headers, name) == Some(what);
    let source = text(headers, header::SOURCE).filter(|source| source.len() <= SOURCE_MAX);
    // Each header once, however many of one name there are.
    let same = [
        (header::SPECVERSION, "x-original-specversion", says(header::SPECVERSION, "1.0")),
        (header::ID, "x-original-id", says(header::ID, &id.to_string())),
        (header::TYPE, "x-original-type", says(header::TYPE, kind)),
        (header::SOURCE, "x-original-source", source.is_some() && alone(header::SOURCE)),
    ];
    let new_name = |name: &str| match name {
        header::SEQUENCE => Some(dead_letter_header::SEQUENCE),
        header::EPOCH => Some(dead_letter_header::EPOCH),
        header::TIME => Some(dead_letter_header::TIME),
        name => same.iter().find(|(of, _, same)| *of == name && !same).map(|(_, new, _)| *new),
    };
    let renamed = headers.iter().filter_map(|(name, value)| Some((new_name(name)?, value)));
    let others = headers.iter().filter(|(name, _)| new_name(name).is_none() && !SET_BY_THE_RELAY.contains(name));
    exact::beside(renamed.chain(others), &dead_letter_header::SAID)
}

/// Derives the id, which is always the same for one record and one group.
fn derive_id(group: &str, at: &Coordinates) -> MessageId {
    let name = format!("{group}/{}/{}/{}", at.topic, at.partition, at.offset);
    MessageId(Uuid::new_v5(&Uuid::NAMESPACE_URL, name.as_bytes()))
}

/// Appends dead letters in the transaction that gives their records up.
pub(super) async fn append_in(
    tx: &mut Tx<'_>,
    group: &str,
    letters: impl IntoIterator<Item = DeadLetter<'_>>,
) -> Result<(), AppendError> {
    let mut messages = Vec::new();
    let mut keys = Vec::new();
    for letter in letters {
        // Logged once, here, with the coordinates: the record itself is in the dead letter.
        tracing::warn!(
            group,
            topic = letter.at.topic,
            partition = letter.at.partition,
            offset = letter.at.offset,
            message_id = letter.text(header::ID),
            saga = letter.text(header::SAGA_ID),
            saga_type = letter.text(header::SAGA_TYPE),
            class = letter.class,
            reason = letter.reason,
            attempts = letter.attempts,
            "dead-lettered"
        );
        let (message, key) = letter.into_message(group);
        messages.push(message);
        keys.push(key);
    }
    outbox::append_keyed_in(tx, &messages, keys.iter().map(Option::as_deref).collect()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::OffsetDateTime;

    type Given<'a> = &'a [(&'a str, Option<&'a [u8]>)];

    fn refused(key: Option<&[u8]>, headers: Given<'_>) -> RefusedRecord {
        let mut raw = RawHeaders::default();
        headers.iter().for_each(|(name, value)| raw.push(name, *value));
        RefusedRecord {
            at: Coordinates { topic: "t".into(), partition: 3, offset: 14 },
            key: key.map(<[u8]>::to_vec),
            payload: None,
            origin: RecordOrigin { timestamp: Some(OffsetDateTime::UNIX_EPOCH), headers: raw },
            class: "undecodable",
            reason: "no\0good".into(),
        }
    }

    #[test]
    fn a_dead_letter_tells_where_it_stood_and_what_was_wrong() {
        let given: Given<'_> = &[
            ("ce_type", Some(b"a.b.v1")),
            ("x-shop", Some(b"1")),
            ("ce_sequence", Some(b"9")),
            ("ce_epoch", Some(b"e")),
        ];
        let record = refused(Some(b"k"), given);
        let (message, key) = DeadLetter::refused(&record).into_message("g");
        assert_eq!((message.topic.as_str(), message.kind.as_str(), key.as_deref()), ("t.dlt", "a.b.v1", Some("k")));
        let headers: Vec<_> = message.headers.iter().map(|(name, value)| (&**name, value.as_str())).collect();
        assert_eq!(
            headers,
            [
                ("x-attempts", "0"),
                ("x-error-class", "undecodable"),
                ("x-error-message", "no\u{fffd}good"),
                ("x-original-epoch", "e"),
                ("x-original-group", "g"),
                ("x-original-offset", "14"),
                ("x-original-partition", "3"),
                ("x-original-sequence", "9"),
                ("x-original-timestamp", "1970-01-01T00:00:00Z"),
                ("x-original-topic", "t"),
                ("x-shop", "1"),
            ]
        );
    }

    #[test]
    fn a_key_that_is_no_text_is_kept_in_digits_and_a_repeat_has_the_same_id() {
        let (first, key) = DeadLetter::refused(&refused(Some(&[0xff, 0]), &[])).into_message("g");
        assert_eq!((key, first.headers["x-original-key"].as_str()), (None, "ff00"));
        assert_eq!(first.kind, "undecodable");
        let (again, _) = DeadLetter::refused(&refused(Some(&[0xff, 0]), &[])).into_message("g");
        assert_eq!(first.id, again.id);
    }
    #[test]
    fn every_header_is_kept_and_what_the_dead_letter_has_of_its_own_is_renamed() {
        let given: Given<'_> = &[
            ("ce_id", Some(b"seven")),
            ("ce_type", Some(b"a.b.v1")),
            ("ce_type", Some(b"a.b.v2")),
            ("ce_source", None),
            ("ce_specversion", Some(b"1.1")),
            ("ce_sequence", Some(b"40")),
            ("bin", Some(&[0xff])),
            ("none", None),
            ("x-original-sequence", Some(b"9")),
            ("x-original-topic", Some(b"before")),
        ];
        let (message, _) = DeadLetter::refused(&refused(None, given)).into_message("g");
        let all = exact::to_record(&message.headers);
        let of = |name: &str| -> Vec<_> {
            all.iter().filter(|(of, _)| of == name).map(|(_, value)| value.as_deref()).collect()
        };
        assert_eq!(message.kind, "a.b.v2");
        assert_eq!(of("x-original-id"), [Some(&b"seven"[..])]);
        assert_eq!(of("x-original-type"), [Some(&b"a.b.v1"[..]), Some(b"a.b.v2")]);
        assert_eq!((of("x-original-source"), of("x-original-specversion")), (vec![None], vec![Some(&b"1.1"[..])]));
        assert_eq!((of("bin"), of("none")), (vec![Some(&[0xff_u8][..])], vec![None]));
        assert_eq!(of("x-original-sequence"), [Some(&b"40"[..]), Some(b"9")], "the first original's is the last");
        assert_eq!(of("x-original-topic"), [Some(&b"before"[..]), Some(b"t")]);
        for name in ["ce_id", "ce_type", "ce_source", "ce_specversion", "ce_sequence"] {
            assert!(of(name).is_empty(), "{name} is the relay's to say");
        }
    }
}

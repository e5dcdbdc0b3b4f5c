//! What could not be handled goes to `<topic>.dlt`, through the outbox: in the transaction that gives it up.
//!
//! A dead letter is the record as it was (key, value, headers, id), with its coordinates and what was wrong as further
//! headers. One that had no readable id gets one derived from its coordinates, so that a repeat is recognisable.

use super::{
    Coordinates, Message,
    failure::Fault,
    record::{Refused, storable_headers},
};
use crate::{
    envelope::{Headers, header},
    id::MessageId,
    outbox::{self, AppendError, NewMessage, Tx},
    topic::dead_letter_topic,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

/// Header names of a dead letter.
pub mod dead_letter_header {
    /// The topic that it was read from.
    pub const TOPIC: &str = "x-original-topic";
    /// Its partition there.
    pub const PARTITION: &str = "x-original-partition";
    /// Its offset there.
    pub const OFFSET: &str = "x-original-offset";
    /// Its record's timestamp, RFC 3339.
    pub const TIMESTAMP: &str = "x-original-timestamp";
    /// The consumer group that gave it up.
    pub const GROUP: &str = "x-original-group";
    /// Its key, in hexadecimal digits, when that is no text.
    pub const KEY: &str = "x-original-key";
    /// What kind of thing was wrong, in one word.
    pub const ERROR_CLASS: &str = "x-error-class";
    /// What was wrong, in words.
    pub const ERROR_MESSAGE: &str = "x-error-message";
    /// How often it was tried.
    pub const ATTEMPTS: &str = "x-attempts";
}

/// What the relay says of every message; of a dead letter it says its own.
const SET_BY_THE_RELAY: [&str; 5] = [header::SPECVERSION, header::ID, header::TYPE, header::TIME, header::SEQUENCE];

/// What a record is called whose type cannot be read.
const UNKNOWN_TYPE: &str = "undecodable";

/// A record that is given up.
pub(super) struct DeadLetter<'a> {
    at: &'a Coordinates,
    timestamp: Option<OffsetDateTime>,
    key: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
    headers: Headers,
    class: &'a str,
    reason: &'a str,
    attempts: u32,
}

impl<'a> DeadLetter<'a> {
    /// One that no handler saw.
    pub(super) fn refused(refused: &'a Refused) -> Self {
        Self {
            at: &refused.at,
            timestamp: refused.timestamp,
            key: refused.key.as_deref(),
            payload: refused.payload.as_deref(),
            headers: refused.headers.clone(),
            class: refused.class,
            reason: &refused.reason,
            attempts: 0,
        }
    }

    /// One that was tried `attempts` times.
    pub(super) fn failed(
        message: &'a Message,
        timestamp: Option<OffsetDateTime>,
        fault: &'a Fault,
        attempts: u32,
    ) -> Self {
        Self {
            at: &message.at,
            timestamp,
            key: message.key.as_deref(),
            payload: message.payload.as_deref(),
            headers: storable_headers(&message.envelope),
            class: &fault.class,
            reason: &fault.reason,
            attempts,
        }
    }

    fn into_message(mut self, group: &str) -> (NewMessage, Option<String>) {
        let key = self.key.and_then(|key| std::str::from_utf8(key).ok()).filter(|key| !key.contains('\0'));
        let id =
            self.headers.get(header::ID).and_then(|id| id.parse().ok()).unwrap_or_else(|| derive_id(group, self.at));
        let kind = self.headers.get(header::TYPE).filter(|kind| !kind.is_empty()).cloned();
        self.headers.retain(|name, _| !SET_BY_THE_RELAY.contains(&&**name));
        let mut set = |name: &'static str, value: String| self.headers.insert(name.into(), value);
        set(dead_letter_header::TOPIC, self.at.topic.clone());
        set(dead_letter_header::PARTITION, self.at.partition.to_string());
        set(dead_letter_header::OFFSET, self.at.offset.to_string());
        set(dead_letter_header::GROUP, group.to_owned());
        set(dead_letter_header::ERROR_CLASS, self.class.to_owned());
        set(dead_letter_header::ERROR_MESSAGE, self.reason.replace('\0', "\u{fffd}"));
        set(dead_letter_header::ATTEMPTS, self.attempts.to_string());
        if let Some(timestamp) = self.timestamp.and_then(|timestamp| timestamp.format(&Rfc3339).ok()) {
            set(dead_letter_header::TIMESTAMP, timestamp);
        }
        if let (Some(bytes), None) = (self.key, key) {
            set(dead_letter_header::KEY, bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        let message = NewMessage {
            id,
            topic: dead_letter_topic(&self.at.topic),
            key: String::new(),
            kind: kind.unwrap_or_else(|| UNKNOWN_TYPE.to_owned()),
            payload: self.payload.map(<[u8]>::to_vec),
            headers: self.headers,
        };
        (message, key.map(str::to_owned))
    }
}

/// Always the same for one record and one group.
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
        // Once, here, with the coordinates: the record itself is in the dead letter.
        tracing::warn!(
            group,
            topic = letter.at.topic,
            partition = letter.at.partition,
            offset = letter.at.offset,
            message_id = letter.headers.get(header::ID),
            saga = letter.headers.get(header::SAGA_ID),
            saga_type = letter.headers.get(header::SAGA_TYPE),
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

    fn refused(key: Option<&[u8]>, headers: &[(&str, &str)]) -> Refused {
        Refused {
            at: Coordinates { topic: "t".into(), partition: 3, offset: 14 },
            timestamp: Some(OffsetDateTime::UNIX_EPOCH),
            key: key.map(<[u8]>::to_vec),
            payload: None,
            headers: headers.iter().map(|&(name, value)| (name.to_owned().into(), value.to_owned())).collect(),
            class: "undecodable",
            reason: "no\0good".into(),
        }
    }

    #[test]
    fn a_dead_letter_tells_where_it_stood_and_what_was_wrong() {
        let record = refused(Some(b"k"), &[("ce_type", "a.b.v1"), ("x-shop", "1"), ("ce_sequence", "9")]);
        let (message, key) = DeadLetter::refused(&record).into_message("g");
        assert_eq!((message.topic.as_str(), message.kind.as_str(), key.as_deref()), ("t.dlt", "a.b.v1", Some("k")));
        let headers: Vec<_> = message.headers.iter().map(|(name, value)| (&**name, value.as_str())).collect();
        assert_eq!(
            headers,
            [
                ("x-attempts", "0"),
                ("x-error-class", "undecodable"),
                ("x-error-message", "no\u{fffd}good"),
                ("x-original-group", "g"),
                ("x-original-offset", "14"),
                ("x-original-partition", "3"),
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
}

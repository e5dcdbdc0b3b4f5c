//! What a Kafka topic is meant to be. Declared once, in a contracts crate; created at start by
//! [`crate::service::topics`]; a mismatch is reported, never changed in silence.

use std::time::Duration;

/// The declaration of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic {
    /// The topic's name on the broker.
    pub name: &'static str,
    /// How many partitions it is created with.
    pub partitions: i32,
    /// How long a record is kept; `None` is for ever.
    pub retention: Option<Duration>,
    /// What happens to old records.
    pub cleanup: Cleanup,
}

/// Kafka's `cleanup.policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cleanup {
    /// Old records are deleted after the retention.
    Delete,
    /// Of each key, the last record is kept.
    Compact,
}

impl Topic {
    /// A topic whose records are deleted after seven days.
    pub const fn events(name: &'static str, partitions: i32) -> Self {
        Self { name, partitions, retention: Some(Duration::from_secs(7 * 24 * 3600)), cleanup: Cleanup::Delete }
    }
}

impl From<&Topic> for String {
    fn from(topic: &Topic) -> Self {
        topic.name.to_owned()
    }
}

/// Longest name of a topic that Kafka accepts, in bytes.
pub const NAME_MAX: usize = 249;

/// Whether Kafka can have a topic of this name: 1 to [`NAME_MAX`] of a-z, A-Z, 0-9, `.`, `_` and `-`, and neither `.` nor `..`.
/// What a message or a relay says of a topic is judged by this rule alone.
#[must_use]
pub fn is_legal_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=NAME_MAX).contains(&name.len()) && name.chars().all(legal) && !matches!(name, "." | "..")
}

/// The name of the topic that takes what a consumer of `topic` could not handle.
pub fn dead_letter_topic(topic: &str) -> String {
    format!("{topic}.dlt")
}

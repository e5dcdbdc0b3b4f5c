//! Declarations of Kafka topics. A contracts crate declares each topic once, and [`crate::service::topics`] creates it
//! at start. A mismatch is reported, never changed in silence.
//!
//! ```
//! use saga_core::topic::{Topic, is_legal_name};
//!
//! /// Twelve partitions; a record is kept for seven days.
//! static COMMANDS: Topic = Topic::events("inventory.commands", 12);
//!
//! assert!(is_legal_name(COMMANDS.name));
//! assert!(!is_legal_name("__consumer_offsets"), "Kafka's own topics are no topics of ours");
//! ```

use std::time::Duration;

/// The declaration of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic {
    /// The topic's name on the broker.
    pub name: &'static str,
    /// How many partitions it is created with.
    pub partitions: i32,
    /// How long a record is kept; `None`: for ever.
    pub retention: Option<Duration>,
    /// What happens to old records.
    pub cleanup: Cleanup,
}

/// Kafka's `cleanup.policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cleanup {
    /// Old records are deleted after the retention.
    Delete,
    /// Kafka keeps the last record of each key.
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

/// Whether a message of ours can go to a topic of this name. A name has 1 to [`NAME_MAX`] of a-z, A-Z, 0-9, `.`, `_`
/// and `-`. It is neither `.` nor `..`, and does not begin with `__` as Kafka's own topics do. This rule alone judges
/// the topics in messages, in a command's `ce_replyto` and in the relay.
#[must_use]
pub fn is_legal_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=NAME_MAX).contains(&name.len())
        && name.chars().all(legal)
        && !matches!(name, "." | "..")
        && !name.starts_with("__")
}

/// The hash of a record's key in Kafka's default partitioner and in the relay's (`murmur2`). Modulo the number of
/// partitions it is the record's partition. Never negative.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
pub(crate) fn key_hash(key: &[u8]) -> i32 {
    const MIX: u32 = 0x5bd1_e995;
    let (words, rest) = key.as_chunks::<4>();
    let mut hash = 0x9747_b28c ^ key.len() as u32;
    for word in words {
        let word = u32::from_le_bytes(*word).wrapping_mul(MIX);
        hash = hash.wrapping_mul(MIX) ^ (word ^ (word >> 24)).wrapping_mul(MIX);
    }
    if !rest.is_empty() {
        let tail = rest.iter().rev().fold(0_u32, |tail, byte| (tail << 8) | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(MIX);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(MIX);
    ((hash ^ (hash >> 15)) & 0x7fff_ffff) as i32
}

/// The name of the topic that takes what a consumer of `topic` could not handle.
pub fn dead_letter_topic(topic: &str) -> String {
    format!("{topic}.dlt")
}

#[cfg(test)]
mod tests {
    #[test]
    fn kafkas_own_topics_and_impossible_names_are_no_topics_of_ours() {
        for name in ["", ".", "..", "a b", "a/b", "ä", "__consumer_offsets", "__x", &"x".repeat(250)] {
            assert!(!super::is_legal_name(name), "{name}");
        }
        for name in ["orders.replies", "_private", "a__b", &"x".repeat(249)] {
            assert!(super::is_legal_name(name), "{name}");
        }
    }

    #[test]
    fn a_keys_hash_is_that_of_kafkas_default_partitioner() {
        // These vectors are from Kafka's own tests; the partitioner takes the sign off.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(super::key_hash(key.as_bytes()), hash & 0x7fff_ffff, "{key}");
        }
    }
}

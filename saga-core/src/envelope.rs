//! Message headers: CloudEvents 1.0 in Kafka binary mode, and what sagas add to them.
//!
//! Attributes travel as headers, the payload as the record's value. Unknown headers pass through; a tombstone (null
//! value) is legal. This module is pure.
//!
//! ```
//! use saga_core::{envelope::{Envelope, header}, id::MessageId};
//!
//! let sent = Envelope::new(MessageId::new(), "orders", "order_placed.v1");
//! let headers = sent.encode();
//! assert_eq!(headers[header::TYPE], "order_placed.v1");
//!
//! let read = Envelope::decode(headers.iter().map(|(name, value)| (name.as_ref(), Some(value.as_bytes()))));
//! assert_eq!(read, Ok(sent));
//! ```

mod carried;
mod codec;
pub mod exact;

pub use carried::carried;

use crate::{
    command::{Happened, Op, Outcome},
    id::{CommandId, MessageId, SagaId},
};
use std::{borrow::Cow, collections::BTreeMap};
use time::OffsetDateTime;

/// Header name to value. Kafka allows a name twice and any bytes; we write each once, in UTF-8, and read the last. Most
/// names are ours, and not copied.
pub type Headers = BTreeMap<Cow<'static, str>, String>;

/// The names of the headers.
pub mod header {
    /// CloudEvents specification version; always `1.0`.
    pub const SPECVERSION: &str = "ce_specversion";
    /// The message's id, unique per logical message.
    pub const ID: &str = "ce_id";
    /// The sender: the outbox's name unless the service set its own.
    pub const SOURCE: &str = "ce_source";
    /// The message's type, which also decides how to decode the payload.
    pub const TYPE: &str = "ce_type";
    /// The subject, for example the aggregate's id.
    pub const SUBJECT: &str = "ce_subject";
    /// When the message was written, RFC 3339.
    pub const TIME: &str = "ce_time";
    /// The outbox row's id: it grows along a key, within an epoch of its source.
    pub const SEQUENCE: &str = "ce_sequence";
    /// The epoch that the sequence counts in: a new one begins with a restore, a promotion, a new database or a new
    /// outbox. Epochs may only be compared for equality.
    pub const EPOCH: &str = "ce_epoch";
    /// Media type of the payload.
    pub const CONTENT_TYPE: &str = "content-type";
    /// W3C trace context: the ids of the trace and of the sending span.
    pub const TRACEPARENT: &str = "traceparent";
    /// W3C trace context, vendor part.
    pub const TRACESTATE: &str = "tracestate";
    /// Ties together all that one request caused.
    pub const CORRELATION_ID: &str = "correlation-id";
    /// The id of the saga.
    pub const SAGA_ID: &str = "ce_sagaid";
    /// The name of the saga's definition.
    pub const SAGA_TYPE: &str = "ce_sagatype";
    /// The version of the saga's definition.
    pub const SAGA_VERSION: &str = "ce_sagaversion";
    /// The name of the step.
    pub const SAGA_STEP: &str = "ce_sagastep";
    /// The direction of the command: `do` or `undo`.
    pub const SAGA_OP: &str = "ce_sagaop";
    /// Which run of the step: 0, and more after a retry with edited input.
    pub const SAGA_OCCURRENCE: &str = "ce_sagaoccurrence";
    /// The orchestrator's name, where the topic for the reply does not name it.
    pub const SAGA_ORCHESTRATOR: &str = "ce_sagaorchestrator";
    /// In an undo: the id of the command that it undoes.
    pub const SAGA_UNDOES: &str = "ce_sagaundoes";
    /// In an undo: `yes` when the orchestrator took the step's success, `in_doubt` otherwise.
    pub const SAGA_HAPPENED: &str = "ce_sagahappened";
    /// The command's id, stable across resends.
    pub const COMMAND_ID: &str = "ce_commandid";
    /// The attempt; 1 for the first send of a command.
    pub const ATTEMPT: &str = "ce_attempt";
    /// The topic that the reply goes to.
    pub const REPLY_TO: &str = "ce_replyto";
    /// In a reply: the command's id.
    pub const CAUSATION_ID: &str = "ce_causationid";
    /// In a reply: `succeeded`, `rejected` or `failed`.
    pub const OUTCOME: &str = "ce_outcome";
    /// Set when an operator published the row again.
    pub const REPLAYED: &str = "ce_replayed";
    /// In a dead letter: the topic of the record that was given up.
    pub const ORIGINAL_TOPIC: &str = "x-original-topic";
    /// In a dead letter: the `ce_sequence` of the record that was given up.
    pub const ORIGINAL_SEQUENCE: &str = "x-original-sequence";
    /// In a dead letter: the `ce_epoch` of the record that was given up.
    pub const ORIGINAL_EPOCH: &str = "x-original-epoch";
}

/// A decoded message header set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// The message's id, `ce_id`.
    pub id: MessageId,
    /// The sender's name, `ce_source`.
    pub source: String,
    /// The message's type, `ce_type`.
    pub kind: String,
    /// The subject, for example the aggregate's id, `ce_subject`.
    pub subject: Option<String>,
    /// When the message was written, `ce_time`; `None` also if it does not parse.
    pub time: Option<OffsetDateTime>,
    /// The outbox row's id, `ce_sequence`; `None` also if it does not parse.
    pub sequence: Option<i64>,
    /// The media type of the payload, `content-type`.
    pub content_type: Option<String>,
    /// The ids of the trace and of the sending span, `traceparent`.
    pub traceparent: Option<String>,
    /// The vendor part of the trace context, `tracestate`.
    pub tracestate: Option<String>,
    /// The saga headers; `None` for a plain event.
    pub saga: Option<SagaHeaders>,
    /// All other headers, which pass through.
    pub other: Headers,
}

/// Where a message stands among all that its source has published: sequences of one epoch can be compared, and no
/// others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourcePosition<'a> {
    /// The `ce_source` whose sequence it is.
    pub source: &'a str,
    /// The epoch that the sequence counts in; empty where the message has none.
    pub epoch: &'a str,
    /// The place in the epoch; `None` where the message has none.
    pub sequence: Option<i64>,
    /// Whether a consumer gave the message up and an operator sent it again: it may come behind anything.
    pub redriven: bool,
}

/// The saga headers of a command or a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SagaHeaders {
    /// The id of the saga.
    pub saga: SagaId,
    /// The name of the saga's definition.
    pub definition: String,
    /// The version of the saga's definition.
    pub version: u32,
    /// The name of the step.
    pub step: String,
    /// Whether the command does the step or undoes it.
    pub op: Op,
    /// The run of the step: 0, and more after a retry with edited input.
    pub occurrence: u32,
    /// The command's id (in a reply: that of the command that is answered).
    pub command: CommandId,
    /// 1 for the first send (in a reply: of the command that is answered).
    pub attempt: u32,
    /// Undo only: the command that it undoes. `None` if the orchestrator is of a build that does not send it.
    pub undoes: Option<CommandId>,
    /// Undo only: what the orchestrator knows of the step. `None`, if its build does not send it, counts as in doubt.
    pub happened: Option<Happened>,
    /// Command only: the name of its orchestrator; with `definition` it is the namespace of saga and step. `None`:
    /// `reply_to` names the orchestrator, as in every command of an older build.
    pub orchestrator: Option<String>,
    /// Command only: the topic that the reply goes to.
    pub reply_to: Option<String>,
    /// Reply only: how the command ended.
    pub outcome: Option<Outcome>,
}

/// Why a record's headers are not an envelope. The record goes to the dead letter topic with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A required header is not there.
    #[error("header `{0}` is missing")]
    Missing(&'static str),
    /// A header's value does not parse.
    #[error("header `{name}` is {value:?}, expected {expected}")]
    Malformed {
        /// The name of the header.
        name: &'static str,
        /// Its value (truncated to 100 characters).
        value: String,
        /// The form that was expected.
        expected: &'static str,
    },
}

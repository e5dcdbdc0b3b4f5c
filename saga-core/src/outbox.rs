//! The outbox: messages written in the transaction that changes the state they tell of.
//!
//! Rules of an append, kept by whoever calls it: it comes *after* the statement that locks the aggregate, and that lock
//! is held to the commit. Then the order of ids along a key is the order of commits along that key.

use crate::{
    envelope::{Headers, SagaHeaders},
    id::MessageId,
};
use serde::Serialize;

/// The caller's transaction. Whatever takes it is atomic with the rest of that transaction.
pub type Tx<'a> = sqlx::Transaction<'a, sqlx::Postgres>;

/// A message to be published once the transaction commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMessage {
    /// `ce_id`; also what the consumers' inboxes know it by.
    pub id: MessageId,
    /// Where to.
    pub topic: String,
    /// The record key: the aggregate's or the saga's id. Messages of one key stay in order.
    pub key: String,
    /// `ce_type`.
    pub kind: String,
    /// The record's value; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Further headers.
    pub headers: Headers,
}

impl NewMessage {
    /// A message with a JSON payload, a new id, and the current span's trace context.
    pub fn json<T: Serialize>(topic: &str, key: &str, kind: &str, payload: &T) -> Result<Self, serde_json::Error> {
        let payload = Some(serde_json::to_vec(payload)?);
        Ok(Self {
            id: MessageId::new(),
            topic: topic.into(),
            key: key.into(),
            kind: kind.into(),
            payload,
            headers: Headers::new(),
        })
    }

    /// Adds the saga headers of a command or a reply.
    #[must_use]
    pub fn with_saga(self, _saga: &SagaHeaders) -> Self {
        todo!("skeleton")
    }
}

/// Appends `messages`, in their order, in the caller's transaction: one statement, whatever their number.
pub async fn append_in(_tx: &mut Tx<'_>, _messages: &[NewMessage]) -> Result<(), sqlx::Error> {
    todo!("skeleton")
}

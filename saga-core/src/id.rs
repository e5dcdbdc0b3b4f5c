//! Identifiers. Each is a newtype, so that a saga's id cannot be passed where a message's is meant.
//!
//! ```
//! use saga_core::{command::Op, id::{CommandPlace, Nonce, SagaId}};
//!
//! let (saga, nonce) = (SagaId::new(), Nonce::new());
//! let id = |occurrence| {
//!     let (orchestrator, definition, step, op) = ("shop", "order", "hold money", Op::Do);
//!     CommandPlace { orchestrator, definition, saga, step, op, occurrence }.derive_secretly(nonce)
//! };
//! assert_eq!(id(0), id(0), "a resend has the command's id");
//! assert_ne!(id(0), id(1), "a retry with edited input is another command");
//! ```

use crate::command::Op;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{fmt, str::FromStr};
use uuid::Uuid;

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id, UUIDv7: it carries its time of birth in milliseconds.
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_newtype! {
    /// One logical message. Unique for ever; kept when an outbox row is published again.
    MessageId
}
uuid_newtype! {
    /// One saga instance. The caller that starts the saga chooses it.
    SagaId
}

/// A secret of one saga. Its command ids are derived from it, so that only a process that reads the saga's row can
/// compute them. It is never sent, logged or shown.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Nonce(#[serde(with = "uuid::serde::simple")] pub(crate) Uuid);

impl Nonce {
    /// A new nonce: 122 random bits.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// One command of one step of one saga. A resend has a new [`MessageId`] and the same `CommandId`; it is also the
/// idempotency key that an external effect is performed under.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommandId(pub Uuid);

impl CommandId {
    /// The first derivation: UUIDv5 of step, operation and occurrence in the namespace of the saga. All of that is
    /// public, and two definitions with one saga id share it, so no new saga uses it. A saga that began with it keeps
    /// it to its end. `occurrence` counts from 0 and grows when an operator retries with edited input.
    pub fn derive(saga: SagaId, step: &str, op: Op, occurrence: u32) -> Self {
        Self(Uuid::new_v5(&saga.0, format!("{step}/{op}/{occurrence}").as_bytes()))
    }
}

/// What names one command: no two commands of a process have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandPlace<'a> {
    /// The orchestrator's name, which is its reply topic.
    pub orchestrator: &'a str,
    /// The name of the saga's definition.
    pub definition: &'a str,
    /// The saga.
    pub saga: SagaId,
    /// The name of the step.
    pub step: &'a str,
    /// The direction of the command.
    pub op: Op,
    /// Which run of the step, from 0.
    pub occurrence: u32,
}

impl CommandPlace<'_> {
    /// The second derivation of a command's id: SHA-256 of the saga's secret and of this. The id is derived and not
    /// drawn, so that the saga's core stays free of randomness.
    #[must_use]
    pub fn derive_secretly(self, nonce: Nonce) -> CommandId {
        let Self { orchestrator, definition, saga, step, op, occurrence } = self;
        let mut hash = Sha256::new();
        hash.update(nonce.0.as_bytes());
        let occurrence = occurrence.to_be_bytes();
        let fields = [orchestrator.as_bytes(), definition.as_bytes(), saga.0.as_bytes(), step.as_bytes()];
        for field in fields.into_iter().chain([op.as_str().as_bytes(), &occurrence]) {
            // Each field goes in with its length, so that no two lists of fields are one text.
            hash.update((field.len() as u64).to_be_bytes());
            hash.update(field);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        CommandId(uuid::Builder::from_custom_bytes(id).into_uuid())
    }
}

impl fmt::Display for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for CommandId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_id_differs_in_whatever_names_the_command_and_needs_the_secret() {
        let (nonce, saga) = (Nonce::new(), SagaId::new());
        let (orchestrator, definition, step, op) = ("orders", "order", "pay", Op::Do);
        let place = CommandPlace { orchestrator, definition, saga, step, op, occurrence: 0 };
        let one = place.derive_secretly(nonce);
        assert_eq!(one, place.derive_secretly(nonce));
        let others = [
            place.derive_secretly(Nonce::new()),
            CommandPlace { orchestrator: "returns", ..place }.derive_secretly(nonce),
            CommandPlace { definition: "refund", ..place }.derive_secretly(nonce),
            CommandPlace { orchestrator: "orderso", definition: "rder", ..place }.derive_secretly(nonce),
            CommandPlace { saga: SagaId::new(), ..place }.derive_secretly(nonce),
            CommandPlace { step: "payd", ..place }.derive_secretly(nonce),
            CommandPlace { op: Op::Undo, ..place }.derive_secretly(nonce),
            CommandPlace { occurrence: 1, ..place }.derive_secretly(nonce),
            CommandId::derive(saga, "pay", Op::Do, 0),
        ];
        assert!(!others.contains(&one));
        assert_eq!(others.iter().collect::<std::collections::BTreeSet<_>>().len(), others.len());
        assert_eq!(format!("{nonce:?}"), "Nonce(..)");
    }
}

//! The typed contract between an orchestrator and a participant: a command, what it replies, how it can be refused.
//!
//! ```
//! use saga_core::{command::{Command, Done, Never}, topic::Topic};
//! use serde::{Deserialize, Serialize};
//!
//! static INVENTORY: Topic = Topic::events("inventory.commands", 12);
//!
//! #[derive(Serialize, Deserialize)]
//! struct ReserveStock { sku: String, quantity: u32 }
//!
//! #[derive(Serialize, Deserialize)]
//! enum NotReserved { OutOfStock { available: u32 } }
//!
//! impl Command for ReserveStock {
//!     const TYPE: &'static str = "inventory.reserve.v1";
//!     const TOPIC: &'static Topic = &INVENTORY;
//!     type Reply = Done;
//!     type Rejection = NotReserved;
//! }
//!
//! /// It takes a reservation back, so it cannot be refused.
//! #[derive(Serialize, Deserialize)]
//! struct ReleaseStock { sku: String, quantity: u32 }
//!
//! impl Command for ReleaseStock {
//!     const TYPE: &'static str = "inventory.release.v1";
//!     const TOPIC: &'static Topic = &INVENTORY;
//!     type Reply = Done;
//!     type Rejection = Never;
//! }
//! ```

use crate::{reason::reason, topic::Topic};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fmt, str::FromStr};

/// A command that a saga sends to a participant.
///
/// A refusal ([`Command::Rejection`]) says: *certainly nothing happened*. A command that cannot be refused has
/// [`Never`] there; only such commands may undo a step or stand after the pivot.
pub trait Command: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The CloudEvents type, with a version at its end: `payments.authorize.v1`.
    const TYPE: &'static str;
    /// The topic that its participant reads.
    const TOPIC: &'static Topic;
    /// What the participant answers when it is done.
    type Reply: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Why the participant refuses.
    type Rejection: Serialize + DeserializeOwned + Send + Sync + 'static;
}

/// The rejection of a command that cannot be refused: it has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Never {}

/// The reply of a command whose reply holds nothing beside the fact that it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Done {}

macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// All names, as they stand in a header.
            pub(crate) const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name, as it stands in a header.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = ();
            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($text => Ok(Self::$variant),)+ _ => Err(()) }
            }
        }
    };
}

text_enum! {
    /// Whether a saga's command does its step or undoes it.
    Op {
        /// The step's command.
        Do = "do",
        /// The command that compensates it.
        Undo = "undo",
    }
}

text_enum! {
    /// How a participant answered. Only `Succeeded` and `Rejected` are final.
    Outcome {
        /// The command is done.
        Succeeded = "succeeded",
        /// Certainly nothing happened, and nothing will.
        Rejected = "rejected",
        /// The command is not done now; it stays open and a resend tries again.
        Failed = "failed",
    }
}

/// What is known of a step that is to be undone. An undo must handle both.
///
/// The orchestrator builds its undo from it and sends it (`ce_sagahappened`). The participant's undo receives what its
/// own record shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happened<R = ()> {
    /// The step was done, and this was its reply.
    Yes(R),
    /// The step's command was issued and not answered: it may have been done, or may still arrive.
    InDoubt,
}

impl<R> Happened<R> {
    /// The name, as it stands in a header.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Yes(_) => "yes",
            Self::InDoubt => "in_doubt",
        }
    }
}

/// Why a participant did not get a command done: a small vocabulary, for programs. It only grows; a reader takes a name
/// that a later build sends for [`Why::Other`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The participant did not answer in time: it is away or behind, or it waits for the provider. Its own health shows
    /// which.
    NoAnswer,
    /// The participant could not understand the command, or failed at it too often. It is in the dead-letter topic with
    /// the reason.
    GivenUp,
    /// What the participant calls was not reached, or did not answer in time.
    Unreachable,
    /// What the participant calls answered that it does not work.
    Faulty,
    /// What the participant calls gave an answer that cannot be read.
    Unreadable,
    /// What the participant calls answered something else than was asked for.
    Contradiction,
    /// The participant's record of what was done is gone.
    RecordLost,
    /// The participant gave a reason in words alone.
    #[default]
    #[serde(other)]
    Other,
}

impl Why {
    /// The name, as it stands in messages and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoAnswer => "no_answer",
            Self::GivenUp => "given_up",
            Self::Unreachable => "unreachable",
            Self::Faulty => "faulty",
            Self::Unreadable => "unreadable",
            Self::Contradiction => "contradiction",
            Self::RecordLost => "record_lost",
            Self::Other => "other",
        }
    }
}

/// A participant's account of an attempt that did not get its command done.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Failed {
    /// The reason for programs.
    pub why: Why,
    /// The reason for people; cleaned.
    pub reason: String,
}

impl Failed {
    /// Cleans `text`, because another program wrote it and it is stored.
    #[must_use]
    pub fn new(why: Why, text: &str) -> Self {
        Self { why, reason: reason(text) }
    }
}

impl From<&str> for Failed {
    fn from(text: &str) -> Self {
        Self::new(Why::Other, text)
    }
}

impl From<String> for Failed {
    fn from(text: String) -> Self {
        Self::new(Why::Other, &text)
    }
}

impl FromStr for Happened {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "yes" => Ok(Self::Yes(())),
            "in_doubt" => Ok(Self::InDoubt),
            _ => Err(()),
        }
    }
}

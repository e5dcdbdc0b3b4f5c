//! The typed contract between an orchestrator and a participant: a command, what it replies, how it can be refused.

use crate::topic::Topic;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::str::FromStr;

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

/// The reply of a command that has nothing to say but that it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Done {}

/// What is known of a step that is to be undone. An undo must handle both.
///
/// The orchestrator's undo is built from it and says it (`ce_sagahappened`); the participant's undo is given what its
/// own record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happened<R = ()> {
    /// The step was done, and this was its reply.
    Yes(R),
    /// The step's command was issued and not answered: it may have been done, or may still arrive.
    InDoubt,
}

impl<R> Happened<R> {
    /// As it stands in a header.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Yes(_) => "yes",
            Self::InDoubt => "in_doubt",
        }
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

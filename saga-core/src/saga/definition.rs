//! What a saga is made of.
//!
//! A service writes a saga with the typed builder ([`saga`]); the engine works with its erased form, [`Definition`]: a
//! list of steps whose commands are built by functions from JSON to JSON. The invariant that the builder's types keep,
//! and that [`crate::saga::decide`] relies on: before the pivot a step either has an undo that cannot be refused or
//! says that there is nothing to undo; after the pivot nothing can be refused.
//!
//! Nothing here is lost when the process dies: a definition is code. What is persisted is its name, version and
//! [`Definition::fingerprint`], so that a replica knows whether the saga before it is one that it understands.

mod builder;
mod check;
mod policy;
mod replies;

pub use builder::{AfterPivot, AfterPivotCommand, BeforePivot, SagaBuilder, UndoUndecided, saga};
pub use builder::{BeforeThePivot, HasPivot, NeverRefusedAfterPivot, NeverRefusedUndo, NoPivotYet};
pub use check::DefinitionError;
pub use policy::RetryPolicy;
pub use replies::{And, Replies};

use crate::command::Op;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{fmt, marker::PhantomData, ops::Deref, sync::Arc, time::Duration};

/// A saga's definition together with the type of its input: what the typed builder builds. Cheap to clone.
pub struct Saga<I> {
    definition: Arc<Definition>,
    input: PhantomData<fn(&I)>,
}

impl<I> Saga<I> {
    pub(crate) fn shared(&self) -> Arc<Definition> {
        Arc::clone(&self.definition)
    }
}

impl<I> Clone for Saga<I> {
    fn clone(&self) -> Self {
        Self { definition: self.shared(), input: PhantomData }
    }
}

impl<I> Deref for Saga<I> {
    type Target = Definition;
    fn deref(&self) -> &Definition {
        &self.definition
    }
}

impl<I> fmt::Debug for Saga<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.definition.fmt(f)
    }
}

/// A saga's steps, erased.
#[derive(Debug)]
pub struct Definition {
    name: String,
    version: u32,
    steps: Vec<Step>,
    pivot: Option<usize>,
    deadline: Option<Duration>,
    fingerprint: String,
}

impl Definition {
    /// Puts steps together. The typed builder is the way for services; the explorer and the property tests come here
    /// with generated steps.
    pub fn new(name: impl Into<String>, version: u32, steps: Vec<Step>, deadline: Option<Duration>) -> Self {
        let pivot =
            steps.iter().position(|step| matches!(&step.kind, StepKind::Remote(r) if r.role == StepRole::Pivot));
        let mut definition = Self { name: name.into(), version, steps, pivot, deadline, fingerprint: String::new() };
        definition.fingerprint = definition.hash_of_shape();
        definition
    }

    /// The definition's name, for example `order`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts the changes of the definition. A saga stays with the version that it started with.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The steps, in the order in which they are taken.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Where the pivot stands: as long as its command is not issued the saga can be undone, from then on it cannot.
    pub fn pivot(&self) -> Option<usize> {
        self.pivot
    }

    /// How long a saga may take until its pivot's command is issued.
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// A hash of the shape (names, kinds, order of steps, command types and topics), not of deadlines and retries.
    /// Two definitions with one name and version and different fingerprints are a mistake that must not go unseen.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The text by which a saga's row names its definition: the fingerprint, and the format in which the state is
    /// stored, unless that is the first.
    pub(crate) fn fingerprint_of_format(&self, format: u16) -> String {
        let fingerprint = &self.fingerprint;
        if format == 1 { fingerprint.clone() } else { format!("{fingerprint}.{format}") }
    }

    /// The names of the local effects that a saga of this definition may run.
    pub fn local_effects(&self) -> impl Iterator<Item = &str> {
        self.steps
            .iter()
            .filter_map(|step| match &step.kind {
                StepKind::Local { undo, .. } => Some(std::iter::once(step.name.as_str()).chain(undo.as_deref())),
                StepKind::Remote(_) => None,
            })
            .flatten()
    }

    fn hash_of_shape(&self) -> String {
        let mut hash = Sha256::new();
        let mut field = |text: &str| {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text.as_bytes());
        };
        for step in &self.steps {
            field(&step.name);
            match &step.kind {
                StepKind::Local { undo, .. } => {
                    field("local");
                    field(undo.as_deref().unwrap_or_default());
                }
                StepKind::Remote(remote) => {
                    field(remote.role.as_str());
                    for call in std::iter::once(&remote.action).chain(&remote.undo) {
                        field(call.kind);
                        field(call.topic);
                    }
                }
            }
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A step of a saga, in the definition's order.
#[derive(Debug, Clone)]
pub struct Step {
    /// Unique within the definition; travels as `ce_sagastep`.
    pub name: String,
    /// Whether the step runs a local effect or sends a command.
    pub kind: StepKind,
}

/// What a step does. Later kinds of steps (parallel groups, external events, child sagas) are further variants.
#[derive(Debug, Clone)]
pub enum StepKind {
    /// An effect in the orchestrator's own database, in the transaction that takes the step. Its name is the step's.
    Local {
        /// The name of the effect that takes it back; `None` where the effect stays when the saga is undone.
        undo: Option<String>,
        /// How either is tried again when it failed by its own fault.
        retry: RetryPolicy,
    },
    /// A command to a participant.
    Remote(Box<Remote>),
}

/// A step that sends a command.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Where the step stands to the pivot.
    pub role: StepRole,
    /// The command that does it.
    pub action: Call,
    /// The command that undoes it; `None` where there is nothing to undo.
    pub undo: Option<Call>,
    /// How long one attempt, of the command or its undo, may stay without an answer.
    pub deadline: Duration,
    /// How the command is resent.
    pub retry: RetryPolicy,
    /// How the undo is resent.
    pub undo_retry: RetryPolicy,
}

impl Remote {
    /// The command or its undo.
    pub fn call(&self, op: Op) -> Option<&Call> {
        match op {
            Op::Do => Some(&self.action),
            Op::Undo => self.undo.as_ref(),
        }
    }

    /// The topics of the command and of its undo, where they are two.
    pub fn undone_elsewhere(&self) -> Option<(&'static str, &'static str)> {
        let topics = (self.action.topic, self.undo.as_ref()?.topic);
        (topics.0 != topics.1).then_some(topics)
    }

    /// How the command or its undo is resent.
    pub fn retry(&self, op: Op) -> &RetryPolicy {
        match op {
            Op::Do => &self.retry,
            Op::Undo => &self.undo_retry,
        }
    }
}

/// Where a step stands to the pivot; that alone decides how the engine meets its failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepRole {
    /// Before the pivot: a failure undoes the saga.
    Compensable,
    /// The point of no return: a rejection undoes the saga, doubt is waited out.
    Pivot,
    /// After the pivot: retried until it is done.
    Retriable,
}

impl StepRole {
    /// The role's name, as people and the fingerprint see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compensable => "compensable",
            Self::Pivot => "pivot",
            Self::Retriable => "retriable",
        }
    }
}

/// What a command is built from.
#[derive(Debug, Clone, Copy)]
pub struct BuildFrom<'a> {
    /// The saga's input, as JSON.
    pub input: &'a Value,
    /// The replies of the remote steps before this one.
    pub replies: &'a [&'a Value],
    /// For an undo: the reply of the step that is undone; `None` means in doubt.
    pub happened: Option<&'a Value>,
}

type Build = dyn Fn(BuildFrom<'_>) -> Result<Vec<u8>, BuildError> + Send + Sync;
type Check = dyn Fn(&Value) -> Result<(), serde_json::Error> + Send + Sync;

/// A command, erased: where it goes, how it is built, what its answers look like.
#[derive(Clone)]
pub struct Call {
    /// The command's CloudEvents type.
    pub kind: &'static str,
    /// The topic that the command's participant reads.
    pub topic: &'static str,
    /// Builds the command's payload, as JSON text.
    pub build: Arc<Build>,
    /// Whether a reply's payload is what the definition expects.
    pub check_reply: Arc<Check>,
    /// Whether a rejection's payload is what the definition expects.
    pub check_rejection: Arc<Check>,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("kind", &self.kind).field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// A command could not be built: the input or a stored reply does not fit the definition's types. So a type was changed
/// under running sagas; the saga becomes stuck.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct BuildError {
    pub(crate) what: &'static str,
    #[source]
    pub(crate) source: serde_json::Error,
}

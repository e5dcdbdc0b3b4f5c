//! What the builder's types cannot see: names. Checked when the engine is built, every mistake at once.

use super::{Definition, StepKind};
use std::{collections::BTreeSet, time::Duration};

/// A mistake in a definition that only its values show.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    /// A saga needs something to do.
    #[error("saga `{0}` has no steps")]
    NoSteps(String),
    /// Names are written into headers, logs and command ids.
    #[error("saga `{saga}`: {name:?} is no name: 1 to 100 printable ASCII characters")]
    BadName {
        /// Which saga.
        saga: String,
        /// The name.
        name: String,
    },
    /// A step's name tells its commands from those of other steps.
    #[error("saga `{saga}` has two steps named `{step}`")]
    DuplicateStep {
        /// Which saga.
        saga: String,
        /// Which name.
        step: String,
    },
    /// Elsewhere no participant knows what there is to undo, and nothing keeps the two in their order.
    #[error(
        "saga `{saga}`, step `{step}`: its command goes to topic `{topic}` and its undo to `{undo_topic}`; both go to one topic"
    )]
    UndoElsewhere {
        /// Which saga.
        saga: String,
        /// Which step.
        step: String,
        /// Where the step's command goes.
        topic: &'static str,
        /// Where its undo goes.
        undo_topic: &'static str,
    },
    /// Attempts are counted from one.
    #[error("saga `{saga}`, step `{step}`: zero attempts")]
    NoAttempts {
        /// Which saga.
        saga: String,
        /// Which step.
        step: String,
    },
    /// A saga that is late before it has begun would do nothing.
    #[error("saga `{0}` has less than a millisecond until its deadline")]
    NoTime(String),
}

impl Definition {
    /// Every mistake that only the values show.
    pub fn check(&self) -> Vec<DefinitionError> {
        let saga = || self.name.clone();
        let mut errors = Vec::new();
        let mut names = BTreeSet::new();
        if self.steps.is_empty() {
            errors.push(DefinitionError::NoSteps(saga()));
        }
        if self.deadline.is_some_and(|deadline| deadline < Duration::from_millis(1)) {
            errors.push(DefinitionError::NoTime(saga()));
        }
        let all_names = std::iter::once(self.name.as_str())
            .chain(self.steps.iter().map(|step| step.name.as_str()))
            .chain(self.local_effects());
        errors.extend(
            all_names
                .filter(|name| !is_name(name))
                .map(|name| DefinitionError::BadName { saga: saga(), name: name.to_owned() }),
        );
        for step in &self.steps {
            if !names.insert(step.name.as_str()) {
                errors.push(DefinitionError::DuplicateStep { saga: saga(), step: step.name.clone() });
            }
            if let StepKind::Remote(remote) = &step.kind
                && let Some((topic, undo_topic)) = remote.undone_elsewhere()
            {
                errors.push(DefinitionError::UndoElsewhere {
                    saga: saga(),
                    step: step.name.clone(),
                    topic,
                    undo_topic,
                });
            }
            let policies = match &step.kind {
                StepKind::Remote(remote) => [remote.retry, remote.undo_retry],
                StepKind::Local { retry, .. } => [*retry; 2],
            };
            if policies.iter().any(|policy| policy.attempts == Some(0)) {
                errors.push(DefinitionError::NoAttempts { saga: saga(), step: step.name.clone() });
            }
        }
        errors.dedup();
        errors
    }
}

fn is_name(name: &str) -> bool {
    (1..=100).contains(&name.len()) && name.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

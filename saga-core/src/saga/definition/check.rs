//! Checks names and values, which the builder's types cannot see. The engine's build runs them and reports every
//! mistake at once.

use super::{Definition, StepKind};
use std::{collections::BTreeSet, time::Duration};

/// A mistake in a definition that only its values show.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    /// The definition has no steps: a saga needs something to do.
    #[error("saga `{0}` has no steps")]
    NoSteps(String),
    /// A name cannot be written into headers, logs and command ids.
    #[error("saga `{saga}`: {name:?} is no name: 1 to 100 printable ASCII characters")]
    BadName {
        /// The saga's name.
        saga: String,
        /// The name that was refused, of the saga, a step or an effect.
        name: String,
    },
    /// Two steps share a name, which distinguishes a step's commands from those of other steps.
    #[error("saga `{saga}` has two steps named `{step}`")]
    DuplicateStep {
        /// The saga's name.
        saga: String,
        /// The name that two steps share.
        step: String,
    },
    /// A step's undo goes to another topic than its command. There no participant knows what there is to undo, and
    /// nothing keeps the two in order.
    #[error(
        "saga `{saga}`, step `{step}`: its command goes to topic `{topic}` and its undo to `{undo_topic}`; both go to one topic"
    )]
    UndoElsewhere {
        /// The saga's name.
        saga: String,
        /// The step's name.
        step: String,
        /// Where the step's command goes.
        topic: &'static str,
        /// Where its undo goes.
        undo_topic: &'static str,
    },
    /// A retry policy allows zero attempts; attempts are counted from one.
    #[error("saga `{saga}`, step `{step}`: zero attempts")]
    NoAttempts {
        /// The saga's name.
        saga: String,
        /// The step's name.
        step: String,
    },
    /// The deadline is below one millisecond: a saga that is late before it has begun would do nothing.
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

//! Definitions from a list of shapes: commands whose content does not matter.

use crate::saga::definition::{Call, Definition, Remote, RetryPolicy, Step, StepKind, StepRole};
use std::{sync::Arc, time::Duration};

/// The shape of a generated step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A local effect that is not taken back.
    Local,
    /// A local effect with one that takes it back.
    LocalWithUndo,
    /// A command with an undo.
    Step,
    /// A command whose undo goes to another topic: no engine takes it.
    StepUndoneElsewhere,
    /// A command with nothing to undo.
    StepWithoutUndo,
    /// The pivot.
    Pivot,
    /// A command after the pivot.
    Then,
}

/// A definition of these steps, each command of which is tried `attempts` times.
pub fn definition(shapes: &[Shape], attempts: u32, deadline: Option<Duration>) -> Definition {
    let retry = RetryPolicy::exponential(attempts, Duration::from_secs(1), Duration::from_secs(1));
    let remote = |role, undo: Option<Call>| {
        let deadline = Duration::from_secs(1);
        StepKind::Remote(Box::new(Remote { role, action: call("do"), undo, deadline, retry, undo_retry: retry }))
    };
    let step = |(index, shape): (usize, &Shape)| Step {
        name: format!("s{index}"),
        kind: match shape {
            Shape::Local => StepKind::Local { undo: None, retry },
            Shape::LocalWithUndo => StepKind::Local { undo: Some(format!("undo s{index}")), retry },
            Shape::Step => remote(StepRole::Compensable, Some(call("undo"))),
            Shape::StepUndoneElsewhere => {
                remote(StepRole::Compensable, Some(Call { topic: "elsewhere", ..call("undo") }))
            }
            Shape::StepWithoutUndo => remote(StepRole::Compensable, None),
            Shape::Pivot => remote(StepRole::Pivot, None),
            Shape::Then => remote(StepRole::Retriable, None),
        },
    };
    Definition::new("explored", 1, shapes.iter().enumerate().map(step).collect(), deadline)
}

fn call(kind: &'static str) -> Call {
    Call {
        kind,
        topic: "explored",
        build: Arc::new(|_| Ok(Vec::new())),
        check_reply: Arc::new(|_| Ok(())),
        check_rejection: Arc::new(|_| Ok(())),
    }
}

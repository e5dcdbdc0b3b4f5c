//! The saga that is measured: three remote steps that do nothing, each of another participant.

use saga_core::{
    command::{Command, Done, Never},
    saga::{Saga, saga},
    topic::Topic,
};
use serde::{Deserialize, Serialize};

/// Where the replies go.
pub const REPLIES: &str = "bench.replies";
/// The step whose reply ends the saga.
pub const LAST_STEP: &str = "third";

/// What a saga is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Nothing {
    /// Of some size, as an order's would be.
    pub note: String,
}

macro_rules! command {
    ($name:ident, $topic:ident, $type:literal, $commands:literal) => {
        #[doc = concat!("A command to the participant that reads `", $commands, "`.")]
        #[derive(Debug, Clone, Serialize, Deserialize)]
        pub struct $name {
            /// Of some size, as a real one's would be.
            pub note: String,
        }

        const $topic: Topic = Topic::events($commands, 1);

        impl Command for $name {
            const TYPE: &'static str = $type;
            const TOPIC: &'static Topic = &$topic;
            type Reply = Done;
            type Rejection = Never;
        }
    };
}

command!(First, FIRST, "bench.first.v1", "bench.first.commands");
command!(Second, SECOND, "bench.second.v1", "bench.second.commands");
command!(Third, THIRD, "bench.third.v1", "bench.third.commands");

/// The participants' topics, in the order of the steps.
pub const COMMANDS: [&Topic; 3] = [First::TOPIC, Second::TOPIC, Third::TOPIC];

/// Three commands, then the end.
pub fn definition() -> Saga<Nothing> {
    saga::<Nothing>("bench", 1)
        .step("first", |input, ()| First { note: input.note.clone() })
        .nothing_to_undo()
        .step("second", |input, (_,)| Second { note: input.note.clone() })
        .nothing_to_undo()
        .step(LAST_STEP, |input, (_, _)| Third { note: input.note.clone() })
        .nothing_to_undo()
        .build()
}

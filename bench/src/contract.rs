//! The saga that is measured: three remote steps that do nothing, of three services or of one.

use clap::ValueEnum;
use saga_core::{
    command::{Command, Done, Never},
    saga::{Saga, saga},
    topic::Topic,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The topic that the replies go to.
pub const REPLIES: &str = "bench.replies";
/// The step whose reply ends the saga.
pub const LAST_STEP: &str = "third";

/// Which services the steps belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Each of another service, with a database and a command topic of its own
    ThreeServices,
    /// All of one service
    OneService,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ThreeServices => "three services",
            Self::OneService => "one service",
        })
    }
}

/// The input of a saga.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Nothing {
    /// A text of some size, like an order's.
    pub note: String,
}

macro_rules! command {
    ($name:ident, $topic:ident, $type:literal, $commands:literal) => {
        #[doc = concat!("A command to the participant that reads `", $commands, "`.")]
        #[derive(Debug, Clone, Serialize, Deserialize)]
        pub struct $name {
            /// A text of some size, like a real command's.
            pub note: String,
        }

        pub(super) const $topic: Topic = Topic::events($commands, 1);

        impl Command for $name {
            const TYPE: &'static str = $type;
            const TOPIC: &'static Topic = &$topic;
            type Reply = Done;
            type Rejection = Never;
        }
    };
}

macro_rules! commands {
    ($module:ident, $doc:literal, $first:literal, $second:literal, $third:literal) => {
        #[doc = $doc]
        pub mod $module {
            use super::*;

            command!(First, FIRST, "bench.first.v1", $first);
            command!(Second, SECOND, "bench.second.v1", $second);
            command!(Third, THIRD, "bench.third.v1", $third);

            /// A saga of three commands.
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
        }
    };
}

commands!(apart, "Of three services.", "bench.first.commands", "bench.second.commands", "bench.third.commands");
commands!(together, "Of one service.", "bench.commands", "bench.commands", "bench.commands");

impl Layout {
    /// The names of the services' databases.
    pub fn services(self) -> &'static [&'static str] {
        match self {
            Self::ThreeServices => &["first", "second", "third"],
            Self::OneService => &["all"],
        }
    }

    /// The services' command topics, in the same order.
    pub fn command_topics(self) -> Vec<&'static str> {
        match self {
            Self::ThreeServices => vec![apart::FIRST.name, apart::SECOND.name, apart::THIRD.name],
            Self::OneService => vec![together::FIRST.name],
        }
    }

    /// The definition of the saga.
    pub fn definition(self) -> Saga<Nothing> {
        match self {
            Self::ThreeServices => apart::definition(),
            Self::OneService => together::definition(),
        }
    }
}

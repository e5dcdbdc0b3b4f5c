//! Every interleaving of a saga: the production `decide` against a network that may lose, repeat and reorder anything,
//! participants with fences, impatient timers, cancels, and operators.
//!
//! The network never forgets a message: each may be delivered at any time, in any order, any number of times, or never.
//! That is delivery, duplication, reordering and delay at once. It is a crash as well: an orchestrator or a participant
//! that dies before its commit has done nothing, and one that dies after it sees the message again. An external effect
//! has a crash of its own: between the call and its record lies any amount of time. A participant's database may forget
//! (a restore, an asynchronous failover). Then a fence is lost with an effect beside it, and an effect outside is not.
//! Another saga of the same batch may be unreadable.
//!
//! [`Model`] knows what can happen to a [`World`] and checks the rules at each step. [`walk`](Model::walk) visits all
//! worlds; property tests take random paths where the worlds are too many to visit. A violation names the rule and the
//! schedule that leads to it, which [`Model::replay`] takes again.

mod fences;
mod messages;
mod model;
mod pair;
mod rules;
mod shapes;
mod walk;

pub use crate::saga::runner::divide;
pub use fences::Fence;
pub use messages::Note;
pub use model::{Choice, Decide, Divide, ExplorerStep, Limits, Local, Mistake, Model, World};
pub use pair::{Pairs, walk_pairs};
pub use rules::Violation;
pub use shapes::{Shape, definition};
pub use walk::Walk;

//! Sagas: define, decide, persist, run, inspect.
//!
//! ```text
//!   definition ──┐
//!                ├─> decide (pure) ──> state + effects ──> store: saga, saga_event, saga_due, outbox
//!   event ───────┘                                          (the transaction that consumed the event)
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`definition`] | the typed builder, and the erased form that the engine works with |
//! | [`state`] | what is known of one saga, what can happen to it, what follows |
//! | [`decide`] | the one transition function; no I/O, no clock, no randomness |
//! | [`local`] | effects in the orchestrator's own database |
//! | [`engine`] | definitions and effects bound together; cancel, retry |
//! | `start`, `starts` | starting, in the caller's transaction or several in one |
//! | [`runner`], [`timers`] | batches of replies and due times, each batch one transaction |
//! | `backlog` | timers wait for the replies that have come already |
//! | `store`, `due` | the SQL: of sagas, and of the times at which they are due |
//! | `loaded_saga`, `batch` | one saga in a transaction with the events that wait for it; many of them together |
//! | [`log`] | the entries of a saga's log |
//! | `measure`, `timers_health` | metrics; whether the timers do their work |
//! | [`inspect`], [`view`] | lists, and one saga with its timeline and why it waits |

mod backlog;
mod batch;
pub mod decide;
pub mod definition;
mod due;
pub mod engine;
pub mod error;
pub mod inspect;
mod loaded_saga;
pub mod local;
pub mod log;
mod measure;
mod moment;
pub mod runner;
mod start;
mod starts;
pub mod state;
mod store;
pub mod timers;
mod timers_health;
pub mod view;

pub use crate::command::Happened;
pub use definition::{Definition, RetryPolicy, Saga, saga};
pub use engine::{Engine, EngineBuilder};
pub use error::{CancelError, Cancelled, EngineErrors, RetryError, StartError};
pub use local::{LocalCall, LocalEffect, LocalError};
pub use runner::ReplyHandler;
pub use state::{Failure, FailureKind};

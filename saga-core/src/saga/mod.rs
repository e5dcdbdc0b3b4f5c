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
//! | [`engine`] | definitions and effects bound together; start, cancel, retry |

pub mod decide;
pub mod definition;
pub mod engine;
pub mod local;
pub mod state;

pub use definition::{Definition, Happened, RetryPolicy, Saga, saga};
pub use engine::{CancelError, Cancelled, Engine, RetryError, StartError};
pub use local::{LocalCall, LocalEffect, LocalError};
pub use state::{Failure, FailureKind};

//! Owning: which process publishes an outbox, and its time as the owner.
//!
//! | module | what it is |
//! |---|---|
//! | `owner` | one owner's time, from taking the lease to losing it |
//! | `gauges` | how far behind the outbox is, whichever process publishes |
//! | `turns` | standing by, owning, standing by again |
//! | `supervisor` | starts an outbox again after a panic |
//!
//! The lease lets one process at a time own an outbox. When that process dies, the lease runs out, and another process takes its turn.

pub(crate) mod gauges;
pub(crate) mod owner;
pub(crate) mod supervisor;
pub(crate) mod turns;

//! Recording: what the outbox's database knows of publishing.
//!
//! | module | what it is |
//! |---|---|
//! | `batch_log` | the log of what is published, whose last entry is the position |
//! | `pause` | topics that are set apart, each with its position |
//! | `parking` | rows that Kafka refused, and the rows behind them |
//! | `commit` | the recorder: progress, pauses and parked rows in one transaction |
//!
//! Progress is recorded under the lease: a process that has lost it records none. When a process dies, what it published
//! and did not record is published again.

pub(crate) mod batch_log;
pub(crate) mod commit;
pub(crate) mod parking;
pub(crate) mod pause;

//! Benchmarks: each figure beside its yardstick of the same run, on a PostgreSQL and a Kafka of their own.
//!
//! In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | what is run, and how long |
//! | [`machine`] | the servers, tuned and durable; what this machine is |
//! | [`databases`], [`topics`] | databases and topics of a run |
//! | [`meter`] | CPU, commits, WAL, fsyncs and messages of a stretch of time |
//! | [`statements`] | the statements in which PostgreSQL spends its time |
//! | [`contract`] | the saga that is measured: three remote steps that do nothing |
//! | [`participants`], [`orchestrator`] | the services that take its steps; the service that drives it |
//! | [`role`] | the processes that a run consists of: this binary, started again |
//! | [`drain`], [`producer_tool`] | the relay against Kafka's own producer tool |
//! | [`sagas`] | sagas of three remote steps, 64 in flight |
//! | [`steps`] | the yardstick beside them: bare step-transactions |
//! | [`report`] | the table, and the same as JSON |
//!
//! Wall-clock figures depend on the machine; what is counted per saga (commits, WAL, messages, CPU) hardly does.

pub mod cli;
pub mod contract;
pub mod databases;
pub mod drain;
pub mod machine;
pub mod meter;
pub mod orchestrator;
pub mod participants;
pub mod producer_tool;
pub mod report;
pub mod role;
pub mod sagas;
pub mod statements;
pub mod steps;
pub mod topics;

//! Whole-system tests: the platform's real processes on a real PostgreSQL and a real Kafka, under faults. The audit
//! judges them afterwards by the rows of databases and the records of topics.
//!
//! | module | what it is |
//! |---|---|
//! | [`audit`] | the invariants that hold whatever happened, checked over everything that was written |
//! | [`platform`] | one running platform, shared by the tests of a binary; settling it, judging it |
//! | [`orders`] | placing, cancelling and following orders as a customer does |
//! | [`load`] | orders of every kind, by many customers at once |
//! | [`topics`] | reading topics to their end, writing records into them, consumer groups' lag |
//! | [`faults`] | a seeded source of chance, and processes that die or stop at moments that it picks |
//! | [`failpoint`] | processes that die at a named edge of a transaction |
//!
//! The binaries must have been built with the whole workspace (`cargo build --workspace --bins`). Then this crate's use
//! of saga-core's test kit compiles the fail points into them.

pub mod audit;
pub mod failpoint;
pub mod faults;
pub mod load;
pub mod orders;
pub mod platform;
pub mod topics;

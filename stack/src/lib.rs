//! The whole system on one machine without containers: for `make demo`, `make up`, tests and benchmarks.
//!
//! Both servers are real and come pinned from Maven Central; there is no stand-in for either. The invariant of this
//! crate: **what it started is gone when it is gone**, however it ends (see [`guard`]). In reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`cache`] | where the servers' files are kept between runs, and which users may read them |
//! | [`directory`] | directories in places that others use too |
//! | [`maven`] | resolves a pom to its files; finds Java and Maven, or reports what to install |
//! | [`jars`] | the SHA-256 of each jar |
//! | [`guard`] | ends the processes that were started here when this process dies |
//! | [`process`] | one server process: started, healthy, paused, killed, stopped |
//! | [`ports`] | ports on which no process listens |
//! | [`durability`] | what a server promises about power failures |
//! | [`password`], `cluster` | PostgreSQL's password and its data directory |
//! | [`postgres`], [`kafka`] | the two servers |
//! | [`servers`] | the two together, or those that `DATABASE_URL` and `KAFKA_BROKERS` name |
//! | [`run`] | a command with servers |
//! | [`service`] | the platform's processes: names, ports, databases |
//! | [`platform`] | the servers with the platform on them |
//! | [`state`], [`up`] | a platform that stays up, and what is known of it from outside |
//! | [`progress`] | what a person sees meanwhile |

pub mod cache;
mod cluster;
pub mod directory;
pub mod durability;
pub mod error;
pub mod guard;
pub mod jars;
pub mod kafka;
pub mod maven;
pub mod password;
pub mod platform;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod progress;
pub mod run;
pub mod servers;
pub mod service;
pub mod state;
pub mod up;

pub use error::{Error, Result};

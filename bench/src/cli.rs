//! What is run, and how long.

use crate::{contract::Layout, machine::ServerArgs, role::RoleArgs};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures the relay and the sagas, each beside a yardstick of the same run.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    /// Which; both when nothing is said
    #[command(subcommand)]
    pub verb: Option<Verb>,
    /// The relay's drain.
    #[command(flatten)]
    pub relay: RelayArgs,
    /// The sagas.
    #[command(flatten)]
    pub sagas: SagaArgs,
    /// The servers.
    #[command(flatten)]
    pub servers: ServerArgs,
    /// Where the figures go as JSON
    #[arg(long, env = "BENCH_JSON", value_name = "FILE", default_value = "target/bench/bench.json", global = true)]
    pub json: PathBuf,
    /// Exit code 1 when a goal is missed
    #[arg(long, env = "BENCH_ENFORCE", global = true)]
    pub enforce: bool,
}

/// Which figure.
#[derive(Subcommand)]
pub enum Verb {
    /// The relay drains an outbox; beside it Kafka's own ProducerPerformance
    Relay,
    /// Sagas of three remote no-op steps; beside them bare step-transactions
    Sagas,
    /// A process of a run; started by the bench itself
    #[command(hide = true)]
    Role(RoleArgs),
}

/// The relay's drain.
#[derive(Debug, Clone, Args)]
pub struct RelayArgs {
    /// Rows in the outbox
    #[arg(long, env = "BENCH_ROWS", value_name = "NUMBER", default_value_t = 1_000_000, global = true)]
    pub rows: u32,
    /// Bytes of payload of each
    #[arg(long, env = "BENCH_BYTES", value_name = "NUMBER", default_value_t = 256, global = true)]
    pub bytes: usize,
    /// Partitions of the topic
    #[arg(long, env = "BENCH_PARTITIONS", value_name = "NUMBER", default_value_t = 6, global = true)]
    pub partitions: i32,
    /// Compression of both
    #[arg(long, env = "BENCH_COMPRESSION", value_name = "TYPE", default_value = outbox_relay::settings::COMPRESSION, global = true)]
    pub compression: String,
    /// How often both are run, taking turns; the medians count
    #[arg(long, env = "BENCH_ROUNDS", value_name = "NUMBER", default_value_t = 3, global = true)]
    pub rounds: u32,
}

/// The sagas.
#[derive(Debug, Clone, Args)]
pub struct SagaArgs {
    /// Sagas in flight: one that ends is followed by the next
    #[arg(long, env = "BENCH_IN_FLIGHT", value_name = "NUMBER", default_value_t = 64, global = true)]
    pub in_flight: usize,
    /// Seconds before it is measured, at least: pools fill, and Kafka's JVM compiles itself, which is waited for beyond that
    #[arg(long, env = "BENCH_WARM_UP", value_name = "SECONDS", default_value_t = 45, global = true)]
    pub warm_up: u64,
    /// Seconds that are measured
    #[arg(long, env = "BENCH_SECONDS", value_name = "SECONDS", default_value_t = 20, global = true)]
    pub seconds: u64,
    /// Whose the steps are; both layouts when nothing is said
    #[arg(long, env = "BENCH_LAYOUT", value_name = "LAYOUT", global = true)]
    pub layout: Option<Layout>,
    /// Partitions of each topic
    #[arg(long, env = "BENCH_SAGA_PARTITIONS", value_name = "NUMBER", default_value_t = 1, global = true)]
    pub saga_partitions: i32,
}

//! The processes that a run consists of. Each is this binary, started again. So the processor time of each can be
//! measured apart, and nothing else has to be built or found.

use crate::{contract::Layout, databases::Database, machine::Machine, orchestrator, participants};
use clap::{Args, Subcommand, ValueEnum as _};
use outbox_relay::{OutboxSettings, RelaySettings};
use saga_core::service::telemetry::{self, TelemetrySettings};
use sqlx::postgres::PgConnectOptions;
use stack::process::{Process, Spec};
use std::{
    path::{Path, PathBuf},
    str::FromStr,
};
use tokio_util::sync::CancellationToken;

/// The environment variable with the databases of a process.
const DATABASES: &str = "BENCH_DATABASES";

/// A process of a run.
#[derive(Clone, Args)]
pub struct RoleArgs {
    /// Kafka.
    #[arg(long)]
    pub kafka: String,
    /// Which.
    #[command(subcommand)]
    pub part: Part,
}

/// What the process does until a signal stops it. URLs come through the environment: they hold a password, and every
/// user of the machine may read a process's arguments.
#[derive(Clone, Subcommand)]
pub enum Part {
    /// Publishes outboxes, as `outbox-relay` does
    Relay {
        /// `name=url`
        #[arg(long = "outbox", env = DATABASES, value_delimiter = ' ', hide_env_values = true)]
        outboxes: Vec<String>,
        /// Compression
        #[arg(long)]
        compression: String,
    },
    /// Answers commands
    Participants {
        /// Suffix of the consumer groups
        #[arg(long)]
        run: String,
        /// Whose the steps are
        #[arg(long)]
        layout: Layout,
        /// URLs, in the order of the participants
        #[arg(long = "database", env = DATABASES, value_delimiter = ' ', hide_env_values = true)]
        databases: Vec<String>,
    },
    /// Starts sagas and drives them
    Orchestrator {
        /// Suffix of the consumer group
        #[arg(long)]
        run: String,
        /// Whose the steps are
        #[arg(long)]
        layout: Layout,
        /// Its database
        #[arg(long, env = DATABASES, hide_env_values = true)]
        database: String,
        /// Sagas in flight
        #[arg(long)]
        in_flight: usize,
        /// Where it says at its end what ended when
        #[arg(long)]
        out: PathBuf,
    },
}

/// Plays a role until SIGTERM, with the telemetry that every service has.
pub async fn play(role: &RoleArgs) -> anyhow::Result<()> {
    let _telemetry = telemetry::init(&TelemetrySettings::default(), "bench")?;
    let stop = saga_core::service::shutdown::token();
    match &role.part {
        Part::Relay { outboxes, compression } => relay(&role.kafka, outboxes, compression, stop).await,
        Part::Participants { run, layout, databases } => {
            participants::play(&role.kafka, run, *layout, databases, stop).await
        }
        Part::Orchestrator { run, layout, database, in_flight, out } => {
            orchestrator::play(&role.kafka, run, *layout, database, *in_flight, out, stop).await
        }
    }
}

async fn relay(kafka: &str, outboxes: &[String], compression: &str, stop: CancellationToken) -> anyhow::Result<()> {
    let outboxes = outboxes.iter().map(|outbox| {
        let (name, url) = outbox.split_once('=').unwrap_or(("bench", outbox));
        Ok(OutboxSettings { name: name.to_owned(), database: PgConnectOptions::from_str(url)? })
    });
    let outboxes = outboxes.collect::<Result<_, sqlx::Error>>()?;
    let settings = RelaySettings { compression: compression.to_owned(), ..RelaySettings::new(kafka, outboxes) };
    Ok(outbox_relay::run(settings, stop).await?)
}

/// The environment variable from which tokio takes the number of its threads.
const WORKER_THREADS: &str = "TOKIO_WORKER_THREADS";

/// How many threads a process works with, unless the environment sets the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// One thread for each processor.
    All,
    /// One thread. Where several processes share few processors with PostgreSQL and Kafka, more threads hand the same
    /// work to each other.
    One,
}

/// Starts a relay over outboxes named by their databases.
pub fn start_relay(
    machine: &Machine,
    databases: &[&Database],
    compression: &str,
    threads: Threads,
) -> anyhow::Result<Process> {
    let outboxes: Vec<_> = databases.iter().map(|database| format!("{}={}", database.name, database.url)).collect();
    let args = ["relay", "--compression", compression].map(str::to_owned);
    start(machine, "relay", threads, &outboxes.join(" "), args.into_iter())
}

/// Starts the participants, one on each database.
pub fn start_participants(
    machine: &Machine,
    run: &str,
    layout: Layout,
    databases: &[&Database],
) -> anyhow::Result<Process> {
    let databases: Vec<_> = databases.iter().map(|database| database.url.as_str()).collect();
    let args = ["participants", "--run", run, "--layout", &name_of(layout)].map(str::to_owned);
    start(machine, "participants", Threads::One, &databases.join(" "), args.into_iter())
}

/// Starts the orchestrator.
pub fn start_orchestrator(
    machine: &Machine,
    run: &str,
    layout: Layout,
    database: &Database,
    in_flight: usize,
    out: &Path,
) -> anyhow::Result<Process> {
    let args = ["orchestrator", "--run", run, "--layout", &name_of(layout)];
    let in_flight = ["--in-flight".to_owned(), in_flight.to_string()];
    let out = ["--out".to_owned(), out.display().to_string()];
    let args = args.map(str::to_owned).into_iter().chain(in_flight).chain(out);
    start(machine, "orchestrator", Threads::One, &database.url, args)
}

/// The layout's name on the command line.
fn name_of(layout: Layout) -> String {
    layout.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn start(
    machine: &Machine,
    name: &str,
    threads: Threads,
    databases: &str,
    args: impl Iterator<Item = String>,
) -> anyhow::Result<Process> {
    let role = ["role".to_owned(), "--kafka".to_owned(), machine.brokers().to_owned()];
    let log = machine.logs().join(format!("bench-{name}.log"));
    let spec =
        Spec::new(name, std::env::current_exe()?, log).args(role.into_iter().chain(args)).env(DATABASES, databases);
    let said = std::env::var_os(WORKER_THREADS).is_some();
    Ok(Process::start(if threads == Threads::All || said { spec } else { spec.env(WORKER_THREADS, "1") })?)
}

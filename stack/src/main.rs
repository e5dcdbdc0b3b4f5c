//! `stack`: starts the system on this machine, uses it, and leaves nothing running.

mod demo;

use clap::{Args, Parser, Subcommand};
use stack::{
    progress::Progress,
    run,
    servers::{Servers, ServersConfig},
    state::StateDirectory,
    up::{self, Follow},
};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};

/// The whole system on one machine without containers.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Runs a command against a PostgreSQL and a Kafka of its own, and returns its exit code.
    ///
    /// The servers keep nothing, listen on free ports and are gone afterwards. The command finds them in
    /// `DATABASE_URL` and `KAFKA_BROKERS`; what these name already is used instead of started.
    Run {
        /// The command, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Starts the platform, drives orders through every outcome, shows what happened, stops it and keeps nothing.
    Demo,
    /// Starts the platform and stays until Ctrl-C or `stack down`; its data is kept.
    ///
    /// The services take their own ports where these are free, PostgreSQL 5432 and Kafka 9092, others where not. PostgreSQL
    /// asks for a password, which is kept in a file beside its data; Kafka asks for none.
    Up {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Ends what `stack up` started.
    Down {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Ends it and wipes its data.
    Reset {
        #[command(flatten)]
        state: StateArgs,
    },
    /// What runs, and whether it is healthy; exit code 1 when something is not.
    Status {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Shows the end of every log.
    Logs {
        #[command(flatten)]
        state: StateArgs,
        /// Goes on with what comes.
        #[arg(long, short)]
        follow: bool,
    },
}

#[derive(Debug, Args)]
struct StateArgs {
    /// Where the platform keeps its data, its logs, and its state.
    #[arg(long, env = "STACK_DIR", default_value = ".stack")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    obey(Cli::parse().command).await.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

async fn run_command(command: &[OsString]) -> anyhow::Result<ExitCode> {
    let progress = Progress::for_people();
    let interrupted = run::interrupted()?;
    let started = tokio::select! {
        started = Servers::start(ServersConfig::for_tests(), &progress) => started,
        signal = interrupted => anyhow::bail!("interrupted ({signal:?})"),
    };
    progress.finish();
    let servers = started?;
    let code = run::command(command, &servers).await;
    servers.stop().await;
    Ok(code?)
}

async fn obey(verb: Verb) -> anyhow::Result<ExitCode> {
    let at = |state: StateArgs| StateDirectory::at(state.dir);
    match verb {
        Verb::Demo => return demo::demo().await,
        Verb::Up { state } => up::up(&at(state)).await?,
        Verb::Down { state } => {
            let said = if at(state).down().await? { "Everything is stopped." } else { "Nothing ran." };
            println!("{said}");
        }
        Verb::Reset { state } => {
            at(state).reset().await?;
            println!("Everything is stopped and wiped.");
        }
        Verb::Status { state } => {
            if !up::status(&at(state)).await? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Verb::Logs { state, follow } => up::logs(&at(state), if follow { Follow::Yes } else { Follow::No })?,
        Verb::Run { command } => return run_command(&command).await,
    }
    Ok(ExitCode::SUCCESS)
}

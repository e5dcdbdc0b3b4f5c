//! `stack`: starts the system on this machine, uses it, and leaves nothing running.

use clap::{Parser, Subcommand};
use stack::{
    progress::Progress,
    run,
    servers::{Servers, ServersConfig},
};
use std::{ffi::OsString, process::ExitCode};

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
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Verb::Run { command } => run_command(&command).await,
    };
    done.unwrap_or_else(|error| {
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

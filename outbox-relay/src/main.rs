//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.

use outbox_relay::{
    app,
    config::{Cli, Command, IDENTITY, RelayArgs},
};
use saga_core::service::{ConfigErrors, command_line, launch_with};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { command, args } = command_line();
    let done = match command.unwrap_or(Command::Serve) {
        Command::Serve => serve(&args).await,
        other => with_databases(&args, other).await,
    };
    done.unwrap_or_else(|mistakes| mistakes.report())
}

async fn serve(args: &RelayArgs) -> Result<ExitCode, ConfigErrors> {
    let configuration = args.validate()?;
    let telemetry = configuration.telemetry.clone();
    Ok(launch_with(&IDENTITY, &telemetry, app::serve(configuration)).await)
}

async fn with_databases(args: &RelayArgs, command: Command) -> Result<ExitCode, ConfigErrors> {
    let (outboxes, telemetry) = args.validate_databases()?;
    Ok(launch_with(&IDENTITY, &telemetry, app::run_once(outboxes, command)).await)
}

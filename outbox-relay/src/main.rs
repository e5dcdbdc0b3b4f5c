//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.

use clap::Parser;
use outbox_relay::{
    app,
    config::{Cli, Command, IDENTITY},
};
use saga_core::service::{exit_code, telemetry};
use std::process::ExitCode;

/// librdkafka's too; see `mimalloc` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let configuration = match cli.args.validate() {
        Ok(configuration) => configuration,
        Err(errors) => return errors.report(),
    };
    let telemetry = match telemetry::init(&configuration.telemetry, IDENTITY.name) {
        Ok(telemetry) => telemetry,
        Err(error) => return exit_code(Err::<(), _>(error)),
    };
    exit_code(match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => app::serve(configuration, &telemetry).await,
        Command::Migrate => app::migrate_all(&configuration).await,
    })
}

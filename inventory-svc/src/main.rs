//! Items, stock and reservations: `inventory-svc serve`, `inventory-svc migrate`.

use clap::Parser;
use saga_core::service::{
    ConfigErrors, ParticipantArgs, ServiceArgs, ServiceCommand, command_line, launch_migrate, launch_with, shutdown,
};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Items, stock and reservations of the order platform
#[derive(Parser)]
#[command(name = "inventory-svc", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<ServiceCommand>,
    #[command(flatten)]
    args: ServiceArgs,
    #[command(flatten)]
    participant: ParticipantArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|mistakes| mistakes.report())
}

async fn run(Cli { command, args, participant }: Cli) -> Result<ExitCode, ConfigErrors> {
    let identity = &inventory_svc::IDENTITY;
    if command.unwrap_or(ServiceCommand::Serve) == ServiceCommand::Migrate {
        return Ok(launch_migrate(identity, &args, &inventory_svc::migrations()).await);
    }
    let mut errors = ConfigErrors::default();
    let (settings, participant) = (args.read(identity, &mut errors), participant.read(&mut errors));
    let (settings, participant) = errors.finish(settings.zip(participant))?;
    let telemetry = settings.telemetry.clone();
    Ok(launch_with(identity, &telemetry, inventory_svc::serve(settings, participant, shutdown::token())).await)
}

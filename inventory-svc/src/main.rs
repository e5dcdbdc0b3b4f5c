//! Items, stock and reservations: `inventory-svc serve`, `inventory-svc migrate`.

use inventory_svc::{
    app,
    config::{Cli, IDENTITY},
    migrations,
};
use saga_core::service::{
    ConfigErrors, ServiceCommand as Command, command_line, launch_migrate, launch_with, shutdown,
};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|errors| errors.report())
}

async fn run(Cli { command, service, participant }: Cli) -> Result<ExitCode, ConfigErrors> {
    let mut errors = ConfigErrors::default();
    Ok(match command.unwrap_or(Command::Serve) {
        Command::Migrate => launch_migrate(&IDENTITY, &service, &migrations::all()).await,
        Command::Serve => {
            let found = service.read(&IDENTITY, &mut errors).zip(participant.read(&mut errors));
            let (settings, participant) = errors.finish(found)?;
            let telemetry = settings.telemetry.clone();
            launch_with(&IDENTITY, &telemetry, app::serve(settings, participant, shutdown::token())).await
        }
    })
}

//! Payments, the payment gateway port, and a simulated provider.

use payment_svc::{
    config::{Cli, Command, IDENTITY},
    migrations, serve, sim,
};
use saga_core::service::{ConfigErrors, command_line, exit_code, launch_migrate};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|errors| errors.report())
}

async fn run(Cli { service, participant, gateway, command }: Cli) -> Result<ExitCode, ConfigErrors> {
    Ok(match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let (settings, gateway, participant) = gateway.validate(&service, &participant)?;
            exit_code(serve::serve(settings, gateway, participant).await)
        }
        Command::Migrate => launch_migrate(&IDENTITY, &service, &migrations::all()).await,
        Command::MigrateGatewaySim => launch_migrate(&sim::IDENTITY, &service, &[migrations::gateway()]).await,
        Command::GatewaySim(sim) => exit_code(sim::run(sim.validate(&service, gateway.gateway_token.as_ref())?).await),
    })
}

//! Payments, the payment gateway port, and a simulated provider: `payment-svc serve`, `payment-svc migrate`,
//! `payment-svc gateway-sim`, `payment-svc migrate-gateway-sim`.

use payment_svc::{
    app,
    config::{Cli, Command, IDENTITY},
    migrations, sim,
};
use saga_core::service::{ConfigErrors, command_line, exit_code, launch_migrate, launch_with, shutdown};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|errors| errors.report())
}

async fn run(Cli { command, service, participant, gateway }: Cli) -> Result<ExitCode, ConfigErrors> {
    let mut errors = ConfigErrors::default();
    Ok(match command.unwrap_or(Command::Serve) {
        Command::Migrate => launch_migrate(&IDENTITY, &service, &migrations::all()).await,
        Command::MigrateGatewaySim => launch_migrate(&sim::IDENTITY, &service, &[migrations::gateway()]).await,
        Command::GatewaySim(sim) => exit_code(sim::run(sim.validate(&service, gateway.gateway_token.as_ref())?).await),
        Command::Serve => {
            let found = service.read(&IDENTITY, &mut errors).zip(participant.read(&mut errors));
            let found = found.zip(gateway.read(&mut errors));
            let ((settings, participant), gateway) = errors.finish(found)?;
            let telemetry = settings.telemetry.clone();
            launch_with(&IDENTITY, &telemetry, app::serve(settings, participant, gateway, shutdown::token())).await
        }
    })
}

//! The order REST API and the order saga: `order-svc serve`, `order-svc migrate`, `order-svc rebuild catalogue`.

use order_svc::{
    app,
    config::{Cli, Command, IDENTITY},
    migrations, rebuild,
};
use saga_core::service::{ConfigErrors, command_line, launch_migrate, launch_with, shutdown};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|errors| errors.report())
}

async fn run(Cli { command, service, sagas }: Cli) -> Result<ExitCode, ConfigErrors> {
    let mut errors = ConfigErrors::default();
    Ok(match command.unwrap_or(Command::Serve) {
        Command::Migrate => launch_migrate(&IDENTITY, &service, &migrations::all()).await,
        Command::Rebuild(what) => {
            let found = rebuild::RebuildSettings::read(&service, &mut errors);
            let settings = errors.finish(found)?;
            launch_with(&IDENTITY, &settings.telemetry, rebuild::run(what, &settings)).await
        }
        Command::Serve => {
            let found = service.read(&IDENTITY, &mut errors).zip(sagas.read(&mut errors));
            let (settings, sources) = errors.finish(found)?;
            let telemetry = settings.telemetry.clone();
            launch_with(&IDENTITY, &telemetry, app::serve(settings, sources, shutdown::token())).await
        }
    })
}

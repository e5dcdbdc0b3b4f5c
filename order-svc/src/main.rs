//! The order REST API and the order saga: `order-svc serve`, `order-svc migrate`, `order-svc rebuild catalogue`.

use order_svc::{IDENTITY, config::Cli, migrations, rebuild, serve};
use saga_core::service::{ConfigErrors, command_line, launch_migrate, launch_with, shutdown};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    run(command_line::<Cli>()).await.unwrap_or_else(|mistakes| mistakes.report())
}

async fn run(Cli { command, args, sagas }: Cli) -> Result<ExitCode, ConfigErrors> {
    use order_svc::config::Command::{Migrate, Rebuild, Serve};
    let mut errors = ConfigErrors::default();
    Ok(match command.unwrap_or(Serve) {
        Migrate => launch_migrate(&IDENTITY, &args, &migrations::all()).await,
        Rebuild(what) => {
            let found = rebuild::Settings::read(&args, &mut errors);
            let settings = errors.finish(found)?;
            launch_with(&IDENTITY, &settings.telemetry, rebuild::run(what, &settings)).await
        }
        Serve => {
            let found = args.read(&IDENTITY, &mut errors).zip(sagas.read(&mut errors));
            let (settings, sources) = errors.finish(found)?;
            let telemetry = settings.telemetry.clone();
            launch_with(&IDENTITY, &telemetry, serve(settings, sources, shutdown::token())).await
        }
    })
}

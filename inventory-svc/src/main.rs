//! Items, stock and reservations: `inventory-svc serve`, `inventory-svc migrate`.

use clap::Parser;
use saga_core::service::{ServiceArgs, ServiceCommand, launch};
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
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { command, args } = Cli::parse();
    launch(&inventory_svc::IDENTITY, command, &args, inventory_svc::migrations, inventory_svc::serve).await
}

//! The order REST API and the order saga: `order-svc serve`, `order-svc migrate`.

use clap::Parser;
use saga_core::service::{ServiceArgs, ServiceCommand, launch};
use std::process::ExitCode;

/// See `tikv-jemallocator` in the workspace's `Cargo.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Orders of the order platform: their API, and the saga that carries each one through
#[derive(Parser)]
#[command(name = "order-svc", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Option<ServiceCommand>,
    #[command(flatten)]
    args: ServiceArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { command, args } = Cli::parse();
    launch(&order_svc::IDENTITY, command, &args, order_svc::migrations::all, order_svc::serve).await
}

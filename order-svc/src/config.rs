//! The settings of `order-svc` beside those of every service.

use saga_core::service::{Identity, OrchestratorArgs, ServiceArgs};

/// The service's name and its default ports.
pub const IDENTITY: Identity = Identity { name: "order-svc", http_port: 8080, admin_port: 9080 };

/// Orders of the order platform: their API, and the saga that carries each one through
#[derive(Debug, clap::Parser)]
#[command(name = "order-svc", version)]
pub struct Cli {
    /// What to do; `serve` when not said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What every service takes.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// What a service that runs sagas takes beside.
    #[command(flatten)]
    pub sagas: OrchestratorArgs,
}

/// The program's commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// Bring the database's schema up to date and run (the default)
    Serve,
    /// Bring the database's schema up to date, then exit
    Migrate,
    /// Make a copy anew from its topic, while the service runs
    #[command(subcommand)]
    Rebuild(Copied),
}

/// What order-svc has a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Subcommand)]
pub enum Copied {
    /// The items and their prices, from the topic inventory.items; needs DATABASE_URL and KAFKA_BROKERS
    Catalogue {
        /// Withdraw the items that the topic does not have; without this they stay as they are
        #[arg(long)]
        withdraw_missing: bool,
    },
}

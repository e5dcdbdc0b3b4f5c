//! The settings of `inventory-svc` beside those of every service.

use saga_core::service::{Identity, ParticipantArgs, ServiceArgs, ServiceCommand};

/// The service's name and its default ports.
pub const IDENTITY: Identity = Identity { name: "inventory-svc", http_port: 8082, admin_port: 9082 };

/// Items, stock and reservations of the order platform
#[derive(Debug, clap::Parser)]
#[command(name = "inventory-svc", version)]
pub struct Cli {
    /// What to do; `serve` when not said.
    #[command(subcommand)]
    pub command: Option<ServiceCommand>,
    /// What every service takes.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// What a participant takes beside.
    #[command(flatten)]
    pub participant: ParticipantArgs,
}

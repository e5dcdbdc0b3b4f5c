//! The platform's processes: their names, their databases, their ports.

use crate::{Error, Result, ports};
use std::{fmt, path::PathBuf};

/// One of the platform's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Service {
    /// The simulated payment provider.
    #[serde(rename = "gateway-sim")]
    Gateway,
    /// The payments, `payment-svc`.
    #[serde(rename = "payment-svc")]
    Payments,
    /// The stock, `inventory-svc`.
    #[serde(rename = "inventory-svc")]
    Inventory,
    /// The orders and their sagas, `order-svc`.
    #[serde(rename = "order-svc")]
    Orders,
    /// The relay of all outboxes, `outbox-relay`.
    #[serde(rename = "outbox-relay")]
    Relay,
}

impl Service {
    /// All processes, in the order in which they are started: a callee comes before its callers.
    pub const ALL: [Self; 5] = [Self::Gateway, Self::Payments, Self::Inventory, Self::Orders, Self::Relay];

    /// The name of the process, and of its log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway-sim",
            Self::Payments => "payment-svc",
            Self::Inventory => "inventory-svc",
            Self::Orders => "order-svc",
            Self::Relay => "outbox-relay",
        }
    }

    /// The program, and its subcommand.
    pub fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Gateway => ("payment-svc", "gateway-sim"),
            other => (other.name(), "serve"),
        }
    }

    /// The process's own database; the relay has none and reads those of the services.
    pub fn database(self) -> Option<&'static str> {
        match self {
            Self::Gateway => Some("gateway"),
            Self::Payments => Some("payments"),
            Self::Inventory => Some("inventory"),
            Self::Orders => Some("orders"),
            Self::Relay => None,
        }
    }

    /// Whether its database has an outbox for the relay; the outbox's name is the database's.
    pub fn has_outbox(self) -> bool {
        matches!(self, Self::Payments | Self::Inventory | Self::Orders)
    }

    /// The default ports: the API's (the relay has none) and the admin listener's.
    pub fn default_ports(self) -> (Option<u16>, u16) {
        match self {
            Self::Orders => (Some(8080), 9080),
            Self::Payments => (Some(8081), 9081),
            Self::Inventory => (Some(8082), 9082),
            Self::Gateway => (Some(8083), 9083),
            Self::Relay => (None, 9084),
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The ports of a process, on the loopback interface.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Address {
    /// The port of the API; `None`: it has none.
    pub http: Option<u16>,
    /// The admin listener's port.
    pub admin: u16,
}

impl Address {
    /// The service's own ports where they are free, others where not.
    pub fn preferred(service: Service) -> Result<Self> {
        let (http, admin) = service.default_ports();
        Ok(Self { http: http.map(ports::free_or).transpose()?, admin: ports::free_or(admin)? })
    }

    /// Any ports that are free.
    pub fn free(service: Service) -> Result<Self> {
        let (http, _) = service.default_ports();
        Ok(Self { http: http.map(|_| ports::free()).transpose()?, admin: ports::free()? })
    }

    /// The URL of the API; for a process without one, of its admin listener.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http.unwrap_or(self.admin))
    }

    /// The URL of health, metrics and inspection.
    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin)
    }
}

/// The program's file: in `$STACK_BIN_DIR`, else beside the program that runs (or beside the folder of test binaries).
pub fn binary(name: &str) -> Result<PathBuf> {
    let ours = std::env::current_exe().map_err(Error::io("find our own program"))?;
    let mut place = ours.parent().map(PathBuf::from).unwrap_or_default();
    if place.ends_with("deps") || place.ends_with("examples") {
        place.pop();
    }
    if let Some(named) = std::env::var_os("STACK_BIN_DIR") {
        place = named.into();
    }
    let path = place.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::Other(format!("{} is not built. Build it: cargo build --workspace --bins", path.display())))
}

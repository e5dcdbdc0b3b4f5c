//! The two listeners: where they listen, by which names they are reached, and which callers they let in.

use super::{super::admin::AdminAuth, ConfigErrors, Secret, given, nth, token};
use crate::http::Hosts;
use clap::Args;
use std::net::SocketAddr;

/// The API's listener.
#[derive(Debug, Clone, Default, Args)]
pub struct HttpArgs {
    /// Where the API listens, address and port [default: 127.0.0.1 and the service's own port]
    #[arg(long, env = "HTTP_ADDR", value_name = "IP:PORT", hide_env_values = true, global = true)]
    pub http_addr: Option<String>,
    /// Names that the API is reached by, separated by commas, beside IP addresses and localhost; off loopback also beside names
    /// without a dot. `*` stands for every name. Requests for another name get 421
    #[arg(long, env = "HTTP_HOSTS", value_name = "NAME,...", hide_env_values = true, global = true)]
    pub http_hosts: Option<String>,
}

/// The admin listener.
#[derive(Debug, Clone, Default, Args)]
pub struct AdminArgs {
    /// Where health, metrics and inspection listen [default: 127.0.0.1 and the service's own admin port].
    /// Anything but loopback needs ADMIN_TOKEN
    #[arg(long, env = "ADMIN_ADDR", value_name = "IP:PORT", hide_env_values = true, global = true)]
    pub admin_addr: Option<String>,
    /// Names that the admin listener is reached by, like HTTP_HOSTS
    #[arg(long, env = "ADMIN_HOSTS", value_name = "NAME,...", hide_env_values = true, global = true)]
    pub admin_hosts: Option<String>,
    /// Bearer token that may look and act, 16 characters or more. Set the variable: a flag is read by every user of the machine
    #[arg(long, env = "ADMIN_TOKEN", value_name = "TOKEN", hide_env_values = true, global = true)]
    pub admin_token: Option<Secret>,
    /// Bearer token that may only look, 16 characters or more. Set the variable: a flag is read by every user of the machine
    #[arg(long, env = "ADMIN_VIEWER_TOKEN", value_name = "TOKEN", hide_env_values = true, global = true)]
    pub admin_viewer_token: Option<Secret>,
}

/// The settings of a valid [`HttpArgs`].
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// The address and port of the API.
    pub addr: SocketAddr,
    /// The names that the API is reached by.
    pub hosts: Hosts,
}

/// The settings of a valid [`AdminArgs`].
#[derive(Debug, Clone)]
pub struct AdminSettings {
    /// The address and port of the admin listener.
    pub addr: SocketAddr,
    /// The names that the admin listener is reached by.
    pub hosts: Hosts,
    /// The tokens of the callers that the admin listener lets in.
    pub auth: AdminAuth,
}

impl HttpArgs {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(&self, default_port: u16, errors: &mut ConfigErrors) -> Option<HttpSettings> {
        let addr = address(&self.http_addr, "HTTP_ADDR", default_port, errors);
        let hosts = hosts(&self.http_hosts, "HTTP_HOSTS", errors);
        Some(HttpSettings { addr: addr?, hosts: hosts? })
    }
}

impl AdminArgs {
    /// Reads the arguments, and adds each mistake to `errors`. An address off loopback without an operator's token is a
    /// mistake.
    pub fn read(&self, default_port: u16, errors: &mut ConfigErrors) -> Option<AdminSettings> {
        let addr = address(&self.admin_addr, "ADMIN_ADDR", default_port, errors);
        let hosts = hosts(&self.admin_hosts, "ADMIN_HOSTS", errors);
        let operator = token(self.admin_token.as_ref(), "ADMIN_TOKEN", errors);
        let viewer = token(self.admin_viewer_token.as_ref(), "ADMIN_VIEWER_TOKEN", errors);
        if operator.is_some() && operator == viewer {
            errors.add::<()>("ADMIN_VIEWER_TOKEN", "is the same as ADMIN_TOKEN", "give each role a token of its own");
        }
        if addr.is_some_and(|addr| !addr.ip().is_loopback()) && Secret::given(self.admin_token.as_ref()).is_none() {
            errors.add::<()>(
                "ADMIN_TOKEN",
                "is not set, and ADMIN_ADDR is not a loopback address",
                "set a token of 16 characters or more, or listen on 127.0.0.1",
            );
        }
        Some(AdminSettings { addr: addr?, hosts: hosts?, auth: AdminAuth::new(operator, viewer) })
    }
}

fn address(
    text: &Option<String>,
    variable: &'static str,
    default_port: u16,
    errors: &mut ConfigErrors,
) -> Option<SocketAddr> {
    let Some(text) = given(text) else { return Some(SocketAddr::from(([127, 0, 0, 1], default_port))) };
    text.parse().ok().or_else(|| {
        errors.add(
            variable,
            "is not an IP address and a port",
            format!("set it to an IP address and a port, for example 127.0.0.1:{default_port}"),
        )
    })
}

fn hosts(text: &Option<String>, variable: &'static str, errors: &mut ConfigErrors) -> Option<Hosts> {
    let Some(text) = given(text) else { return Some(Hosts::default()) };
    Hosts::parse(text).map_err(|wrong| {
        let cure = "set it to names separated by commas, without scheme and port: `orders.example.com`; `*` stands for every name";
        errors.add::<()>(variable, nth(wrong, "is no name"), cure);
    })
    .ok()
}

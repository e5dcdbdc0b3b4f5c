//! The settings of `payment-svc` beside those of every service.

use crate::sim::SimArgs;
use reqwest::Url;
use saga_core::service::{
    ConfigErrors, Identity, ParticipantArgs, ServiceArgs,
    config::{Secret, http_url, millis, token},
};
use std::time::Duration;

/// The service's name and its default ports.
pub const IDENTITY: Identity = Identity { name: "payment-svc", http_port: 8081, admin_port: 9081 };

/// Holds, takes and gives back the money of orders, by commands from Kafka, at a payment provider.
#[derive(Debug, clap::Parser)]
#[command(name = "payment-svc", version)]
pub struct Cli {
    /// What every service takes.
    #[command(flatten)]
    pub service: ServiceArgs,
    /// What a participant takes beside.
    #[command(flatten)]
    pub participant: ParticipantArgs,
    /// The payment provider.
    #[command(flatten)]
    pub gateway: GatewayArgs,
    /// What to do; `serve` when not said.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The program's commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Bring the database's schema up to date and run (the default)
    Serve,
    /// Bring the database's schema up to date, then exit
    Migrate,
    /// Bring the schema of the simulated provider's database up to date, then exit
    MigrateGatewaySim,
    /// Run a simulated payment provider, with a database of its own
    GatewaySim(SimArgs),
}

/// The payment provider.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct GatewayArgs {
    /// The payment provider's base URL [default: http://127.0.0.1:8083, where `payment-svc gateway-sim` listens]
    #[arg(long, env = "GATEWAY_URL", value_name = "URL", hide_env_values = true, global = true)]
    pub gateway_url: Option<Secret>,
    /// Bearer token that the provider lets this service in by, 16 characters or more; `gateway-sim` asks for it when it is
    /// set, and needs it where HTTP_ADDR is not loopback.
    /// Set the variable: a flag is read by every user of the machine
    #[arg(long, env = "GATEWAY_TOKEN", value_name = "TOKEN", hide_env_values = true, global = true)]
    pub gateway_token: Option<Secret>,
    /// Milliseconds that the provider has for an answer; later it is in doubt and asked again [default: 2000]
    #[arg(long, env = "GATEWAY_TIMEOUT_MS", value_name = "MILLISECONDS", hide_env_values = true, global = true)]
    pub gateway_timeout_ms: Option<String>,
    /// Requests to the provider in flight at once [default: 32]
    #[arg(long, env = "GATEWAY_CONCURRENCY", value_name = "NUMBER", hide_env_values = true, global = true)]
    pub gateway_concurrency: Option<String>,
}

/// The settings of a valid [`GatewayArgs`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewaySettings {
    /// The provider's base URL, without a user or a password.
    pub url: Url,
    /// The token that the provider lets the service in by; `None`: it asks for none.
    pub token: Option<Secret>,
    /// How long the provider has for an answer.
    pub timeout: Duration,
    /// How many requests may be in flight at once.
    pub concurrency: usize,
}

impl GatewayArgs {
    /// Checks these arguments, and adds each mistake to `errors`; `None` if there is one.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<GatewaySettings> {
        let url = Secret::given(self.gateway_url.as_ref()).unwrap_or("http://127.0.0.1:8083");
        let url = http_url(url).and_then(|_| url.parse::<Url>().map_err(|_| "is not a URL"));
        let url = match url {
            Ok(url) => Some(url),
            Err(wrong) => errors.add(
                "GATEWAY_URL",
                wrong,
                "set it to a URL such as https://gateway.example, and the provider's token in GATEWAY_TOKEN",
            ),
        };
        let token = token(self.gateway_token.as_ref(), "GATEWAY_TOKEN", errors).map(Secret::from);
        let timeout = millis(&self.gateway_timeout_ms, "GATEWAY_TIMEOUT_MS", Duration::from_secs(2), errors);
        let timeout = match timeout {
            Some(Duration::ZERO) => errors.add("GATEWAY_TIMEOUT_MS", "is 0", "give the provider time to answer"),
            other => other,
        };
        let concurrency = match given(&self.gateway_concurrency).map(str::parse::<usize>) {
            None => Some(32),
            Some(Ok(concurrency)) if (1..=1_024).contains(&concurrency) => Some(concurrency),
            Some(_) => errors.add("GATEWAY_CONCURRENCY", "is not from 1 to 1024", "leave it out for 32"),
        };
        Some(GatewaySettings { url: url?, token, timeout: timeout?, concurrency: concurrency? })
    }
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_is_reported_at_once() {
        let text = |text: &str| Some(text.to_owned());
        let gateway = GatewayArgs {
            gateway_url: Some("ftp://x".into()),
            gateway_token: Some("short".into()),
            gateway_timeout_ms: text("soon"),
            gateway_concurrency: text("0"),
        };
        let participant = ParticipantArgs { reply_topics: text("no topic"), command_sources: text("no source") };
        let mut errors = ConfigErrors::default();
        let found = ServiceArgs::default().read(&IDENTITY, &mut errors).zip(participant.read(&mut errors));
        let gateway = gateway.read(&mut errors);
        let errors = errors.finish(found.zip(gateway)).unwrap_err();
        let variables: Vec<_> = errors.mistakes().iter().map(|mistake| mistake.variable).collect();
        assert_eq!(
            variables,
            [
                "DATABASE_URL",
                "KAFKA_BROKERS",
                "REPLY_TOPICS",
                "COMMAND_SOURCES",
                "GATEWAY_URL",
                "GATEWAY_TOKEN",
                "GATEWAY_TIMEOUT_MS",
                "GATEWAY_CONCURRENCY"
            ]
        );
    }
    #[test]
    fn a_password_in_the_gateways_url_is_refused_and_the_token_is_named() {
        for url in ["https://user:hunter2@gateway.example", "https://hunter2@h", "https://h/?token=hunter2"] {
            let mut errors = ConfigErrors::default();
            let args = GatewayArgs { gateway_url: Some(url.into()), ..GatewayArgs::default() };
            let read = args.read(&mut errors);
            let said = errors.finish(read).unwrap_err().to_string();
            assert!(said.contains("GATEWAY_URL") && said.contains("GATEWAY_TOKEN"), "{said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }

    #[test]
    fn settings_and_what_they_were_read_from_show_no_secret() {
        let gateway = GatewayArgs { gateway_token: Some("hunter2-hunter2-a".into()), ..GatewayArgs::default() };
        let mut service = ServiceArgs::default();
        service.database.database_url = Some("postgres://me:hunter2-b@h/d".into());
        service.kafka.kafka_brokers = Some("h:1".into());
        let mut errors = ConfigErrors::default();
        let settings = (service.read(&IDENTITY, &mut errors), gateway.read(&mut errors).expect("they are good"));
        let simulator = SimArgs::default().validate(&service, gateway.gateway_token.as_ref()).unwrap();
        let said = format!("{gateway:?}{gateway:#?}{settings:?}{settings:#?}{simulator:?}{simulator:#?}");
        assert!(!said.contains("hunter2"), "{said}");
        assert_eq!(settings.1.token, simulator.token, "the simulator asks for what it is shown");
    }
}

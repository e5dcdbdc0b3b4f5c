//! The settings of the simulator's behaviour; validated whole, like every service's configuration.

use super::tokens;
use saga_core::service::{
    ConfigErrors, DatabaseSettings, Identity, ServiceArgs,
    config::{AdminSettings, HttpSettings, Secret, millis, token},
    telemetry::TelemetrySettings,
};
use std::time::Duration;

/// The simulator's name and its default ports.
pub const IDENTITY: Identity = Identity { name: "gateway-sim", http_port: 8083, admin_port: 9083 };

/// A payment provider, simulated, with books of its own (database `DATABASE_URL`).
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_long_help = tokens::help(), after_help = tokens::help())]
pub struct SimArgs {
    /// Share of authorizations by good tokens that succeed, 0 to 1 [default: 1]
    #[arg(long, env = "GATEWAY_SIM_SUCCESS_RATE", value_name = "SHARE", hide_env_values = true)]
    pub gateway_sim_success_rate: Option<String>,
    /// Share of answers that are lost after the request was performed, 0 to 1 [default: 0]
    #[arg(long, env = "GATEWAY_SIM_LOST_ANSWER_RATE", value_name = "SHARE", hide_env_values = true)]
    pub gateway_sim_lost_answer_rate: Option<String>,
    /// Share of requests that are answered 503 before anything is done, 0 to 1 [default: 0]
    #[arg(long, env = "GATEWAY_SIM_ERROR_RATE", value_name = "SHARE", hide_env_values = true)]
    pub gateway_sim_error_rate: Option<String>,
    /// Milliseconds that each request takes [default: 0]
    #[arg(long, env = "GATEWAY_SIM_LATENCY_MS", value_name = "MILLISECONDS", hide_env_values = true)]
    pub gateway_sim_latency_ms: Option<String>,
    /// Milliseconds that a request with tok_slow takes [default: 1500]
    #[arg(long, env = "GATEWAY_SIM_SLOW_MS", value_name = "MILLISECONDS", hide_env_values = true)]
    pub gateway_sim_slow_ms: Option<String>,
}

/// How the simulator behaves when no token says otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Behaviour {
    /// The share of authorizations that succeed, 0 to 1.
    pub success_rate: f64,
    /// The share of answers that are lost after the effect, 0 to 1.
    pub lost_answer_rate: f64,
    /// The share of requests that fail before the effect, 0 to 1.
    pub error_rate: f64,
    /// How long each request takes.
    pub latency: Duration,
    /// How long a request with `tok_slow` takes.
    pub slow: Duration,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            success_rate: 1.0,
            lost_answer_rate: 0.0,
            error_rate: 0.0,
            latency: Duration::ZERO,
            slow: Duration::from_millis(1_500),
        }
    }
}

/// The settings of a valid [`SimArgs`], with those that it shares with the services.
#[derive(Debug, Clone)]
pub struct SimSettings {
    /// The simulator's own database.
    pub database: DatabaseSettings,
    /// The address and names of the simulator's API.
    pub http: HttpSettings,
    /// The admin listener, with health and metrics.
    pub admin: AdminSettings,
    /// The settings of logs and traces.
    pub telemetry: TelemetrySettings,
    /// The token that lets callers in; without one, on loopback, every caller is let in.
    pub token: Option<Secret>,
    /// The simulator's behaviour where no token decides it.
    pub behaviour: Behaviour,
}

impl SimArgs {
    /// Checks everything and reports every mistake at once. The `gateway_token` is the one that calls of the provider
    /// carry: the simulator asks for it.
    pub fn validate(&self, service: &ServiceArgs, gateway_token: Option<&Secret>) -> Result<SimSettings, ConfigErrors> {
        let mut errors = ConfigErrors::default();
        let database = service.database.read(&mut errors);
        let http = service.http.read(IDENTITY.http_port, &mut errors);
        let admin = service.admin.read(IDENTITY.admin_port, &mut errors);
        let telemetry = service.telemetry.read(&mut errors);
        let token = token(gateway_token, "GATEWAY_TOKEN", &mut errors).map(Secret::from);
        let is_open = http.as_ref().is_some_and(|http| !http.addr.ip().is_loopback());
        if is_open && Secret::given(gateway_token).is_none() {
            errors.add::<()>(
                "GATEWAY_TOKEN",
                "is not set, and HTTP_ADDR is not a loopback address",
                "set a token of 16 characters or more, or listen on 127.0.0.1",
            );
        }
        let behaviour = self.behaviour(&mut errors);
        let settings = (|| {
            Some(SimSettings {
                database: database?,
                http: http?,
                admin: admin?,
                telemetry: telemetry?,
                token,
                behaviour: behaviour?,
            })
        })();
        errors.finish(settings)
    }

    fn behaviour(&self, errors: &mut ConfigErrors) -> Option<Behaviour> {
        let usual = Behaviour::default();
        let success = share(&self.gateway_sim_success_rate, "GATEWAY_SIM_SUCCESS_RATE", usual.success_rate, errors);
        let lost =
            share(&self.gateway_sim_lost_answer_rate, "GATEWAY_SIM_LOST_ANSWER_RATE", usual.lost_answer_rate, errors);
        let error = share(&self.gateway_sim_error_rate, "GATEWAY_SIM_ERROR_RATE", usual.error_rate, errors);
        let latency = millis(&self.gateway_sim_latency_ms, "GATEWAY_SIM_LATENCY_MS", usual.latency, errors);
        let slow = millis(&self.gateway_sim_slow_ms, "GATEWAY_SIM_SLOW_MS", usual.slow, errors);
        Some(Behaviour {
            success_rate: success?,
            lost_answer_rate: lost?,
            error_rate: error?,
            latency: latency?,
            slow: slow?,
        })
    }
}

fn share(text: &Option<String>, variable: &'static str, default: f64, errors: &mut ConfigErrors) -> Option<f64> {
    let Some(text) = text.as_deref().map(str::trim).filter(|text| !text.is_empty()) else { return Some(default) };
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Some(share),
        _ => errors.add(variable, "is no share", "set it to a number from 0 to 1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::service::{DatabaseArgs, HttpArgs};

    #[test]
    fn off_loopback_the_simulator_needs_a_token() {
        let read = |addr: &str, token: Option<&str>| {
            let service = ServiceArgs {
                database: DatabaseArgs { database_url: Some("postgres://a:b@h/db".into()), ..DatabaseArgs::default() },
                http: HttpArgs { http_addr: Some(addr.to_owned()), ..HttpArgs::default() },
                ..ServiceArgs::default()
            };
            let token = token.map(Secret::from);
            SimArgs::default().validate(&service, token.as_ref()).map(|settings| settings.token.is_some())
        };
        let token = Some("a-token-of-the-providers");
        assert_eq!(read("127.0.0.1:1", None), Ok(false));
        assert_eq!(read("0.0.0.0:1", token), Ok(true));
        for none in [None, Some(" ")] {
            let errors = read("0.0.0.0:1", none).unwrap_err();
            assert_eq!(errors.mistakes().len(), 1, "{errors}");
            assert_eq!(errors.mistakes()[0].variable, "GATEWAY_TOKEN");
        }
    }
}

//! Flags and environment. Each flag is the kebab-case of its variable.
//!
//! Everything is taken as text and validated afterwards, whole. A start with five mistakes reports five lines at once,
//! each with the variable, what is wrong and what to do.
//!
//! No value is shown, neither by `--help` nor in a mistake: what stands in the wrong variable may be a password.

mod database;
mod listeners;
mod sagas;
mod secret;

pub use database::{DatabaseArgs, DatabaseSettings};
pub use listeners::{AdminArgs, AdminSettings, HttpArgs, HttpSettings};
pub use sagas::{OrchestratorArgs, ParticipantArgs, ParticipantSettings};
pub use secret::{DatabasePlace, Secret, database_url, http_url};

use super::telemetry::TelemetrySettings;
use clap::Args;
use std::{
    fmt,
    ops::{Bound, RangeBounds},
    str::FromStr,
    time::Duration,
};

/// The name and the ports of a service, which are known before it has read anything.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The service's name in logs, traces and `application_name`.
    pub name: &'static str,
    /// The port of the API on loopback when `HTTP_ADDR` is not set.
    pub http_port: u16,
    /// The port of the admin listener on loopback when `ADMIN_ADDR` is not set.
    pub admin_port: u16,
}

/// The subcommands that every service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Subcommand)]
pub enum ServiceCommand {
    /// Bring the database's schema up to date and run (the default)
    Serve,
    /// Bring the database's schema up to date, then exit
    Migrate,
}

/// What every service takes.
#[derive(Debug, Clone, Default, Args)]
pub struct ServiceArgs {
    /// The service's database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// How the process reaches Kafka.
    #[command(flatten)]
    pub kafka: KafkaArgs,
    /// The API's listener.
    #[command(flatten)]
    pub http: HttpArgs,
    /// The admin listener.
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// Kafka.
#[derive(Debug, Clone, Default, Args)]
pub struct KafkaArgs {
    /// Kafka brokers to start from, `host:port`, several separated by commas
    #[arg(long, env = "KAFKA_BROKERS", value_name = "HOST:PORT,...", hide_env_values = true, global = true)]
    pub kafka_brokers: Option<String>,
    /// Copies that a topic created by this process has [default: 1]
    #[arg(long, env = "KAFKA_REPLICATION_FACTOR", value_name = "NUMBER", hide_env_values = true, global = true)]
    pub kafka_replication_factor: Option<String>,
    /// After so long without a heartbeat a consumer's partitions go to another, milliseconds [default: 6000]. Not less than
    /// the brokers' group.min.session.timeout.ms, not more than 300000
    #[arg(long, env = "KAFKA_SESSION_TIMEOUT_MS", value_name = "NUMBER", hide_env_values = true, global = true)]
    pub kafka_session_timeout_ms: Option<String>,
}

/// Logs and traces.
#[derive(Debug, Clone, Default, Args)]
pub struct TelemetryArgs {
    /// What is logged, in the syntax of tracing's EnvFilter; what libraries repeat in an outage only by their names [default: info]
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", hide_env_values = true, global = true)]
    pub rust_log: Option<String>,
    /// `json` (a line per event, for machines) or `text` (for people) [default: json]
    #[arg(long, env = "LOG_FORMAT", value_name = "FORMAT", hide_env_values = true, global = true)]
    pub log_format: Option<String>,
    /// Where traces are sent by OTLP over HTTP, for example `http://collector:4318`; unset: nowhere
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL", hide_env_values = true, global = true)]
    pub otel_exporter_otlp_endpoint: Option<Secret>,
}

/// The settings of a valid [`ServiceArgs`].
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    /// The service's name and default ports.
    pub identity: Identity,
    /// The settings of the service's database.
    pub database: DatabaseSettings,
    /// The settings of the Kafka client and of new topics.
    pub kafka: KafkaSettings,
    /// The address and names of the API's listener.
    pub http: HttpSettings,
    /// The address, names and tokens of the admin listener.
    pub admin: AdminSettings,
    /// The settings of logs and traces.
    pub telemetry: TelemetrySettings,
}

/// The settings of a valid [`KafkaArgs`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaSettings {
    /// The brokers to start from, as in `bootstrap.servers`.
    pub brokers: String,
    /// How many copies a topic has that this process creates; default 1.
    pub replication_factor: i32,
    /// The consumers' `session.timeout.ms`; default 6 s.
    pub session_timeout: Duration,
}

/// The longest session timeout: the client library lets no more pass between two polls (`max.poll.interval.ms`).
const SESSION_TIMEOUT_MAX_MS: u64 = 300_000;
/// The fewest characters of a token: shorter ones can be guessed.
const MIN_TOKEN: usize = 16;

impl ServiceArgs {
    /// Checks everything and reports every mistake at once.
    ///
    /// # Errors
    /// Every mistake, each with its variable and what to do.
    pub fn validate(&self, identity: &Identity) -> Result<ServiceSettings, ConfigErrors> {
        let mut errors = ConfigErrors::default();
        let settings = self.read(identity, &mut errors);
        errors.finish(settings)
    }

    /// Like [`Self::validate`], for a service that has more settings of its own and reports all mistakes together.
    pub fn read(&self, identity: &Identity, errors: &mut ConfigErrors) -> Option<ServiceSettings> {
        let database = self.database.read(errors);
        let kafka = self.kafka.read(errors);
        let http = self.http.read(identity.http_port, errors);
        let admin = self.admin.read(identity.admin_port, errors);
        let telemetry = self.telemetry.read(errors);
        Some(ServiceSettings {
            identity: *identity,
            database: database?,
            kafka: kafka?,
            http: http?,
            admin: admin?,
            telemetry: telemetry?,
        })
    }
}

impl KafkaArgs {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<KafkaSettings> {
        let example = "set it to host:port, for example localhost:9092";
        let broker = |text: &str| {
            text.trim().rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
            })
        };
        let brokers = match given(&self.kafka_brokers) {
            None => errors.add("KAFKA_BROKERS", "is not set", example),
            Some(list) => match list.split(',').position(|one| !broker(one)) {
                Some(wrong) => errors.add("KAFKA_BROKERS", nth(wrong, "is not host:port"), example),
                None => Some(list.to_owned()),
            },
        };
        let replication_factor = number(&self.kafka_replication_factor, "KAFKA_REPLICATION_FACTOR", 1_i32, 1.., errors);
        let (session, allowed) = (&self.kafka_session_timeout_ms, 1_000..=SESSION_TIMEOUT_MAX_MS);
        let session = number(session, "KAFKA_SESSION_TIMEOUT_MS", 6_000_u64, allowed, errors);
        let session_timeout = Duration::from_millis(session?);
        Some(KafkaSettings { brokers: brokers?, replication_factor: replication_factor?, session_timeout })
    }
}

impl TelemetryArgs {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<TelemetrySettings> {
        TelemetrySettings::read(
            given(&self.rust_log),
            given(&self.log_format),
            Secret::given(self.otel_exporter_otlp_endpoint.as_ref()),
            errors,
        )
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(Vec<Mistake>);

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The environment variable; its flag is the kebab-case of it.
    pub variable: &'static str,
    /// What is wrong with it: completes a sentence that begins with the variable.
    pub what: String,
    /// What the operator does about it.
    pub cure: String,
}

impl ConfigErrors {
    /// Notes a mistake. Always `None`, so that a reader can end with it.
    pub fn add<T>(&mut self, variable: &'static str, what: impl Into<String>, cure: impl Into<String>) -> Option<T> {
        self.0.push(Mistake { variable, what: what.into(), cure: cure.into() });
        None
    }

    /// Returns `value`, if no mistake was noted.
    ///
    /// # Panics
    /// When a reader gave no value and noted no mistake.
    ///
    /// # Errors
    /// The mistakes that were noted.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Self> {
        if !self.0.is_empty() {
            return Err(self);
        }
        Ok(value.expect("a reader that gives no value notes a mistake"))
    }

    /// The mistakes that were noted, in the order of reading.
    #[must_use]
    pub fn mistakes(&self) -> &[Mistake] {
        &self.0
    }

    /// Prints every mistake to standard error (there are no logs yet) and returns the exit code of a usage error.
    #[must_use]
    pub fn report(&self) -> std::process::ExitCode {
        eprintln!("{self}");
        std::process::ExitCode::from(2)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.len() == 1 { "" } else { "s" };
        write!(f, "{} mistake{plural} in the configuration:", self.0.len())?;
        for Mistake { variable, what, cure } in &self.0 {
            let flag = variable.to_lowercase().replace('_', "-");
            write!(f, "\n  {variable} (--{flag}) {what}: {cure}")?;
        }
        write!(f, "\n--help explains each.")
    }
}

/// Parses the command line. A usage error repeats no argument that looks like a URL: there may be a password in it.
#[must_use]
pub fn command_line<C: clap::Parser>() -> C {
    C::try_parse().unwrap_or_else(|error| {
        if error.use_stderr() && error.render().to_string().contains("://") {
            eprintln!(
                "error: an argument that looks like a URL is not expected where it stands, and not shown: it may hold a password. \
                 Set its environment variable instead.\n--help names them."
            );
            std::process::exit(2);
        }
        error.exit()
    })
}

/// The text of a variable. A variable set to nothing is not set: that is how compose files and shells say "no value".
fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

fn number<N: FromStr + PartialOrd + fmt::Display + Copy>(
    text: &Option<String>,
    variable: &'static str,
    default: N,
    allowed: impl RangeBounds<N>,
    errors: &mut ConfigErrors,
) -> Option<N> {
    let Some(text) = given(text) else { return Some(default) };
    match text.parse::<N>() {
        Ok(number) if allowed.contains(&number) => Some(number),
        _ => {
            let bound = |name: &str, bound: Bound<&N>| match bound {
                Bound::Included(number) => format!(" {name} {number}"),
                Bound::Excluded(_) | Bound::Unbounded => String::new(),
            };
            let (from, to) = (bound("from", allowed.start_bound()), bound("to", allowed.end_bound()));
            let cure = format!("set it to a whole number{from}{to}, or leave it out for {default}");
            errors.add(variable, "is no such number", cure)
        }
    }
}

/// Reads a number of milliseconds, at most an hour.
pub fn millis(
    text: &Option<String>,
    variable: &'static str,
    default: Duration,
    errors: &mut ConfigErrors,
) -> Option<Duration> {
    match given(text).map(str::parse::<u64>) {
        None => Some(default),
        Some(Ok(millis)) if millis <= 3_600_000 => Some(Duration::from_millis(millis)),
        Some(_) => errors.add(variable, "is not a number of milliseconds up to an hour", "set it to 2000, for example"),
    }
}

/// What is wrong with one of several entries of a variable. Only the entry's number identifies it, because no value is
/// shown.
#[must_use]
pub fn nth(index: usize, what: &str) -> String {
    format!("has an entry, number {}, that {what}", index + 1)
}

/// Reads a bearer token, if one is given.
pub fn token(text: Option<&Secret>, variable: &'static str, errors: &mut ConfigErrors) -> Option<String> {
    let token = Secret::given(text)?;
    if token.len() < MIN_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return errors.add(
            variable,
            "is too short or has characters that a header cannot carry",
            "use 16 or more printable ASCII characters without spaces, for example from `openssl rand -hex 16`",
        );
    }
    Some(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Identity = Identity { name: "me", http_port: 8080, admin_port: 9080 };

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    fn secret(text: &str) -> Option<Secret> {
        Some(text.into())
    }

    fn valid() -> ServiceArgs {
        ServiceArgs {
            database: DatabaseArgs { database_url: secret("postgres://a:b@h/db"), ..DatabaseArgs::default() },
            kafka: KafkaArgs { kafka_brokers: some("localhost:9092"), ..KafkaArgs::default() },
            ..ServiceArgs::default()
        }
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_variable_and_a_cure_but_no_password() {
        let args = ServiceArgs {
            database: DatabaseArgs {
                database_url: secret("mysql://root:hunter2@x/y"),
                database_max_connections: some("many"),
            },
            kafka: KafkaArgs {
                kafka_brokers: some("a:1,b"),
                kafka_replication_factor: some("0"),
                kafka_session_timeout_ms: some("999"),
            },
            http: HttpArgs { http_addr: some("8080"), http_hosts: some("http://orders.example.com") },
            admin: AdminArgs {
                admin_addr: some("0.0.0.0:9"),
                admin_hosts: some("a,"),
                admin_viewer_token: secret("short"),
                admin_token: None,
            },
            telemetry: TelemetryArgs {
                rust_log: some("saga=loud"),
                log_format: some("xml"),
                otel_exporter_otlp_endpoint: secret("collector"),
            },
        };
        let errors = args.validate(&ME).unwrap_err();
        let variables: Vec<_> = errors.mistakes().iter().map(|mistake| mistake.variable).collect();
        assert_eq!(
            variables,
            [
                "DATABASE_URL",
                "DATABASE_MAX_CONNECTIONS",
                "KAFKA_BROKERS",
                "KAFKA_REPLICATION_FACTOR",
                "KAFKA_SESSION_TIMEOUT_MS",
                "HTTP_ADDR",
                "HTTP_HOSTS",
                "ADMIN_HOSTS",
                "ADMIN_VIEWER_TOKEN",
                "ADMIN_TOKEN",
                "RUST_LOG",
                "LOG_FORMAT",
                "OTEL_EXPORTER_OTLP_ENDPOINT",
            ]
        );
        let text = errors.to_string();
        assert!(
            text.contains(
                "KAFKA_BROKERS (--kafka-brokers) has an entry, number 2, that is not host:port: set it to host:port"
            ),
            "{text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn reply_topics_are_names_of_topics_that_can_be_written_to() {
        let read = |topics: &str| {
            let mut errors = ConfigErrors::default();
            let read = ParticipantArgs { reply_topics: some(topics), command_sources: None }.read(&mut errors);
            errors.finish(read.map(|read| read.reply_topics))
        };
        assert_eq!(read(" a.replies , b ,").unwrap(), ["a.replies", "b"]);
        assert!(read(" ").unwrap().is_empty());
        for wrong in ["a b", "a,__consumer_offsets", ".."] {
            assert_eq!(read(wrong).unwrap_err().mistakes()[0].variable, "REPLY_TOPICS", "{wrong}");
        }
    }

    #[test]
    fn sources_are_texts_without_blanks() {
        let read = |sources: &str| {
            let mut errors = ConfigErrors::default();
            let participant = ParticipantArgs { reply_topics: None, command_sources: some(sources) };
            let orchestrator = OrchestratorArgs { reply_sources: some(sources) };
            let read = participant.read(&mut errors).zip(orchestrator.read(&mut errors));
            errors.finish(read.map(|(participant, replies)| (participant.command_sources, replies)))
        };
        let both = vec!["a".to_owned(), "urn:x:b".to_owned()];
        assert_eq!(read(" a , urn:x:b ,").unwrap(), (both.clone(), both));
        let mistakes = read("a b").unwrap_err();
        let variables: Vec<_> = mistakes.mistakes().iter().map(|mistake| mistake.variable).collect();
        assert_eq!(variables, ["COMMAND_SOURCES", "REPLY_SOURCES"]);
    }

    #[test]
    fn what_is_left_out_or_empty_has_its_default_or_is_asked_for() {
        let settings = valid().validate(&ME).unwrap();
        assert_eq!(settings.http.addr.to_string(), "127.0.0.1:8080");
        assert_eq!(settings.admin.addr.to_string(), "127.0.0.1:9080");
        assert_eq!(settings.database.max_connections, 16);
        let mut empty = valid();
        empty.kafka.kafka_brokers = some(" ");
        assert_eq!(empty.validate(&ME).unwrap_err().mistakes()[0].variable, "KAFKA_BROKERS");
    }

    #[test]
    fn off_loopback_needs_an_operators_token_and_roles_need_different_ones() {
        let mut args = valid();
        args.admin.admin_addr = some("[::]:9080");
        assert!(args.validate(&ME).is_err());
        args.admin.admin_viewer_token = secret("0123456789abcdef");
        assert!(args.validate(&ME).is_err(), "a viewer's token alone leaves nobody who can act");
        args.admin.admin_token = secret("0123456789abcdef");
        assert!(args.validate(&ME).is_err(), "the same token for both");
        args.admin.admin_token = secret("fedcba9876543210");
        assert!(args.validate(&ME).is_ok());
    }

    #[test]
    fn settings_and_what_they_were_read_from_show_no_secret() {
        let mut args = valid();
        args.database.database_url = secret("postgres://me:hunter2-hunter2-a@h/db?password=hunter2-hunter2-b");
        args.admin.admin_token = secret("hunter2-hunter2-c");
        args.admin.admin_viewer_token = secret("hunter2-hunter2-d");
        args.telemetry.otel_exporter_otlp_endpoint = secret("https://collector/hunter2");
        let settings = args.validate(&ME).unwrap();
        let said = format!("{args:?}{args:#?}{settings:?}{settings:#?}");
        assert!(!said.contains("hunter2"), "{said}");
        assert!(said.contains("\"me\""), "it says as whom: {said}");
    }
}

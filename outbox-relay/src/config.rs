//! Flags and environment of the binary. It reports every mistake at once.

use crate::{
    budget,
    settings::{
        COMPRESSION, DEFAULT_LEASE, DEFAULT_READING, OutboxSettings, RESOLVED_KEPT, RelaySettings, SET_APART_FOR,
        STUCK_AFTER,
    },
};
use clap::{Args, Parser, Subcommand};
use saga_core::service::{
    AdminArgs, ConfigErrors, Identity, KafkaArgs, TelemetryArgs,
    config::{AdminSettings, Secret, database_url, nth},
    telemetry::TelemetrySettings,
};
use sqlx::postgres::PgConnectOptions;
use std::{fmt::Display, str::FromStr, time::Duration};

/// The relay among the services; it has no API of its own, only the admin listener.
pub const IDENTITY: Identity = Identity { name: "outbox-relay", http_port: 0, admin_port: 9084 };

/// The shortest lease that is allowed; a shorter one would be lost to a hiccup.
const LEAST_LEASE_SECONDS: u64 = 2;

/// Publishes committed outbox rows to Kafka, in order
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Everything else
    #[command(flatten)]
    pub args: RelayArgs,
}

/// What the binary does.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Publish (the default). The outbox's tables are its service's; this waits for them
    Serve,
    /// Bring the messaging tables of every outbox's database up to date, then exit
    Migrate,
    /// Let an outbox be published that was moved to another PostgreSQL cluster. The relays and its writers are stopped
    Reanchor(Reanchor),
    /// Give the position of an outbox to its new name. The relays are stopped
    Rename {
        /// How it was called
        from: String,
        /// How it is called in OUTBOXES
        to: String,
    },
}

/// Which outbox, and how it was moved.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Reanchor {
    /// How it is called in OUTBOXES
    pub outbox: String,
    /// What to do about the position.
    #[command(flatten)]
    pub cure: CureArgs,
}

/// The cures, of which one is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
#[group(required = true, multiple = false)]
pub struct CureArgs {
    /// By pg_upgrade or a physical copy: transaction ids were kept
    #[arg(long)]
    pub accept: bool,
    /// By a logical copy (pg_dump, logical replication): every row gets a transaction id of this cluster
    #[arg(long)]
    pub rewrite: bool,
}

/// What the relay takes.
#[derive(Debug, Clone, Default, Args)]
pub struct RelayArgs {
    /// The outboxes to publish and their databases: `orders=postgres://user:secret@db:5432/orders,payments=…`.
    /// The name is the messages' `ce_source`, and what the position is kept under: `rename` gives it another.
    /// Set the variable: a flag is read by every user of the machine
    #[arg(long, env = "OUTBOXES", value_name = "NAME=URL,...", hide_env_values = true, global = true)]
    pub outboxes: Option<Secret>,
    /// At the first start of an outbox, leave out what was committed before
    #[arg(long, env = "FROM_NOW", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_env_values = true, global = true)]
    pub from_now: Option<String>,
    /// Publish all of an outbox again that was published under another name
    #[arg(long, env = "PUBLISH_AGAIN", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_env_values = true, global = true)]
    pub publish_again: Option<String>,
    /// How long a stand-by waits for an owner that was killed or is stuck [default: 10]
    #[arg(long, env = "LEASE_SECONDS", value_name = "SECONDS", hide_env_values = true, global = true)]
    pub lease_seconds: Option<String>,
    /// How long rows may wait for a partition without a leader before their topic is set apart and others go on
    /// [default: 5]
    #[arg(long, env = "STUCK_AFTER_SECONDS", value_name = "SECONDS", hide_env_values = true, global = true)]
    pub stuck_after_seconds: Option<String>,
    /// How long a topic whose rows Kafka refuses stays set apart after the last refusal [default: 60]
    #[arg(long, env = "SET_APART_SECONDS", value_name = "SECONDS", hide_env_values = true, global = true)]
    pub set_apart_seconds: Option<String>,
    /// Mebibytes of rows that the process holds at most, read and not yet acknowledged by Kafka, for all outboxes.
    /// Kafka's client copies a row while it is handed over, so the process needs more [default: 256, or 64 for each
    /// outbox if that is more]
    #[arg(long, env = "HELD_MEBIBYTES", value_name = "MEBIBYTES", hide_env_values = true, global = true)]
    pub held_mebibytes: Option<String>,
    /// Compression of what is sent: `none`, `lz4`, `zstd`, `gzip` or `snappy` [default: lz4]
    #[arg(long, env = "COMPRESSION", value_name = "TYPE", hide_env_values = true, global = true)]
    pub compression: Option<String>,
    /// Kafka brokers to start from, `host:port`, several separated by commas
    #[arg(long, env = "KAFKA_BROKERS", value_name = "HOST:PORT,...", hide_env_values = true, global = true)]
    pub kafka_brokers: Option<String>,
    /// The admin listener.
    #[command(flatten)]
    pub admin: AdminArgs,
    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// A valid [`RelayArgs`].
#[derive(Debug, Clone)]
pub struct Configuration {
    /// The relay's own settings.
    pub relay: RelaySettings,
    /// The admin listener's settings.
    pub admin: AdminSettings,
    /// The settings of logs and traces.
    pub telemetry: TelemetrySettings,
}

impl RelayArgs {
    /// Checks everything and reports every mistake at once.
    ///
    /// # Errors
    /// Every mistake, each with its variable and what to do.
    pub fn validate(&self) -> Result<Configuration, ConfigErrors> {
        let mut errors = ConfigErrors::default();
        let outboxes = read_outboxes(Secret::given(self.outboxes.as_ref()).unwrap_or_default(), &mut errors);
        // A relay needs nothing else of the Kafka settings: it makes no topics and consumes none.
        let kafka = KafkaArgs { kafka_brokers: self.kafka_brokers.clone(), ..KafkaArgs::default() }.read(&mut errors);
        let lease =
            seconds("LEASE_SECONDS", self.lease_seconds.as_deref(), LEAST_LEASE_SECONDS, DEFAULT_LEASE, &mut errors);
        let stuck = self.stuck_after_seconds.as_deref();
        let stuck_after = seconds("STUCK_AFTER_SECONDS", stuck, 1, STUCK_AFTER, &mut errors);
        let set_apart = self.set_apart_seconds.as_deref();
        let set_apart_for = seconds("SET_APART_SECONDS", set_apart, 0, SET_APART_FOR, &mut errors);
        let from_now = switch("FROM_NOW", self.from_now.as_deref(), &mut errors);
        let publish_again = switch("PUBLISH_AGAIN", self.publish_again.as_deref(), &mut errors);
        let held = outboxes.as_ref().and_then(|outboxes| {
            let (least, default) = (budget::least(outboxes.len()), budget::default(outboxes.len()));
            number("HELD_MEBIBYTES", self.held_mebibytes.as_deref(), least >> 20, default >> 20, &mut errors)
        });
        let compression = match self.compression.as_deref().map(str::trim).filter(|text| !text.is_empty()) {
            None => Some(COMPRESSION.to_owned()),
            Some(kind @ ("none" | "lz4" | "zstd" | "gzip" | "snappy")) => Some(kind.to_owned()),
            Some(_) => errors.add("COMPRESSION", "is no such type", "set it to none, lz4, zstd, gzip or snappy"),
        };
        let admin = self.admin.read(IDENTITY.admin_port, &mut errors);
        let telemetry = self.telemetry.read(&mut errors);
        let read = || {
            let relay = RelaySettings {
                outboxes: outboxes?,
                kafka_brokers: kafka?.brokers,
                from_now: from_now?,
                publish_again: publish_again?,
                lease: lease?,
                reading: DEFAULT_READING,
                resolved_kept: RESOLVED_KEPT,
                stuck_after: stuck_after?,
                set_apart_for: set_apart_for?,
                held: held?.saturating_mul(1 << 20),
                compression: compression?,
            };
            Some(Configuration { relay, admin: admin?, telemetry: telemetry? })
        };
        errors.finish(read())
    }

    /// Checks what the commands `migrate`, `reanchor` and `rename` need, which is nothing but the databases.
    ///
    /// # Errors
    /// Every mistake, each with its variable and what to do.
    pub fn validate_databases(&self) -> Result<(Vec<OutboxSettings>, TelemetrySettings), ConfigErrors> {
        let mut errors = ConfigErrors::default();
        let outboxes = read_outboxes(Secret::given(self.outboxes.as_ref()).unwrap_or_default(), &mut errors);
        let telemetry = self.telemetry.read(&mut errors);
        errors.finish(outboxes.zip(telemetry))
    }
}

/// A whole number of seconds, of at least `least`.
fn seconds(
    variable: &'static str,
    text: Option<&str>,
    least: u64,
    default: Duration,
    errors: &mut ConfigErrors,
) -> Option<Duration> {
    number(variable, text, least, default.as_secs(), errors).map(Duration::from_secs)
}

/// A whole number of at least `least`.
fn number<T: FromStr + PartialOrd + Display + Copy>(
    variable: &'static str,
    text: Option<&str>,
    least: T,
    default: T,
    errors: &mut ConfigErrors,
) -> Option<T> {
    match text.map(str::trim).filter(|text| !text.is_empty()) {
        None => Some(default),
        Some(text) => match text.parse() {
            Ok(number) if number >= least => Some(number),
            _ => errors.add(variable, "is no such number", format!("set it to a whole number of at least {least}")),
        },
    }
}

/// On or off; off where the text is absent or empty.
fn switch(variable: &'static str, text: Option<&str>, errors: &mut ConfigErrors) -> Option<bool> {
    match text.map(str::trim) {
        None | Some("" | "false" | "0") => Some(false),
        Some("true" | "1") => Some(true),
        Some(_) => errors.add(variable, "is neither true nor false", "set it to true, or leave it out"),
    }
}

fn read_outboxes(text: &str, errors: &mut ConfigErrors) -> Option<Vec<OutboxSettings>> {
    const CURE: &str = "set it to name=postgres://user:password@host:5432/database, several separated by commas";
    let mut outboxes: Vec<OutboxSettings> = Vec::new();
    let mut good = true;
    for (n, entry) in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).enumerate() {
        let (name, url) = entry.split_once('=').unwrap_or_default();
        let (name, url) = (name.trim(), url.trim());
        let mut wrong = |what: String| {
            errors.add::<()>("OUTBOXES", what, CURE);
            good = false;
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        // What stands for a name may be a piece of a password with a comma in it: messages do not show it until the
        // entry is right.
        if name.is_empty() || !name.chars().all(legal) {
            wrong(nth(n, "does not begin with `name=`, a name of letters, digits, - _ or ."));
            continue;
        }
        let database = match database_url(url) {
            Ok(database) => database,
            Err(what) => {
                wrong(nth(n, what));
                continue;
            }
        };
        let place = |of: &PgConnectOptions| {
            let socket = of.get_socket().cloned();
            (socket, of.get_host().to_owned(), of.get_port(), of.get_database().map(str::to_owned))
        };
        if outboxes.iter().any(|other| other.name == name) {
            wrong(format!("names {name:?} twice"));
        } else if let Some(other) = outboxes.iter().find(|other| place(&other.database) == place(&database)) {
            wrong(format!(
                "has the same database for {:?} and {name:?}, which would publish everything twice",
                other.name
            ));
        } else {
            outboxes.push(OutboxSettings { name: name.to_owned(), database });
        }
    }
    if outboxes.is_empty() && good {
        return errors.add("OUTBOXES", "is not set", CURE);
    }
    good.then_some(outboxes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(outboxes: &str) -> RelayArgs {
        RelayArgs {
            outboxes: Some(outboxes.into()),
            kafka_brokers: Some("localhost:9092".to_owned()),
            ..RelayArgs::default()
        }
    }

    #[test]
    fn several_outboxes_are_read_by_name() {
        let settings = args("orders=postgres://a:b@h/orders, payments=postgres://h:5433/payments").validate().unwrap();
        let names: Vec<&str> = settings.relay.outboxes.iter().map(|outbox| outbox.name.as_str()).collect();
        assert_eq!(names, ["orders", "payments"]);
        assert_eq!(settings.admin.addr.port(), 9084);
    }

    #[test]
    fn the_least_of_bytes_that_are_held_grows_with_the_outboxes() {
        let read = |outboxes: &str, held: Option<&str>| {
            let args = RelayArgs { held_mebibytes: held.map(str::to_owned), ..args(outboxes) };
            args.validate().map(|configuration| configuration.relay.held >> 20)
        };
        assert_eq!(read("a=postgres://h/a", None).unwrap(), 256);
        assert_eq!(read("a=postgres://h/a", Some("56")).unwrap(), 56);
        let two = "a=postgres://h/a,b=postgres://h/b";
        let mistakes = read(two, Some("56")).unwrap_err().to_string();
        assert!(mistakes.contains("HELD_MEBIBYTES") && mistakes.contains("at least 96"), "{mistakes}");
    }

    #[test]
    fn every_mistake_is_told_at_once_and_no_password() {
        let mut wrong =
            args("postgres://root:hunter2@h/x,a=mysql://h/x,b=postgres://h/b,b=postgres://h/c,c=postgres://h/b");
        wrong.lease_seconds = Some("0".into());
        wrong.compression = Some("rar".into());
        wrong.kafka_brokers = None;
        let errors = wrong.validate().unwrap_err();
        let variables: Vec<_> = errors.mistakes().iter().map(|mistake| mistake.variable).collect();
        let expected =
            ["OUTBOXES", "OUTBOXES", "OUTBOXES", "OUTBOXES", "KAFKA_BROKERS", "LEASE_SECONDS", "COMPRESSION"];
        assert_eq!(variables, expected, "{errors}");
        assert!(!errors.to_string().contains("hunter2"), "{errors}");
        assert_eq!(args(" ").validate().unwrap_err().mistakes()[0].variable, "OUTBOXES");
    }

    #[test]
    fn settings_and_what_they_were_read_from_show_no_secret() {
        let mut args = args("orders=postgres://me:hunter2-a@h/orders,payments=postgres://h/p?password=hunter2-b");
        args.admin.admin_token = Some("hunter2-hunter2-c".into());
        let configuration = args.validate().unwrap();
        let said = format!("{args:?}{args:#?}{configuration:?}{configuration:#?}");
        assert!(!said.contains("hunter2"), "{said}");
        assert!(said.contains("\"payments\""), "it says which: {said}");
    }

    #[test]
    fn a_switch_is_on_or_off_and_nothing_else() {
        let read = |from_now: Option<&str>| {
            let args = RelayArgs { from_now: from_now.map(str::to_owned), ..args("a=postgres://h/a") };
            args.validate().map(|configuration| configuration.relay.from_now)
        };
        for (text, on) in
            [(None, false), (Some(""), false), (Some("false"), false), (Some("true"), true), (Some("1"), true)]
        {
            assert_eq!(read(text).unwrap(), on, "{text:?}");
        }
        assert_eq!(read(Some("hunter2")).unwrap_err().mistakes()[0].variable, "FROM_NOW");
        let flags = Cli::try_parse_from(["outbox-relay", "--from-now", "serve"]).unwrap();
        assert_eq!((flags.args.from_now.as_deref(), flags.command), (Some("true"), Some(Command::Serve)));
    }
}

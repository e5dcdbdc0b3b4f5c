//! The order platform on this machine: servers, databases, the gateway simulator, the services, the relay.
//!
//! One stack owns one Kafka, because topics have fixed names: two platforms on one Kafka would eat each other's
//! commands. Tests that share a stack keep their orders apart by ids.

use crate::{
    Error, Result,
    postgres::without_password,
    process::{Process, Spec},
    progress::Progress,
    servers::{Servers, ServersConfig},
    service::{Address, Service, binary},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// How long a process may take to become ready, migrations and the first rebalance included, on a busy machine.
const READY_BOUND: Duration = Duration::from_secs(60);
/// How long one question about health may take.
const ASK_BOUND: Duration = Duration::from_secs(3);

/// The configuration of a stack.
#[derive(Clone)]
pub struct StackConfig {
    /// The servers under the platform.
    pub servers: ServersConfig,
    /// Whether the services use their own ports where these are free.
    pub preferred_ports: bool,
    /// The value of `RUST_LOG` for every process.
    pub log_level: String,
    /// The directory of the services' programs; `None`: where [`binary`] looks.
    pub programs: Option<PathBuf>,
    /// Variables in addition, for one of the processes: fail points, timeouts.
    pub env: BTreeMap<Service, Vec<(String, String)>>,
}

impl StackConfig {
    /// The configuration of tests: servers of its own whatever the environment names, nothing kept, any ports. Its
    /// Kafka allows a shorter session than brokers do by default: tests that kill processes wait less for their
    /// partitions.
    pub fn for_tests() -> Self {
        let servers = ServersConfig { database_url: None, kafka_brokers: None, ..ServersConfig::for_tests() };
        let log_level = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into());
        let tests = Self { servers, preferred_ports: false, log_level, programs: None, env: BTreeMap::new() };
        let consumers = [Service::Orders, Service::Payments, Service::Inventory];
        consumers.into_iter().fold(tests, |tests, service| tests.env(service, "KAFKA_SESSION_TIMEOUT_MS", "2000"))
    }

    /// Adds a variable for one of the processes.
    #[must_use]
    pub fn env(mut self, service: Service, name: &str, value: impl Into<String>) -> Self {
        self.env.entry(service).or_default().push((name.to_owned(), value.into()));
        self
    }
}

/// A process of the platform, with its addresses.
#[derive(Debug)]
pub struct Running {
    /// The kind of the process.
    pub service: Service,
    /// The process: to be killed, paused, started again.
    pub process: Process,
    /// The process's addresses, also after it was started again.
    pub address: Address,
    client: reqwest::Client,
}

impl Running {
    /// Waits until the process serves its callers and each of its parts has begun; an error when it ends meanwhile.
    pub async fn ready(&self) -> Result<()> {
        let admin = self.address.admin_url();
        self.process.healthy(READY_BOUND, || async { has_begun(&self.client, &admin).await }).await
    }

    /// Starts the process again after it was killed or stopped, and waits until it is ready.
    pub async fn start_again(&self) -> Result<()> {
        self.process.start_again()?;
        self.ready().await
    }

    /// Stops the process in an orderly way and starts the program of that name in `programs` in its place: an upgrade,
    /// or the way back.
    pub async fn becomes(&self, programs: &Path) -> Result<()> {
        self.process.replace_program(programs.join(self.service.program().0));
        self.restart().await
    }

    /// Stops the process in an orderly way, starts it again, waits until it is ready.
    pub async fn restart(&self) -> Result<()> {
        self.process.stop().await;
        self.start_again().await
    }
}

/// Whether the process of this admin listener serves its callers, and each of its parts has begun, whether or not its
/// work moves.
pub async fn has_begun(client: &reqwest::Client, admin: &str) -> Result<(), String> {
    asked(client, &format!("{admin}/readyz")).await?;
    let health = client.get(format!("{admin}/health")).timeout(ASK_BOUND).send().await;
    let health = health.map_err(|e| e.without_url().to_string())?;
    // Builds before this one have no `/health`, and are ready when all has begun.
    if health.status() == reqwest::StatusCode::NOT_FOUND {
        return Ok(());
    }
    let health: Health = health.json().await.map_err(|e| e.without_url().to_string())?;
    let starts = health.parts.iter().find(|(_, part)| part.cause.as_deref() == Some("starting"));
    starts.map_or(Ok(()), |(part, _)| Err(format!("its part {part} has not begun")))
}

/// The answer of `/health` and `/v1/health`.
#[derive(Debug, serde::Deserialize)]
pub struct Health {
    /// Whether all work moves.
    pub healthy: bool,
    /// The standing of each part, by its name.
    pub parts: BTreeMap<String, Part>,
}

/// The standing of a part.
#[derive(Debug, serde::Deserialize)]
pub struct Part {
    /// Why the part's work does not move; `None` while it does.
    pub cause: Option<String>,
    /// Since when the part's work does not move, RFC 3339.
    pub since: Option<String>,
    /// The reason in words; `None` without a token where one is needed.
    pub reason: Option<String>,
}

/// The troubles of the process of this admin listener, part by part. Without a token, where the listener takes one,
/// they come without the reasons in words.
pub async fn issues(client: &reqwest::Client, admin: &str) -> Result<Vec<String>, String> {
    let ask = async |path: &str| {
        let answer = client.get(format!("{admin}{path}")).timeout(ASK_BOUND).send().await;
        answer.map_err(|e| e.without_url().to_string())
    };
    let mut answer = ask("/v1/health").await?;
    if answer.status() == reqwest::StatusCode::UNAUTHORIZED {
        answer = ask("/health").await?;
    }
    let health: Health = answer.json().await.map_err(|e| e.without_url().to_string())?;
    let red = health.parts.into_iter().filter_map(|(name, part)| {
        let since = part.since.map(|since| format!(" since {since}")).unwrap_or_default();
        let reason = part.reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        Some(format!("{name} {}{since}{reason}", part.cause?))
    });
    Ok(red.collect())
}

/// Whether the answer is a success; otherwise what it holds.
pub async fn asked(client: &reqwest::Client, url: &str) -> Result<(), String> {
    let answer = client.get(url).timeout(ASK_BOUND).send().await.map_err(|e| e.without_url().to_string())?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    Err(format!("{status} {}", answer.text().await.unwrap_or_default()))
}

/// The platform, running. Dropping it ends it at once; [`Stack::stop`] ends it in an orderly way.
pub struct Stack {
    services: BTreeMap<Service, Running>,
    // The field stands after the services, so that it is dropped after them.
    servers: Servers,
    config: StackConfig,
    addresses: BTreeMap<Service, Address>,
    replicas: AtomicUsize,
    client: reqwest::Client,
}

impl Stack {
    /// Starts everything and waits until everything is ready.
    pub async fn start(config: StackConfig, progress: &Progress) -> Result<Self> {
        // The check comes before anything is started: a missing program should be reported at once.
        for service in Service::ALL {
            binary(service.program().0)?;
        }
        let servers = Servers::start(config.servers.clone(), progress).await?;
        progress.done(format!("PostgreSQL     {}", without_password(&servers.database_url)));
        progress.done(format!("Kafka          {}", servers.kafka_brokers));
        let address = if config.preferred_ports { Address::preferred } else { Address::free };
        let addresses = Service::ALL.into_iter().map(|s| Ok((s, address(s)?))).collect::<Result<_>>()?;
        let client = reqwest::Client::new();
        let replicas = AtomicUsize::new(1);
        let mut stack = Self { services: BTreeMap::new(), servers, config, addresses, replicas, client };
        stack.create_databases().await?;
        // The services start at once; the relay after them, because it reads the tables that they make.
        for together in [&Service::ALL[..1], &Service::ALL[1..4], &Service::ALL[4..]] {
            stack.start_services(together, progress).await?;
        }
        Ok(stack)
    }

    async fn create_databases(&self) -> Result<()> {
        let failed = |e: sqlx::Error| Error::Other(format!("could not make the services' databases: {e}"));
        let mut connection = PgConnection::connect(&self.servers.own_url()).await.map_err(failed)?;
        for name in Service::ALL.into_iter().filter_map(Service::database) {
            let exists = sqlx::query("select from pg_database where datname = $1").bind(name);
            if exists.fetch_optional(&mut connection).await.map_err(failed)?.is_none() {
                // The name is one of four constants; `create database` takes no parameters.
                let create = sqlx::query(AssertSqlSafe(format!("create database {name}")));
                create.execute(&mut connection).await.map_err(failed)?;
            }
        }
        connection.close().await.map_err(failed)
    }

    async fn start_services(&mut self, together: &[Service], progress: &Progress) -> Result<()> {
        for &service in together {
            let running = self.launch(service, service.name(), self.addresses[&service].clone())?;
            self.services.insert(service, running);
        }
        for &service in together {
            progress.step(format!("waiting for {service}"));
            let running = &self.services[&service];
            running.ready().await?;
            progress.done(format!("{:<14} {}", service.name(), running.address.url()));
        }
        Ok(())
    }

    fn launch(&self, service: Service, name: &str, address: Address) -> Result<Running> {
        let (program, subcommand) = service.program();
        let log = self.servers.logs.join(format!("{name}.log"));
        let file = match &self.config.programs {
            Some(folder) => folder.join(program),
            None => binary(program)?,
        };
        let mut spec = Spec::new(name, file, log).args([subcommand]);
        for (variable, value) in self.environment(service, &address) {
            spec = spec.env(variable, value);
        }
        let process = Process::start(spec)?;
        Ok(Running { service, process, address, client: self.client.clone() })
    }

    /// The variables of a process. Every variable that it reads is set, so that our own environment does not leak in.
    fn environment(&self, service: Service, address: &Address) -> Vec<(String, String)> {
        let listen = |port: u16| format!("127.0.0.1:{port}");
        let mut env = vec![
            ("ADMIN_ADDR".to_owned(), listen(address.admin)),
            ("KAFKA_BROKERS".to_owned(), self.servers.kafka_brokers.clone()),
            ("RUST_LOG".to_owned(), self.config.log_level.clone()),
            ("LOG_FORMAT".to_owned(), "json".to_owned()),
        ];
        let mut set = |name: &str, value: String| env.push((name.to_owned(), value));
        if let Some(port) = address.http {
            set("HTTP_ADDR", listen(port));
        }
        if let Some(database) = service.database() {
            set("DATABASE_URL", self.database_url(database));
        }
        if service == Service::Payments {
            set("GATEWAY_URL", self.addresses[&Service::Gateway].url());
        }
        if service == Service::Relay {
            set("OUTBOXES", self.outboxes());
        }
        env.extend(self.config.env.get(&service).into_iter().flatten().cloned());
        env
    }

    fn outboxes(&self) -> String {
        let with_outbox = Service::ALL.into_iter().filter(|s| s.has_outbox()).filter_map(Service::database);
        let named = with_outbox.map(|name| format!("{name}={}", self.database_url(name)));
        named.collect::<Vec<_>>().join(",")
    }

    /// The process of this kind.
    pub fn service(&self, service: Service) -> &Running {
        &self.services[&service]
    }

    /// Starts another process of the same kind beside the first (a standby relay, a second replica), with ports of its
    /// own.
    pub async fn start_another(&self, service: Service) -> Result<Running> {
        let number = self.replicas.fetch_add(1, Ordering::Relaxed) + 1;
        let running = self.launch(service, &format!("{service}-{number}"), Address::free(service)?)?;
        running.ready().await?;
        Ok(running)
    }

    /// The URL of a service's API.
    pub fn url(&self, service: Service) -> String {
        self.addresses[&service].url()
    }

    /// The URL of a process's health, metrics and inspection.
    pub fn admin_url(&self, service: Service) -> String {
        self.addresses[&service].admin_url()
    }

    /// The URL of one of the databases: `orders`, `payments`, `inventory`, `gateway`.
    pub fn database_url(&self, database: &str) -> String {
        with_database(&self.servers.own_url(), database)
    }

    /// The servers under the platform: to be killed and started again, with the places of logs and data.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// The directory of every process's log.
    pub fn logs(&self) -> &Path {
        &self.servers.logs
    }

    /// All processes that run here: the servers, unless others were named, and the platform's.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        let postgres = self.servers.postgres.iter().map(|postgres| &postgres.process);
        let kafka = self.servers.kafka.iter().map(|kafka| &kafka.process);
        postgres.chain(kafka).chain(self.services.values().map(|running| &running.process))
    }

    /// The logs of all processes that run here.
    pub fn log_files(&self) -> Vec<PathBuf> {
        self.processes().map(|process| process.log().to_owned()).collect()
    }

    /// Stops everything in an orderly way: the services side by side, then the servers.
    pub async fn stop(self) {
        let Self { services, servers, .. } = self;
        for running in services.values() {
            running.process.ask_to_stop();
        }
        for running in services.values() {
            running.process.stopped().await;
        }
        drop(services);
        servers.stop().await;
    }
}

/// The URL of another database on the same server.
fn with_database(url: &str, database: &str) -> String {
    let (url, query) = url.split_once('?').map_or((url, String::new()), |(url, query)| (url, format!("?{query}")));
    let authority = url.find("://").map_or(0, |at| at + 3);
    let server = url[authority..].find('/').map_or(url, |slash| &url[..authority + slash]);
    format!("{server}/{database}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_of_a_url_is_replaced_and_everything_else_kept() {
        assert_eq!(with_database("postgres://u:p@h:1/postgres", "orders"), "postgres://u:p@h:1/orders");
        assert_eq!(with_database("postgres://h", "orders"), "postgres://h/orders");
        assert_eq!(with_database("postgres://h/x?sslmode=require", "o"), "postgres://h/o?sslmode=require");
    }
}

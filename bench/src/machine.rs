//! The servers of a run, durable and with memory as on a small production machine; and the description of this machine.
//!
//! When this process dies, the servers that it started end with it (see [`stack::guard`]).

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stack::{
    cache::Cache,
    durability::Durability,
    kafka::Java,
    progress::Progress,
    servers::{Keep, Servers, ServersConfig},
};
use std::{fs, thread};

/// Settings of the server beside those of `stack`. Durability is PostgreSQL's default: everything.
const SETTINGS: [(&str, &str); 7] = [
    ("shared_preload_libraries", "pg_stat_statements"),
    // A run turns counting on when it needs it: counting costs a few percent.
    ("pg_stat_statements.track", "none"),
    ("pg_stat_statements.track_planning", "on"),
    ("shared_buffers", "1GB"),
    ("max_wal_size", "8GB"),
    // A checkpoint keeps all files of the WAL for use again, as those of a database that has run for a while are.
    ("min_wal_size", "8GB"),
    ("wal_buffers", "64MB"),
];

/// The servers.
#[derive(Clone, Args)]
pub struct ServerArgs {
    /// Use this PostgreSQL instead of starting one
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, global = true)]
    pub database_url: Option<String>,
    /// Use this Kafka instead of starting one
    #[arg(long, env = "KAFKA_BROKERS", value_name = "HOST:PORT,...", global = true)]
    pub kafka_brokers: Option<String>,
    /// Connect by TCP to the PostgreSQL that is started, instead of its Unix socket
    #[arg(long, env = "BENCH_TCP", global = true)]
    pub tcp: bool,
    /// Start PostgreSQL with this setting
    #[arg(long = "postgres", value_name = "NAME=VALUE", global = true)]
    pub postgres: Vec<String>,
}

/// The servers of a run.
pub struct Machine {
    servers: Servers,
    cache: Cache,
    database_url: String,
}

/// The machine on which the figures were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// The processor's name.
    pub processor: String,
    /// How many processors this process may use.
    pub processors: usize,
    /// Main memory, in GiB.
    pub memory_gib: u64,
    /// The kernel's version.
    pub kernel: String,
    /// PostgreSQL's version and the settings that matter for durability.
    pub postgres: String,
    /// One synced write, as PostgreSQL's WAL does it: the median of a few hundred, in microseconds.
    pub sync_us: u64,
    /// How the kernel schedules this process, and all that it starts; `None` where the kernel does not show it.
    pub scheduling: Option<&'static str>,
    /// How many processes wanted a processor when the run began, without the bench (the 1-minute load).
    pub load_before: f64,
}

impl Machine {
    /// Starts the servers that `args` does not name.
    pub async fn start(args: &ServerArgs, progress: &Progress) -> anyhow::Result<Self> {
        let named = |value: &Option<String>| value.clone().filter(|value| !value.trim().is_empty());
        let config = ServersConfig {
            keep: Keep::Nothing,
            logs: None,
            durability: Durability::On,
            database_url: named(&args.database_url),
            kafka_brokers: named(&args.kafka_brokers),
            preferred_ports: None,
        };
        let servers = Servers::start(config, progress).await?;
        // Everything is on one machine, as a service may be with its PostgreSQL; such a service connects by the socket.
        let database_url = if args.tcp { servers.database_url.clone() } else { servers.own_url() };
        let machine = Self { servers, cache: Cache::open()?, database_url };
        machine.tune(&args.postgres).await?;
        Ok(machine)
    }

    async fn tune(&self, more: &[String]) -> anyhow::Result<()> {
        // A server that the caller named is left as it is.
        let Some(postgres) = &self.servers.postgres else { return Ok(()) };
        let mut admin = self.admin().await?;
        let more = more.iter().filter_map(|setting| setting.split_once('='));
        for (setting, value) in SETTINGS.into_iter().chain(more) {
            sqlx::query(AssertSqlSafe(format!("alter system set {setting} = '{value}'"))).execute(&mut admin).await?;
        }
        admin.close().await?;
        postgres.process.stop().await;
        postgres.restart().await?;
        let mut admin = self.admin().await?;
        sqlx::query("create extension if not exists pg_stat_statements").execute(&mut admin).await?;
        Ok(admin.close().await?)
    }

    /// A connection to the maintenance database.
    pub async fn admin(&self) -> anyhow::Result<PgConnection> {
        PgConnection::connect(&self.database_url).await.context("connect to PostgreSQL")
    }

    /// Stops the servers that this run started.
    pub async fn stop(self) {
        self.servers.stop().await;
    }

    /// The value of `KAFKA_BROKERS`.
    pub fn brokers(&self) -> &str {
        &self.servers.kafka_brokers
    }

    /// The URL of PostgreSQL's maintenance database.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// The process of PostgreSQL, if it was started here.
    pub fn postgres_pid(&self) -> Option<u32> {
        self.servers.postgres.as_ref().and_then(|postgres| postgres.process.pid())
    }

    /// The process of Kafka, if it was started here.
    pub fn kafka_pid(&self) -> Option<u32> {
        self.servers.kafka.as_ref().and_then(|kafka| kafka.process.pid())
    }

    /// The directory of the servers' logs.
    pub fn logs(&self) -> &std::path::Path {
        &self.servers.logs
    }

    /// The directory for temporary files.
    pub fn directory(&self) -> &std::path::Path {
        self.servers.directory()
    }

    /// A JVM with Kafka's tools, set as the broker's is.
    pub async fn java(&self, progress: &Progress) -> anyhow::Result<Java> {
        Ok(Java::find(&self.cache, Durability::On, progress).await?)
    }

    /// Describes the machine for the report.
    pub async fn describe(&self) -> anyhow::Result<Description> {
        let mut admin = self.admin().await?;
        let postgres: String = sqlx::query_scalar(
            "select format('%s by %s; fsync %s, synchronous_commit %s, full_page_writes %s, shared_buffers %s',
                           current_setting('server_version'),
                           case when inet_client_addr() is null then 'Unix socket' else 'TCP' end,
                           current_setting('fsync'),
                           current_setting('synchronous_commit'), current_setting('full_page_writes'),
                           current_setting('shared_buffers'))",
        )
        .fetch_one(&mut admin)
        .await?;
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        Ok(Description {
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: thread::available_parallelism().map_or(1, Into::into),
            memory_gib: (kib + (1 << 19)) >> 20,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            postgres,
            sync_us: self.sync().await?,
            scheduling: scheduling(&read("/proc/self/stat")),
            load_before: read("/proc/loadavg").split_whitespace().next().and_then(|l| l.parse().ok()).unwrap_or(0.0),
        })
    }

    /// How long a synced write takes where the servers' data is, in microseconds: the median.
    async fn sync(&self) -> anyhow::Result<u64> {
        let path = self.directory().join("sync");
        tokio::task::spawn_blocking(move || {
            use std::io::{Seek, Write};
            let mut file = fs::File::create(&path)?;
            let mut times = Vec::new();
            file.write_all(&vec![0; 1 << 20])?;
            file.sync_all()?;
            for _ in 0..300 {
                let start = std::time::Instant::now();
                file.seek(std::io::SeekFrom::Start(0))?;
                file.write_all(&[1; 8192])?;
                file.sync_data()?;
                times.push(start.elapsed());
            }
            fs::remove_file(&path)?;
            times.sort_unstable();
            Ok(u64::try_from(times[times.len() / 2].as_micros())?)
        })
        .await?
    }
}

/// The scheduling policy in `/proc/…/stat`, see `sched(7)`.
fn scheduling(stat: &str) -> Option<&'static str> {
    // The name of the program, in parentheses, may have spaces in it.
    let policy = stat.rsplit_once(')')?.1.split_whitespace().nth(38)?;
    Some(match policy {
        "0" => "as usual",
        "3" => "in batches",
        _ => "in another way",
    })
}

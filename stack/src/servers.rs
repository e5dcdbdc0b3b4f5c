//! PostgreSQL and Kafka together: started here, or the ones that `DATABASE_URL` and `KAFKA_BROKERS` name.

use crate::{
    Error, Result,
    cache::{self, Cache},
    directory,
    durability::Durability,
    guard,
    kafka::Kafka,
    maven, ports,
    postgres::Postgres,
    progress::Progress,
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// How often a server is started before it is clear that ports are not the reason.
const STARTS_MAX: usize = 3;

/// Where the servers keep their data.
#[derive(Debug, Clone)]
pub enum Keep {
    /// In a temporary directory, thrown away at the end.
    Nothing,
    /// In this directory, where the data stays.
    In(PathBuf),
}

/// The servers to start, and where.
#[derive(Clone)]
pub struct ServersConfig {
    /// Where the servers keep their data.
    pub keep: Keep,
    /// The directory of the logs; `None`: one in the cache. The logs outlive the servers, for a person to read them.
    pub logs: Option<PathBuf>,
    /// What PostgreSQL promises about power failures.
    pub durability: Durability,
    /// The PostgreSQL to use instead of starting one.
    pub database_url: Option<String>,
    /// The Kafka to use instead of starting one.
    pub kafka_brokers: Option<String>,
    /// The ports of PostgreSQL and Kafka, used where they are free.
    pub preferred_ports: Option<(u16, u16)>,
}

impl ServersConfig {
    /// The configuration of tests: nothing kept, nothing synced, any ports, and the servers that the environment names.
    pub fn for_tests() -> Self {
        Self {
            keep: Keep::Nothing,
            logs: None,
            durability: Durability::Off,
            database_url: variable("DATABASE_URL"),
            kafka_brokers: variable("KAFKA_BROKERS"),
            preferred_ports: None,
        }
    }
}

/// Starts a server that ended at once again: another process may have taken its port between the check and its start.
async fn with_other_ports<T, F: Future<Output = Result<T>>>(mut start: impl FnMut() -> F) -> Result<T> {
    for _ in 1..STARTS_MAX {
        match start().await {
            Err(Error::Exited { .. }) => {}
            other => return other,
        }
    }
    start().await
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// The two servers, running. Dropping this ends what was started here.
pub struct Servers {
    /// The server that was started here; `None` when one was named.
    pub postgres: Option<Postgres>,
    /// The broker that was started here; `None` when one was named.
    pub kafka: Option<Kafka>,
    /// The URL of PostgreSQL's maintenance database over TCP, for other programs. Our own take [`Self::own_url`].
    pub database_url: String,
    /// The addresses of Kafka's brokers.
    pub kafka_brokers: String,
    /// The directory of the logs.
    pub logs: PathBuf,
    // The field is the last, so that it goes after the processes that write there.
    home: Home,
}

impl Servers {
    /// Starts the servers that are not named, both at once.
    pub async fn start(config: ServersConfig, progress: &Progress) -> Result<Self> {
        if config.kafka_brokers.is_none() {
            // The check comes before anything is fetched: what has to be installed should be reported at once.
            maven::java()?;
        }
        let cache = Cache::open()?;
        let home = Home::make(&config.keep)?;
        let logs = match config.logs {
            Some(logs) => logs,
            None => cache.log_directory()?,
        };
        directory::make(&logs)?;
        let preferred = |pick: fn((u16, u16)) -> u16| {
            config.preferred_ports.map_or_else(ports::free, |wanted| ports::free_or(pick(wanted)))
        };
        let postgres = async {
            if config.database_url.is_some() {
                return Ok(None);
            }
            let (data, log) = (home.server_data("postgres")?, logs.join("postgres.log"));
            let start = || async {
                let port = preferred(|wanted| wanted.0)?;
                Postgres::start(&cache, &data, &log, port, config.durability, progress).await
            };
            with_other_ports(start).await.map(Some)
        };
        let kafka = async {
            if config.kafka_brokers.is_some() {
                return Ok(None);
            }
            let (data, log) = (home.path().join("kafka"), logs.join("kafka.log"));
            let start = || async {
                let ports = [preferred(|wanted| wanted.1)?, ports::free()?];
                Kafka::start(&cache, &data, &log, ports, config.durability, progress).await
            };
            with_other_ports(start).await.map(Some)
        };
        progress.step("starting PostgreSQL and Kafka");
        let (postgres, kafka) = tokio::try_join!(postgres, kafka)?;
        let database_url = postgres.as_ref().map(|p| p.url("postgres")).or(config.database_url);
        let kafka_brokers = kafka.as_ref().map(Kafka::brokers).or(config.kafka_brokers);
        Ok(Self {
            postgres,
            kafka,
            database_url: database_url.expect("it was named when it was not started"),
            kafka_brokers: kafka_brokers.expect("they were named when it was not started"),
            logs,
            home,
        })
    }

    /// The URL with which our own processes connect to PostgreSQL's maintenance database (see [`Postgres::own_url`]).
    pub fn own_url(&self) -> String {
        self.postgres.as_ref().map_or_else(|| self.database_url.clone(), |postgres| postgres.own_url("postgres"))
    }

    /// The directory of the data.
    pub fn directory(&self) -> &Path {
        self.home.path()
    }

    /// Stops both in an orderly way, side by side.
    pub async fn stop(self) {
        let postgres = async {
            if let Some(postgres) = &self.postgres {
                postgres.process.stop().await;
            }
        };
        let kafka = async {
            match &self.kafka {
                // A broker whose data is thrown away needs no orderly end, which takes Kafka seconds.
                Some(kafka) if self.home.is_temporary() => kafka.process.kill(),
                Some(kafka) => drop(kafka.process.stop().await),
                None => {}
            }
        };
        tokio::join!(postgres, kafka);
    }
}

/// The directory that holds everything of a stack.
#[derive(Debug)]
enum Home {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Home {
    fn make(keep: &Keep) -> Result<Self> {
        let Keep::In(path) = keep else {
            let user = cache::server_user()?;
            let places = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
            let place = places.iter().find(|place| cache::reachable(place, user.as_ref())).unwrap_or(&places[0]);
            let dir = tempfile::Builder::new().prefix(&format!("{}-", cache::NAME)).tempdir_in(place);
            let dir = dir.map_err(Error::io(format!("make a temporary directory in {}", place.display())))?;
            // PostgreSQL's user has to get through; the directories inside have their own permissions.
            directory::open_to_readers(dir.path())?;
            guard::remove_at_end(dir.path());
            return Ok(Self::Temporary(dir));
        };
        directory::make(path)?;
        let path = fs::canonicalize(path).map_err(Error::io(format!("find {}", path.display())))?;
        Ok(Self::Kept(path))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Kept(path) => path,
        }
    }

    fn is_temporary(&self) -> bool {
        matches!(self, Self::Temporary(_))
    }

    /// The directory where a server that may run as another user keeps its data. It is in this place or, when that user
    /// cannot get here, below the temporary directory, under a name that this place always leads to.
    fn server_data(&self, name: &str) -> Result<PathBuf> {
        let user = cache::server_user()?;
        if cache::reachable(self.path(), user.as_ref()) {
            return Ok(self.path().join(name));
        }
        let link = self.path().join(name);
        let target = elsewhere(self.path());
        directory::make(&target)?;
        // The link is for people that look for the data; the server goes to the target itself.
        let _ = std::os::unix::fs::symlink(target.join(name), &link);
        Ok(target.join(name))
    }
}

/// The place for the data of a directory that the server's user cannot get to. Every user may make something under this
/// name, so the place is checked before it is used.
pub fn elsewhere(directory: &Path) -> PathBuf {
    let name = directory.to_string_lossy().replace('/', "-");
    Path::new("/var/tmp").join(format!("{}{name}", cache::NAME))
}

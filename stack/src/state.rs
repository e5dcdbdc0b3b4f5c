//! The state of a platform that stays up, as others see it: `.stack/` of the checkout.
//!
//! | file | what |
//! |---|---|
//! | `lock` | held (flock) as long as anything of it runs, also by the guard: survives no death, needs no clean-up |
//! | `state.json` | what runs, where, and its logs; only ours to read, because of PostgreSQL's password; may be stale, so only read while the lock is held |
//! | `postgres.password` | PostgreSQL's password, where the data is here (see [`crate::password`]) |
//! | `logs/`, `postgres/`, `kafka/` | the logs, and the servers' data |

use crate::{
    Error, Result, directory,
    platform::Stack,
    postgres::Postgres,
    process::POLL_EVERY,
    servers::elsewhere,
    service::{Address, Service},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long an orderly end of everything may take: each process has 20 s, and they end side by side, in two turns.
const DOWN_BOUND: Duration = Duration::from_secs(50);
/// How long the lock is tried for: longer than a check of the lock takes on a busy machine.
const LOCK_TRIED_FOR: Duration = Duration::from_millis(500);

/// The processes that run, and their addresses.
#[derive(Serialize, Deserialize)]
pub struct State {
    /// The id of the process that supervises.
    pub pid: i32,
    /// PostgreSQL's URL, with its password: where people connect to.
    pub database_url: String,
    /// The URL that our own processes connect to, when it is another: the socket of the server that was started here.
    #[serde(default)]
    pub socket_url: Option<String>,
    /// The file with PostgreSQL's password, when the server was started here.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The addresses of Kafka's brokers.
    pub kafka_brokers: String,
    /// The platform's processes, with their addresses.
    pub services: Vec<(Service, Address)>,
    /// The logs of all processes.
    pub logs: Vec<PathBuf>,
}

/// The directory that holds the state.
#[derive(Debug, Clone)]
pub struct StateDirectory(PathBuf);

impl StateDirectory {
    /// The state in this directory, which need not exist yet. The servers work in directories of their own, so the path
    /// is made absolute.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self(std::path::absolute(&path).unwrap_or(path))
    }

    /// The absolute path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes the lock, before a platform starts; `None` while another platform runs. It is tried for a moment: a
    /// process that only checks holds the lock too, for as long as it takes to let it go.
    pub async fn lock(&self) -> Result<Option<File>> {
        let start = Instant::now();
        loop {
            let lock = self.try_lock(File::try_lock)?;
            if lock.is_some() || start.elapsed() > LOCK_TRIED_FOR {
                return Ok(lock);
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// Whether anything of a platform runs. The check shares the lock, so that two checks at once see the platform and
    /// not each other.
    fn is_held(&self) -> Result<bool> {
        Ok(self.try_lock(File::try_lock_shared)?.is_none())
    }

    fn try_lock(&self, lock: fn(&File) -> std::result::Result<(), TryLockError>) -> Result<Option<File>> {
        directory::make(&self.0)?;
        let path = self.0.join("lock");
        let doing = || format!("lock {}", path.display());
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io(doing()))?;
        match lock(&file) {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::io(doing())(source)),
        }
    }

    /// The state of the platform that runs; `None` when none does.
    pub fn running(&self) -> Result<Option<State>> {
        if !self.0.is_dir() || !self.is_held()? {
            return Ok(None);
        }
        let path = self.file();
        match fs::read(&path) {
            Ok(text) => {
                let state = serde_json::from_slice(&text);
                state.map(Some).map_err(|e| Error::Other(format!("{} cannot be read: {e}", path.display())))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::Other("it is just starting or ending; look again in a moment".into()))
            }
            Err(e) => Err(Error::io(format!("read {}", path.display()))(e)),
        }
    }

    fn file(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// Writes the state of the platform; the caller holds the lock.
    pub fn write(&self, stack: &Stack) -> Result<()> {
        let servers = stack.servers();
        let state = State {
            pid: std::process::id().cast_signed(),
            database_url: servers.database_url.clone(),
            socket_url: servers.postgres.as_ref().and_then(|postgres| postgres.socket_url("postgres")),
            password_file: servers.postgres.as_ref().map(Postgres::password_file),
            kafka_brokers: servers.kafka_brokers.clone(),
            services: Service::ALL.into_iter().map(|s| (s, stack.service(s).address.clone())).collect(),
            logs: stack.log_files(),
        };
        let text = serde_json::to_vec_pretty(&state).map_err(|e| Error::Other(e.to_string()))?;
        // The file is written whole or not at all: others read it at any time.
        let doing = || format!("write {}", self.file().display());
        // A temporary file's mode is 0600.
        let mut aside = tempfile::NamedTempFile::new_in(&self.0).map_err(Error::io(doing()))?;
        aside.write_all(&text).map_err(Error::io(doing()))?;
        aside.persist(self.file()).map(drop).map_err(|e| Error::io(doing())(e.error))
    }

    /// Removes the state, as nothing runs any more; the caller holds the lock.
    pub fn clear(&self) {
        let _ = fs::remove_file(self.file());
    }

    /// Ends the platform that runs, in an orderly way within a bound, otherwise by force. `false` when none ran.
    pub async fn down(&self) -> Result<bool> {
        let Some(state) = self.running()? else { return Ok(false) };
        let supervisor = Pid::from_raw(state.pid);
        let _ = kill(supervisor, Signal::SIGTERM);
        if !self.ended_within(DOWN_BOUND).await? {
            // The supervisor's guard ends the rest.
            let _ = kill(supervisor, Signal::SIGKILL);
            if !self.ended_within(DOWN_BOUND).await? {
                return Err(Error::Other(format!("process {} does not end", state.pid)));
            }
        }
        Ok(true)
    }

    async fn ended_within(&self, bound: Duration) -> Result<bool> {
        let start = Instant::now();
        while start.elapsed() < bound {
            if !self.is_held()? {
                return Ok(true);
            }
            tokio::time::sleep(POLL_EVERY * 5).await;
        }
        Ok(false)
    }

    /// Ends the platform that runs and removes its data.
    pub async fn reset(&self) -> Result<()> {
        self.down().await?;
        // PostgreSQL's data may be elsewhere, when its user cannot get here. A link shows that, but not where.
        if let Ok(here) = fs::canonicalize(&self.0)
            && here.join("postgres").is_symlink()
            && let elsewhere = elsewhere(&here)
            && elsewhere.exists()
        {
            directory::check(&elsewhere, None)?;
            let doing = format!("remove {}", elsewhere.display());
            fs::remove_dir_all(&elsewhere).map_err(Error::io(doing))?;
        }
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", self.0.display()))(e))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn who_looks_keeps_nobody_from_starting() {
        let place = tempfile::tempdir().unwrap();
        let (directory, done) = (StateDirectory::at(place.path().join("state")), AtomicBool::new(false));
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        assert!(!matches!(directory.running(), Ok(Some(_))));
                    }
                });
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let started = (0..200).filter(|_| matches!(runtime.block_on(directory.lock()), Ok(Some(_)))).count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(started, 200);
        });
    }
}

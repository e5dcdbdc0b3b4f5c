//! The servers' files that are kept between runs, and the users that may read them.
//!
//! PostgreSQL refuses to run as root. As root it runs under `postgres` where that user exists, else `nobody`. That user
//! has to get at the programs and its data: a directory below another user's 0700 home will not do.
//!
//! A cache entry is made aside and then renamed, under a lock: when the process dies half way, the next run makes it
//! again.

use crate::{Error, Result, directory, progress::Progress};
use nix::unistd::{Uid, User};
use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The name of the directories.
pub const NAME: &str = "saga-stack";
/// The place of root's cache when root's home is closed to others, and of data when a checkout is.
const ROOT_CACHE: &str = "/var/cache";
/// How many runs' logs are kept: more runs than can reasonably go on at once.
const LOGS_KEPT: usize = 50;

/// The user that PostgreSQL runs as; `None`: our own.
pub fn server_user() -> Result<Option<User>> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    ["postgres", "nobody"].into_iter().find_map(|name| User::from_name(name).ok().flatten()).map(Some).ok_or_else(
        || Error::Missing {
            what: "PostgreSQL refuses to run as root, and there is neither a user 'postgres' nor a user 'nobody'"
                .into(),
            install: "useradd --system postgres".into(),
        },
    )
}

/// Whether the user can get to the directory, which need not exist yet (then: to its first ancestor that does).
pub fn reachable(path: &Path, user: Option<&User>) -> bool {
    let Some(user) = user else { return true };
    let Some(existing) = path.ancestors().find_map(|p| fs::canonicalize(p).ok()) else { return false };
    existing.ancestors().all(|dir| {
        fs::metadata(dir).is_ok_and(|meta| {
            let shift = match () {
                () if meta.uid() == user.uid.as_raw() => 6,
                () if meta.gid() == user.gid.as_raw() => 3,
                () => 0,
            };
            (meta.mode() >> shift) & 1 == 1
        })
    })
}

/// The cache of this user.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens `$STACK_CACHE`, else the XDG cache directory, else (root with a closed home) one below `/var/cache`.
    pub fn open() -> Result<Self> {
        let user = server_user()?;
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(root) = variable("STACK_CACHE") {
            return Self::at(root);
        }
        let xdg = variable("XDG_CACHE_HOME").filter(|p| p.is_absolute());
        let home = variable("HOME").map(|home| home.join(".cache"));
        let of_root = Uid::effective().is_root().then(|| PathBuf::from(ROOT_CACHE));
        let root = [xdg, home, of_root].into_iter().flatten().find(|p| reachable(p, user.as_ref()));
        Self::at(root.unwrap_or_else(std::env::temp_dir).join(NAME))
    }

    /// Opens a cache in this directory.
    pub fn at(root: PathBuf) -> Result<Self> {
        directory::make(&root)?;
        Ok(Self { root })
    }

    /// The directory of an entry; it exists only when it is complete.
    pub fn entry(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The entry of this name, made by `make` in an empty directory when it is not there. One process at a time makes
    /// entries.
    pub async fn entry_or<F>(&self, name: &str, progress: &Progress, make: impl FnOnce(PathBuf) -> F) -> Result<PathBuf>
    where
        F: Future<Output = Result<()>>,
    {
        let entry = self.entry(name);
        if entry.is_dir() {
            return Ok(entry);
        }
        let _lock = self.lock(progress).await?;
        if entry.is_dir() {
            return Ok(entry);
        }
        let aside = self.root.join(format!("{name}.part"));
        let _ = fs::remove_dir_all(&aside);
        directory::make(&aside)?;
        make(aside.clone()).await?;
        fs::rename(&aside, &entry).map_err(Error::io(format!("move {} into place", aside.display())))?;
        Ok(entry)
    }

    /// Removes an entry, so that it is made again.
    pub fn discard(&self, name: &str) {
        let _ = fs::remove_dir_all(self.entry(name));
    }

    /// Makes a directory for the logs of one run. The oldest of them go: this is a cache.
    pub fn log_directory(&self) -> Result<PathBuf> {
        let logs = self.root.join("logs");
        directory::make(&logs)?;
        // Names of version 7 sort by age.
        let mut runs: Vec<PathBuf> = fs::read_dir(&logs).into_iter().flatten().flatten().map(|e| e.path()).collect();
        runs.sort_unstable();
        for old in runs.iter().take(runs.len().saturating_sub(LOGS_KEPT)) {
            let _ = fs::remove_dir_all(old);
        }
        let run = logs.join(uuid::Uuid::now_v7().to_string());
        directory::make(&run)?;
        Ok(run)
    }

    async fn lock(&self, progress: &Progress) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(Error::io(format!("open {}", path.display())))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => progress.step("waiting for another fetch to end"),
            Err(TryLockError::Error(source)) => return Err(Error::io(format!("lock {}", path.display()))(source)),
        }
        let locked = tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await;
        locked.map_err(|e| Error::Other(e.to_string()))?.map_err(Error::io(format!("lock {}", path.display())))
    }
}

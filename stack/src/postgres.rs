//! PostgreSQL: its programs out of the jar, a data directory, a running server.

use crate::{
    Error, Result,
    cache::{self, Cache},
    maven::Pom,
    process::{Process, Spec},
    progress::Progress,
};
use nix::{sys::signal::Signal, unistd};
use sqlx::{Connection, PgConnection};
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The version that is fetched.
pub const VERSION: &str = "18.1";
/// The pom that names it.
const POM: &str = include_str!("../postgres/pom.xml");
/// A server that recovers from a crash takes a while; a fresh one answers in 0.3 s.
const START_BOUND: Duration = Duration::from_secs(60);

/// Linux takes 107 bytes for a socket's path, macOS 103, and `/.s.PGSQL.65535` comes behind the directory's.
const SOCKET_DIRECTORY_MAX: usize = 103 - 15;

/// What a server promises about power failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Nothing: for tests, whose data is thrown away. A killed *process* loses nothing even so.
    Off,
    /// Everything, as in production: for what people keep, and for benchmarks.
    On,
}

/// A server that we started.
#[derive(Debug)]
pub struct Postgres {
    /// The process.
    pub process: Process,
    /// Its port on the loopback interface.
    pub port: u16,
    /// Where its Unix socket is, if the path is short enough for one.
    sockets: Option<String>,
}

impl Postgres {
    /// Starts a server on `data` (made when it is not there yet) and waits until it answers.
    pub async fn start(
        cache: &Cache,
        data: &Path,
        log: &Path,
        port: u16,
        durability: Durability,
        progress: &Progress,
    ) -> Result<Self> {
        let home = programs(cache, progress).await?;
        let user = cache::server_user()?;
        if !data.join("PG_VERSION").exists() {
            initdb(&home, data, log, user.as_ref()).await?;
        }
        let mut spec = Spec::new("PostgreSQL", home.join("bin/postgres"), log);
        spec = spec.args(["-D".as_ref(), data.as_os_str()]).args(["-p".to_owned(), port.to_string()]);
        spec = spec.args(settings(durability).into_iter().flat_map(|setting| ["-c".to_owned(), setting.to_owned()]));
        let sockets = socket_directory(data);
        spec = spec.args(["-c".to_owned(), format!("unix_socket_directories={}", sockets.unwrap_or_default())]);
        spec.user = user;
        // "Fast": ends its clients. Smart, which is SIGTERM, would wait for them.
        spec.stop = Signal::SIGINT;
        spec.orphan = if durability == Durability::Off { Signal::SIGQUIT } else { Signal::SIGINT };
        let process = Process::start(spec)?;
        let url = url(port, "postgres");
        process.healthy(START_BOUND, || answers(&url)).await?;
        Ok(Self { process, port, sockets: sockets.map(str::to_owned) })
    }

    /// Starts it again on its data and port after it was killed, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.process.start_again()?;
            let url = self.url("postgres");
            match self.process.healthy(START_BOUND, || answers(&url)).await {
                // The old one's backends need a moment to see that their parent is gone; until then it refuses to start.
                Err(Error::Exited { .. }) if start.elapsed() < START_BOUND => {}
                other => return other,
            }
        }
    }

    /// How to connect to one of its databases.
    pub fn url(&self, database: &str) -> String {
        url(self.port, database)
    }

    /// Likewise over its Unix socket, which spares each statement the way through the network's layers.
    pub fn socket_url(&self, database: &str) -> Option<String> {
        let sockets = self.sockets.as_ref()?;
        Some(format!("postgres://postgres@localhost:{}/{database}?host={sockets}", self.port))
    }
}

/// How to connect to a database of the server on `port`.
pub fn url(port: u16, database: &str) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/{database}")
}

/// Sockets go into the data directory, which nobody else gets into; if its path fits, and means itself in a list and in a
/// URL.
fn socket_directory(data: &Path) -> Option<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let path = data.to_str().filter(|_| data.is_absolute())?;
    (path.len() <= SOCKET_DIRECTORY_MAX && path.chars().all(plain)).then_some(path)
}

fn settings(durability: Durability) -> Vec<&'static str> {
    let mut settings = vec![
        "listen_addresses=127.0.0.1",
        // Many test databases with a pool each share one server.
        "max_connections=600",
        // Prepared transactions are one of the things the outbox is tested with.
        "max_prepared_transactions=64",
        "log_line_prefix=%m [%p] %d %a ",
        "log_min_messages=warning",
        "deadlock_timeout=200ms",
    ];
    if durability == Durability::Off {
        settings.extend(["fsync=off", "full_page_writes=off", "max_wal_size=4GB"]);
    }
    settings
}

async fn initdb(home: &Path, data: &Path, log: &Path, user: Option<&unistd::User>) -> Result<()> {
    let doing = || format!("prepare the data directory {}", data.display());
    // An initdb that was interrupted leaves a directory that the next one would refuse.
    let _ = fs::remove_dir_all(data);
    fs::create_dir_all(data).map_err(Error::io(doing()))?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o700)).map_err(Error::io(doing()))?;
    if let Some(user) = user {
        unistd::chown(data, Some(user.uid), Some(user.gid)).map_err(|e| Error::io(doing())(e.into()))?;
    }
    let mut spec = Spec::new("initdb", home.join("bin/initdb"), log);
    spec = spec.args(["-D".as_ref(), data.as_os_str()]);
    spec = spec.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]);
    spec.user = user.cloned();
    spec.run().await
}

/// Whether the server lets us in.
pub async fn answers(url: &str) -> Result<(), String> {
    let connection = tokio::time::timeout(Duration::from_secs(5), PgConnection::connect(url)).await;
    let connection = connection.map_err(|_| "no answer".to_owned())?.map_err(|e| e.to_string())?;
    connection.close().await.map_err(|e| e.to_string())
}

/// Where the programs are: in `$STACK_POSTGRES` (another version's directory, the one with `bin` in it), else unpacked
/// from Maven's jar on the first run.
async fn programs(cache: &Cache, progress: &Progress) -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("STACK_POSTGRES").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let pom = Pom { name: "PostgreSQL", text: POM, properties: vec![("postgres.platform", platform()?)] };
    let entry = pom.entry();
    let make = |dir: PathBuf| async move {
        let jars = pom.fetch(&dir, progress).await?;
        progress.step("unpacking PostgreSQL");
        let unpacked = tokio::task::spawn_blocking(move || unpack(&jars, &dir)).await;
        unpacked.map_err(|e| Error::Other(e.to_string()))?
    };
    cache.entry_or(&entry, progress, make).await
}

/// The jar's name for this machine.
fn platform() -> Result<String> {
    let os = match std::env::consts::OS {
        "linux" => "linux",
        "macos" => "darwin",
        other => return Err(Error::Other(format!("no PostgreSQL to fetch for {other}; set DATABASE_URL"))),
    };
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64v8",
        other => return Err(Error::Other(format!("no PostgreSQL to fetch for {other}; set DATABASE_URL"))),
    };
    let libc = if Path::new("/etc/alpine-release").exists() { "-alpine" } else { "" };
    Ok(format!("{os}-{arch}{libc}"))
}

/// jar > .txz > files.
fn unpack(jars: &[PathBuf], into: &Path) -> Result<()> {
    let odd = |what: String| Error::Other(format!("the jar of PostgreSQL is not as expected: {what}"));
    let jar = jars.first().ok_or_else(|| odd("there is none".into()))?;
    let file = File::open(jar).map_err(Error::io(format!("open {}", jar.display())))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| odd(e.to_string()))?;
    let name = archive.file_names().flatten().find(|name| name.ends_with(".txz")).map(|name| name.to_string());
    let name = name.ok_or_else(|| odd("no .txz in it".into()))?;
    let mut packed = Vec::new();
    let mut entry = archive.by_name(&name).map_err(|e| odd(e.to_string()))?;
    entry.read_to_end(&mut packed).map_err(Error::io("read the jar of PostgreSQL"))?;
    let files = liblzma::read::XzDecoder::new(packed.as_slice());
    tar::Archive::new(files).unpack(into).map_err(Error::io(format!("unpack PostgreSQL into {}", into.display())))
}

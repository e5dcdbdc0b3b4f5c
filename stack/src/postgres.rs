//! PostgreSQL: its programs out of the jar, a running server, and how to connect to it.

use crate::{
    Error, Result,
    cache::{self, Cache},
    cluster,
    durability::{Durability, settings},
    jars::JarList,
    maven::Pom,
    password::Password,
    process::{Process, Spec},
    progress::Progress,
};
use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};
use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The version of PostgreSQL that is fetched.
pub const VERSION: &str = "18.1";
/// The pom that names PostgreSQL's jar.
const POM: &str = include_str!("../postgres/pom.xml");
/// The listed jars of PostgreSQL, one for each platform.
const JARS: JarList = JarList { path: "stack/postgres/jars.sha256", text: include_str!("../postgres/jars.sha256") };
/// How long a start may take: a server that recovers from a crash takes a while, a fresh one answers in 0.3 s.
const START_BOUND: Duration = Duration::from_secs(60);

/// The longest directory of a socket. Linux takes 107 bytes for a socket's path, macOS 103, and `/.s.PGSQL.65535` comes
/// behind the directory's.
const SOCKET_DIRECTORY_MAX: usize = 103 - 15;

/// A PostgreSQL server that was started here.
#[derive(Debug)]
pub struct Postgres {
    /// The server's own process, its postmaster.
    pub process: Process,
    /// The server's port on the loopback interface.
    pub port: u16,
    /// The directory of its Unix socket; `None` if the path is too long for one.
    sockets: Option<String>,
    password: Password,
    data: PathBuf,
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
        let programs = cluster::Programs { home: &home, user: user.as_ref(), log };
        let password = cluster::prepare(programs, data, durability).await?;
        let mut spec = Spec::new("PostgreSQL", home.join("bin/postgres"), log);
        spec = spec.args(["-D".as_ref(), data.as_os_str()]).args(["-p".to_owned(), port.to_string()]);
        spec = spec.args(settings(durability).into_iter().flat_map(|setting| ["-c".to_owned(), setting.to_owned()]));
        let sockets = socket_directory(data);
        spec = spec.args(["-c".to_owned(), format!("unix_socket_directories={}", sockets.unwrap_or_default())]);
        spec.user = user;
        // SIGINT is PostgreSQL's fast shutdown, which ends its clients. SIGTERM, the smart one, would wait for them.
        spec.stop = Signal::SIGINT;
        spec.orphan = if durability == Durability::Off { Signal::SIGQUIT } else { Signal::SIGINT };
        let process = Process::start(spec)?;
        let postgres = Self { process, port, sockets: sockets.map(str::to_owned), password, data: data.to_owned() };
        postgres.healthy().await?;
        Ok(postgres)
    }

    /// Starts the server again on its data and port after it was killed, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.process.start_again()?;
            match self.healthy().await {
                // The old server's backends need a moment to see that their parent is gone; until then the new one
                // refuses to start.
                Err(Error::Exited { .. }) if start.elapsed() < START_BOUND => {}
                other => return other,
            }
        }
    }

    async fn healthy(&self) -> Result<()> {
        let lets_us_in = || async { self.accepts_us().await.map_err(|why| self.with_cure(why)) };
        self.process.healthy(START_BOUND, lets_us_in).await
    }

    /// Whether the server answers. Another process may listen on the port before the server does, and ask for the
    /// password in clear. So the server shows first that it is ours: by its socket, or by what it writes into its
    /// directory once it has the port.
    async fn accepts_us(&self) -> Result<(), String> {
        if self.sockets.is_none() && !self.has_the_port() {
            return Err("the server does not listen yet".to_owned());
        }
        answers(&self.own_url("postgres")).await
    }

    /// Whether `postmaster.pid` shows that the server is ready: its first line is the process, its last one the state.
    fn has_the_port(&self) -> bool {
        let text = pid_file(&self.data);
        let is_ours = |line: &str| self.process.pid().is_some_and(|pid| line.trim() == pid.to_string());
        text.lines().next().is_some_and(is_ours) && text.lines().last().is_some_and(|line| line.trim() == "ready")
    }

    /// Adds the cure where the password is wrong: another may have been set by hand.
    fn with_cure(&self, why: String) -> String {
        let file = self.password_file();
        match why.contains("password authentication failed") {
            true => format!("{why}; remove {}, and the next start sets another password", file.display()),
            false => why,
        }
    }

    /// The URL of one of its databases over TCP, with the password: for other programs. While the server is being
    /// restarted, another process may have its port.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/{database}", self.password.reveal(), self.port)
    }

    /// The file that holds the password.
    pub fn password_file(&self) -> PathBuf {
        Password::file_of(&self.data)
    }

    /// The URL by which the password reaches this server only, wherever its socket's path fits.
    pub fn own_url(&self, database: &str) -> String {
        self.socket_url(database).unwrap_or_else(|| self.url(database))
    }

    /// The URL over its Unix socket, which also spares each statement the way through the network's layers.
    pub fn socket_url(&self, database: &str) -> Option<String> {
        let sockets = self.sockets.as_ref()?;
        let password = self.password.reveal();
        Some(format!("postgres://postgres:{password}@localhost:{}/{database}?host={sockets}", self.port))
    }
}

/// A URL for people to read: without the password and the parameters.
pub fn without_password(url: &str) -> String {
    let parsed = reqwest::Url::parse(url).ok().filter(|url| !url.cannot_be_a_base());
    let Some(mut url) = parsed else { return "(a URL that cannot be read)".into() };
    // Only a URL without a host refuses, and that has no password.
    let _ = url.set_password(None);
    // A parameter may be a password as well.
    url.set_query(None);
    url.into()
}

/// The directory of the sockets: the data directory, which only the server's user gets into. `None` unless its path
/// fits, and means itself in a list and in a URL.
fn socket_directory(data: &Path) -> Option<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let path = data.to_str().filter(|_| data.is_absolute())?;
    (path.len() <= SOCKET_DIRECTORY_MAX && path.chars().all(plain)).then_some(path)
}

fn pid_file(data: &Path) -> String {
    fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default()
}

/// Whether a server on this data directory runs: only then its port is asked, with the password.
pub fn runs(data: &Path) -> bool {
    let pid = pid_file(data).lines().next().and_then(|line| line.trim().parse().ok());
    pid.is_some_and(|pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok())
}

/// Whether the server lets a client of this URL in.
pub async fn answers(url: &str) -> Result<(), String> {
    let connection = tokio::time::timeout(Duration::from_secs(5), PgConnection::connect(url)).await;
    let connection = connection.map_err(|_| "no answer".to_owned())?.map_err(|e| e.to_string())?;
    connection.close().await.map_err(|e| e.to_string())
}

/// The directory of the programs: `$STACK_POSTGRES` (another version's directory, the one with `bin` in it), else
/// unpacked from Maven's jar on the first run.
async fn programs(cache: &Cache, progress: &Progress) -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("STACK_POSTGRES").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let musl = if Path::new("/etc/alpine-release").exists() { Musl::Yes } else { Musl::No };
    let platform = platform(std::env::consts::OS, std::env::consts::ARCH, musl)?;
    let properties = vec![("postgres.platform", platform.to_owned())];
    let pom = Pom { name: "PostgreSQL", text: POM, jars: JARS, properties };
    let entry = pom.entry();
    let make = |dir: PathBuf| async move {
        let jars = pom.fetch(&dir, progress).await?;
        progress.step("unpacking PostgreSQL");
        let unpacked = tokio::task::spawn_blocking(move || unpack(&jars, &dir)).await;
        unpacked.map_err(|e| Error::Other(e.to_string()))?
    };
    cache.entry_or(&entry, progress, make).await
}

/// Whether Linux's C library is musl, as Alpine's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Musl {
    No,
    Yes,
}

/// The jar's name for a machine, by Rust's names of its system and architecture.
fn platform(os: &str, arch: &str, musl: Musl) -> Result<&'static str> {
    match (os, arch, musl) {
        ("linux", "x86_64", Musl::No) => Ok("linux-amd64"),
        ("linux", "x86_64", Musl::Yes) => Ok("linux-amd64-alpine"),
        ("linux", "aarch64", Musl::No) => Ok("linux-arm64v8"),
        ("macos", "x86_64", _) => Ok("darwin-amd64"),
        ("macos", "aarch64", _) => Ok("darwin-arm64v8"),
        (os, arch, musl) => {
            let musl = if musl == Musl::Yes { " with musl" } else { "" };
            Err(Error::Other(format!(
                "there is no PostgreSQL {VERSION} to fetch for {os} on {arch}{musl}. Set DATABASE_URL to a server that runs, \
                 or STACK_POSTGRES to the directory of an installed PostgreSQL, the one with bin/postgres in it"
            )))
        }
    }
}

/// Unpacks the jar, and the `.txz` in it, into files.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jar_of_every_platform_is_listed() {
        let mut listed = 0;
        for (os, arch) in [("linux", "x86_64"), ("linux", "aarch64"), ("macos", "x86_64"), ("macos", "aarch64")] {
            for musl in [Musl::No, Musl::Yes] {
                let Ok(platform) = platform(os, arch, musl) else { continue };
                let jar = format!("embedded-postgres-binaries-{platform}-{VERSION}.0.jar");
                assert!(JARS.has(&jar), "{jar} is not in {}", JARS.path);
                listed += 1;
            }
        }
        assert_eq!(listed, 7, "all but aarch64 with musl, macOS counted twice");
        assert!(POM.contains(&format!("<version>{VERSION}.0</version>")));
        let said = platform("linux", "aarch64", Musl::Yes).unwrap_err().to_string();
        assert!(said.contains("linux on aarch64 with musl") && said.contains("STACK_POSTGRES"), "{said}");
    }

    #[test]
    fn a_url_for_people_has_no_password_in_it() {
        let shown = without_password("postgres://u:secret@h:1/db?password=secret&sslmode=require");
        assert_eq!(shown, "postgres://u@h:1/db");
        assert_eq!(without_password("postgres://there"), "postgres://there");
        for odd in ["u:secret@h", "postgres:u:secret@h", "secret"] {
            assert!(!without_password(odd).contains("secret"), "{odd}");
        }
    }
}

//! The doors: PostgreSQL asks every client for its password, and no directory is used that others may change.

use nix::unistd::Uid;
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use stack::{
    Error,
    cache::Cache,
    durability::Durability,
    password::Password,
    ports,
    postgres::{Postgres, without_password},
    progress::Progress,
    servers::{Keep, Servers, ServersConfig, elsewhere},
    state::StateDirectory,
};
use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// A uid that no user has.
const ANOTHER: u32 = 12_345;

/// A directory below /tmp, so that PostgreSQL's user gets there when this runs as root.
fn place() -> TempDir {
    let place = tempfile::Builder::new().prefix("stack-doors-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place
}

fn config(dir: &Path) -> ServersConfig {
    ServersConfig {
        keep: Keep::In(dir.to_owned()),
        logs: Some(dir.join("logs")),
        durability: Durability::On,
        database_url: None,
        kafka_brokers: Some("unused:1".into()),
        preferred_ports: None,
    }
}

async fn started(dir: &Path) -> Servers {
    Servers::start(config(dir), &Progress::Silent).await.unwrap()
}

async fn refusal(dir: &Path) -> String {
    match Servers::start(config(dir), &Progress::Silent).await {
        Ok(_) => panic!("it started in {}", dir.display()),
        Err(refused) => refused.to_string(),
    }
}

/// The SQLSTATE with which PostgreSQL refuses a client that connects like this.
async fn sqlstate(options: &PgConnectOptions) -> String {
    let refused = options.connect().await.expect_err("it let in somebody");
    refused.as_database_error().and_then(|e| e.code()).expect("PostgreSQL itself refused").into_owned()
}

/// Runs a program as another user; returns whether that succeeded.
fn as_another(program: &str, arguments: &[&Path]) -> bool {
    let mut command = Command::new(program);
    let status = command
        .args(arguments)
        .uid(ANOTHER)
        .gid(ANOTHER)
        .current_dir("/")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.unwrap().success()
}

fn is_root() -> bool {
    let root = Uid::effective().is_root();
    if !root {
        // The line does not go through `eprintln`, which shows a test's output only when the test fails.
        std::io::stderr()
            .write_all(b"NOT TESTED with another user of the machine: only root can act as one\n")
            .unwrap();
    }
    root
}

#[tokio::test]
async fn without_the_password_nobody_gets_in_over_tcp_or_the_socket() {
    let place = place();
    let servers = started(place.path()).await;
    let postgres = servers.postgres.as_ref().unwrap();
    let socket = postgres.socket_url("postgres").expect("the path is short and plain");
    let over_tcp: PgConnectOptions = servers.database_url.parse().unwrap();
    let over_socket: PgConnectOptions = socket.parse().unwrap();
    for with_password in [&over_tcp, &over_socket] {
        with_password.connect().await.unwrap().close().await.unwrap();
        assert_eq!(sqlstate(&with_password.clone().password("guessed")).await, "28P01");
    }
    let data = place.path().join("postgres");
    let no_password: PgConnectOptions = without_password(&servers.database_url).parse().unwrap();
    assert_eq!(sqlstate(&no_password).await, "28P01");
    assert_eq!(sqlstate(&no_password.clone().socket(&data)).await, "28P01");
    let file = data.join(format!(".s.PGSQL.{}", postgres.port));
    assert!(file.exists());
    if is_root() {
        assert!(!as_another("test", &["-e".as_ref(), &file]), "another user reaches the socket");
        assert!(!as_another("cat", &[&postgres.password_file()]), "another user reads the password");
    }
    servers.stop().await;
}

/// The files below a directory that hold this text.
fn files_with(text: &str, below: &Path) -> Vec<String> {
    let found = Command::new("grep").args(["-rlF", "--", text]).arg(below).output().unwrap();
    String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// The arguments of all processes.
fn all_arguments() -> String {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned() + "\n").collect()
}

#[tokio::test]
async fn the_password_is_in_a_file_of_ours_and_in_no_log_or_argument() {
    let place = place();
    let servers = started(place.path()).await;
    let password = Password::read(&place.path().join("postgres")).unwrap().expect("it was kept");
    let file = servers.postgres.as_ref().unwrap().password_file();
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, Uid::effective().as_raw()));
    let arguments = all_arguments();
    assert!(arguments.contains(place.path().to_str().unwrap()), "the server's own arguments are seen");
    assert!(!arguments.contains(password.reveal()), "a process has the password in its arguments");
    // An error of a statement is logged with the statement.
    let mut connection = PgConnection::connect(&servers.database_url).await.unwrap();
    sqlx::query("select this_is_logged").execute(&mut connection).await.unwrap_err();
    assert_eq!(files_with("this_is_logged", &place.path().join("logs")).len(), 1);
    servers.stop().await;
    assert_eq!(files_with(password.reveal(), place.path()), [file.to_str().unwrap()]);
}

/// A listener that asks for a password in clear, as another user of the machine may, and the messages that it got.
struct Asker {
    port: u16,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Asker {
    fn on(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let (port, heard) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<String>>>::default());
        let hears = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                hears.lock().unwrap().extend(stream.ok().and_then(|stream| password_of(stream).ok()));
            }
        });
        Self { port, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

fn password_of(mut stream: TcpStream) -> std::io::Result<String> {
    /// The first message of a client that would rather have TLS.
    const TLS: &[u8] = &80_877_103_u32.to_be_bytes();
    let mut message = |kind: usize| {
        let mut head = vec![0; kind + 4];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes(head[kind..].try_into().unwrap());
        let mut body = vec![0; length as usize - 4];
        stream.read_exact(&mut body)?;
        match &*body {
            TLS => stream.write_all(b"N")?,
            // The answer is AuthenticationCleartextPassword.
            _ if kind == 0 => stream.write_all(&[b'R', 0, 0, 0, 8, 0, 0, 0, 3])?,
            _ => {}
        }
        std::io::Result::Ok(body)
    };
    while message(0)? == TLS {}
    Ok(String::from_utf8_lossy(&message(1)?).into_owned())
}

#[tokio::test]
async fn a_listener_that_has_the_port_first_is_sent_no_password() {
    let (place, far) = (place(), "long".repeat(30));
    let (cache, asker) = (Cache::open().unwrap(), Asker::on(0));
    // The socket's path fits in the first place, and not in the second.
    for data in [place.path().join("postgres"), place.path().join(far).join("postgres")] {
        let log = place.path().join("log");
        let start = |port| Postgres::start(&cache, &data, &log, port, Durability::Off, &Progress::Silent);
        let refused = start(asker.port).await.expect_err("its port is taken");
        assert!(matches!(refused, Error::Exited { .. }), "{refused}");
        let postgres = start(ports::free().unwrap()).await.unwrap();
        assert_eq!(postgres.socket_url("postgres").is_some(), data.parent() == Some(place.path()));
        postgres.process.stop().await;
    }
    assert_eq!(asker.heard(), [""; 0]);
    let asked = format!("postgres://postgres:guessed@127.0.0.1:{}/postgres", asker.port);
    PgConnection::connect(&asked).await.unwrap_err();
    assert_eq!(asker.heard(), ["guessed\0"], "it does hear one");
}

#[tokio::test]
async fn a_listener_that_takes_the_port_of_a_server_that_died_is_sent_no_password() {
    let place = place();
    let servers = started(place.path()).await;
    let postgres = servers.postgres.as_ref().unwrap();
    let own: PgConnectOptions = servers.own_url().parse().unwrap();
    own.connect().await.unwrap().close().await.unwrap();
    postgres.process.kill();
    let asker = Asker::on(postgres.port);
    own.connect().await.unwrap_err();
    PgConnection::connect(&servers.database_url).await.unwrap_err();
    assert_eq!(asker.heard().len(), 1, "it hears what is sent to the port, and nothing else");
}

/// Leaves the data as a build before passwords did, with a transaction that only a server with its settings can start
/// with.
async fn make_old(servers: Servers, data: &Path) {
    let mut connection = PgConnection::connect(&servers.database_url).await.unwrap();
    sqlx::raw_sql("create table kept (); alter role postgres password null").execute(&mut connection).await.unwrap();
    sqlx::raw_sql("begin; create table prepared (); prepare transaction 'p'").execute(&mut connection).await.unwrap();
    servers.stop().await;
    fs::remove_file(Password::file_of(data)).unwrap();
    let trust = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    fs::write(data.join("pg_hba.conf"), trust).unwrap();
}

#[tokio::test]
async fn a_data_directory_of_before_is_closed_and_keeps_its_data() {
    let place = place();
    let data = place.path().join("postgres");
    make_old(started(place.path()).await, &data).await;

    let servers = started(place.path()).await;
    let given = Password::read(&data).unwrap().expect("it was given one");
    let no_password: PgConnectOptions = without_password(&servers.database_url).parse().unwrap();
    assert_eq!(sqlstate(&no_password).await, "28P01");
    let mut connection = PgConnection::connect(&servers.database_url).await.unwrap();
    sqlx::raw_sql("commit prepared 'p'").execute(&mut connection).await.unwrap();
    sqlx::raw_sql("select from kept, prepared").execute(&mut connection).await.unwrap();
    servers.stop().await;
    assert!(!fs::read_to_string(data.join("pg_hba.conf")).unwrap().contains("trust"));

    let servers = started(place.path()).await;
    assert_eq!(Password::read(&data).unwrap(), Some(given), "once is enough");
    servers.stop().await;
}

#[tokio::test]
async fn a_password_that_was_removed_is_replaced_and_the_old_one_is_refused() {
    let place = place();
    let servers = started(place.path()).await;
    let (file, before) = (servers.postgres.as_ref().unwrap().password_file(), servers.database_url.clone());
    servers.stop().await;
    fs::remove_file(&file).unwrap();
    let servers = started(place.path()).await;
    let before: PgConnectOptions = before.parse().unwrap();
    let port = servers.postgres.as_ref().unwrap().port;
    assert_eq!(sqlstate(&before.port(port)).await, "28P01");
    PgConnection::connect(&servers.database_url).await.unwrap();
    servers.stop().await;
}

#[tokio::test]
async fn data_that_another_user_owns_or_links_to_is_not_used_and_not_changed() {
    if !is_root() {
        return;
    }
    let place = place();
    let (data, victim) = (place.path().join("postgres"), place.path().join("victim"));
    fs::create_dir(&data).unwrap();
    chown(&data, Some(ANOTHER), None).unwrap();
    let said = refusal(place.path()).await;
    assert!(said.contains(&format!("{} cannot be used: it belongs to uid {ANOTHER}", data.display())), "{said}");
    assert_eq!(fs::metadata(&data).unwrap().uid(), ANOTHER);

    fs::remove_dir(&data).unwrap();
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("file"), "").unwrap();
    symlink(&victim, &data).unwrap();
    lchown(&data, Some(ANOTHER), None).unwrap();
    let said = refusal(place.path()).await;
    assert!(said.contains("it is a link, which belongs to uid 12345") && said.contains("rm "), "{said}");
    assert!(victim.join("file").exists() && fs::metadata(&victim).unwrap().uid() == 0);
}

#[tokio::test]
async fn a_place_in_var_tmp_that_another_user_made_first_is_not_used() {
    if !is_root() {
        return;
    }
    let closed = place();
    fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let theirs = elsewhere(closed.path());
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(ANOTHER), None).unwrap();
    let said = refusal(closed.path()).await;
    let untouched = fs::read_dir(&theirs).unwrap().count() == 0 && fs::metadata(&theirs).unwrap().uid() == ANOTHER;
    fs::remove_dir(&theirs).unwrap();
    assert!(said.contains(&format!("{} cannot be used", theirs.display())), "{said}");
    assert!(untouched);
}

#[tokio::test]
async fn reset_removes_nothing_that_a_link_leads_to() {
    let (place, victim) = (place(), place());
    fs::write(victim.path().join("file"), "").unwrap();
    let state = place.path().join("state");
    fs::create_dir(&state).unwrap();
    symlink(victim.path(), state.join("postgres")).unwrap();
    StateDirectory::at(&state).reset().await.unwrap();
    assert!(!state.exists() && victim.path().join("file").exists());
}

#[test]
fn a_cache_or_state_directory_that_others_may_write_to_is_refused() {
    let place = place();
    let open = place.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    for (variable, arguments) in
        [("STACK_CACHE", &["run", "--", "true"][..]), ("STACK_DIR", &["up"]), ("STACK_DIR", &["reset"])]
    {
        let mut stack = Command::new(env!("CARGO_BIN_EXE_stack"));
        stack.args(arguments).env(variable, &open).env_remove("DATABASE_URL").env_remove("KAFKA_BROKERS");
        let output = stack.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{variable} {arguments:?}");
        let why = format!("{} cannot be used: others may write to it (its mode is 0777)", open.display());
        assert!(said.contains(&why) && said.contains("chmod go-w") && said.contains(variable), "{said}");
        assert_eq!(fs::read_dir(&open).unwrap().count(), 0, "{arguments:?} left something there");
    }
}

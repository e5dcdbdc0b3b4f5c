//! `stack run` starts and cleans up, whatever happens to it.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How long a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// A directory that marks the processes of a test: its servers keep their data there, and have it in their arguments.
fn place() -> TempDir {
    let place = tempfile::Builder::new().prefix("stack-test-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place
}

fn stack(place: &Path, command: &[&str]) -> Command {
    let mut stack = Command::new(env!("CARGO_BIN_EXE_stack"));
    stack.args(["run", "--"]).args(command);
    stack.env("TMPDIR", place).env_remove("DATABASE_URL").env_remove("KAFKA_BROKERS").stdin(Stdio::null());
    stack
}

/// The arguments of the processes whose data is in the place.
fn processes_of(place: &Path) -> Vec<String> {
    let place = place.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(place))
        .collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn nothing_is_left(place: &Path) {
    wait_until("no process is left", || processes_of(place).is_empty());
    wait_until("no data is left", || fs::read_dir(place).unwrap().count() == 0);
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Starts a `stack run` whose command waits for ever, with its servers up.
fn started(place: &Path) -> Child {
    let mut command = stack(place, &["sh", "-c", "echo up; exec sleep 600"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    assert_eq!(line.trim(), "up");
    assert_eq!(processes_of(place).iter().filter(|p| p.contains("bin/postgres")).count(), 1);
    assert_eq!(processes_of(place).iter().filter(|p| p.contains("kafka.Kafka")).count(), 1);
    child
}

#[test]
fn a_command_gets_both_servers_and_its_exit_code_is_returned_and_nothing_is_left() {
    let place = place();
    let output = stack(place.path(), &["sh", "-c", "echo $DATABASE_URL $KAFKA_BROKERS; exit 7"]).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains("postgres://postgres:") && said.contains("@127.0.0.1:"), "{said}");
    nothing_is_left(place.path());
}

#[test]
fn a_signal_ends_the_command_and_the_servers() {
    let place = place();
    let mut child = started(place.path());
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    nothing_is_left(place.path());
}

#[test]
fn a_killed_parent_leaves_nothing_running() {
    let place = place();
    let mut child = started(place.path());
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    nothing_is_left(place.path());
}

#[test]
fn another_users_server_gets_no_more_of_our_environment_than_it_needs() {
    let place = place();
    let look = "tr '\\0' '\\n' < /proc/$(pgrep -f \"bin/postgres -D $TMPDIR\")/environ";
    let output = stack(place.path(), &["sh", "-c", look]).env("A_TOKEN", "hunter2").output().unwrap();
    let said = text(&output);
    assert!(output.status.success() && said.contains("PATH="), "{said}");
    assert_eq!(said.contains("hunter2"), !nix::unistd::Uid::effective().is_root(), "{said}");
}

#[test]
fn servers_that_are_named_are_used_and_none_is_started() {
    let place = place();
    let mut stack = stack(place.path(), &["sh", "-c", "echo $DATABASE_URL $KAFKA_BROKERS"]);
    let output = stack.env("DATABASE_URL", "postgres://there").env("KAFKA_BROKERS", "there:1").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "postgres://there there:1");
}

/// A PATH with a few of the machine's programs and no others.
fn path_with(place: &Path, programs: &[&str]) -> std::path::PathBuf {
    let path = place.join("bin");
    fs::create_dir(&path).unwrap();
    for program in programs {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
        let found = String::from_utf8(found.stdout).unwrap();
        std::os::unix::fs::symlink(found.trim(), path.join(program)).unwrap();
    }
    path
}

#[test]
fn once_the_servers_are_fetched_maven_is_not_needed_any_more() {
    let place = place();
    let warm = stack(place.path(), &["true"]).output().unwrap();
    assert!(warm.status.success(), "{}", text(&warm));
    let path = path_with(place.path(), &["java", "env", "sleep", "rm"]);
    let start = Instant::now();
    let again = stack(place.path(), &["env"]).env("PATH", path).output().unwrap();
    assert!(again.status.success(), "{}", text(&again));
    // The run takes about two seconds; the bound allows for other work of this machine, not for Maven.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn without_a_jvm_or_maven_it_says_what_to_install() {
    for (present, missing) in [(&["rm", "sleep"][..], "JVM"), (&["java", "rm", "sleep"][..], "Maven")] {
        let place = place();
        let path = path_with(place.path(), present);
        let mut stack = stack(place.path(), &["true"]);
        stack.env("PATH", path).env("STACK_CACHE", place.path().join("cache")).env_remove("JAVA_HOME");
        let output = stack.output().unwrap();
        let said = text(&output);
        assert!(!output.status.success());
        assert!(said.contains(missing) && said.contains("Install") && said.contains("DATABASE_URL"), "{said}");
        // The guard, which cleans up after the stack, ends a moment later.
        wait_until("no process is left", || processes_of(place.path()).is_empty());
    }
}

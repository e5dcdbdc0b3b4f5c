//! `stack demo` and `stack up`, as a person runs them.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// What a busy machine may take to start everything.
const PATIENCE: Duration = Duration::from_secs(120);

fn place() -> TempDir {
    let place = tempfile::Builder::new().prefix("stack-platform-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place
}

fn stack(place: &Path, arguments: &[&str]) -> Command {
    let mut stack = Command::new(env!("CARGO_BIN_EXE_stack"));
    // Relative, as it is for a person.
    stack.current_dir(place).args(arguments).env("TMPDIR", place).env("STACK_DIR", "state").stdin(Stdio::null());
    stack.env_remove("DATABASE_URL").env_remove("KAFKA_BROKERS");
    stack
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The processes whose arguments or environment name the place.
fn processes_of(place: &Path) -> Vec<String> {
    let place = place.to_str().unwrap().as_bytes();
    let names_it =
        |file: std::path::PathBuf| fs::read(file).is_ok_and(|text| text.windows(place.len()).any(|w| w == place));
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
        .filter(|entry| names_it(entry.path().join("cmdline")) || names_it(entry.path().join("environ")))
        .map(|entry| String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).unwrap_or_default()).into_owned())
        .collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn nothing_runs(place: &Path) {
    wait_until("nothing runs", || processes_of(place).is_empty());
}

#[test]
fn the_demo_shows_every_outcome_balances_the_books_and_leaves_nothing() {
    let place = place();
    let output = stack(place.path(), &["demo"]).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for shown in [
        "An order is confirmed: confirmed",
        "The payment is declined: cancelled (payment_declined)",
        "Out of stock, so the payment is voided: cancelled (out_of_stock)",
        "Several items, all or nothing: confirmed",
        "The customer cancels while it runs: cancelled (cancelled_by_customer)",
        "in the middle and comes back: confirmed",
        "is lost and asked for again: confirmed",
        "the provider was asked 2 times to authorize under one key, and did it once",
        "They add up",
        "logs: ",
    ] {
        assert!(said.contains(shown), "{shown} is missing:\n{said}");
    }
    nothing_runs(place.path());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "the data is gone");
}

#[test]
fn a_demo_that_cannot_start_says_what_to_do() {
    let place = place();
    let output = stack(place.path(), &["demo"]).env("STACK_BIN_DIR", place.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("cargo build --workspace --bins"), "{}", text(&output));
    nothing_runs(place.path());
}

fn up(place: &Path) -> Child {
    let mut command = stack(place, &["up"]);
    let said = place.join("up.log");
    let log = fs::File::create(&said).unwrap();
    let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    wait_until("it is up", || {
        assert!(child.try_wait().unwrap().is_none(), "`stack up` ended: {}", fs::read_to_string(&said).unwrap());
        stack(place, &["status"]).output().unwrap().status.success()
    });
    child
}

#[test]
fn up_restarts_what_dies_and_ends_with_down_or_with_its_own_death_and_reset_wipes() {
    let place = place();
    let mut first = up(place.path());
    let again = stack(place.path(), &["up"]).output().unwrap();
    assert!(!again.status.success() && text(&again).contains("running already"), "{}", text(&again));

    let pid = |name: &str| {
        let found = Command::new("pgrep").args(["-P", &first.id().to_string(), "-f", name]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().trim().parse::<i32>().ok()
    };
    let killed = pid("inventory-svc").expect("it runs");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("inventory-svc is started again", || pid("inventory-svc").is_some_and(|now| now != killed));

    assert!(stack(place.path(), &["down"]).status().unwrap().success());
    assert!(first.wait().unwrap().success());
    nothing_runs(place.path());
    assert!(!stack(place.path(), &["status"]).output().unwrap().status.success());

    let mut second = up(place.path());
    second.kill().unwrap();
    second.wait().unwrap();
    nothing_runs(place.path());

    assert!(stack(place.path(), &["reset"]).status().unwrap().success());
    assert!(!place.path().join("state").exists());
}

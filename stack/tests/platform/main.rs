//! `stack demo`, `stack up` and `stack logs`, as a person runs them.

mod demo;
mod shop;
mod up;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How long a busy machine may take to start everything.
const PATIENCE: Duration = Duration::from_secs(120);

fn place() -> TempDir {
    let place = tempfile::Builder::new().prefix("stack-platform-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place
}

fn stack(place: &Path, arguments: &[&str]) -> Command {
    let mut stack = Command::new(env!("CARGO_BIN_EXE_stack"));
    // The directory is relative, as it is for a person.
    stack.current_dir(place).args(arguments).env("TMPDIR", place).env("STACK_DIR", "state").stdin(Stdio::null());
    stack.env_remove("DATABASE_URL").env_remove("KAFKA_BROKERS");
    stack
}

/// Whether the command succeeded, and all its output.
fn said(place: &Path, arguments: &[&str]) -> (bool, String) {
    let output = stack(place, arguments).output().unwrap();
    (output.status.success(), text(&output))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The processes whose arguments or environment name the place.
fn processes_of(place: &Path) -> Vec<String> {
    let place = place.to_str().unwrap().as_bytes();
    let names_it = |file: PathBuf| fs::read(file).is_ok_and(|text| text.windows(place.len()).any(|w| w == place));
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

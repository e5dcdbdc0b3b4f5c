//! `stack/tools.sh`, which `make` runs first: it installs missing tools on Debian as root, and names them elsewhere.
//! The machine around it is made of stand-ins here, so that nothing is really installed.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};
use tempfile::TempDir;

/// A PATH with the shell's own needs and these programs, each a script with this text.
fn machine(programs: &[(&str, &str)]) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    for name in ["sed", "head", "uname"] {
        let found = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
        let found = String::from_utf8(found.stdout).unwrap();
        std::os::unix::fs::symlink(found.trim(), place.path().join(name)).unwrap();
    }
    for (name, text) in programs {
        let path = place.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    place
}

fn tools(machine: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> (bool, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools.sh");
    let mut command = Command::new("/bin/sh");
    command.arg(script).args(arguments).env_clear().env("PATH", machine).envs(variables.iter().copied());
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

const JAVA_17: (&str, &str) = ("java", r#"echo 'openjdk version "17.0.15" 2025-04-15' >&2"#);
const JAVA_8: (&str, &str) = ("java", r#"echo 'java version "1.8.0_402"' >&2"#);
const MAVEN: (&str, &str) = ("mvn", "");
const APT: (&str, &str) = ("apt-get", "echo apt-get $*");
const ROOT: (&str, &str) = ("id", "echo 0");
const PERSON: (&str, &str) = ("id", "echo 1000");

#[test]
fn what_is_there_is_left_alone() {
    let machine = machine(&[JAVA_17, MAVEN, APT, ROOT]);
    assert_eq!(tools(machine.path(), &["servers"], &[]), (true, String::new()));
}

#[test]
fn an_old_java_and_no_maven_are_missing_and_a_person_is_told_what_to_type() {
    let machine = machine(&[JAVA_8, PERSON]);
    let (done, said) = tools(machine.path(), &["servers"], &[]);
    assert!(!done);
    assert!(said.contains("java (17 or later)") && said.contains("mvn") && said.contains("Install"), "{said}");
}

#[test]
fn root_on_debian_gets_what_is_missing_after_an_update() {
    if !Path::new("/etc/debian_version").exists() {
        return;
    }
    let machine = machine(&[JAVA_17, APT, ROOT]);
    let (done, said) = tools(machine.path(), &["servers"], &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(done, "{said}");
    assert_eq!(lines[1..], ["apt-get update -q", "apt-get install -y -q maven"]);
}

#[test]
fn a_python_without_venv_is_missing_and_one_with_it_is_left_alone() {
    let with = machine(&[("python3", "exit 0"), PERSON]);
    assert_eq!(tools(with.path(), &["python"], &[]), (true, String::new()));
    let without = machine(&[("python3", "exit 1"), PERSON]);
    let (done, said) = tools(without.path(), &["python"], &[]);
    assert!(!done && said.contains("not installed: python3 (with venv)\n") && said.contains("Install"), "{said}");
}

/// The two variables as they are when servers run already.
const NAMED: [(&str, &str); 2] = [("DATABASE_URL", "postgres://there"), ("KAFKA_BROKERS", "there:9092")];

#[test]
fn servers_that_are_named_need_nothing_to_run_them_unless_only_one_is() {
    let machine = machine(&[PERSON]);
    assert_eq!(tools(machine.path(), &["servers-unless-named"], &NAMED), (true, String::new()));
    for named in [&[][..], &NAMED[..1], &NAMED[1..], &[NAMED[0], ("KAFKA_BROKERS", "")]] {
        let (done, said) = tools(machine.path(), &["servers-unless-named"], named);
        assert!(!done && said.contains("not installed: java (17 or later) mvn\n"), "{named:?}: {said}");
    }
}

#[test]
fn what_starts_servers_of_its_own_needs_them_however_many_are_named_and_says_why() {
    let without = machine(&[PERSON]);
    let (done, said) = tools(without.path(), &["servers"], &NAMED);
    assert!(!done && said.contains("java (17 or later) mvn (DATABASE_URL and KAFKA_BROKERS are set, but"), "{said}");
    assert!(said.contains("Install"), "{said}");
    let (_, said) = tools(without.path(), &["servers"], &[]);
    assert!(said.contains("java (17 or later) mvn\n"), "{said}");
    let with = machine(&[JAVA_17, MAVEN, PERSON]);
    assert_eq!(tools(with.path(), &["servers"], &NAMED), (true, String::new()));
}

#[test]
fn make_asks_for_what_each_of_its_targets_starts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (arguments, kind) in [
        (&["demo"][..], "servers"),
        (&["up"], "servers-unless-named"),
        (&["test"], "servers"),
        (&["test-pg15"], "servers"),
        (&["bench"], "servers"),
        (&["bench", "ARGS=sagas --tcp"], "servers-unless-named"),
    ] {
        let mut make = Command::new("make");
        // Under `make test`, that make's own flags are in the environment.
        make.arg("--dry-run").args(arguments).current_dir(root).env_remove("MAKEFLAGS").env_remove("ARGS");
        let said = String::from_utf8(make.output().unwrap().stdout).unwrap();
        let asked: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("sh stack/tools.sh servers")).collect();
        assert_eq!(asked, [kind.strip_prefix("servers").unwrap()], "make {arguments:?}: {said}");
        let python = said.contains("sh stack/tools.sh python\n");
        assert_eq!(python, arguments[0].starts_with("test"), "make {arguments:?}: {said}");
    }
}

#[test]
fn without_rust_it_says_where_rust_comes_from() {
    let machine = machine(&[("cc", ""), ("make", ""), ROOT]);
    let (done, said) = tools(machine.path(), &["build"], &[]);
    assert!(!done && said.contains("rustup.rs"), "{said}");
}

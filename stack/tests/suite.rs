//! `stack/test.sh`, which `make test` runs. It reads cargo's own output, so cargo runs a small package here.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};
use tempfile::TempDir;

const MANIFEST: &str = "[package]\nname = \"small-one\"\nedition = \"2024\"\n[workspace]\n";
const LIB: &str = "/// ```\n/// assert!(small_one::yes());\n/// ```\npub fn yes() -> bool { true }\n";
const QUICK: &str = "#[test] fn a() {}\n#[test] #[ignore] fn b() {}\n#[test] fn c() { panic!(\"on purpose\") }\n";
const SLOW: &str = "#[test] fn a() { std::thread::sleep(std::time::Duration::from_millis(300)) }\n";

/// A package with a unit test binary, a test that takes a while, one that fails, one that is skipped, and a doc test.
fn package() -> TempDir {
    let package = tempfile::tempdir().unwrap();
    for folder in ["src", "tests", "bin"] {
        fs::create_dir(package.path().join(folder)).unwrap();
    }
    for (file, text) in
        [("Cargo.toml", MANIFEST), ("src/lib.rs", LIB), ("tests/quick.rs", QUICK), ("tests/slow.rs", SLOW)]
    {
        fs::write(package.path().join(file), text).unwrap();
    }
    package
}

fn run(package: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("test.sh");
    let path = format!("{}:{}", package.join("bin").display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.arg(script).args(arguments).current_dir(package).env("PATH", path);
    command.env("CARGO_TARGET_DIR", package.join("target")).env("CARGO_TERM_COLOR", "always");
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

/// Quotes output, so that its lines do not begin as they do. When a test here fails, the script that runs this suite
/// reads the output as well.
fn quoted(said: &str) -> String {
    format!("\n| {}", said.replace('\n', "\n| "))
}

#[test]
fn the_suite_ends_with_its_sum_how_long_it_took_and_what_took_longest() {
    let package = package();
    let (code, said) = run(package.path(), &[]);
    assert_eq!(code, Some(101), "cargo's own exit code: {}", quoted(&said));
    let end = said.rfind("\n3 passed, 1 failed, 1 skipped, in ");
    let end = &said[end.unwrap_or_else(|| panic!("no sum: {}", quoted(&said)))..];
    let lines: Vec<&str> = end.trim().lines().collect();
    assert!(lines[0].ends_with(" s"), "{end}");
    assert_eq!(lines[1], "What took longest:");
    let took: Vec<f32> = lines[2..].iter().map(|l| l.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert!(took.is_sorted_by(|a, b| a >= b) && took[0] >= 0.3, "{end}");
    for binary in ["src/lib.rs", "tests/quick.rs", "tests/slow.rs"] {
        assert!(lines[2..].iter().any(|l| l.contains(&format!("small_one: {binary}"))), "{binary}: {end}");
    }
    assert!(end.contains("s  small_one: its documentation"), "{end}");
}

#[test]
fn a_suite_that_takes_longer_than_is_promised_says_so_and_does_not_fail_for_it() {
    let package = package();
    // The clock goes on by twenty-one minutes and a second between two looks.
    let clock = "#!/bin/sh\necho $(( $(cat \"$0.at\" 2>/dev/null || echo 0) + 1261 )) > \"$0.at\"\ncat \"$0.at\"\n";
    let date = package.path().join("bin/date");
    fs::write(&date, clock).unwrap();
    fs::set_permissions(&date, fs::Permissions::from_mode(0o755)).unwrap();
    let (code, said) = run(package.path(), &["--test", "slow"]);
    assert_eq!(code, Some(0), "{}", quoted(&said));
    for end in [
        "1 passed, 0 failed, 0 skipped, in 21 min 1 s\n",
        "s  tests/slow.rs\n",
        "That is 1 min 1 s over the 20 min that the suite is meant to take on 2 cores.\n",
    ] {
        assert!(said.contains(end), "{}", quoted(&said));
    }
}

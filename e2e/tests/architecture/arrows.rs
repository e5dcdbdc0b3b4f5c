//! The arrows that are allowed between crates.

use crate::Violation;
use serde_json::Value;
use std::{collections::BTreeMap, process::Command};

/// The crates that each crate may depend on, tests included. The two that drive whole systems may depend on everything.
const ARROWS: [(&str, &[&str]); 7] = [
    ("saga-core", &["saga-core"]),
    ("contracts", &["saga-core"]),
    ("outbox-relay", &["saga-core"]),
    ("order-svc", &["contracts", "saga-core"]),
    ("inventory-svc", &["contracts", "saga-core"]),
    ("payment-svc", &["contracts", "saga-core"]),
    ("stack", &[]),
];
const DRIVERS: [&str; 2] = ["e2e", "bench"];

/// Each crate of the workspace with all that it depends on.
pub(crate) type Dependencies = BTreeMap<String, Vec<String>>;

pub(crate) fn of_this_workspace() -> Dependencies {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let names = |list: &Value| list.as_array().cloned().unwrap_or_default();
    let name = |package: &Value| package["name"].as_str().unwrap_or_default().to_owned();
    names(&metadata["packages"])
        .iter()
        .map(|package| (name(package), names(&package["dependencies"]).iter().map(name).collect()))
        .collect()
}

pub(crate) fn check(dependencies: &Dependencies) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (package, needs) in dependencies {
        let allowed = ARROWS.iter().find(|(name, _)| name == package).map(|(_, allowed)| *allowed);
        match allowed {
            None if DRIVERS.contains(&package.as_str()) => {}
            None => violations.push(format!("{package}: a crate that the architecture does not know")),
            Some(allowed) => violations.extend(
                needs
                    .iter()
                    .filter(|need| dependencies.contains_key(*need) && !allowed.contains(&need.as_str()))
                    .map(|need| format!("{package} must not depend on {need}")),
            ),
        }
        if package != "saga-core" && needs.iter().any(|need| need == "backoff") {
            violations.push(format!("{package} must not depend on backoff"));
        }
        let io = ["sqlx", "rdkafka", "axum", "tokio", "reqwest"];
        if package == "contracts" {
            let reached = needs.iter().filter(|need| io.contains(&need.as_str()));
            violations.extend(reached.map(|need| format!("contracts must not depend on {need}: it does no I/O")));
        }
    }
    violations
}

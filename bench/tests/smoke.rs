//! Both figures, in small: the harness works. Nothing is said about speed.

use std::process::Command;

#[test]
fn both_figures_are_measured_beside_their_yardsticks() {
    let directory = std::env::temp_dir().join(format!("bench-{}", std::process::id()));
    let json = directory.join("bench.json");
    let small = ["--rows", "3000", "--rounds", "1", "--warm-up", "1", "--seconds", "2", "--in-flight", "8", "--json"];
    // The servers are those of DATABASE_URL and KAFKA_BROKERS.
    let bench = Command::new(env!("CARGO_BIN_EXE_bench")).args(small).arg(&json).output().expect("the bench starts");
    let said = format!("{}{}", String::from_utf8_lossy(&bench.stderr), String::from_utf8_lossy(&bench.stdout));
    assert!(bench.status.success(), "{said}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&json).expect("the bench writes its JSON")).expect("which is JSON");
    std::fs::remove_dir_all(directory).ok();
    for figure in ["/relay/rounds/0/relay", "/relay/rounds/0/tool", "/sagas/0/per_second", "/sagas/1/steps/in_sets"] {
        assert!(report.pointer(figure).and_then(serde_json::Value::as_f64) > Some(0.0), "{figure}: {report:#}");
    }
    assert!(said.contains("goal sagas/s, three services") && said.contains("goal sagas/s, one service"), "{said}");
}

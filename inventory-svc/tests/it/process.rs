//! The binary itself: its configuration, its output, its waits and its end.

use inventory_svc::migrations;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Client;
use saga_core::testkit::{TestDatabase, eventually};
use serde_json::Value;
use std::{net::TcpListener, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The binary with nothing in its environment but `variables`.
fn binary(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inventory-svc"));
    command.args(arguments).env_clear().envs(variables.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// An address on which no process listens.
fn free() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Ends `child` as an orchestrator does; returns its exit code and the lines that it logged.
async fn stop(child: Child) -> (Option<i32>, Vec<Value>) {
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), lines.lines().map(|line| serde_json::from_str(line).expect(line)).collect())
}

#[tokio::test]
async fn every_mistake_in_the_configuration_is_told_at_once() {
    let wrong =
        [("DATABASE_URL", "mysql://x"), ("HTTP_ADDR", "here"), ("ADMIN_ADDR", "0.0.0.0:1"), ("LOG_FORMAT", "xml")];
    let output = binary(&["serve"], &wrong).output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    for variable in ["DATABASE_URL", "KAFKA_BROKERS", "HTTP_ADDR", "ADMIN_TOKEN", "LOG_FORMAT"] {
        assert!(said.contains(&format!("  {variable} (--")), "{variable} is missing in:\n{said}");
    }
    assert!(said.starts_with("5 mistakes"), "{said}");
}

#[tokio::test]
async fn help_explains_each_option_and_shows_no_secret() {
    let secret = [("ADMIN_TOKEN", "hunter2-hunter2-hunter2"), ("DATABASE_URL", "postgres://u:hunter2@h/d")];
    let output = binary(&["--help"], &secret).output().await.unwrap();
    // The help is wrapped to the terminal's width, whatever that is here.
    let help = String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(output.status.success());
    for variable in [
        "DATABASE_URL",
        "DATABASE_MAX_CONNECTIONS",
        "KAFKA_BROKERS",
        "KAFKA_REPLICATION_FACTOR",
        "KAFKA_SESSION_TIMEOUT_MS",
        "HTTP_ADDR",
        "ADMIN_ADDR",
        "ADMIN_TOKEN",
        "ADMIN_VIEWER_TOKEN",
        "RUST_LOG",
        "LOG_FORMAT",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ] {
        assert!(help.contains(&format!("[env: {variable}")), "{variable} is missing in:\n{help}");
    }
    assert!(help.starts_with("Items, stock and reservations of the order platform"), "{help}");
    assert!(help.contains("migrate") && !help.contains("hunter2"), "{help}");
}

#[tokio::test]
async fn migrate_brings_an_empty_database_up_to_date_and_ends() {
    let database = TestDatabase::new(&[]).await;
    for _ in 0..2 {
        let output = binary(&["migrate"], &[("DATABASE_URL", &database.url)]).output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let applied: i64 =
        sqlx::query_scalar("select count(*) from refinery_inventory").fetch_one(&database.pool).await.unwrap();
    assert_eq!(usize::try_from(applied).unwrap(), migrations::all()[1].count());
}

#[tokio::test]
async fn without_kafka_it_starts_and_serves_says_so_once_is_red_and_stops_when_told() {
    let database = TestDatabase::new(&[]).await;
    let (kafka, http, admin) = (free(), free(), free());
    let variables =
        [("DATABASE_URL", &*database.url), ("KAFKA_BROKERS", &kafka), ("HTTP_ADDR", &http), ("ADMIN_ADDR", &admin)];
    let child = binary(&[], &variables).spawn().unwrap();
    let client = Client::new();
    let ask = async |path: &str| -> Option<(u16, Value)> {
        let answer = client.get(format!("http://{admin}{path}")).send().await.ok()?;
        Some((answer.status().as_u16(), answer.json().await.ok()?))
    };
    eventually(PATIENCE, || async { (ask("/readyz").await?.0 == 200).then_some(()) }).await;
    let served = client.get(format!("http://{http}/v1/items")).send().await.unwrap();
    assert_eq!(served.status(), 200, "its callers need no Kafka");
    let red = eventually(PATIENCE, || async {
        let (status, body) = ask("/health").await?;
        (status == 503 && body["parts"]["topics"]["cause"] == "kafka_away").then_some(body)
    })
    .await;
    assert_eq!(
        (&red["parts"]["kafka"]["cause"], &red["parts"]["database"]["state"]),
        (&"kafka_away".into(), &"ok".into())
    );
    assert!(!red.to_string().contains(&kafka), "strangers hear no addresses: {red}");
    let live = client.get(format!("http://{admin}/livez")).send().await.unwrap();
    assert_eq!(live.status(), 200);
    let metrics = client.get(format!("http://{admin}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("ready{check=\"database\"} 1"), "{metrics}");
    assert!(metrics.contains("work_stalled_seconds{part=\"kafka\",reason=\"kafka_away\"} "), "{metrics}");

    let (code, lines) = stop(child).await;
    assert_eq!(code, Some(0), "{lines:#?}");
    for line in &lines {
        assert_eq!(line["service"], "inventory-svc");
        assert!(line["trace_id"].is_string() && line["timestamp"].is_string(), "{line}");
    }
    let waiting = lines.iter().filter(|line| line["message"] == "waiting for Kafka").count();
    assert!(waiting <= 1, "said {waiting} times: {lines:#?}");
}

#[tokio::test]
async fn without_a_database_it_says_so_once_and_waits() {
    let (nowhere, http, admin) = (free(), free(), free());
    let url = format!("postgres://nobody@{nowhere}/inventory");
    let variables =
        [("DATABASE_URL", &*url), ("KAFKA_BROKERS", &nowhere), ("HTTP_ADDR", &http), ("ADMIN_ADDR", &admin)];
    let mut child = binary(&[], &variables).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    loop {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().expect("it goes on");
        if serde_json::from_str::<Value>(&line).unwrap()["message"] == "waiting for the database" {
            break;
        }
    }
    let (code, _) = stop(child).await;
    assert_eq!(code, Some(0));
}

//! Health as a whole, without a database.

use super::*;
use crate::testkit::Log;
use metrics_exporter_prometheus::PrometheusBuilder;
use std::sync::atomic::{AtomicUsize, Ordering};

async fn looked(health: &Health) -> Readiness {
    health.look().await;
    health.readiness()
}

#[tokio::test]
async fn it_is_ready_while_what_callers_need_is_there_and_names_what_is_not() {
    let stopping = CancellationToken::new();
    let health = Health::new(&stopping);
    assert_eq!(health.readiness().checks["process"], "starting", "nobody has looked yet");
    health.callers_need("database", || async { PartReport::fine() });
    assert!(looked(&health).await.ready);
    health.callers_need("database", || async { PartReport::red(Cause::DatabaseAway, "at line 1721") });
    let red = looked(&health).await;
    assert!(!red.ready);
    assert_eq!(red.checks["database"], "database_away");
    health.callers_need("database", || async { PartReport::fine() });
    assert!(looked(&health).await.ready, "it turns green by itself");
    stopping.cancel();
    assert!(!health.readiness().ready, "a process that stops takes no more work");
}

/// However often a stranger asks, the database and the brokers are asked by the loop alone.
#[tokio::test]
async fn no_answer_about_health_runs_a_check() {
    let health = Health::new(&CancellationToken::new());
    let ran = Arc::new(AtomicUsize::new(0));
    let check = || {
        let ran = Arc::clone(&ran);
        move || {
            ran.fetch_add(1, Ordering::Relaxed);
            async { PartReport::fine() }
        }
    };
    health.callers_need("database", check());
    health.part("kafka", check());
    health.look().await;
    let looked = ran.load(Ordering::Relaxed);
    assert_eq!(looked, 2, "the loop asks each once");
    for _ in 0..1_000 {
        assert!(health.is_live() && health.readiness().ready && health.healthiness().healthy);
        health.tell_age();
    }
    // A check that were run beside the answer would run now.
    tokio::task::yield_now().await;
    assert_eq!(ran.load(Ordering::Relaxed), looked);
}

#[tokio::test]
async fn a_part_whose_work_stands_still_is_red_and_takes_no_traffic_away() {
    let health = Health::new(&CancellationToken::new());
    health.part("replies", || async { PartReport::red(Cause::KafkaAway, "no broker at 10.0.0.7") });
    health.look().await;
    assert!(health.readiness().ready && health.is_live());
    let (first, open) = (health.healthiness(), health.healthiness().for_anybody());
    assert!(!first.healthy);
    assert_eq!(first.parts["replies"].cause, Some(Cause::KafkaAway));
    assert_eq!(first.parts["replies"].reason.as_deref(), Some("no broker at 10.0.0.7"));
    assert!(!serde_json::to_string(&open).unwrap().contains("10.0.0.7"), "strangers hear the cause alone");

    health.part("replies", || async { PartReport::red(Cause::Stalled, "") });
    health.look().await;
    let later = health.healthiness();
    assert_eq!(later.parts["replies"].cause, Some(Cause::Stalled));
    assert_eq!(later.parts["replies"].since, first.parts["replies"].since, "it has been red all the time");
}

#[tokio::test]
async fn what_is_red_before_the_process_begins_is_logged_only_if_it_stays_so() {
    let log = Log::hear("warn");
    let health = Health::new(&CancellationToken::new());
    health.starting("the database");
    for name in ["tables", "orders"] {
        health.callers_need(name, || async { PartReport::red(Cause::TableMissing, "it is not migrated") });
    }
    health.part("replies", || async { PartReport::red(Cause::Starting, "it has not started") });
    health.look().await;
    health.look().await;
    health.callers_need("tables", || async { PartReport::fine() });
    health.look().await;
    assert!(log.warnings().is_empty(), "{:?}", log.warnings());
    health.started();
    health.look().await;
    health.look().await;
    let said: Vec<_> = log.warnings().iter().map(|line| line["check"].clone()).collect();
    assert_eq!(said, ["orders"], "{:?}", log.warnings());
}

#[tokio::test]
async fn a_check_that_does_not_answer_is_red() {
    let health = Health::new(&CancellationToken::new());
    health.callers_need("stuck", std::future::pending);
    health.look_within(Duration::from_millis(5)).await;
    assert_eq!(health.readiness().checks["stuck"], "no_answer");
}

#[tokio::test]
async fn what_was_seen_too_long_ago_is_a_no_and_a_still_loop_is_not_alive() {
    let health = Health::new(&CancellationToken::new());
    health.callers_need("database", || async { PartReport::fine() });
    health.look().await;
    let age = |by: Duration| {
        let mut seen = lock(&health.0.seen);
        let seen = seen.as_mut().unwrap();
        seen.at = seen.at.checked_sub(by).unwrap();
    };
    age(TOO_OLD);
    assert_eq!(health.readiness().checks["process"], "unwatched");
    assert_eq!(health.healthiness().parts["process"].cause, Some(Cause::Unwatched));
    assert!(health.is_live());
    age(LIVE_MAX);
    assert!(!health.is_live());
}

#[test]
fn a_process_that_waits_before_it_begins_is_not_ready_in_the_metrics_either() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let shown = |health: &Health| {
        metrics::with_local_recorder(&recorder, || health.tell_age());
        let lines = recorder.handle().render();
        let value = |series: &str| {
            let line = lines.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_else(|| panic!("{lines}"));
            line.trim().parse::<f64>().unwrap()
        };
        let starting = value("work_stalled_seconds{part=\"process\",reason=\"starting\"}");
        (value("ready{check=\"process\"}"), starting)
    };
    let stopping = CancellationToken::new();
    let health = Health::new(&stopping);
    health.starting("the lock for the migrations");
    let (ready, for_seconds) = shown(&health);
    assert!(ready == 0.0 && for_seconds > 0.0);
    assert!(shown(&health).1 >= for_seconds, "it grows");
    health.started();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(health.look());
    assert_eq!(shown(&health), (1.0, 0.0), "it has begun");
    stopping.cancel();
    assert_eq!(shown(&health), (0.0, 0.0), "a process that stops is not ready, and does not start");
}

//! Kafka's own `ProducerPerformance`, with the relay's guarantees: `acks=all`, idempotent, the same compression.
//!
//! The tool has less to do: records without key and headers, made in its own memory, and no progress to record.

use crate::{
    cli::RelayArgs,
    machine::Machine,
    meter::{self, Cost},
    topics,
};
use anyhow::{Context as _, ensure};
use stack::{process::Process, progress::Progress};
use std::fs;

/// The tool's class.
const CLASS: &str = "org.apache.kafka.tools.ProducerPerformance";

/// Runs the tool once; returns its records a second, and the cost.
pub async fn run(machine: &Machine, args: &RelayArgs, progress: &Progress) -> anyhow::Result<(f64, Cost)> {
    let topic = String::from("bench.tool");
    topics::create(machine.brokers(), std::slice::from_ref(&topic), args.partitions).await?;
    let java = machine.java(progress).await?;
    let log = machine.directory().join("producer-performance.log");
    // The log is appended to; the tool's summary is its last line.
    let _ = fs::remove_file(&log);
    let spec = java.spec("ProducerPerformance", &log, &machine.directory().join("kafka"), CLASS).args([
        "--topic".to_owned(),
        topic.clone(),
        "--num-records".to_owned(),
        args.rows.to_string(),
        "--record-size".to_owned(),
        args.bytes.to_string(),
        "--throughput".to_owned(),
        "-1".to_owned(),
        "--producer-props".to_owned(),
        format!("bootstrap.servers={}", machine.brokers()),
        "acks=all".to_owned(),
        "enable.idempotence=true".to_owned(),
        format!("compression.type={}", args.compression),
    ]);
    let before = meter::read(machine, &[]).await?;
    let process = Process::start(spec)?;
    let pid = process.pid();
    let mut last = meter::cpu_of(pid);
    let status = loop {
        tokio::select! {
            status = process.wait() => break status,
            () = tokio::time::sleep(std::time::Duration::from_millis(50)) => last = meter::cpu_of(pid).or(last),
        }
    };
    let after = meter::read(machine, &[]).await?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    ensure!(status.is_some_and(|status| status.success()), "ProducerPerformance failed: {said}");
    let rate = rate(&said).with_context(|| format!("ProducerPerformance said: {said}"))?;
    let written = topics::messages(machine.brokers(), std::slice::from_ref(&topic)).await?;
    ensure!(written == [i64::from(args.rows)], "ProducerPerformance wrote {written:?} records");
    let mut cost = after.since(&before);
    last.map(|seconds| cost.cpu_seconds.insert("tool".to_owned(), seconds));
    Ok((rate, cost))
}

/// The rate in the tool's last line, which sums up: `1000000 records sent, 300000.1 records/sec (73.24 MB/sec), …`.
fn rate(said: &str) -> Option<f64> {
    let line = said.lines().rfind(|line| line.contains("records/sec"))?;
    line.split(',').find(|part| part.contains("records/sec"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_last_line_sums_up() {
        let said = "105 records sent, 21.0 records/sec (0.01 MB/sec), 5.0 ms avg latency\n\
                    1000 records sent, 315457.413249 records/sec (77.02 MB/sec), 1.31 ms avg latency, 9 ms 99th.\n";
        assert_eq!(super::rate(said).map(f64::round), Some(315_457.0));
        assert_eq!(super::rate("no such topic"), None);
    }
}

//! The report of a run: a table for people, JSON for programs.

use crate::{
    drain::Drain,
    machine::Description,
    sagas::{COMPILERS_QUIET, Sagas},
};
use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde::Serialize;
use std::{fmt, fs, path::Path};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// The relay reaches at least this part of the producer tool's rate.
const RELAY_GOAL: f64 = 0.5;
/// Sagas a second that each layout reaches, with 64 in flight.
const SAGAS_GOAL: f64 = 1_500.0;
/// Transactions of a saga that is carried out without batches.
const STEPS_PER_SAGA: f64 = 7.0;

/// The figures of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// When the run began, RFC 3339 in UTC.
    pub at: String,
    /// The machine that it ran on.
    pub machine: Description,
    /// The relay's drain; `None` if the run had none.
    pub relay: Option<Drain>,
    /// The sagas, one entry for each layout that ran.
    pub sagas: Vec<Sagas>,
    /// The goals, and what the run reached of each.
    pub goals: Vec<Goal>,
}

/// A goal of a figure.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// The figure's name.
    pub name: String,
    /// The least value that meets the goal.
    pub at_least: f64,
    /// The value that the run reached.
    pub reached: f64,
}

impl Report {
    /// A report without figures yet.
    pub fn new(machine: Description) -> Self {
        let at = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        Self { at, machine, relay: None, sagas: Vec::new(), goals: Vec::new() }
    }

    /// Puts the goals beside the measured figures.
    #[must_use]
    pub fn judged(mut self) -> Self {
        let relay = self.relay.as_ref().map(|drain| Goal {
            name: "relay / ProducerPerformance".to_owned(),
            at_least: RELAY_GOAL,
            reached: drain.medians().2,
        });
        let sagas = self.sagas.iter().map(|sagas| Goal {
            name: format!("sagas/s, {}", sagas.layout),
            at_least: SAGAS_GOAL,
            reached: sagas.per_second,
        });
        self.goals = relay.into_iter().chain(sagas).collect();
        self
    }

    /// Whether a goal was missed.
    pub fn missed(&self) -> bool {
        self.goals.iter().any(|goal| goal.reached < goal.at_least)
    }

    /// Writes the report as JSON, and makes the folder if it is missing.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let write = || {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(path, serde_json::to_vec_pretty(self)?)
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(f, "\n{}", self.at)?;
        writeln!(
            f,
            "{} x {}, {} GiB, Linux {}; a synced write takes {} us; load before: {:.1}",
            machine.processors,
            machine.processor,
            machine.memory_gib,
            machine.kernel,
            machine.sync_us,
            machine.load_before
        )?;
        if let Some(scheduling) = machine.scheduling {
            writeln!(f, "processes are scheduled {scheduling}")?;
        }
        writeln!(f, "PostgreSQL {}", machine.postgres)?;
        if let Some(drain) = &self.relay {
            relay(f, drain)?;
        }
        self.sagas.iter().try_for_each(|measured| sagas(f, measured))?;
        for Goal { name, at_least, reached } in &self.goals {
            let verdict = if reached < at_least { "MISSED" } else { "reached" };
            writeln!(f, "goal {name} >= {at_least}: {reached:.2}, {verdict}")?;
        }
        Ok(())
    }
}

/// A table with numbers in all columns except the first.
fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(head);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn relay(f: &mut fmt::Formatter<'_>, drain: &Drain) -> fmt::Result {
    let Drain { rows, bytes, partitions, compression, .. } = drain;
    writeln!(
        f,
        "\nRelay: {rows} rows of {bytes} bytes to {partitions} partitions, {compression}, acks=all, idempotent"
    )?;
    let mut rounds = table(&[
        "",
        "relay rows/s",
        "MB/s",
        "tool records/s",
        "MB/s",
        "ratio",
        "CPU s: relay",
        "PostgreSQL",
        "Kafka",
        "tool",
        "its Kafka",
    ]);
    #[allow(clippy::cast_precision_loss)]
    let mb = |rate: f64| format!("{:.1}", rate * *bytes as f64 / 1e6);
    for (n, round) in drain.rounds.iter().enumerate() {
        let cpu = |cost: &crate::meter::Cost, name: &str| {
            cost.cpu_seconds.get(name).map_or_else(|| "?".to_owned(), |seconds| format!("{seconds:.1}"))
        };
        rounds.add_row([
            format!("round {}", n + 1),
            format!("{:.0}", round.relay),
            mb(round.relay),
            format!("{:.0}", round.tool),
            mb(round.tool),
            format!("{:.2}", round.relay / round.tool),
            cpu(&round.relay_cost, "relay"),
            cpu(&round.relay_cost, "PostgreSQL"),
            cpu(&round.relay_cost, "Kafka"),
            cpu(&round.tool_cost, "tool"),
            cpu(&round.tool_cost, "Kafka"),
        ]);
    }
    let (relay, tool, ratio) = drain.medians();
    let median =
        ["median".to_owned(), format!("{relay:.0}"), mb(relay), format!("{tool:.0}"), mb(tool), format!("{ratio:.2}")];
    rounds.add_row(median);
    writeln!(f, "{rounds}")
}

#[allow(clippy::cast_precision_loss)]
fn sagas(f: &mut fmt::Formatter<'_>, sagas: &Sagas) -> fmt::Result {
    let Sagas { layout, in_flight, partitions, latency_ms, cost, .. } = sagas;
    writeln!(
        f,
        "\nSagas of three remote steps of {layout}, {in_flight} in flight, {partitions} partition(s) a topic: {:.0}/s; \
         p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, max {:.1} ms",
        sagas.per_second, latency_ms.p50, latency_ms.p99, latency_ms.p999, latency_ms.max
    )?;
    match sagas.compilers {
        Some(share) if share < COMPILERS_QUIET => {}
        Some(share) => writeln!(f, "Kafka's JVM took {:.0}% of a processor to compile itself", share * 100.0)?,
        None => writeln!(f, "whether Kafka's JVM had compiled itself is not known")?,
    }
    let ended = sagas.ended.max(1) as f64;
    let mut per_saga = table(&["per saga", ""]);
    let each = |count: i64| format!("{:.2}", count as f64 / ended);
    per_saga.add_row(["commits".to_owned(), each(cost.commits)]);
    per_saga.add_row(["fsyncs of WAL".to_owned(), each(cost.wal_syncs)]);
    per_saga.add_row(["bytes of WAL".to_owned(), format!("{:.0}", cost.wal_bytes as f64 / ended)]);
    per_saga.add_row(["Kafka messages".to_owned(), each(sagas.messages)]);
    for (name, seconds) in &cost.cpu_seconds {
        per_saga.add_row([format!("CPU us: {name}"), format!("{:.0}", seconds * 1e6 / ended)]);
    }
    per_saga.add_row(["CPU us: all".to_owned(), format!("{:.0}", cost.cpu() * 1e6 / ended)]);
    writeln!(f, "{per_saga}")?;
    let steps = sagas.steps;
    let mut beside = table(&["beside it: bare step-transactions", "steps/s", "= sagas/s", "sagas reach"]);
    for (name, rate) in [("one by one", steps.singly), ("in sets of 16", steps.in_sets)] {
        let equal = rate / STEPS_PER_SAGA;
        let reached = format!("{:.2}", sagas.per_second / equal);
        beside.add_row([name.to_owned(), format!("{rate:.0}"), format!("{equal:.0}"), reached]);
    }
    writeln!(f, "{beside}")?;
    if !sagas.statements.is_empty() {
        let ended = sagas.ended_while_counted.max(1) as f64;
        let mut statements = table(&["PostgreSQL, by total time", "calls/saga", "us/call", "us/saga", "+ planning"]);
        for statement in &sagas.statements {
            let calls = statement.calls.max(1) as f64;
            statements.add_row([
                statement.text.clone(),
                format!("{:.2}", statement.calls as f64 / ended),
                format!("{:.0}", statement.total_ms * 1e3 / calls),
                format!("{:.0}", statement.total_ms * 1e3 / ended),
                format!("{:.0}", statement.planning_ms * 1e3 / ended),
            ]);
        }
        writeln!(f, "{statements}")?;
    }
    Ok(())
}

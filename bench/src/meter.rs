//! The cost of a stretch of time: CPU of each process, commits, WAL and fsyncs of PostgreSQL.

use crate::machine::Machine;
use serde::Serialize;
use sqlx::Row as _;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

/// The kernel reports processor time in these parts of a second, whatever its own clock does (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// What was used up to a moment, by all meters.
#[derive(Debug, Clone)]
pub struct Reading {
    at: Instant,
    cpu: BTreeMap<String, f64>,
    database: [i64; 4],
}

/// The cost of a stretch of time.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// The length of the stretch.
    pub seconds: f64,
    /// CPU seconds by process. Empty where the kernel does not report them.
    pub cpu_seconds: BTreeMap<String, f64>,
    /// Commits, in all databases.
    pub commits: i64,
    /// Bytes of WAL.
    pub wal_bytes: i64,
    /// Times that WAL was synced to disk.
    pub wal_syncs: i64,
    /// Records of WAL.
    pub wal_records: i64,
}

impl Cost {
    /// CPU seconds of all processes.
    pub fn cpu(&self) -> f64 {
        self.cpu_seconds.values().sum()
    }
}

/// Reads all meters. `processes` are those of the run, by name; the servers and this process are always read.
pub async fn read(machine: &Machine, processes: &[(&str, Option<u32>)]) -> anyhow::Result<Reading> {
    let mut admin = machine.admin().await?;
    // Counters that backends keep to themselves are flushed within a second; reading twice as much time costs nothing.
    sqlx::query("select pg_stat_clear_snapshot()").execute(&mut admin).await?;
    let version: i32 =
        sqlx::query_scalar("select current_setting('server_version_num')::int").fetch_one(&mut admin).await?;
    let syncs: i64 = if version >= 180_000 {
        sqlx::query_scalar("select coalesce(sum(fsyncs), 0)::bigint from pg_stat_io where object = 'wal'")
            .fetch_one(&mut admin)
            .await?
    } else {
        sqlx::query_scalar("select wal_sync from pg_stat_wal").fetch_one(&mut admin).await?
    };
    let row = sqlx::query(
        "select (select sum(xact_commit) from pg_stat_database)::bigint, wal_bytes::bigint, wal_records
           from pg_stat_wal",
    )
    .fetch_one(&mut admin)
    .await?;
    let all = processes.iter().copied().chain([
        ("PostgreSQL", machine.postgres_pid()),
        ("Kafka", machine.kafka_pid()),
        ("bench", Some(std::process::id())),
    ]);
    let tree = Tree::read();
    let mut cpu = BTreeMap::new();
    for (name, pid) in all {
        // For this process its own time alone: its children are the other processes.
        let seconds = pid.and_then(|pid| match pid == std::process::id() {
            true => own(Path::new("/proc/self/stat")),
            false => tree.with_children(pid),
        });
        seconds.map(|seconds| cpu.insert(name.to_owned(), seconds));
    }
    Ok(Reading { at: Instant::now(), cpu, database: [row.try_get(0)?, row.try_get(1)?, syncs, row.try_get(2)?] })
}

/// Processor time of a process and its children so far.
pub fn cpu_of(pid: Option<u32>) -> Option<f64> {
    Tree::read().with_children(pid?)
}

/// Processor time of each of a JVM's compilers so far, by thread. They come and go.
#[derive(Debug)]
pub struct Compilers(BTreeMap<PathBuf, f64>);

impl Compilers {
    /// Reads the compilers of the JVM with this process id; `None` when there is no such process.
    pub fn read(jvm: u32) -> Option<Self> {
        let threads = fs::read_dir(format!("/proc/{jvm}/task")).ok()?.flatten().map(|thread| thread.path());
        let compilers = threads.filter(|thread| {
            fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("C1 ") || name.starts_with("C2 "))
        });
        Some(Self(compilers.filter_map(|thread| Some((thread.clone(), own(&thread.join("stat"))?))).collect()))
    }

    /// Seconds that the compilers worked from `before` to here.
    pub fn since(&self, before: &Self) -> f64 {
        self.0.iter().map(|(thread, now)| now - before.0.get(thread).unwrap_or(&0.0)).sum()
    }
}

impl Reading {
    /// The cost of the time from `before` to here. A process that did not exist then began with nothing.
    pub fn since(&self, before: &Self) -> Cost {
        let spent = |name: &String, now: &f64| now - before.cpu.get(name).unwrap_or(&0.0);
        let cpu = self.cpu.iter().map(|(name, now)| (name.clone(), spent(name, now)));
        let [commits, wal_bytes, wal_syncs, wal_records] =
            std::array::from_fn(|at| self.database[at] - before.database[at]);
        Cost {
            seconds: self.at.duration_since(before.at).as_secs_f64(),
            cpu_seconds: cpu.collect(),
            commits,
            wal_bytes,
            wal_syncs,
            wal_records,
        }
    }
}

/// Fields of a `/proc/PID/stat` behind the name, which may contain anything: state first, then the parent.
fn stat(path: &Path) -> Option<Vec<u64>> {
    let text = fs::read_to_string(path).ok()?;
    let rest = text.rsplit_once(')')?.1;
    Some(rest.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

/// Processor time of one process, or one thread, without children.
fn own(path: &Path) -> Option<f64> {
    let stat = stat(path)?;
    #[allow(clippy::cast_precision_loss)]
    Some((stat.get(11)? + stat.get(12)?) as f64 / TICKS_PER_SECOND)
}

/// Every process of this machine, by parent.
struct Tree(Vec<(u32, u64, u64)>);

impl Tree {
    fn read() -> Self {
        let names = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        Self(
            pids.filter_map(|pid| {
                let stat = stat(Path::new(&format!("/proc/{pid}/stat")))?;
                // The time includes children that ended and were waited for: backends come and go.
                Some((pid, *stat.get(1)?, stat.get(11..15)?.iter().sum()))
            })
            .collect(),
        )
    }

    fn with_children(&self, pid: u32) -> Option<f64> {
        let own = self.0.iter().find(|(other, ..)| *other == pid)?.2;
        let children = self.0.iter().filter(|(_, parent, _)| *parent == u64::from(pid));
        #[allow(clippy::cast_precision_loss)]
        let own = own as f64 / TICKS_PER_SECOND;
        Some(own + children.filter_map(|(child, ..)| self.with_children(*child)).sum::<f64>())
    }
}

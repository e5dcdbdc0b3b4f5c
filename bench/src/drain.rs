//! The relay drains an outbox; beside it, in turns, Kafka's own producer tool writes as many records of that size.
//!
//! The relay's time is measured in the database: from its taking the lease to its recording the last row as published.
//! That is after Kafka acknowledged the row. The tool measures its own time: from its first record to the last
//! acknowledgement, without the JVM's start.

use crate::{
    cli::RelayArgs,
    databases::Database,
    machine::Machine,
    meter::{self, Cost},
    producer_tool,
    role::{Threads, start_relay},
    topics,
};
use anyhow::ensure;
use saga_core::{
    outbox::{NewMessage, append_in},
    service::messaging_migrations,
};
use serde::Serialize;
use sqlx::PgPool;
use stack::progress::Progress;
use std::time::{Duration, Instant};

/// Rows in each transaction that fills the outbox.
const ROWS_PER_TRANSACTION: u32 = 2_000;
/// How many aggregates the rows belong to.
const KEY_COUNT: u32 = 10_000;
/// How many rows lie between two lines of progress.
const TOLD_EVERY: u32 = 100_000;
/// How often the bench reads the relay's progress.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// When no row was published for this long, something is wrong.
const STALLED_AFTER: Duration = Duration::from_secs(60);

/// The figures of all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Drain {
    /// Rows of a round.
    pub rows: u32,
    /// Bytes of payload of each row.
    pub bytes: usize,
    /// Partitions of the topic.
    pub partitions: i32,
    /// Compression of the relay's and of the tool's records.
    pub compression: String,
    /// The rounds, in order.
    pub rounds: Vec<Round>,
}

/// One run of the relay and one of the tool.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// Rows a second of the relay.
    pub relay: f64,
    /// Records a second of the tool.
    pub tool: f64,
    /// The cost of the relay's drain.
    pub relay_cost: Cost,
    /// The cost of the tool's run.
    pub tool_cost: Cost,
}

impl Drain {
    /// The medians of the relay and of the tool, and the median of their ratios.
    pub fn medians(&self) -> (f64, f64, f64) {
        let median = |of: fn(&Round) -> f64| {
            let mut all: Vec<f64> = self.rounds.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or(0.0)
        };
        (median(|r| r.relay), median(|r| r.tool), median(|r| r.relay / r.tool))
    }
}

/// Runs all rounds.
pub async fn run(machine: &Machine, args: &RelayArgs, progress: &Progress) -> anyhow::Result<Drain> {
    let mut rounds = Vec::new();
    for round in 1..=args.rounds.max(1) {
        let of = format!("round {round} of {}", args.rounds.max(1));
        let (relay, relay_cost) = drain(machine, args, &of, progress).await?;
        progress.done(format!("relay: {of}: {relay:.0} rows/s"));
        progress.step(format!("ProducerPerformance writes {} records ({of})", args.rows));
        let (tool, tool_cost) = producer_tool::run(machine, args, progress).await?;
        progress.done(format!("ProducerPerformance: {of}: {tool:.0} records/s, ratio {:.2}", relay / tool));
        rounds.push(Round { relay, tool, relay_cost, tool_cost });
    }
    let RelayArgs { rows, bytes, partitions, compression, .. } = args.clone();
    Ok(Drain { rows, bytes, partitions, compression, rounds })
}

async fn drain(machine: &Machine, args: &RelayArgs, of: &str, progress: &Progress) -> anyhow::Result<(f64, Cost)> {
    let topic = String::from("bench.drain");
    topics::create(machine.brokers(), std::slice::from_ref(&topic), args.partitions).await?;
    let database = Database::create(machine, "drain", &[messaging_migrations()]).await?;
    let pool = database.pool(4).await?;
    fill(&pool, &topic, args, of, progress).await?;
    // The relay should not pay for pages that the filling left to be written.
    sqlx::query("checkpoint").execute(&pool).await?;
    let before = meter::read(machine, &[]).await?;
    let relay = start_relay(machine, &[&database], &args.compression, Threads::All)?;
    let seconds = wait(&pool, args.rows, of, progress).await;
    let after = meter::read(machine, &[("relay", relay.pid())]).await?;
    relay.stop().await;
    let seconds = seconds?;
    let written = topics::messages(machine.brokers(), std::slice::from_ref(&topic)).await?;
    ensure!(written == [i64::from(args.rows)], "the relay wrote {written:?} records of {} rows", args.rows);
    pool.close().await;
    database.drop(machine).await?;
    Ok((f64::from(args.rows) / seconds, after.since(&before)))
}

/// Appends rows as a service does, in transactions of many.
async fn fill(pool: &PgPool, topic: &str, args: &RelayArgs, of: &str, progress: &Progress) -> anyhow::Result<()> {
    let mut letters = Letters(0x2545_f491_4f6c_dd1d);
    let mut at = 0;
    while at < args.rows {
        if at % TOLD_EVERY == 0 {
            progress.step(format!("filling the outbox: {at} of {} rows ({of})", args.rows));
        }
        let until = args.rows.min(at + ROWS_PER_TRANSACTION);
        let messages = (at..until).map(|n| {
            let mut message = NewMessage::tombstone(topic, &format!("key-{}", n % KEY_COUNT), "bench.row.v1");
            message.payload = Some(letters.take(args.bytes));
            message
        });
        let mut tx = pool.begin().await?;
        append_in(&mut tx, &messages.collect::<Vec<_>>()).await?;
        tx.commit().await?;
        at = until;
    }
    Ok(())
}

/// Random capital letters, as the producer tool's payload has them: compression finds as much in both.
struct Letters(u64);

impl Letters {
    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let letter = |_| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            b'A' + u8::try_from(self.0 % 26).unwrap_or(0)
        };
        (0..bytes).map(letter).collect()
    }
}

/// Waits until every row is recorded as published; returns the seconds from the lease to that moment.
async fn wait(pool: &PgPool, rows: u32, of: &str, progress: &Progress) -> anyhow::Result<f64> {
    progress.step(format!("the relay drains {rows} rows ({of})"));
    let (mut moved, mut logged) = ((0, Instant::now()), 0);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let (published, seconds): (i64, Option<f64>) = sqlx::query_as(
            "select coalesce(sum(rows), 0)::bigint,
                    extract(epoch from max(at) - (select min(acquired_at) from outbox_lease))::float8
               from outbox_batch",
        )
        .fetch_one(pool)
        .await?;
        if published / i64::from(TOLD_EVERY) > logged {
            logged = published / i64::from(TOLD_EVERY);
            progress.step(format!("the relay drains: {published} of {rows} rows ({of})"));
        }
        match seconds {
            Some(seconds) if published >= i64::from(rows) => return Ok(seconds),
            _ if published > moved.0 => moved = (published, Instant::now()),
            _ => ensure!(moved.1.elapsed() < STALLED_AFTER, "the relay stands still at {published} of {rows} rows"),
        }
    }
}

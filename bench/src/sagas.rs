//! Sagas a second: three remote no-op steps, a fixed number in flight, everything on this machine.
//!
//! ```text
//!   orchestrator ─┬─ outbox ─┐             ┌─ commands ─► participants (3 services, or 1)
//!                 │          ├─► relay ─► Kafka                │
//!                 └─ replies ◄─────────────┘◄── outboxes ◄─────┘
//! ```
//!
//! A saga is seven transactions (start, three times command and reply) and six messages; several of them share a
//! transaction when they arrive together.

use crate::{
    cli::SagaArgs,
    contract::{Layout, REPLIES},
    databases::Database,
    machine::Machine,
    meter::{self, Compilers, Cost},
    orchestrator::Ended,
    role,
    statements::{self, Statement},
    steps::{self, Steps},
    topics,
};
use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use saga_core::service::{messaging_migrations, saga_migrations};
use serde::Serialize;
use stack::progress::Progress;
use std::{
    fs,
    time::{Duration, Instant, SystemTime},
};

/// How long statements are counted, after the measured time.
const COUNTED_FOR: Duration = Duration::from_secs(5);
/// The first saga ends within this, or something is broken.
const FIRST_END: Duration = Duration::from_secs(120);
/// How long the bench waits at most for a JVM to compile itself: some of that never ends.
const COMPILED_MAX: Duration = Duration::from_secs(180);
/// How often the bench reads the JVM's compilers.
const LOOK_AT_COMPILERS: Duration = Duration::from_secs(5);
/// The compilers are quiet when they take less than this part of a processor.
pub const COMPILERS_QUIET: f64 = 0.05;
/// The compilers have done when they were quiet at so many looks in a row. They rest between their last large pieces of
/// work, one of which was a third of a processor for 10 s.
const QUIET_LOOKS: usize = 4;
/// In microseconds; the histogram counts a slower saga as this slow.
const SLOWEST_MICROS: u64 = 600_000_000;

/// The figures of one layout.
#[derive(Debug, Clone, Serialize)]
pub struct Sagas {
    /// Which services the steps belong to.
    pub layout: Layout,
    /// How many sagas were in flight.
    pub in_flight: usize,
    /// Partitions of each topic.
    pub partitions: i32,
    /// Sagas that ended in the measured time.
    pub ended: u64,
    /// Sagas that ended, for each measured second.
    pub per_second: f64,
    /// Milliseconds from beginning to end.
    pub latency_ms: Latency,
    /// The part of a processor that Kafka's JVM took to compile itself in the measured time.
    pub compilers: Option<f64>,
    /// Messages in the command and reply topics.
    pub messages: i64,
    /// The cost of the measured time.
    pub cost: Cost,
    /// Statements by total time, in a stretch of their own.
    pub statements: Vec<Statement>,
    /// Sagas that ended while the statements were counted.
    pub ended_while_counted: u64,
    /// The yardstick, measured after the sagas.
    pub steps: Steps,
}

/// Quantiles of a histogram, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    /// Half of the sagas were faster.
    pub p50: f64,
    /// 99 of 100 sagas were faster.
    pub p99: f64,
    /// 999 of 1000 sagas were faster.
    pub p999: f64,
    /// The time of the slowest saga.
    pub max: f64,
}

/// Measures the sagas, and the yardstick after them.
pub async fn run(machine: &Machine, layout: Layout, args: &SagaArgs, progress: &Progress) -> anyhow::Result<Sagas> {
    progress.step(format!("sagas, {layout}: preparing databases and topics"));
    let orders = Database::create(machine, "orchestrator", &[messaging_migrations(), saga_migrations()]).await?;
    let mut databases = vec![orders];
    for name in layout.services() {
        databases.push(Database::create(machine, name, &[messaging_migrations()]).await?);
    }
    let names: Vec<String> = layout.command_topics().into_iter().chain([REPLIES]).map(str::to_owned).collect();
    topics::create(machine.brokers(), &names, args.saga_partitions).await?;
    let measured = measure(machine, layout, args, &databases, &names, progress).await?;
    for database in databases {
        database.drop(machine).await?;
    }
    progress.done(format!("sagas, {layout}: {:.0}/s, p50 {:.1} ms", measured.per_second, measured.latency_ms.p50));
    let steps = steps::run(machine, args, progress).await?;
    Ok(Sagas { steps, ..measured })
}

async fn measure(
    machine: &Machine,
    layout: Layout,
    args: &SagaArgs,
    databases: &[Database],
    names: &[String],
    progress: &Progress,
) -> anyhow::Result<Sagas> {
    let run = uuid::Uuid::new_v4().simple().to_string();
    let out = machine.directory().join("sagas.json");
    let all: Vec<&Database> = databases.iter().collect();
    let relay = role::start_relay(machine, &all, outbox_relay::settings::COMPRESSION, role::Threads::One)?;
    let participants = role::start_participants(machine, &run, layout, &all[1..])?;
    let orchestrator = role::start_orchestrator(machine, &run, layout, all[0], args.in_flight, &out)?;
    let processes =
        [("relay", relay.pid()), ("participants", participants.pid()), ("orchestrator", orchestrator.pid())];

    progress.step("sagas: waiting for the first to end");
    await_first_end(&databases[0]).await?;
    pass(progress, "sagas: warming up", Duration::from_secs(args.warm_up)).await;
    // Autovacuum would do the same within the minute: plans that were made for empty tables are made anew.
    for database in databases {
        sqlx::query("vacuum analyze").execute(&database.pool(1).await?).await?;
    }
    await_compilers(machine, progress).await;
    // From here on the WAL goes to files that existed before. The committing transaction would first fill a new file
    // with zeros, once a second: a cost that a database has only while it is new.
    sqlx::query("checkpoint").execute(&databases[0].pool(1).await?).await?;
    let compiled = compilers(machine);
    let (from, before, written) =
        (now()?, meter::read(machine, &processes).await?, topics::total_messages(machine, names).await?);
    pass(progress, "sagas: measuring", Duration::from_secs(args.seconds)).await;
    let (to, after) = (now()?, meter::read(machine, &processes).await?);
    let compiled = compiled.zip(compilers(machine)).map(|(before, after)| after.since(&before));
    let messages = topics::total_messages(machine, names).await? - written;
    let counting = statements::begin(machine).await?;
    let counted_from = now()?;
    let counted = match counting {
        true => {
            pass(progress, "sagas: counting statements", COUNTED_FOR).await;
            statements::end(machine).await?
        }
        false => Vec::new(),
    };
    let counted_to = now()?;
    for process in [&orchestrator, &participants, &relay] {
        ensure!(process.is_running(), "{} ended early; its log is {}", process.name(), process.log().display());
        process.stop().await;
    }
    let ended: Vec<Ended> = serde_json::from_slice(&fs::read(&out).with_context(|| out.display().to_string())?)?;
    let within = |from, to| ended.iter().filter(move |saga| (from..to).contains(&saga.at));
    let mut histogram: Histogram<u64> = Histogram::new_with_bounds(1, SLOWEST_MICROS, 3)?;
    within(from, to).for_each(|saga| histogram.saturating_record(saga.took));
    let ms = |micros: u64| f64::from(u32::try_from(micros).unwrap_or(u32::MAX)) / 1_000.0;
    let cost = after.since(&before);
    #[allow(clippy::cast_precision_loss)]
    let per_second = histogram.len() as f64 / cost.seconds;
    Ok(Sagas {
        layout,
        in_flight: args.in_flight,
        partitions: args.saga_partitions,
        ended: histogram.len(),
        per_second,
        latency_ms: Latency {
            p50: ms(histogram.value_at_quantile(0.5)),
            p99: ms(histogram.value_at_quantile(0.99)),
            p999: ms(histogram.value_at_quantile(0.999)),
            max: ms(histogram.max()),
        },
        compilers: compiled.map(|seconds| seconds / cost.seconds),
        messages,
        cost,
        statements: counted,
        ended_while_counted: within(counted_from, counted_to).count() as u64,
        steps: Steps::default(),
    })
}

/// Waits until a saga has ended: the consumers have then joined their groups, which takes a few seconds on a busy
/// machine.
async fn await_first_end(orchestrator: &Database) -> anyhow::Result<()> {
    let pool = orchestrator.pool(1).await?;
    let deadline = Instant::now() + FIRST_END;
    while !sqlx::query_scalar("select exists (select from saga where status = 'completed')").fetch_one(&pool).await? {
        ensure!(Instant::now() < deadline, "no saga ended within {} s", FIRST_END.as_secs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Waits until the broker's JVM has nearly done with compiling itself. That takes longer on a slower machine, and a
/// broker does it once in its life. Returns at once where the bench cannot read the compilers.
async fn await_compilers(machine: &Machine, progress: &Progress) {
    let deadline = Instant::now() + COMPILED_MAX;
    let mut quiet = 0;
    while let Some(before) = compilers(machine).filter(|_| quiet < QUIET_LOOKS && Instant::now() < deadline) {
        pass(progress, "sagas: waiting until Kafka's JVM has compiled itself; looking again", LOOK_AT_COMPILERS).await;
        let worked = compilers(machine).map_or(0.0, |now| now.since(&before));
        quiet = if worked < COMPILERS_QUIET * LOOK_AT_COMPILERS.as_secs_f64() { quiet + 1 } else { 0 };
    }
}

/// The broker's compilers; `None` where the bench did not start the broker.
fn compilers(machine: &Machine) -> Option<Compilers> {
    machine.kafka_pid().and_then(Compilers::read)
}

fn now() -> anyhow::Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros())?)
}

async fn pass(progress: &Progress, what: &str, time: Duration) {
    progress.step(format!("{what} for {} s", time.as_secs()));
    tokio::time::sleep(time).await;
}

//! The yardstick beside the sagas: bare step-transactions (inbox row, saga row updated, outbox row) on the same
//! PostgreSQL. There is no Kafka, relay, JSON or engine.
//!
//! The yardstick is measured twice: with one step a transaction, on as many connections as are useful; and with sets of
//! steps, like a consumer's batches.

use crate::{cli::SagaArgs, databases::Database, machine::Machine};
use saga_core::service::messaging_migrations;
use serde::Serialize;
use sqlx::PgPool;
use stack::progress::Progress;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How many connections work at once.
const OPEN_CONNECTIONS: u32 = 16;
/// How many steps a set has.
const STEPS_PER_SET: usize = 16;
/// How many sagas each connection's steps belong to.
const SAGAS_PER_CONNECTION: usize = 64;
/// How long each variant is measured.
const MEASURED_FOR: Duration = Duration::from_secs(5);

/// The yardstick, in steps a second.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Steps {
    /// Steps a second with one step a transaction.
    pub singly: f64,
    /// Steps a second in sets of `STEPS_PER_SET`.
    pub in_sets: f64,
}

/// Measures both variants.
pub async fn run(machine: &Machine, args: &SagaArgs, progress: &Progress) -> anyhow::Result<Steps> {
    let database = Database::create(machine, "steps", &[messaging_migrations()]).await?;
    let pool = database.pool(OPEN_CONNECTIONS).await?;
    sqlx::raw_sql(
        "create table step_saga (id uuid primary key, step integer not null, state jsonb not null) with (fillfactor = 60);
         select inbox_add_partitions(interval '1 day')",
    )
    .execute(&pool)
    .await?;
    let time = MEASURED_FOR.min(Duration::from_secs(args.seconds));
    progress.step(format!("bare step-transactions, one by one, for {} s", time.as_secs()));
    let singly = rate(&pool, 1, time).await?;
    progress.step(format!("bare step-transactions in sets of {STEPS_PER_SET} for {} s", time.as_secs()));
    let in_sets = rate(&pool, STEPS_PER_SET, time).await?;
    pool.close().await;
    database.drop(machine).await?;
    progress
        .done(format!("bare step-transactions: {singly:.0}/s one by one, {in_sets:.0}/s in sets of {STEPS_PER_SET}"));
    Ok(Steps { singly, in_sets })
}

async fn rate(pool: &PgPool, set: usize, time: Duration) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..OPEN_CONNECTIONS {
        workers.spawn(work(pool.clone(), set, start + time));
    }
    let mut steps: u32 = 0;
    while let Some(worker) = workers.join_next().await {
        steps += worker??;
    }
    Ok(f64::from(steps) / start.elapsed().as_secs_f64())
}

async fn work(pool: PgPool, set: usize, until: Instant) -> anyhow::Result<u32> {
    let mut connection = pool.acquire().await?;
    let sagas: Vec<Uuid> = (0..SAGAS_PER_CONNECTION).map(|_| Uuid::now_v7()).collect();
    sqlx::query("insert into step_saga select id, 0, '{}' from unnest($1::uuid[]) as s (id)")
        .bind(&sagas)
        .execute(&mut *connection)
        .await?;
    let mut steps = 0;
    for at in (0..SAGAS_PER_CONNECTION).step_by(set).cycle() {
        if Instant::now() >= until {
            break;
        }
        let ids = &sagas[at..at + set];
        let messages: Vec<Uuid> = ids.iter().map(|_| Uuid::now_v7()).collect();
        let mut tx = sqlx::Connection::begin(&mut *connection).await?;
        sqlx::query("insert into inbox (consumer, source, message_id) select 'steps', 'steps', id from unnest($1::uuid[]) as m (id) order by id on conflict do nothing")
            .bind(&messages)
            .execute(&mut *tx)
            .await?;
        sqlx::query("update step_saga set step = step + 1, state = jsonb_build_object('step', step, 'note', repeat('x', 200)) where id = any ($1)")
            .bind(ids)
            .execute(&mut *tx)
            .await?;
        sqlx::query("insert into outbox (message_id, topic, key, type, payload) select id, 'steps', id::text, 'step.v1', convert_to(repeat('x', 100), 'UTF8') from unnest($1::uuid[]) as m (id)")
            .bind(&messages)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        steps += u32::try_from(set)?;
    }
    Ok(steps)
}

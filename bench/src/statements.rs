//! The statements in which PostgreSQL spends its time, by total time, counted in a stretch of their own.

use crate::machine::Machine;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Row as _};

/// How many statements the report lists.
const LISTED_MAX: i64 = 16;

/// A statement, over all databases.
#[derive(Debug, Clone, Serialize)]
pub struct Statement {
    /// The first 90 characters of its text.
    pub text: String,
    /// How often it was called.
    pub calls: i64,
    /// Milliseconds of execution, in all calls.
    pub total_ms: f64,
    /// Milliseconds of planning, in all calls.
    pub planning_ms: f64,
}

/// Begins to count; false where the server cannot count.
pub async fn begin(machine: &Machine) -> anyhow::Result<bool> {
    if !track(machine, "top").await? {
        return Ok(false);
    }
    let mut admin = machine.admin().await?;
    sqlx::query("select pg_stat_statements_reset()").execute(&mut admin).await?;
    Ok(true)
}

/// Ends counting; returns the statements that took the most time.
pub async fn end(machine: &Machine) -> anyhow::Result<Vec<Statement>> {
    let mut admin = machine.admin().await?;
    let rows = sqlx::query(
        "select left(regexp_replace(query, '\\s+', ' ', 'g'), 90), sum(calls)::bigint, sum(total_exec_time), sum(total_plan_time)
           from pg_stat_statements
          group by 1
          order by sum(total_exec_time + total_plan_time) desc
          limit $1",
    )
    .bind(LISTED_MAX)
    .fetch_all(&mut admin)
    .await?;
    track(machine, "none").await?;
    rows.iter()
        .map(|row| {
            Ok(Statement {
                text: row.try_get(0)?,
                calls: row.try_get(1)?,
                total_ms: row.try_get(2)?,
                planning_ms: row.try_get(3)?,
            })
        })
        .collect()
}

async fn track(machine: &Machine, what: &str) -> anyhow::Result<bool> {
    // The bench changes only a server that it started itself.
    if machine.postgres_pid().is_none() {
        return Ok(false);
    }
    let mut admin = machine.admin().await?;
    sqlx::query(AssertSqlSafe(format!("alter system set pg_stat_statements.track = '{what}'")))
        .execute(&mut admin)
        .await?;
    sqlx::query("select pg_reload_conf()").execute(&mut admin).await?;
    Ok(true)
}

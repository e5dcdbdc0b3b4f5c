//! What health asks the database.

use crate::{
    error_class::{is_pool_full, renew_connections},
    outbox::has_one_to_spare,
    part::{Cause, Report},
    service::database,
    transaction::{Bound, is_timeout, why_none},
};
use sqlx::PgPool;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long the check of a database waits for a connection of the pool, so that there is time to find out why there is none.
const POOL_MAX: Duration = Duration::from_secs(1);

/// A table that callers need, and the rights to it.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// The table.
    pub table: &'static str,
    /// `select`, `insert`, `update`, `delete`.
    pub rights: &'static [&'static str],
}

/// What is not there of what callers need.
pub(super) async fn missing(pool: &PgPool, needs: &[Needs]) -> Result<Report, sqlx::Error> {
    let pairs = needs.iter().flat_map(|need| need.rights.iter().map(|right| (need.table, *right)));
    let (tables, rights): (Vec<&str>, Vec<&str>) = pairs.unzip();
    let written = rights.iter().any(|right| *right != "select");
    let (lacks, is_there, read_only): (Option<String>, bool, bool) = sqlx::query_as(
        "select need.name || ': ' || need.privilege, coalesce(to_regclass(need.name) is not null, true),
                pg_is_in_recovery() or current_setting('transaction_read_only') = 'on'
           from (values (1)) as one
           left join lateral (select name, privilege
                                from unnest($1::text[], $2::text[]) as n (name, privilege)
                               where to_regclass(name) is null
                                  or not has_table_privilege(to_regclass(name), privilege)
                               order by to_regclass(name) is not null, name
                               limit 1) as need on true",
    )
    .bind(tables)
    .bind(rights)
    .fetch_one(pool)
    .await?;
    Ok(match lacks {
        Some(lacks) if is_there => Report::red(Cause::RightMissing, format!("a right is missing: {lacks}")),
        Some(lacks) => Report::red(Cause::TableMissing, format!("a table is missing: {lacks}")),
        None if read_only && written => {
            // Sessions may be read-only that began before a failover, while new ones are not.
            renew_connections();
            Report::red(Cause::DatabaseReadOnly, "the database takes no writes")
        }
        None => Report::fine(),
    })
}

/// The database's clock; of a pool that gives no connection, why.
pub(super) async fn hear_clock(pool: &PgPool) -> Result<(OffsetDateTime, Instant), sqlx::Error> {
    let heard = Bound::new(POOL_MAX).within(database::hear_clock(pool)).await;
    let none = |error: &sqlx::Error| is_pool_full(error) || is_timeout(error) && !has_one_to_spare(pool);
    if !heard.as_ref().is_err_and(none) {
        return heard;
    }
    let why = async { Err(why_none(pool, sqlx::Error::PoolTimedOut).await) };
    Bound::new(POOL_MAX / 2).within(why).await
}

//! The questions that health asks the database.

use crate::{
    clock,
    error_class::is_pool_full,
    outbox::has_one_to_spare,
    part::{Cause, Report},
    transaction::{Bound, is_timeout, why_none},
};
use sqlx::{ConnectOptions as _, Connection as _, PgExecutor, PgPool};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long the check of a database waits for a connection of the pool. It leaves time to find out why there is none.
const POOL_MAX: Duration = Duration::from_secs(1);

/// A table that callers need, and the rights to it.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// The table's name, as the search path finds it.
    pub table: &'static str,
    /// The rights: `select`, `insert`, `update`, `delete`.
    pub rights: &'static [&'static str],
}

/// The SQL condition of a session that may not write.
macro_rules! read_only {
    () => {
        "pg_is_in_recovery() or current_setting('transaction_read_only') = 'on'"
    };
}

/// Reports the tables and rights that callers need and that are missing.
///
/// # Errors
/// When the database does not answer.
pub async fn missing(db: impl PgExecutor<'_>, needs: &[Needs]) -> Result<Report, sqlx::Error> {
    let pairs = needs.iter().flat_map(|need| need.rights.iter().map(|right| (need.table, *right)));
    let (tables, rights): (Vec<&str>, Vec<&str>) = pairs.unzip();
    let written = rights.iter().any(|right| *right != "select");
    let (lacks, is_there, read_only): (Option<String>, bool, bool) = sqlx::query_as(concat!(
        "select need.name || ': ' || need.privilege, coalesce(to_regclass(need.name) is not null, true), ",
        read_only!(),
        " from (values (1)) as one
           left join lateral (select name, privilege
                                from unnest($1::text[], $2::text[]) as n (name, privilege)
                               where to_regclass(name) is null
                                  or not has_table_privilege(to_regclass(name), privilege)
                               order by to_regclass(name) is not null, name
                               limit 1) as need on true",
    ))
    .bind(tables)
    .bind(rights)
    .fetch_one(db)
    .await?;
    Ok(match lacks {
        Some(lacks) if is_there => Report::red(Cause::RightMissing, format!("a right is missing: {lacks}")),
        Some(lacks) => Report::red(Cause::TableMissing, format!("a table is missing: {lacks}")),
        None if read_only && written => Report::red(Cause::DatabaseReadOnly, "the database takes no writes"),
        None => Report::fine(),
    })
}

/// Whether a session that begins now takes writes. Sessions of the pool may have begun before a failover. To replace
/// them is of no use, and costs every request, while new ones take no writes either.
pub(super) async fn a_new_session_writes(pool: &PgPool) -> bool {
    let ask = async {
        let mut connection = pool.connect_options().connect().await?;
        let read_only: bool = sqlx::query_scalar(concat!("select ", read_only!())).fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok::<bool, sqlx::Error>(!read_only)
    };
    Bound::new(POOL_MAX).within(ask).await.unwrap_or(false)
}

/// Asks for the database's clock; if the pool gives no connection, the error says why.
pub(super) async fn hear_clock(pool: &PgPool) -> Result<(OffsetDateTime, Instant), sqlx::Error> {
    let heard = Bound::new(POOL_MAX).within(clock::hear(pool)).await;
    let none = |error: &sqlx::Error| is_pool_full(error) || is_timeout(error) && !has_one_to_spare(pool);
    if !heard.as_ref().is_err_and(none) {
        return heard;
    }
    let why = async { Err(why_none(pool, sqlx::Error::PoolTimedOut).await) };
    Bound::new(POOL_MAX / 2).within(why).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::TestDatabase;

    #[tokio::test]
    async fn sessions_are_replaced_only_when_new_ones_take_writes() {
        const WRITTEN: &[Needs] = &[Needs { table: "item", rights: &["select", "insert"] }];
        let database = TestDatabase::new(&[]).await;
        sqlx::query("create table item (sku text)").execute(&database.pool).await.unwrap();
        let read_only = "do $$ begin
             execute format('alter database %I set default_transaction_read_only = on', current_database());
         end $$";
        sqlx::query(read_only).execute(&database.pool).await.unwrap();
        let old = PgPool::connect(&database.url).await.unwrap();
        let cause = async || missing(&old, WRITTEN).await.unwrap().trouble.map(|trouble| trouble.cause);
        assert_eq!(cause().await, Some(Cause::DatabaseReadOnly));
        assert!(!a_new_session_writes(&old).await, "the database takes no writes");
        let writes = read_only.replace("set default_transaction_read_only = on", "reset default_transaction_read_only");
        sqlx::query(sqlx::AssertSqlSafe(writes)).execute(&database.pool).await.unwrap();
        assert_eq!(cause().await, Some(Cause::DatabaseReadOnly), "this session began before");
        assert!(a_new_session_writes(&old).await);
    }
}

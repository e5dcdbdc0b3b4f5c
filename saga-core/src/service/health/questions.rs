//! The questions that health asks the database.

use crate::{
    clock,
    error_class::is_pool_full,
    outbox::has_one_to_spare,
    part::{Cause, PartReport},
    transaction::{Bound, is_timeout, why_none},
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, PgPool};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How long the check of a database waits for a connection of the pool. It leaves time to find out why there is none.
const POOL_MAX: Duration = Duration::from_secs(1);

/// How long the check of a table waits for a lock on it. That is less than PostgreSQL waits before it looks for a
/// deadlock (`deadlock_timeout`, a second). So the check never ends another transaction.
const LOCK_MAX: Duration = Duration::from_millis(700);

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

/// The SQL query for the partitions that the next rows go to, of the tables in `$1` that callers insert into and that
/// are partitioned by an identity column. A role that may not lock such a partition by name, or may not see how far the
/// numbers have come, gets no row. `pg_get_expr` of no relation: with one, it would wait for whatever locks it.
macro_rules! next_partitions {
    () => {
        "select into_it.oid::regclass::text
           from (select p.partrelid as parent,
                        case when has_sequence_privilege(sequence, 'select, usage')
                             then coalesce(pg_sequence_last_value(sequence), 0) + 1 end as next
                   from unnest($1::text[], $2::text[]) as n (name, privilege)
                   join pg_partitioned_table p on p.partrelid = to_regclass(n.name) and p.partnatts = 1
                   join pg_attribute a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
                  cross join lateral pg_get_serial_sequence(p.partrelid::regclass::text, a.attname) as owned
                  cross join lateral cast(owned as regclass) as sequence
                  where n.privilege = 'insert' and a.attidentity <> '') as numbered
          cross join lateral (select c.oid
                                from pg_inherits i
                                join pg_class c on c.oid = i.inhrelid
                               cross join lateral pg_get_expr(c.relpartbound, 0) as bound
                               cross join lateral regexp_match(
                                     bound, 'FROM \\(''(\\d+)''\\) TO \\(''(\\d+)''\\)') as range
                               where i.inhparent = numbered.parent
                                 and (bound = 'DEFAULT'
                                      or numbered.next >= range[1]::numeric and numbered.next < range[2]::numeric)
                               order by bound = 'DEFAULT'
                               limit 1) as into_it
          where has_table_privilege(into_it.oid, 'insert')"
    };
}

/// Reports the tables and rights that callers need and that are missing, and a table whose lock callers would wait for.
///
/// # Errors
/// When the database does not answer, or another session holds a lock on a table for too long.
pub async fn missing(db: &mut PgConnection, needs: &[Needs]) -> Result<PartReport, sqlx::Error> {
    let pairs = needs.iter().flat_map(|need| need.rights.iter().map(|right| (need.table, *right)));
    let (tables, rights): (Vec<&str>, Vec<&str>) = pairs.unzip();
    let written = rights.iter().any(|right| *right != "select");
    // Looking a partition up takes a lock on its sequence.
    let mut tx = db.begin().await?;
    sqlx::raw_sql(AssertSqlSafe(lock_bound())).execute(&mut *tx).await?;
    let (lacks, is_there, read_only, partitions): (Option<String>, bool, bool, Vec<String>) = sqlx::query_as(concat!(
        "select need.name || ': ' || need.privilege, coalesce(to_regclass(need.name) is not null, true), ",
        read_only!(),
        ", array(",
        next_partitions!(),
        ") from (values (1)) as one
           left join lateral (select name, privilege
                                from unnest($1::text[], $2::text[]) as n (name, privilege)
                               where to_regclass(name) is null
                                  or not has_table_privilege(to_regclass(name), privilege)
                               order by to_regclass(name) is not null, name
                               limit 1) as need on true",
    ))
    .bind(tables)
    .bind(rights)
    .fetch_one(&mut *tx)
    .await?;
    Ok(match lacks {
        Some(lacks) if is_there => PartReport::red(Cause::RightMissing, format!("a right is missing: {lacks}")),
        Some(lacks) => PartReport::red(Cause::TableMissing, format!("a table is missing: {lacks}")),
        None if read_only && written => PartReport::red(Cause::DatabaseReadOnly, "the database takes no writes"),
        None => {
            sqlx::raw_sql(AssertSqlSafe(locks(needs, &partitions))).execute(&mut *tx).await?;
            tx.rollback().await?;
            PartReport::fine()
        }
    })
}

fn lock_bound() -> String {
    format!("set local lock_timeout = '{}ms'", LOCK_MAX.as_millis())
}

/// Takes the locks that requests take. The caller's transaction lets go of them.
///
/// A question that reads would not do. A role that may only insert cannot ask it, and a lock that keeps writes out lets
/// reads through. `only`: a partition that is locked concerns the rows in it, and new rows go to one of `partitions`.
fn locks(needs: &[Needs], partitions: &[String]) -> String {
    let locks = needs.iter().map(|Needs { table, rights }| {
        let mode = if rights.iter().all(|right| *right == "select") { "access share" } else { "row exclusive" };
        format!("lock table only \"{table}\" in {mode} mode")
    });
    // PostgreSQL has quoted these names.
    let of_partitions = partitions.iter().map(|name| format!("lock table only {name} in row exclusive mode"));
    locks.chain(of_partitions).collect::<Vec<_>>().join("; ")
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
    use crate::{
        part::HealthIssue,
        service::Health,
        testkit::{TestDatabase, eventually},
    };
    use tokio_util::sync::CancellationToken;

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
        let cause = async || {
            let mut connection = old.acquire().await.unwrap();
            missing(&mut connection, WRITTEN).await.unwrap().issue.map(|issue| issue.cause)
        };
        assert_eq!(cause().await, Some(Cause::DatabaseReadOnly));
        assert!(!a_new_session_writes(&old).await, "the database takes no writes");
        let writes = read_only.replace("set default_transaction_read_only = on", "reset default_transaction_read_only");
        sqlx::query(AssertSqlSafe(writes)).execute(&database.pool).await.unwrap();
        assert_eq!(cause().await, Some(Cause::DatabaseReadOnly), "this session began before");
        assert!(a_new_session_writes(&old).await);
    }

    #[tokio::test]
    async fn a_locked_table_that_requests_only_write_to_is_not_ready() {
        const ASKED: &[Needs] =
            &[Needs { table: "item", rights: &["select"] }, Needs { table: "answer", rights: &["insert"] }];
        let database = TestDatabase::new(&[]).await;
        sqlx::raw_sql("create table item (sku text); create table answer (key text)")
            .execute(&database.pool)
            .await
            .unwrap();
        let pool = database.limited_to(ASKED).await;
        let says = async |expected: &str, why: &str| {
            // A process that begins has no standing for which a lock of a moment is excused.
            let health = Health::new(&CancellationToken::new());
            health.tables(&pool, ASKED);
            // On a busy machine a look may find no answer in time.
            let seen = eventually(Duration::from_secs(60), || async {
                health.look().await;
                let said = health.readiness().checks["tables"];
                (said != "no_answer").then_some(said)
            });
            assert_eq!(seen.await, expected, "{why}");
        };
        for (table, mode, expected) in [
            ("answer", "access exclusive", "locked"),
            ("answer", "share", "locked"),
            ("item", "share", "ok"),
            ("item", "access exclusive", "locked"),
        ] {
            let mut lock = database.pool.begin().await.unwrap();
            let lock_table = format!("lock table {table} in {mode} mode");
            sqlx::query(AssertSqlSafe(lock_table.clone())).execute(&mut *lock).await.unwrap();
            says(expected, &lock_table).await;
            lock.rollback().await.unwrap();
            says("ok", "the table is free again").await;
        }
    }

    #[tokio::test]
    async fn of_a_partitioned_table_the_lock_counts_that_the_next_row_waits_for() {
        const ASKED: &[Needs] = &[Needs { table: "posted", rights: &["insert"] }];
        let database = TestDatabase::new(&[]).await;
        sqlx::raw_sql(
            r#"create table posted (id bigint not null generated always as identity) partition by range (id);
               create table "Old"    partition of posted for values from (1) to (3);
               create table "Now"    partition of posted for values from (3) to (5);
               create table "Beyond" partition of posted default;
               insert into posted select from generate_series(1, 2)"#,
        )
        .execute(&database.pool)
        .await
        .unwrap();
        let inserts_only = database.limited_to(ASKED).await;
        let locked = async |pool: &PgPool| {
            let mut connection = pool.acquire().await.unwrap();
            match missing(&mut connection, ASKED).await {
                Ok(report) => report.issue.is_some_and(|issue| panic!("{issue:?}")),
                Err(error) => HealthIssue::from(&error).cause == Cause::Locked,
            }
        };
        for (table, mode, expected) in [
            ("Old", "access exclusive", false),
            ("Beyond", "access exclusive", false),
            ("Now", "share", true),
            ("Now", "row exclusive", false),
            ("posted", "share", true),
        ] {
            let mut lock = database.pool.begin().await.unwrap();
            let lock_table = format!(r#"lock table only "{table}" in {mode} mode"#);
            sqlx::query(AssertSqlSafe(lock_table.clone())).execute(&mut *lock).await.unwrap();
            assert_eq!(locked(&database.pool).await, expected, "{lock_table}");
            // Such a role has no right to name a partition.
            assert_eq!(locked(&inserts_only).await, expected && table == "posted", "{lock_table}");
            lock.rollback().await.unwrap();
        }
        sqlx::query(r#"insert into posted select from generate_series(1, 2)"#).execute(&database.pool).await.unwrap();
        let mut lock = database.pool.begin().await.unwrap();
        sqlx::query(r#"lock table only "Beyond" in share mode"#).execute(&mut *lock).await.unwrap();
        assert!(locked(&database.pool).await, "no other partition takes the next row");
        lock.rollback().await.unwrap();
        // Where the next row goes is not to be found out now; an insert would wait, too.
        let mut lock = database.pool.begin().await.unwrap();
        sqlx::query("alter sequence posted_id_seq restart 9").execute(&mut *lock).await.unwrap();
        let asked = Instant::now();
        assert!(locked(&database.pool).await && asked.elapsed() < LOCK_MAX * 3, "{:?}", asked.elapsed());
    }
}

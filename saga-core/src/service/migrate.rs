//! Migrations: one folder per owner, one history table per owner, one process at a time.
//!
//! refinery takes no lock, so fifty first starts at once would trip over each other's `create table`. Here each holds a
//! PostgreSQL advisory lock around it, on a connection of its own, and all but the first find nothing left to do. A
//! process that dies here loses its connection, and with it the lock and the migration that was running: each is one
//! transaction. An applied migration that was edited afterwards is refused, never run.
//!
//! A process that waits, for its turn or for a lock that a migration needs, logs which session it waits for, and waits
//! on.

use super::{config::DatabaseSettings, database, in_clear, lock_watch::LockWatch};
use refinery::Runner;
use refinery_core::{
    AsyncMigrate, Migration,
    traits::r#async::{AsyncQuery, AsyncTransaction},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgConnectOptions};
use std::collections::BTreeSet;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// The advisory lock's key, the same for every owner: owners of one database take turns, too.
const LOCK_KEY: i64 = 0x6f75_7462_6f78_0001;

mod messaging {
    refinery::embed_migrations!("../migrations/messaging");
}

mod saga {
    refinery::embed_migrations!("../migrations/saga");
}

/// One owner's migrations, embedded in the binary.
pub struct Migrations {
    /// The owner's name; the history table is `refinery_<owner>`.
    pub owner: &'static str,
    /// The migrations, from `refinery::embed_migrations!`.
    pub runner: Runner,
}

impl Migrations {
    /// How many files were embedded. A test compares it with the folder: refinery ignores a misnamed file silently.
    #[must_use]
    pub fn count(&self) -> usize {
        self.runner.get_migrations().len()
    }
}

/// Outbox, inbox, participants, idempotency keys: every service's database has them.
#[must_use]
pub fn messaging_migrations() -> Migrations {
    Migrations { owner: "messaging", runner: messaging::migrations::runner() }
}

/// The tables of the orchestrator: sagas, their logs and timers.
#[must_use]
pub fn saga_migrations() -> Migrations {
    Migrations { owner: "saga", runner: saga::migrations::runner() }
}

/// Migrations that did not run.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The connection or the lock failed.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// One owner's migrations failed.
    #[error("migrations of `{owner}`: {source}")]
    Refinery {
        /// The owner's name.
        owner: &'static str,
        /// What went wrong, with the migration's name.
        source: refinery::Error,
    },
}

/// Brings the schema up to date, in the order of `all`; waits for the database. Returns how many migrations it applied.
///
/// # Errors
/// A migration failed, was edited after it ran, or the database answers what waiting will not change.
pub async fn migrate(settings: &DatabaseSettings, all: &[Migrations]) -> Result<usize, MigrateError> {
    // Each process that has a database of its own comes here first.
    in_clear::warn_of_database(&settings.options);
    let options = database::prepare(&settings.options, "migrate");
    let mut session = Session::open(&options).await?;
    session.take_turn().await?;
    let mut applied = 0;
    for migrations in all {
        applied += run(&mut session, migrations).await?;
    }
    // Closing the connection would release the lock as well, only later.
    sqlx::query("select pg_advisory_unlock($1)").bind(LOCK_KEY).execute(&mut session.connection).await?;
    session.connection.close().await?;
    Ok(applied)
}

async fn run(session: &mut Session, migrations: &Migrations) -> Result<usize, MigrateError> {
    let owner = migrations.owner;
    let history = format!("refinery_{owner}");
    if migrations.count() == 0 {
        return Ok(0);
    }
    if is_current(&mut session.connection, &history, migrations).await? {
        tracing::debug!(owner, "the schema is up to date");
        return Ok(0);
    }
    session.owner = owner;
    session.embedded.clone_from(migrations.runner.get_migrations());
    let mut runner = Runner::new(&session.embedded);
    let report = runner
        .set_migration_table_name(&history)
        .run_async(session)
        .await
        .map_err(|source| MigrateError::Refinery { owner, source })?;
    for migration in report.applied_migrations() {
        tracing::info!(owner, %migration, "migrated");
    }
    Ok(report.applied_migrations().len())
}

/// Whether the history holds all that is embedded. Then there is nothing to run, and nothing is written: refinery would
/// issue `create table if not exists` at every start. It may hold more: the previous release starts again beside the
/// next one in a rolling deployment.
async fn is_current(
    connection: &mut PgConnection,
    history: &str,
    migrations: &Migrations,
) -> Result<bool, sqlx::Error> {
    let exists: bool =
        sqlx::query_scalar("select to_regclass($1) is not null").bind(history).fetch_one(&mut *connection).await?;
    if !exists {
        return Ok(false);
    }
    // The table's name is ours: `refinery_` and an owner, a literal of the program.
    let applied: BTreeSet<String> = sqlx::query_scalar(AssertSqlSafe(format!("select checksum::text from {history}")))
        .fetch_all(connection)
        .await?
        .into_iter()
        .collect();
    let embedded = migrations.runner.get_migrations().iter().map(|migration| migration.checksum().to_string());
    Ok(embedded.collect::<BTreeSet<_>>().is_subset(&applied))
}

/// refinery over sqlx, so that TLS, passwords and `sslmode` work for migrations as they do for the pool.
struct Session {
    connection: PgConnection,
    database: String,
    watch: LockWatch,
    /// The owner whose migrations run at present.
    owner: &'static str,
    embedded: Vec<Migration>,
}

impl Session {
    async fn open(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let mut connection = database::wait_for(options).await?;
        let watch = LockWatch::of(&mut connection, options).await?;
        let database = options.get_database().unwrap_or(options.get_username()).to_owned();
        Ok(Self { connection, database, watch, owner: "", embedded: Vec::new() })
    }

    /// Waits until no other process migrates this database.
    async fn take_turn(&mut self) -> Result<(), sqlx::Error> {
        let turn = sqlx::query("select pg_advisory_lock($1)").bind(LOCK_KEY).execute(&mut self.connection);
        let say = |blocked_by: &str| {
            tracing::warn!(
                database = self.database,
                blocked_by,
                "another process migrates this database; waiting until it has. Its log says what it waits for; \
                 pg_terminate_backend(pid) ends one that hangs"
            );
        };
        self.watch.during(turn, say).await.map(drop)
    }
}

impl AsyncTransaction for Session {
    type Error = sqlx::Error;

    /// One migration and its line in the history, or the statement that makes the history.
    async fn execute<'a, T: Iterator<Item = &'a str> + Send + 'a>(&mut self, queries: T) -> Result<usize, sqlx::Error> {
        let queries: Vec<&str> = queries.collect();
        let named = self.embedded.iter().find(|migration| migration.sql() == queries.first().copied());
        let migration = named.map_or_else(|| "the history table".to_owned(), ToString::to_string);
        let say = |blocked_by: &str| {
            tracing::warn!(
                database = self.database,
                owner = self.owner,
                migration,
                blocked_by,
                "a migration waits for a lock, so the service does not start yet; new statements on the same table wait behind \
                 it. Let the sessions that hold the lock finish, or end them: pg_terminate_backend(pid)"
            );
        };
        let work = async {
            let mut tx = self.connection.begin().await?;
            for sql in &queries {
                // A migration, embedded in the binary.
                sqlx::raw_sql(AssertSqlSafe((*sql).to_owned())).execute(&mut *tx).await?;
            }
            tx.commit().await?;
            Ok(queries.len())
        };
        self.watch.during(work, say).await
    }
}

impl AsyncQuery<Vec<Migration>> for Session {
    async fn query(&mut self, sql: &str) -> Result<Vec<Migration>, sqlx::Error> {
        let rows = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_all(&mut self.connection).await?;
        rows.iter().map(applied).collect()
    }
}

impl AsyncMigrate for Session {}

/// A row of a history table: version, name, applied_on (RFC 3339), checksum (decimal).
fn applied(row: &sqlx::postgres::PgRow) -> Result<Migration, sqlx::Error> {
    let decode = |error: Box<dyn std::error::Error + Send + Sync>| sqlx::Error::Decode(error);
    let applied_on = OffsetDateTime::parse(row.try_get(2)?, &Rfc3339).map_err(|error| decode(error.into()))?;
    let checksum = row.try_get::<&str, _>(3)?.parse().map_err(|error: std::num::ParseIntError| decode(error.into()))?;
    Ok(Migration::applied(row.try_get(0)?, row.try_get(1)?, applied_on, checksum))
}

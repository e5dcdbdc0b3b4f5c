//! The one transaction type of all parts: it has a bound, the server knows that bound too, and its commit wakes the
//! relay.
//!
//! Dropping a future ends nothing in PostgreSQL: a backend that waits for a lock does not look at its socket. So a
//! transaction cannot begin without a [`Bound`]. The part gives it up after [`Bound::client`]. PostgreSQL ends the
//! statement a little later (`statement_timeout`), and from version 17 on the whole transaction
//! (`transaction_timeout`). That is before the pool gives up on the connection, so an abandoned attempt never costs a
//! backend beside the pool's.
//!
//! A wait for a lock is another transaction's doing, and has a bound of its own ([`Bound::lock`], `lock_timeout`), well
//! below the others. PostgreSQL returns 55P03 before the part gives up, so slow work and a wait for a lock can be
//! distinguished.
//!
//! When the process dies, the server ends the statement within the bound, and rolls back.
//!
//! ```no_run
//! use saga_core::transaction::{Bound, Transaction};
//! use std::time::Duration;
//!
//! async fn rename(pool: &sqlx::PgPool, item: i64, name: &str) -> Result<(), sqlx::Error> {
//!     let bound = Bound::new(Duration::from_secs(5));
//!     bound
//!         .within(async {
//!             let mut tx = Transaction::begin(pool, bound).await?;
//!             sqlx::query("update item set name = $2 where id = $1").bind(item).bind(name).execute(&mut **tx).await?;
//!             tx.commit().await
//!         })
//!         .await
//! }
//! ```

use crate::{
    error_class::{in_words, is_pool_full},
    outage::Outage,
    outbox::{self, Tx, has_one_to_spare},
    part::Cause,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, PgPool, Postgres, pool::PoolConnection};
use std::{
    io,
    ops::{Deref, DerefMut},
    time::Duration,
};

/// How long one attempt at a transaction may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    client: Duration,
    lock: Option<Duration>,
}

impl Bound {
    /// A bound of `client`: at least 1 ms; at most what PostgreSQL accepts (24 days).
    #[must_use]
    pub const fn new(client: Duration) -> Self {
        Self { client, lock: None }
    }

    /// The same bound, but its statements wait for no lock longer than `lock`.
    #[must_use]
    pub const fn with_lock(self, lock: Duration) -> Self {
        Self { lock: Some(lock), ..self }
    }

    /// When the part gives the attempt up.
    #[must_use]
    pub const fn client(self) -> Duration {
        self.client
    }

    /// How long a statement under this bound waits for a lock: half of [`Bound::client`], unless [`Bound::with_lock`]
    /// says otherwise. So the work before the wait does not make a time-out of it.
    #[must_use]
    pub fn lock(self) -> Duration {
        self.lock.unwrap_or(self.client / 2)
    }

    /// When PostgreSQL ends a statement under this bound: a tenth later than [`Bound::client`], 0.1 to 0.5 s. So the
    /// part's own bound comes first, and the server's before the pool closes the connection.
    #[must_use]
    pub fn server(self) -> Duration {
        self.client.saturating_add(self.margin())
    }

    fn margin(self) -> Duration {
        (self.client / 10).clamp(Duration::from_millis(100), Duration::from_millis(500))
    }

    /// Runs `work`, and drops it with a time-out of the kind that an outage is.
    ///
    /// # Errors
    /// Those of `work`, and [`io::ErrorKind::TimedOut`].
    pub async fn within<T, E: From<sqlx::Error>>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        tokio::time::timeout(self.client, work).await.unwrap_or_else(|_| Err(self.no_answer().into()))
    }

    /// The error of an attempt that was given up.
    #[must_use]
    pub fn no_answer(self) -> sqlx::Error {
        let text = format!("no answer from the database within {:?}", self.client);
        sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text))
    }

    /// Begins a read committed transaction under this bound, in one round trip. The same statement evaluates `columns`,
    /// if any, behind the bound. So a wait for a lock among them is bounded, and one statement less is parsed and
    /// answered.
    pub(crate) fn begin_sql(self, columns: &str) -> String {
        let (statement, lock) = (milliseconds(self.server()), milliseconds(self.lock()));
        let transaction = milliseconds(self.server().saturating_add(self.margin()));
        let comma = if columns.is_empty() { "" } else { ", " };
        format!(
            "begin isolation level read committed;
             select set_config('statement_timeout', '{statement}', true), set_config('lock_timeout', '{lock}', true),
                    case when current_setting('server_version_num')::int >= 170000
                         then set_config('transaction_timeout', '{transaction}', true) end{comma}{columns}"
        )
    }
}

/// Whether an attempt was given up by its [`Bound`], here or in the server.
#[must_use]
pub fn is_timeout(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == io::ErrorKind::TimedOut,
        sqlx::Error::Database(answer) => matches!(answer.code().as_deref(), Some("57014" | "25P04")),
        _ => false,
    }
}

/// Clamps a bound to what PostgreSQL accepts; 0 would mean no bound.
fn milliseconds(bound: Duration) -> u128 {
    bound.as_millis().clamp(1, i32::MAX.unsigned_abs().into())
}

/// How long the database may take to answer a trivial query.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// Takes a connection of the pool.
///
/// # Errors
/// If there is none in time: [`is_pool_full`] distinguishes a pool that this process uses up from a database that opens
/// none.
pub async fn connection(pool: &PgPool) -> Result<PoolConnection<Postgres>, sqlx::Error> {
    match pool.acquire().await {
        Ok(connection) => Ok(connection),
        Err(error) => Err(why_none(pool, error).await),
    }
}

/// Why `pool` gave no connection: sqlx returns the same error for a full pool and for a database that is away. All
/// callers of one moment share one connection that is opened to find out.
pub async fn why_none(pool: &PgPool, error: sqlx::Error) -> sqlx::Error {
    if !is_pool_full(&error) {
        return error;
    }
    if Outage::of_database(pool).answers(database_answers(pool)).await {
        Outage::of_pool(pool).failing_of(Cause::PoolFull, &in_words(&error));
        return error;
    }
    sqlx::Error::Io(io::Error::new(io::ErrorKind::NotConnected, "no connection to the database can be opened"))
}

/// Whether the database would answer another client's query. A pool whose connections are all in use shows nothing of
/// the database, so then a connection is opened for the question.
pub(crate) async fn database_answers(pool: &PgPool) -> bool {
    let ask = async {
        if has_one_to_spare(pool) {
            return sqlx::query("select 1").execute(pool).await.map(drop);
        }
        let mut connection = pool.connect_options().connect().await?;
        connection.ping().await?;
        connection.close().await
    };
    tokio::time::timeout(ANSWER_MAX, ask).await.is_ok_and(|answer| answer.is_ok())
}

/// A transaction of a part's own, read committed. Dropping it rolls it back. Give it, as [`Tx`], to the work within it.
#[must_use = "a transaction that is dropped is rolled back"]
pub struct Transaction {
    tx: Tx<'static>,
    pool: PgPool,
}

impl Transaction {
    /// Begins on a connection of `pool`, in one round trip. Run it, with the work and the commit, inside
    /// [`Bound::within`].
    ///
    /// # Errors
    /// When the pool has no connection in time ([`connection`]), or the database returns an error.
    pub async fn begin(pool: &PgPool, bound: Bound) -> Result<Self, sqlx::Error> {
        match pool.begin_with(AssertSqlSafe(bound.begin_sql(""))).await {
            Ok(tx) => Ok(Self { tx, pool: pool.clone() }),
            Err(error) => Err(why_none(pool, error).await),
        }
    }

    /// Commits, and nudges the relay, as there may be messages to publish. Do not commit a transaction in which a
    /// statement failed: PostgreSQL answers its commit with a rollback, and the driver calls that a success.
    ///
    /// # Errors
    /// That of the commit. If the connection was lost, the commit is in doubt; a caller that made the ids itself can
    /// look for them.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        outbox::commit(self.tx, &self.pool).await
    }

    /// The same as [`Transaction::commit`], for callers with fail points of their own around their commit.
    pub(crate) async fn commit_within_its_edges(self) -> Result<(), sqlx::Error> {
        self.tx.commit().await?;
        outbox::nudge(&self.pool);
        Ok(())
    }

    /// Commits a transaction that appended no message.
    ///
    /// # Errors
    /// The same as [`Transaction::commit`].
    pub async fn commit_quietly(self) -> Result<(), sqlx::Error> {
        self.tx.commit().await
    }

    /// Rolls back now, rather than when the connection is next used.
    ///
    /// # Errors
    /// When the connection is lost; then the server rolls back by itself.
    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        self.tx.rollback().await
    }
}

impl Deref for Transaction {
    type Target = Tx<'static>;

    fn deref(&self) -> &Tx<'static> {
        &self.tx
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut Tx<'static> {
        &mut self.tx
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_bound_is_a_little_above_the_parts_own() {
        for (client, server) in [(200, 300), (1_000, 1_100), (2_000, 2_200), (30_000, 30_500), (60_000, 60_500)] {
            assert_eq!(Bound::new(Duration::from_millis(client)).server(), Duration::from_millis(server));
        }
        assert_eq!(milliseconds(Bound::new(Duration::MAX).server()), i32::MAX.unsigned_abs().into());
        assert_eq!(milliseconds(Duration::ZERO), 1, "0 would be no bound");
    }

    #[test]
    fn a_wait_for_a_lock_ends_well_before_the_part_gives_up() {
        for client in [1, 200, 60_000].map(Duration::from_millis) {
            assert!(Bound::new(client).lock() <= client / 2);
        }
        let short = Bound::new(Duration::from_secs(30)).with_lock(Duration::from_millis(100));
        assert!(short.begin_sql("").contains("set_config('lock_timeout', '100', true)"), "{}", short.begin_sql(""));
    }
}

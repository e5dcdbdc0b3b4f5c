//! The one transaction type of all parts: it knows its bound, the server knows it too, and its commit wakes the relay.
//!
//! Dropping a future ends nothing in PostgreSQL: a backend that waits for a lock does not look at its socket. So a
//! transaction cannot begin without a [`Bound`]. The part gives it up after [`Bound::client`]; PostgreSQL ends the statement a
//! little later (`statement_timeout`), and from version 17 on the whole transaction (`transaction_timeout`). That is before
//! the pool gives up on the connection, so an attempt that was abandoned never costs a backend beside the pool's.
//!
//! A wait for a lock is another transaction's doing, and has a bound of its own ([`Bound::lock`], `lock_timeout`), well below the
//! others: PostgreSQL says 55P03 before the part gives up, and a part that works slowly and one that waits are told apart.
//!
//! When the process dies, the server ends the statement within the bound, and rolls back.

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
    /// At least 1 ms; at most what PostgreSQL can be given (24 days).
    #[must_use]
    pub const fn new(client: Duration) -> Self {
        Self { client, lock: None }
    }

    /// Likewise, but a statement of it waits for no lock longer than `lock`.
    #[must_use]
    pub const fn with_lock(self, lock: Duration) -> Self {
        Self { lock: Some(lock), ..self }
    }

    /// When the part gives the attempt up.
    #[must_use]
    pub const fn client(self) -> Duration {
        self.client
    }

    /// How long a statement of it waits for a lock: half of [`Bound::client`], so that what the transaction did before the wait
    /// does not make a time-out of it.
    #[must_use]
    pub fn lock(self) -> Duration {
        self.lock.unwrap_or(self.client / 2)
    }

    /// When PostgreSQL ends a statement of it: a tenth later than [`Bound::client`], 0.1 to 0.5 s, so that the part's own
    /// bound comes first, and the server's before the pool closes the connection.
    #[must_use]
    pub fn server(self) -> Duration {
        self.client.saturating_add(self.margin())
    }

    fn margin(self) -> Duration {
        (self.client / 10).clamp(Duration::from_millis(100), Duration::from_millis(500))
    }

    /// What `work` comes to, or a time-out of the kind that an outage is. What `work` holds is dropped.
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

    /// Begins a read committed transaction under this bound, in one round trip. `columns`, if any, are evaluated behind the bound
    /// in the same statement: a wait for a lock among them is bounded, and a statement less is parsed and answered.
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

/// What PostgreSQL takes: not 0, which is no bound.
fn milliseconds(bound: Duration) -> u128 {
    bound.as_millis().clamp(1, i32::MAX.unsigned_abs().into())
}

/// How long the database may take to answer a question that it can answer at once.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// A connection of the pool.
///
/// # Errors
/// When there is none in time: [`is_pool_full`] tells whether this process has all of them in use, or none can be opened.
pub async fn connection(pool: &PgPool) -> Result<PoolConnection<Postgres>, sqlx::Error> {
    match pool.acquire().await {
        Ok(connection) => Ok(connection),
        Err(error) => Err(why_none(pool, error).await),
    }
}

/// Why `pool` gave no connection: sqlx says the same of one that is full and of a database that is away. All who find out at
/// one time open one connection for it.
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

/// Whether the database would answer somebody else's question. A pool whose connections are all in use says nothing of the
/// database, so then it is asked over one that is opened for that.
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

/// A transaction of a part's own, read committed. Dropped, it is rolled back. Give it, as [`Tx`], to whatever works within it.
#[must_use = "a transaction that is dropped is rolled back"]
pub struct Transaction {
    tx: Tx<'static>,
    pool: PgPool,
}

impl Transaction {
    /// Begins on a connection of `pool`, in one round trip. Run it, with the work and the commit, inside [`Bound::within`].
    ///
    /// # Errors
    /// When the pool has no connection in time ([`connection`]), or the database says no.
    pub async fn begin(pool: &PgPool, bound: Bound) -> Result<Self, sqlx::Error> {
        match pool.begin_with(AssertSqlSafe(bound.begin_sql(""))).await {
            Ok(tx) => Ok(Self { tx, pool: pool.clone() }),
            Err(error) => Err(why_none(pool, error).await),
        }
    }

    /// Commits, and tells the relay that there may be messages to publish. A transaction in which a statement failed must not
    /// come here: PostgreSQL answers its commit with a rollback, and the driver calls that a success.
    ///
    /// # Errors
    /// That of the commit. When the connection was lost, the commit is in doubt: ids that the caller made tell, when they are
    /// looked for.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        outbox::commit(self.tx, &self.pool).await
    }

    /// Likewise, for what has fail points of its own around its commit.
    pub(crate) async fn commit_within_its_edges(self) -> Result<(), sqlx::Error> {
        self.tx.commit().await?;
        outbox::nudge(&self.pool);
        Ok(())
    }

    /// Commits a transaction that appended no message.
    ///
    /// # Errors
    /// As of [`Transaction::commit`].
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

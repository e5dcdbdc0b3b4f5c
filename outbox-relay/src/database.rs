//! Conversations with the outbox's database, each of them bounded, in this process and in the server.
//!
//! A host that is lost sends nothing: its connections neither answer nor end, and a task that waits for one waits for
//! ever. An owner that waits like that publishes nothing while its lease is renewed over another connection, so no
//! replica takes over either. So every conversation has a bound. A connection whose conversation did not come to its
//! end is closed; only a connection that is given back is used again.
//!
//! A statement that waits for a lock does not notice that its client is gone. So every statement has a bound in the
//! server as well, a little above this process's. A connection that is given up keeps its place in the pool until the
//! server has ended its statement. So there are never more server processes than the pools have places.

use saga_core::{
    clock,
    outage::Outage,
    transaction::{Bound, why_none},
};
use sqlx::{
    Connection as _, PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    future::Future,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

/// A connection that was in use within this time is given out without a ping.
const TRUSTED_FOR: Duration = Duration::from_millis(500);
/// A ping takes one round trip, so it has only this part of a conversation's time: several connections may be silent.
const PING_PART: u32 = 8;
/// A server that has ended a statement answers within this.
const ENDED_WITHIN: Duration = Duration::from_millis(250);

/// Whether the error means that the service has not made its tables yet.
pub(crate) fn is_missing(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| matches!(&*code, "42P01" | "42883"))
}

/// A pool of connections to the outbox's database for one purpose, with the bound of its conversations.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    pool: PgPool,
    /// The shortage in which all connections of the pool are in use.
    full: Arc<Outage>,
    patience: Duration,
    /// How long the server may take to end the statement of a connection that is given up.
    ends: Duration,
}

impl Database {
    /// Makes a pool that connects when it is first used. A conversation, and getting a connection for it, may take
    /// `patience` each.
    pub(crate) fn new(options: PgConnectOptions, connections: u32, patience: Duration) -> Self {
        Self::with_statements(options, connections, patience, Bound::new(patience).server())
    }

    /// Makes a pool like [`Database::new`], with statements that the server ends after `longest`.
    pub(crate) fn with_statements(
        options: PgConnectOptions,
        connections: u32,
        patience: Duration,
        longest: Duration,
    ) -> Self {
        let options = options.options([("statement_timeout", longest.as_millis().to_string())]);
        let ping = patience / PING_PART;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(patience)
            .test_before_acquire(false)
            .before_acquire(move |connection, use_| {
                Box::pin(async move {
                    if use_.idle_for > TRUSTED_FOR {
                        Bound::new(ping).within(connection.ping()).await?;
                    }
                    Ok::<_, sqlx::Error>(true)
                })
            })
            // sqlx pings as well, but without a bound: a silent connection would keep its place in the pool for ever.
            .after_release(move |connection, _| {
                Box::pin(async move { Bound::new(ping).within(connection.ping()).await.map(|()| true) })
            })
            .connect_lazy_with(options);
        let full = Outage::of_pool(&pool);
        Self { pool, full, patience, ends: longest + ENDED_WITHIN }
    }

    /// Takes a connection, for one conversation or several.
    pub(crate) async fn connect(&self) -> Result<PooledConnection, sqlx::Error> {
        match self.pool.acquire().await {
            Ok(connection) => {
                self.full.working();
                Ok(PooledConnection { connection: Some(connection), ends: self.ends })
            }
            Err(error) => Err(self.why_none(error).await),
        }
    }

    /// In a pool of one, the task that has the connection comes here again when it is closed: then the server takes too
    /// long.
    async fn why_none(&self, error: sqlx::Error) -> sqlx::Error {
        match error {
            sqlx::Error::PoolTimedOut if self.pool.options().get_max_connections() == 1 => {
                Bound::new(self.patience).no_answer()
            }
            error => why_none(&self.pool, error).await,
        }
    }

    /// Whether all its connections have been in use for at least `long`.
    pub(crate) fn is_full_for(&self, long: Duration) -> bool {
        let since = self.full.issue().and_then(|full| full.since);
        since.is_some_and(|since| clock::monotonic().saturating_duration_since(since) >= long)
    }

    /// The outage of the database, one for all parts of this process that use it.
    pub(crate) fn outage(&self) -> Arc<Outage> {
        Outage::of_database(&self.pool)
    }

    /// The options with which the pool connects.
    pub(crate) fn options(&self) -> PgConnectOptions {
        self.pool.connect_options().as_ref().clone()
    }

    /// Runs one conversation over a connection of its own.
    pub(crate) async fn ask<T, E: From<sqlx::Error>>(
        &self,
        conversation: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.connect().await?;
        let said = self.within(conversation(&mut connection)).await?;
        connection.give_back();
        Ok(said)
    }

    /// Runs `conversation`; an error if it does not come to its end in time.
    pub(crate) async fn within<T, E: From<sqlx::Error>>(
        &self,
        conversation: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.within_times(1, conversation).await
    }

    /// Runs a conversation like [`Database::within`], one that does `times` as much as others.
    pub(crate) async fn within_times<T, E: From<sqlx::Error>>(
        &self,
        times: u32,
        conversation: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        Bound::new(self.patience.saturating_mul(times)).within(conversation).await
    }
}

/// A connection from the pool. It is closed when it is dropped, as it is by an error or in the middle of a
/// conversation.
pub(crate) struct PooledConnection {
    connection: Option<PoolConnection<Postgres>>,
    ends: Duration,
}

const THERE: &str = "it is taken only when this is given back or dropped";

impl PooledConnection {
    /// Gives the connection back for others to use: the conversation is over.
    pub(crate) fn give_back(mut self) {
        drop(self.connection.take());
    }
}

impl Deref for PooledConnection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.as_ref().expect(THERE)
    }
}

impl DerefMut for PooledConnection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.as_mut().expect(THERE)
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            drop(connection.detach());
            return;
        };
        // The server answers when it has ended the statement. A host that is gone does not answer, and the task waits
        // no longer than `ends`.
        let ends = self.ends;
        runtime.spawn(async move {
            tokio::time::timeout(ends, connection.ping()).await.ok();
            drop(connection.detach());
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::{
        error_class::{is_outage, is_pool_full},
        testkit::TestDatabase,
    };
    use std::str::FromStr as _;

    #[tokio::test]
    async fn a_full_pool_is_told_from_a_server_that_is_away() {
        let database = TestDatabase::new(&[]).await;
        let options = PgConnectOptions::from_str(&database.url).unwrap();
        let patience = Duration::from_millis(200);
        let db = Database::new(options.clone(), 2, patience);
        let all = [db.connect().await.unwrap(), db.connect().await.unwrap()];
        assert!(is_pool_full(&db.connect().await.err().unwrap()));
        assert!(db.full.check().unwrap_err().contains("a larger pool"));
        all.into_iter().for_each(PooledConnection::give_back);
        db.connect().await.unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let away = Database::new(options.host("127.0.0.1").port(closed.port()), 2, patience);
        assert!(is_outage(&away.connect().await.err().unwrap()));
    }
}

//! Conversations with the outbox's database, each of them bounded.
//!
//! A host that is lost says nothing: its connections neither answer nor end, and whoever waits for one waits for ever. An
//! owner that waits like that publishes nothing while its lease is renewed over another connection, so nobody takes over
//! either. So every conversation has a bound, and a connection whose conversation did not come to its end is closed: only
//! what is given back is used again.

use sqlx::{
    Connection as _, PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgArguments, PgConnectOptions, PgPoolOptions},
    query::Query,
};
use std::{
    future::Future,
    io,
    ops::{Deref, DerefMut},
    time::Duration,
};

/// A connection that was in use so short a time ago is given out without asking whether it is still there.
const TRUSTED: Duration = Duration::from_millis(500);
/// To be asked that takes one round trip, so it has only this part of a conversation's time: several may be silent.
const PING: u32 = 8;

/// `conversation`, if it comes to its end in time.
pub(crate) async fn within<T, E: From<sqlx::Error>>(
    patience: Duration,
    conversation: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(patience, conversation).await {
        Ok(said) => said,
        Err(_) => Err(silent(patience).into()),
    }
}

/// Looks like any other lost connection to those who ask what an error means.
fn silent(patience: Duration) -> sqlx::Error {
    let text = format!("PostgreSQL has not answered for {:.1} s", patience.as_secs_f64());
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// The database, as the owner's tasks use it.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    pool: PgPool,
    patience: Duration,
}

impl Database {
    /// Connects when it is first used. A conversation, and getting a connection for it, may take `patience` each.
    pub(crate) fn new(options: PgConnectOptions, connections: u32, patience: Duration) -> Self {
        let ping = patience / PING;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(patience)
            .test_before_acquire(false)
            .before_acquire(move |connection, use_| {
                Box::pin(async move {
                    if use_.idle_for > TRUSTED {
                        within(ping, connection.ping()).await?;
                    }
                    Ok::<_, sqlx::Error>(true)
                })
            })
            // sqlx asks as well, but without a bound: a silent connection would keep its place in the pool for ever.
            .after_release(move |connection, _| {
                Box::pin(async move { within(ping, connection.ping()).await.map(|()| true) })
            })
            .connect_lazy_with(options);
        Self { pool, patience }
    }

    /// A connection, for one conversation or several.
    pub(crate) async fn connect(&self) -> Result<Borrowed, sqlx::Error> {
        Ok(Borrowed(Some(self.pool.acquire().await?)))
    }

    /// Where it is.
    pub(crate) fn options(&self) -> PgConnectOptions {
        self.pool.connect_options().as_ref().clone()
    }

    /// One conversation over a connection of its own.
    pub(crate) async fn ask<T, E: From<sqlx::Error>>(
        &self,
        conversation: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.connect().await?;
        let said = self.within(conversation(&mut connection)).await?;
        connection.give_back();
        Ok(said)
    }

    /// `conversation`, if it comes to its end in time.
    pub(crate) async fn within<T, E: From<sqlx::Error>>(
        &self,
        conversation: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        within(self.patience, conversation).await
    }
}

/// A connection from the pool. It is closed when it is dropped, as it is by an error or in the middle of a conversation.
pub(crate) struct Borrowed(Option<PoolConnection<Postgres>>);

const THERE: &str = "it is taken only when this is given back or dropped";

impl Borrowed {
    /// For others to use: the conversation is over.
    pub(crate) fn give_back(mut self) {
        drop(self.0.take());
    }
}

impl Deref for Borrowed {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.0.as_ref().expect(THERE)
    }
}

impl DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect(THERE)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // Without a word: there may be nobody to hear it.
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

/// One connection of one's own, that nobody else can keep busy; made again after a failure.
#[derive(Debug)]
pub(crate) struct PrivateLine {
    options: PgConnectOptions,
    idle: Option<PgConnection>,
}

impl PrivateLine {
    pub(crate) fn new(options: PgConnectOptions) -> Self {
        Self { options, idle: None }
    }

    /// Runs one statement; says how many rows it changed.
    pub(crate) async fn execute(
        &mut self,
        patience: Duration,
        statement: Query<'_, Postgres, PgArguments>,
    ) -> Result<u64, sqlx::Error> {
        within(patience, async {
            let mut connection = match self.idle.take() {
                Some(connection) => connection,
                None => PgConnection::connect_with(&self.options).await?,
            };
            let done = statement.execute(&mut connection).await?;
            self.idle = Some(connection);
            Ok(done.rows_affected())
        })
        .await
    }
}

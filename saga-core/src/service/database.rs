//! A pool that waits for its database, and that is safe to cancel on.
//!
//! The trap: a future that runs `Pool::begin()` is dropped between sending `begin` and reading its answer. Then sqlx
//! returns the connection to the pool while the server is inside a transaction. The next borrower's writes join that
//! transaction, are acknowledged, and vanish with it. So each connection that comes back is rolled back, whatever it
//! says about itself, before another borrower gets it.

use super::config::DatabaseSettings;
use crate::{
    error_class::{is_current, is_outage},
    outage::Wait,
    retry::Backoff,
};
use sqlx::{
    Connection, Error, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::time::Duration;

/// How long a borrower waits for a connection before the request fails; a client's patience.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The server ends a transaction that falls silent for so long (its process is stopped, or its machine cut off). So its
/// locks do not hold up a duplicate for ever. Shorter than the relay's usual lease, 10 s.
const IDLE_IN_TRANSACTION: &str = "8s";

/// The server ends a statement outside of a [`Transaction`](crate::transaction::Transaction) after this: a request that
/// was given up would leave it waiting. Transactions have bounds of their own.
const STATEMENT_MAX: &str = "30s";

/// A connection that was in use so short a time ago is given out without a check whether it is still there.
const TRUSTED_FOR: Duration = Duration::from_millis(500);

/// A connection that does not answer for so long when it comes back is closed. Its server is gone without a word, and
/// while the pool waits for it, it counts against the pool.
const ROLLBACK_MAX: Duration = Duration::from_secs(2);

/// The pauses between attempts while the database is away.
const WAIT: Backoff = Backoff::doubling(Duration::from_millis(100), Duration::from_secs(2));

/// Opens the pool: waits until the database is there, and logs that once. An answer that waiting will not change (no
/// such database, wrong password) is an error at once.
///
/// # Errors
/// The database answers what waiting will not change: there is no such database, or the password is wrong.
pub async fn connect(settings: &DatabaseSettings, application: &str) -> Result<PgPool, Error> {
    wait_for(&prepare(&settings.options, application)).await?.close().await?;
    Ok(pool(settings, application))
}

/// Makes the pool without waiting: it connects when it is first used. Needs a tokio runtime around it.
#[must_use]
pub fn pool(settings: &DatabaseSettings, application: &str) -> PgPool {
    let options = prepare(&settings.options, application).options([("statement_timeout", STATEMENT_MAX)]);
    pool_options(settings.max_connections).connect_lazy_with(options)
}

/// The pool's behaviour, apart from the place that it connects to.
#[must_use]
pub fn pool_options(max_connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // sqlx's check before every use costs each transaction a round trip. A connection that was used a moment ago is
        // not checked.
        .test_before_acquire(false)
        // A statement whose client is gone ends within a second, also one that waits for a lock. A server on a system
        // that cannot find out ends it by its bound.
        .after_connect(|connection, _| {
            Box::pin(async move {
                sqlx::raw_sql("set client_connection_check_interval = '1s'").execute(connection).await.ok();
                Ok(())
            })
        })
        .before_acquire(|connection, use_| {
            Box::pin(async move {
                if !is_current(use_.age) {
                    return Ok(false);
                }
                if use_.idle_for > TRUSTED_FOR {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                // `rollback` alone would make the server warn each time that there is nothing to roll back.
                let rolled_back = sqlx::raw_sql("begin; rollback").execute(connection);
                match tokio::time::timeout(ROLLBACK_MAX, rolled_back).await {
                    Ok(answer) => answer.map(|_| true),
                    Err(_) => Err(Error::Io(std::io::ErrorKind::TimedOut.into())),
                }
            })
        })
}

/// The options that every connection has, the pool's and the migrations'.
pub(super) fn prepare(options: &PgConnectOptions, application: &str) -> PgConnectOptions {
    options
        .clone()
        .application_name(application)
        .options([("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION)])
}

/// Opens one connection, as soon as the database takes it.
pub(super) async fn wait_for(options: &PgConnectOptions) -> Result<PgConnection, Error> {
    let mut delays = WAIT.delays();
    let wait = Wait::default();
    loop {
        match PgConnection::connect_with(options).await {
            Ok(connection) => {
                if wait.ends() {
                    tracing::info!("the database is there");
                }
                return Ok(connection);
            }
            Err(error) if is_outage(&error) => {
                if wait.begins() {
                    let socket = options.get_socket().map(|socket| socket.display().to_string());
                    let (host, port) = (socket.as_deref().unwrap_or(options.get_host()), options.get_port());
                    tracing::warn!(host, port, %error, "waiting for the database");
                }
                tokio::time::sleep(delays.next().unwrap_or(WAIT.max)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

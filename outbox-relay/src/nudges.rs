//! Hears services tell that they have committed something (`notify outbox`), so that it is read at once.
//!
//! A hint and nothing more: whatever is lost of it, the reader looks by itself after its pause. One connection is held
//! for it. Behind a pooler that hands a connection from one client to the next nothing is listened for: others would be
//! told.

use futures::FutureExt as _;
use saga_core::{outbox::NUDGES, transaction::Bound};
use sqlx::{
    Connection as _, PgConnection, Row as _,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};

/// Until it is tried again to listen.
const AGAIN: Duration = Duration::from_secs(2);
/// PostgreSQL answers within this.
const ANSWER: Duration = Duration::from_secs(5);
/// Nothing heard for so long: is the connection still there?
const QUIET: Duration = Duration::from_secs(30);
/// How often it is looked whether connections are our own: a busy pooler may give us the same one by chance.
const LOOKS: usize = 5;

/// Listens for as long as it lives.
pub(crate) struct Nudges {
    /// Many that nobody has waited for are one.
    heard: Arc<Notify>,
    _listening: AbortOnDropHandle<()>,
}

impl Nudges {
    pub(crate) fn listen(options: PgConnectOptions) -> Self {
        let heard = Arc::new(Notify::new());
        let _listening = AbortOnDropHandle::new(tokio::spawn(listen(options, Arc::clone(&heard))));
        Self { heard, _listening }
    }

    /// Waits for the next, or returns at once when there was one since the last.
    pub(crate) async fn heard(&self) {
        self.heard.notified().await;
    }

    /// Whether there was one since the last: for who is about to look anyway.
    pub(crate) fn take(&self) -> bool {
        self.heard().now_or_never().is_some()
    }
}

async fn listen(options: PgConnectOptions, heard: Arc<Notify>) {
    let options = options.options([("statement_timeout", ANSWER.as_millis().to_string())]);
    loop {
        match hear(&options, &heard).await {
            Ok(Pooled) => {
                info!(
                    "there is a transaction-mode pooler before PostgreSQL: not listening for commits, looking for them"
                );
                return;
            }
            // Whoever finds out that the database is away, it is not this.
            Err(error) => debug!(%error, "commits are not heard of; listening again soon"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn hear(options: &PgConnectOptions, heard: &Notify) -> Result<Pooled, sqlx::Error> {
    if Bound::new(ANSWER).within(is_pooled(options)).await? {
        return Ok(Pooled);
    }
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    Bound::new(ANSWER).within(listener.listen(NUDGES)).await?;
    loop {
        match tokio::time::timeout(QUIET, listener.try_recv()).await {
            Ok(Ok(Some(_))) => {
                while listener.next_buffered().is_some() {}
                heard.notify_one();
            }
            // The connection was lost, and is made again by the next call.
            Ok(Ok(None)) => {}
            Ok(Err(error)) => return Err(error),
            // A host that is gone says nothing, either.
            Err(_) => {
                Bound::new(ANSWER).within(sqlx::query("select 1").execute(&mut listener)).await?;
            }
        }
    }
}

/// There is somebody between us and PostgreSQL who gives a client another connection for each transaction.
struct Pooled;

/// Who has a connection to PostgreSQL of their own has it for good, and nobody else has it meanwhile.
async fn is_pooled(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut one = PgConnection::connect_with(options).await?;
    let mut other = PgConnection::connect_with(options).await?;
    for _ in 0..LOOKS {
        let ours = backend(&mut one).await?;
        let mut held = other.begin().await?;
        let theirs = backend(&mut held).await?;
        let still_ours = backend(&mut one).await?;
        held.rollback().await?;
        if theirs == ours || still_ours != ours {
            return Ok(true);
        }
    }
    one.close().await?;
    other.close().await?;
    Ok(false)
}

async fn backend(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    // Without preparing it: not every pooler can do that.
    sqlx::raw_sql("select pg_backend_pid()").fetch_one(connection).await?.try_get(0)
}

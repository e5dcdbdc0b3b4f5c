//! Listens for the nudges of services that have committed something (`notify outbox`), so that it is read at once.
//!
//! A nudge is a hint and nothing more: if one is lost, the reader's next look finds the rows. The listener holds one
//! connection. Behind a pooler that hands a connection from one client to the next the relay does not listen, because
//! other clients would get the nudges.

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

/// The pause before the next try to listen.
const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// PostgreSQL answers within this.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// After this long without a nudge the listener checks its connection.
const CHECK_AFTER: Duration = Duration::from_secs(30);
/// How often the check for a pooler looks: a busy pooler may give the same connection twice by chance.
const POOLER_LOOKS: usize = 5;

/// Listens for as long as this value lives.
pub(crate) struct Nudges {
    /// Signals a nudge; several that no task has waited for become one.
    heard: Arc<Notify>,
    _listening: AbortOnDropHandle<()>,
}

impl Nudges {
    pub(crate) fn listen(options: PgConnectOptions) -> Self {
        let heard = Arc::new(Notify::new());
        let _listening = AbortOnDropHandle::new(tokio::spawn(listen(options, Arc::clone(&heard))));
        Self { heard, _listening }
    }

    /// Waits for the next nudge, or returns at once when there was one since the last.
    pub(crate) async fn heard(&self) {
        self.heard.notified().await;
    }

    /// Whether there was a nudge since the last, for a task that is about to look anyway.
    pub(crate) fn take(&self) -> bool {
        self.heard().now_or_never().is_some()
    }
}

async fn listen(options: PgConnectOptions, heard: Arc<Notify>) {
    let options = options.options([("statement_timeout", ANSWER_MAX.as_millis().to_string())]);
    loop {
        match hear(&options, &heard).await {
            Ok(Pooled) => {
                info!(
                    "there is a transaction-mode pooler before PostgreSQL: not listening for commits, looking for them"
                );
                return;
            }
            // A database outage is reported elsewhere; here it only delays the next attempt.
            Err(error) => debug!(%error, "commits are not heard of; listening again soon"),
        }
        tokio::time::sleep(LISTEN_AGAIN_AFTER).await;
    }
}

async fn hear(options: &PgConnectOptions, heard: &Notify) -> Result<Pooled, sqlx::Error> {
    if Bound::new(ANSWER_MAX).within(is_pooled(options)).await? {
        return Ok(Pooled);
    }
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER_MAX).connect_lazy_with(options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    Bound::new(ANSWER_MAX).within(listener.listen(NUDGES)).await?;
    loop {
        match tokio::time::timeout(CHECK_AFTER, listener.try_recv()).await {
            Ok(Ok(Some(_))) => {
                while listener.next_buffered().is_some() {}
                heard.notify_one();
            }
            // The connection was lost; the next call makes a new one.
            Ok(Ok(None)) => {}
            Ok(Err(error)) => return Err(error),
            // A host that is gone sends nothing, either.
            Err(_) => {
                Bound::new(ANSWER_MAX).within(sqlx::query("select 1").execute(&mut listener)).await?;
            }
        }
    }
}

/// A pooler between the relay and PostgreSQL gives a client another connection for each transaction.
struct Pooled;

/// Whether there is a pooler. Without one, each client has its server process for good, and no other client has it
/// meanwhile.
async fn is_pooled(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut one = PgConnection::connect_with(options).await?;
    let mut other = PgConnection::connect_with(options).await?;
    for _ in 0..POOLER_LOOKS {
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
    // The query is not prepared: not every pooler can do that.
    sqlx::raw_sql("select pg_backend_pid()").fetch_one(connection).await?.try_get(0)
}

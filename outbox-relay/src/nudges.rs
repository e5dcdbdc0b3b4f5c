//! Hears services tell that they have committed something (`notify outbox`), so that it is read at once.
//!
//! A hint and nothing more: whatever is lost of it (a cut connection; a pooler that hands a connection from one client to
//! the next), the reader looks by itself after its pause. One connection is held for it.

use saga_core::outbox::NUDGES;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

/// Until it is tried again to listen.
const AGAIN: Duration = Duration::from_secs(2);

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
}

async fn listen(options: PgConnectOptions, heard: Arc<Notify>) {
    loop {
        let Err(error) = hear(options.clone(), &heard).await;
        // Whoever finds out that the database is away, it is not this.
        debug!(%error, "nudges are not heard; listening again soon");
        tokio::time::sleep(AGAIN).await;
    }
}

async fn hear(options: PgConnectOptions, heard: &Notify) -> Result<Infallible, sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(NUDGES).await?;
    loop {
        // `None`: the connection was lost, and is made again by the next call.
        if listener.try_recv().await?.is_some() {
            while listener.next_buffered().is_some() {}
            heard.notify_one();
        }
    }
}

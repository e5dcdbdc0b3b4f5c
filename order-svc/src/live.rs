//! Who waits for an order, told of its changes: server-sent events and `Prefer: wait`.
//!
//! ```text
//!   orders.version ──(one query for all that is watched)──► LiveOrders ──► a watch channel per order ──► streams
//! ```
//!
//! Any replica may move an order, so a change is seen in the database, not in this process. There is one loop and one
//! query per turn, however many clients wait; a commit of this process only makes the next turn come at once. (NOTIFY
//! would queue every commit of the business behind one lock.) The channel carries a version and nothing else: who is
//! woken reads what is new from the history. When the process dies, clients reconnect with the last id they saw.

use crate::store;
use contracts::OrderId;
use saga_core::consumer::{Handler, Then};
use sqlx::PgPool;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The most orders watched at once: each turn looks all of them up in one query, which takes some milliseconds then.
pub const MAX_WATCHED: usize = 4_096;
/// How long another replica's change may go unseen.
const TURN: Duration = Duration::from_millis(50);
/// The shortest time between two turns, so that a busy engine's commits do not become as many queries.
const SHORTEST_TURN: Duration = Duration::from_millis(5);
/// How long a turn that failed keeps the next one away.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Nothing more can be watched now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WATCHED} orders are watched already")]
pub struct TooManyWatched;

/// The orders that somebody waits for.
#[derive(Debug)]
pub struct LiveOrders {
    pool: PgPool,
    watched: Mutex<HashMap<Uuid, watch::Sender<i64>>>,
    wake: Notify,
}

impl LiveOrders {
    /// Nobody waits yet.
    pub fn new(pool: PgPool) -> Arc<Self> {
        Arc::new(Self { pool, watched: Mutex::default(), wake: Notify::new() })
    }

    /// The order's version whenever it is another than `seen` (or another than what this process saw last).
    pub fn watch(&self, order: OrderId, seen: i64) -> Result<watch::Receiver<i64>, TooManyWatched> {
        let mut watched = self.lock();
        if watched.len() >= MAX_WATCHED && !watched.contains_key(&order.0) {
            watched.retain(|_, sender| sender.receiver_count() > 0);
            if watched.len() >= MAX_WATCHED {
                return Err(TooManyWatched);
            }
        }
        let mut receiver = watched.entry(order.0).or_insert_with(|| watch::Sender::new(seen)).subscribe();
        if *receiver.borrow() != seen {
            receiver.mark_changed();
        }
        drop(watched);
        self.wake.notify_one();
        Ok(receiver)
    }

    /// Something was committed: look now.
    pub fn nudge(&self) {
        self.wake.notify_one();
    }

    /// Looks at everything that is watched, tells whoever waits, and says how many changes it saw.
    pub async fn run_once(&self) -> Result<usize, sqlx::Error> {
        let ids: Vec<Uuid> = {
            let mut watched = self.lock();
            watched.retain(|_, sender| sender.receiver_count() > 0);
            watched.keys().copied().collect()
        };
        if ids.is_empty() {
            return Ok(0);
        }
        let versions = store::versions(&self.pool, &ids).await?;
        let watched = self.lock();
        let changed = versions.into_iter().filter(|(order, version)| {
            watched.get(&order.0).is_some_and(|sender| {
                sender.send_if_modified(|known| {
                    let newer = *version > *known;
                    *known = (*known).max(*version);
                    newer
                })
            })
        });
        Ok(changed.count())
    }

    /// Looks until `token` is cancelled.
    pub async fn run(&self, token: CancellationToken) {
        let mut failing = false;
        while !token.is_cancelled() {
            let pause = match self.run_once().await {
                Ok(_) if self.lock().is_empty() => None,
                Ok(_) => {
                    failing = false;
                    Some((SHORTEST_TURN, TURN))
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "live order views stand still until the database answers");
                    }
                    failing = true;
                    Some((AFTER_FAILURE, AFTER_FAILURE))
                }
            };
            tokio::select! {
                () = token.cancelled() => {}
                () = self.pause(pause) => {}
            }
        }
    }

    /// Waits at least the first and at most the second duration; without them, until somebody watches.
    async fn pause(&self, pause: Option<(Duration, Duration)>) {
        match pause {
            None => self.wake.notified().await,
            Some((shortest, longest)) => {
                tokio::time::sleep(shortest).await;
                // Woken or not: the next turn looks.
                tokio::time::timeout(longest - shortest, self.wake.notified()).await.ok();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, watch::Sender<i64>>> {
        // A map of channels has no invariant that a panic elsewhere could break.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handler whose commits make live views look at once.
pub fn nudging(handler: impl Handler, live: Arc<LiveOrders>) -> impl Handler {
    Then(handler, move || live.nudge())
}

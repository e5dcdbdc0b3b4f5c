//! The clients that wait for an order, and its changes: server-sent events and `Prefer: wait`.
//!
//! ```text
//!   orders.version ──(one query for all that is watched)──► LiveOrders ──► a watch channel per order ──► streams
//! ```
//!
//! Any replica may move an order, so a change is seen in the database, not in this process. There is one loop and one
//! query per turn, however many clients wait. A commit of this process only makes the next turn come at once. (NOTIFY
//! would queue every commit of the business behind one lock.) The channel carries a version and nothing else: a task
//! that wakes reads what is new from the history. When the process dies, clients reconnect with the last id they saw.
//! So they do when the oldest stream ends to make room for a new one.

use crate::store;
use contracts::OrderId;
use saga_core::{
    consumer::{Handler, Then},
    http::count_refused,
    outage::Wait,
};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The most event streams at once, of this process. With one order each, a turn's query takes some milliseconds.
pub const MAX_STREAMS: usize = 1_024;
/// The most requests at once that wait for an order's end. Each has one of the API's slots meanwhile, of which there
/// are 1,024.
pub const MAX_WAITS: usize = 256;
/// The most streams and waits at once for one order: its customer's pages, and some of the shop's.
pub const MAX_OF_ONE: usize = 64;
/// How long another replica's change may go unseen.
const TURN_EVERY: Duration = Duration::from_millis(50);
/// The shortest time between two turns, so that a busy engine's commits do not become as many queries.
const TURN_MIN: Duration = Duration::from_millis(5);
/// How long a turn that failed keeps the next one away.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Nothing more can be watched now: waits do not make room, and their callers are answered soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    /// This process serves as many streams, or as many waits, as it can.
    #[error("this process serves as many of this kind as it can")]
    InAll,
    /// As many streams and waits are open for this order as may be.
    #[error("{MAX_OF_ONE} streams and waits are open for this order")]
    OfOne,
}

/// What a watch is for: each kind has places of its own, so that neither takes the other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A stream of server-sent events.
    Stream,
    /// A request with `Prefer: wait`.
    Wait,
}

/// One client's watch over one order. Dropping it gives its place back.
#[derive(Debug)]
pub struct Watch {
    versions: watch::Receiver<i64>,
    made_room: CancellationToken,
    number: u64,
    live: Arc<LiveOrders>,
}

impl Watch {
    /// Returns when the order has another version than the last time. `None` when this has made room for another, or
    /// nothing watches the order any more.
    pub async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            changed = self.versions.changed() => changed.ok(),
            () = self.made_room.cancelled() => None,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.live.lock().places.remove(&self.number);
    }
}

impl Purpose {
    fn most(self) -> usize {
        match self {
            Self::Stream => MAX_STREAMS,
            Self::Wait => MAX_WAITS,
        }
    }
}

/// The orders that are watched, and the places that are taken. They are few enough to be counted when one comes.
#[derive(Debug, Default)]
struct Watched {
    orders: HashMap<Uuid, watch::Sender<i64>>,
    /// The places by their numbers, which grow: the first is the oldest.
    places: BTreeMap<u64, WatchPlace>,
    last: u64,
}

#[derive(Debug)]
struct WatchPlace {
    order: Uuid,
    purpose: Purpose,
    made_room: CancellationToken,
}

impl Watched {
    /// Gives a place; where all are taken, the place of the oldest stream.
    fn enter(&mut self, place: WatchPlace) -> Result<u64, TooMany> {
        let (order, purpose) = (place.order, place.purpose);
        self.keep_below(MAX_OF_ONE, purpose, |place| place.order == order).ok_or(TooMany::OfOne)?;
        self.keep_below(purpose.most(), purpose, |place| place.purpose == purpose).ok_or(TooMany::InAll)?;
        self.last += 1;
        self.places.insert(self.last, place);
        Ok(self.last)
    }

    /// Ends the oldest stream of `these` when they are `most`; `None` when there is none that may end for this purpose.
    fn keep_below(&mut self, most: usize, purpose: Purpose, these: impl Fn(&WatchPlace) -> bool) -> Option<()> {
        if self.places.values().filter(|place| these(place)).count() < most {
            return Some(());
        }
        let ends = |place: &WatchPlace| purpose == Purpose::Stream && place.purpose == Purpose::Stream && these(place);
        let oldest = self.places.iter().find(|(_, place)| ends(place)).map(|(number, _)| *number)?;
        self.places.remove(&oldest)?.made_room.cancel();
        count_refused("old_stream");
        Some(())
    }
}

/// The orders that clients wait for.
#[derive(Debug)]
pub struct LiveOrders {
    pool: PgPool,
    watched: Mutex<Watched>,
    wake: Notify,
}

impl LiveOrders {
    /// Without any order that is watched.
    pub fn new(pool: PgPool) -> Arc<Self> {
        Arc::new(Self { pool, watched: Mutex::default(), wake: Notify::new() })
    }

    /// Watches the order: reports its version whenever it is another than `seen` (or than this process saw last).
    pub fn watch(self: &Arc<Self>, order: OrderId, seen: i64, purpose: Purpose) -> Result<Watch, TooMany> {
        let made_room = CancellationToken::new();
        let mut watched = self.lock();
        let number = watched.enter(WatchPlace { order: order.0, purpose, made_room: made_room.clone() })?;
        let mut versions = watched.orders.entry(order.0).or_insert_with(|| watch::Sender::new(seen)).subscribe();
        if *versions.borrow() != seen {
            versions.mark_changed();
        }
        drop(watched);
        self.wake.notify_one();
        Ok(Watch { versions, made_room, number, live: Arc::clone(self) })
    }

    /// Makes the next turn come at once: something was committed.
    pub fn nudge(&self) {
        self.wake.notify_one();
    }

    /// Reads the versions of all orders that are watched, and wakes the watches of those that changed. Returns how many
    /// changes it saw.
    pub async fn run_once(&self) -> Result<usize, sqlx::Error> {
        let ids: Vec<Uuid> = {
            let mut watched = self.lock();
            watched.orders.retain(|_, sender| sender.receiver_count() > 0);
            watched.orders.keys().copied().collect()
        };
        if ids.is_empty() {
            return Ok(0);
        }
        let versions = store::versions(&self.pool, &ids).await?;
        let watched = self.lock();
        let changed = versions.into_iter().filter(|(order, version)| {
            watched.orders.get(&order.0).is_some_and(|sender| {
                sender.send_if_modified(|known| {
                    let newer = *version > *known;
                    *known = (*known).max(*version);
                    newer
                })
            })
        });
        Ok(changed.count())
    }

    /// Takes turns until `token` is cancelled.
    pub async fn run(&self, token: CancellationToken) {
        let wait = Wait::default();
        while !token.is_cancelled() {
            let pause = match self.run_once().await {
                Ok(_) if self.lock().orders.is_empty() => {
                    // No view stands still any more; the next outage is logged again.
                    wait.ends();
                    None
                }
                Ok(_) => {
                    if wait.ends() {
                        tracing::info!("live order views go on");
                    }
                    Some((TURN_MIN, TURN_EVERY))
                }
                Err(error) => {
                    if wait.begins() {
                        tracing::warn!(%error, "live order views stand still until the database answers");
                    }
                    Some((AFTER_FAILURE, AFTER_FAILURE))
                }
            };
            tokio::select! {
                () = token.cancelled() => {}
                () = self.pause(pause) => {}
            }
        }
    }

    /// Waits at least the first and at most the second duration; without them, until a client watches an order.
    async fn pause(&self, pause: Option<(Duration, Duration)>) {
        match pause {
            None => self.wake.notified().await,
            Some((shortest, longest)) => {
                tokio::time::sleep(shortest).await;
                // Woken or not, the next turn looks.
                tokio::time::timeout(longest - shortest, self.wake.notified()).await.ok();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // Each change is complete before the lock is given back.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handler whose commits make live views look at once.
pub fn nudging(handler: impl Handler, live: Arc<LiveOrders>) -> impl Handler {
    Then(handler, move || live.nudge())
}

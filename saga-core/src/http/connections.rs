//! The open connections of one listener: their number has a bound, and one that waits for its client makes room for a new one.
//!
//! A connection *waits for its client* until a whole request has arrived, and again when that request is answered. While a handler
//! works for it, or an event stream is open on it, it does not. When all places are taken, the connection that has waited longest
//! is closed. So clients that send half a request, or nothing, cannot keep others out: each of them is closed for a newcomer.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio_util::sync::CancellationToken;

/// The open connections of one listener.
#[derive(Debug)]
pub(crate) struct Connections {
    most: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// Grows with each connection and each time one begins to wait.
    turn: u64,
    by_id: HashMap<u64, Place>,
    /// By the turn at which they began to wait for their client.
    waiting: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Place {
    /// How many handlers and streams work for it.
    working: usize,
    /// When it began to wait.
    since: u64,
    close: CancellationToken,
}

impl Connections {
    /// At most so many.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: Mutex::default() })
    }

    /// A place for a new connection; `None` when each of the others is worked for.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Entered> {
        let mut open = self.lock();
        if open.by_id.len() >= self.most {
            let (_, longest) = open.waiting.pop_first()?;
            if let Some(place) = open.by_id.remove(&longest) {
                place.close.cancel();
            }
            super::admission::count_refused("silent_connection");
        }
        open.turn += 1;
        let (id, close) = (open.turn, CancellationToken::new());
        open.by_id.insert(id, Place { working: 0, since: id, close: close.clone() });
        open.waiting.insert(id, id);
        drop(open);
        Some(Entered { connection: Connection { id, all: Arc::clone(self) }, close })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // Each change is complete before the lock is given back.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) connection: Connection,
    close: CancellationToken,
}

impl Entered {
    /// Returns when the connection has to make room.
    pub(crate) async fn must_close(&self) {
        self.close.cancelled().await;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.connection.all.lock();
        if let Some(place) = open.by_id.remove(&self.connection.id) {
            open.waiting.remove(&place.since);
        }
    }
}

/// The connection that a request came on; among the request's extensions.
#[derive(Debug, Clone)]
pub struct Connection {
    id: u64,
    all: Arc<Connections>,
}

impl Connection {
    /// While this is kept, the connection is not closed for the sake of a new one. An answer that goes on for long, as an event
    /// stream does, keeps one; the request itself has one until its answer begins.
    #[must_use]
    pub fn working(&self) -> Working {
        let mut open = self.all.lock();
        if let Some(place) = open.by_id.get_mut(&self.id) {
            place.working += 1;
            let since = place.since;
            open.waiting.remove(&since);
        }
        drop(open);
        Working(self.clone())
    }
}

/// See [`Connection::working`].
#[derive(Debug)]
pub struct Working(Connection);

impl Drop for Working {
    fn drop(&mut self) {
        let mut open = self.0.all.lock();
        let turn = open.turn + 1;
        if let Some(place) = open.by_id.get_mut(&self.0.id) {
            place.working -= 1;
            if place.working == 0 {
                place.since = turn;
                open.waiting.insert(turn, self.0.id);
                open.turn = turn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_closed(entered: &Entered) -> bool {
        entered.close.is_cancelled()
    }

    #[test]
    fn the_connection_that_waits_longest_makes_room_and_one_at_work_does_not() {
        let connections = Connections::new(3);
        let [first, second, third] = std::array::from_fn(|_| connections.enter().unwrap());
        let work = first.connection.working();
        let fourth = connections.enter().unwrap();
        assert!(is_closed(&second) && !is_closed(&first) && !is_closed(&third), "the second waited longest");
        // The first waits again, and not as long as the third.
        drop(work);
        let fifth = connections.enter().unwrap();
        assert!(is_closed(&third) && !is_closed(&first));
        let _work = [&first, &fourth, &fifth].map(|entered| entered.connection.working());
        assert!(connections.enter().is_none(), "each is worked for");
    }

    #[test]
    fn a_place_is_given_back_once_however_its_connection_ends() {
        let connections = Connections::new(2);
        let first = connections.enter().unwrap();
        let (work, stream) = (first.connection.working(), first.connection.working());
        drop(first);
        drop((work, stream));
        let [second, third] = std::array::from_fn(|_| connections.enter().unwrap());
        let fourth = connections.enter().unwrap();
        assert!(is_closed(&second));
        // What was closed takes up work that it had read already, and ends.
        drop(second.connection.working());
        drop(second);
        let open = connections.lock();
        assert_eq!((open.by_id.len(), open.waiting.len()), (2, 2));
        drop(open);
        drop((third, fourth));
        assert!(connections.lock().by_id.is_empty());
    }
}

//! The open connections of one listener: their number has a bound. One that waits for its client makes room for a new
//! one.
//!
//! | a connection | makes room |
//! |---|---|
//! | waits for its client: for a request's head, for the rest of its body, for the next request | first, the one that has waited longest |
//! | has an event stream open, whose client can come back | when no other waits, the oldest |
//! | is worked for: its whole request is there, and no answer yet | never |
//!
//! So clients that send half a request, or nothing, cannot keep others out: a connection of theirs is closed for a
//! newcomer. A proxy's idle connections are the first to go.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
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
    /// The number of the last turn. It grows whenever a connection comes, or becomes another's elder or junior.
    turn: u64,
    by_id: HashMap<u64, ConnectionSlot>,
    /// The connections that wait for their client, by the turn since which they do.
    waiting: BTreeMap<u64, u64>,
    /// The connections that do nothing but stream, by the turn since which they do.
    streaming: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct ConnectionSlot {
    working: usize,
    streams: usize,
    since: u64,
    close: CancellationToken,
}

impl Open {
    /// Changes a place and files it anew, as the youngest. Nothing happens when the connection has made room already.
    fn refile(&mut self, id: u64, change: impl FnOnce(&mut ConnectionSlot)) {
        let Some(place) = self.by_id.get_mut(&id) else { return };
        self.waiting.remove(&place.since);
        self.streaming.remove(&place.since);
        self.turn += 1;
        place.since = self.turn;
        change(place);
        match (place.working, place.streams) {
            (0, 0) => self.waiting.insert(place.since, id),
            (0, _) => self.streaming.insert(place.since, id),
            _ => None,
        };
    }

    fn remove(&mut self, id: u64) -> Option<ConnectionSlot> {
        let place = self.by_id.remove(&id)?;
        self.waiting.remove(&place.since);
        self.streaming.remove(&place.since);
        Some(place)
    }
}

impl Connections {
    /// Makes room for `most` connections.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: Mutex::default() })
    }

    /// A place for a new connection; `None` when each of the others is worked for.
    pub(crate) fn enter(self: &Arc<Self>, peer: IpAddr) -> Option<Entered> {
        let mut open = self.lock();
        if open.by_id.len() >= self.most {
            let waits = open.waiting.first_key_value().map(|(_, id)| (*id, "silent_connection"));
            let streams = || open.streaming.first_key_value().map(|(_, id)| (*id, "old_stream"));
            let (oldest, reason) = waits.or_else(streams)?;
            if let Some(place) = open.remove(oldest) {
                place.close.cancel();
                super::admission::count_refused(reason);
            }
        }
        let (id, close) = (open.turn + 1, CancellationToken::new());
        open.by_id.insert(id, ConnectionSlot { working: 0, streams: 0, since: id, close: close.clone() });
        open.refile(id, |_| {});
        drop(open);
        Some(Entered { connection: Connection { id, peer, all: Arc::clone(self) }, close })
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
        self.connection.all.lock().remove(self.connection.id);
    }
}

/// The connection that a request came on; among the request's extensions.
#[derive(Debug, Clone)]
pub struct Connection {
    id: u64,
    peer: IpAddr,
    all: Arc<Connections>,
}

impl Connection {
    /// The address at the connection's other end, which may be a proxy's.
    pub(crate) fn peer(&self) -> IpAddr {
        self.peer
    }

    /// Notes that a request's head has arrived from the client.
    pub(crate) fn heard(&self) {
        self.all.lock().refile(self.id, |_| {});
    }

    /// While this is kept, the connection does not make room for another.
    pub(crate) fn working(&self) -> Held {
        self.held(|place| &mut place.working)
    }

    /// While this is kept, the connection makes room for another only when none waits for its client. An answer that
    /// goes on for as long as its client likes, as an event stream does, keeps this.
    #[must_use]
    pub fn streaming(&self) -> Held {
        self.held(|place| &mut place.streams)
    }

    fn held(&self, count: fn(&mut ConnectionSlot) -> &mut usize) -> Held {
        self.all.lock().refile(self.id, |place| *count(place) += 1);
        Held { connection: self.clone(), count }
    }
}

/// Keeps a connection from making room, as [`Connection::streaming`] says, until it is dropped.
#[derive(Debug)]
pub struct Held {
    connection: Connection,
    count: fn(&mut ConnectionSlot) -> &mut usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.connection.all.lock().refile(self.connection.id, |place| *(self.count)(place) -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn enter(connections: &Arc<Connections>) -> Option<Entered> {
        connections.enter(Ipv4Addr::LOCALHOST.into())
    }

    fn is_closed(entered: &Entered) -> bool {
        entered.close.is_cancelled()
    }

    #[test]
    fn the_connection_that_waits_longest_makes_room_and_one_at_work_does_not() {
        let connections = Connections::new(3);
        let [first, second, third] = std::array::from_fn(|_| enter(&connections).unwrap());
        let work = first.connection.working();
        let fourth = enter(&connections).unwrap();
        assert!(is_closed(&second) && !is_closed(&first) && !is_closed(&third), "the second waited longest");
        // The first connection waits again, and the third sent a head: the fourth has waited longest now.
        drop(work);
        third.connection.heard();
        let fifth = enter(&connections).unwrap();
        assert!(is_closed(&fourth) && !is_closed(&first) && !is_closed(&third));
        let _work = [&first, &third, &fifth].map(|entered| entered.connection.working());
        assert!(enter(&connections).is_none(), "each is worked for");
    }

    #[test]
    fn a_stream_makes_room_when_no_connection_waits_for_its_client() {
        let connections = Connections::new(3);
        let [older, newer, silent] = std::array::from_fn(|_| enter(&connections).unwrap());
        let _streams = [&older, &newer].map(|entered| entered.connection.streaming());
        let working = enter(&connections).unwrap();
        assert!(is_closed(&silent) && !is_closed(&older));
        let _work = working.connection.working();
        let _last = enter(&connections).unwrap();
        assert!(is_closed(&older) && !is_closed(&newer));
    }

    #[test]
    fn a_place_is_given_back_once_however_its_connection_ends() {
        let connections = Connections::new(2);
        let first = enter(&connections).unwrap();
        let (work, stream) = (first.connection.working(), first.connection.streaming());
        drop(first);
        drop((work, stream));
        let [second, third] = std::array::from_fn(|_| enter(&connections).unwrap());
        let fourth = enter(&connections).unwrap();
        assert!(is_closed(&second));
        // A connection that was closed takes up work that it had read already, and ends.
        drop(second.connection.working());
        drop(second);
        let open = connections.lock();
        assert_eq!((open.by_id.len(), open.waiting.len(), open.streaming.len()), (2, 2, 0));
        drop(open);
        drop((third, fourth));
        let open = connections.lock();
        assert!(open.by_id.is_empty() && open.waiting.is_empty());
    }
}

//! Reads ahead of the producer: pages of the main flow, and of topics that catch up after a pause, in one sequence.
//!
//! After a page comes the next at once. When nothing is found the pauses double from 1 ms to 100 ms.

use crate::{
    control::Control,
    position::{Cursor, Page, ReadError, UpTo},
};
use sqlx::{PgConnection, PgPool};
use std::{collections::HashMap, sync::Arc, time::Duration};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

/// Pauses between polls that find nothing.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What the publisher gets, in order.
pub(crate) enum Item {
    /// Rows to publish.
    Page(Page),
    /// The topic has caught up: from here on its rows are in the main flow again.
    CaughtUp(CaughtUp),
}

/// A pause that is over.
#[derive(Debug, Clone)]
pub(crate) struct CaughtUp {
    pub(crate) topic: Arc<str>,
    /// When it began: the topic may have been paused again since, which is another pause.
    pub(crate) paused_at: OffsetDateTime,
}

/// Reads one outbox.
pub(crate) struct Reader {
    main: Cursor,
    lanes: HashMap<String, Lane>,
    /// Pauses that have ended, by when they began: what is known about them may be a moment old.
    ended: HashMap<String, OffsetDateTime>,
    control: watch::Receiver<Arc<Control>>,
    items: mpsc::Sender<Item>,
}

struct Lane {
    cursor: Cursor,
    paused_at: OffsetDateTime,
}

impl Reader {
    pub(crate) fn new(main: Cursor, control: watch::Receiver<Arc<Control>>, items: mpsc::Sender<Item>) -> Self {
        Self { main, lanes: HashMap::new(), ended: HashMap::new(), control, items }
    }

    /// Reads until nobody wants more.
    pub(crate) async fn run(mut self, db: PgPool) -> Result<(), ReadError> {
        let mut db = db.acquire().await?;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.run_once(&mut db).await? {
                Found::Something => pause = FIRST_PAUSE,
                Found::Nothing => {
                    tokio::select! {
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                        changed = self.control.changed() => if changed.is_err() { return Ok(()) },
                        () = self.items.closed() => return Ok(()),
                    }
                }
                Found::Closed => return Ok(()),
            }
        }
    }

    /// One page of the main flow, and one of each topic that is catching up.
    async fn run_once(&mut self, db: &mut PgConnection) -> Result<Found, ReadError> {
        let control = self.control.borrow_and_update().clone();
        if control.whole {
            return Ok(Found::Nothing);
        }
        let mut found = Found::Nothing;
        self.open_lanes(&control);
        if let Some(page) = self.main.next(db, UpTo::Now).await? {
            if self.items.send(Item::Page(page)).await.is_err() {
                return Ok(Found::Closed);
            }
            found = Found::Something;
        }
        let finished = self.main.finished().cloned();
        let mut caught_up = Vec::new();
        for (topic, lane) in &mut self.lanes {
            match lane.cursor.next(db, UpTo::Snapshot(self.main.base())).await? {
                Some(page) => {
                    if self.items.send(Item::Page(page)).await.is_err() {
                        return Ok(Found::Closed);
                    }
                    found = Found::Something;
                }
                // Only where the main flow stands between two windows do both stand at the same place.
                None if finished.is_some() && lane.cursor.finished() == finished.as_ref() => {
                    caught_up.push(topic.clone());
                }
                None => {}
            }
        }
        for topic in caught_up {
            let Some(Lane { paused_at, .. }) = self.lanes.remove(&topic) else { continue };
            self.ended.insert(topic.clone(), paused_at);
            let caught_up = CaughtUp { topic: topic.into(), paused_at };
            if self.items.send(Item::CaughtUp(caught_up)).await.is_err() {
                return Ok(Found::Closed);
            }
            found = Found::Something;
        }
        Ok(found)
    }

    fn open_lanes(&mut self, control: &Control) {
        for paused in control.paused.values() {
            let Some(position) = paused.position.as_ref().filter(|_| paused.resuming) else { continue };
            if self.lanes.contains_key(&paused.topic) || self.ended.get(&paused.topic) == Some(&paused.paused_at) {
                continue;
            }
            let cursor = Cursor::new(position.clone(), Some(paused.topic.as_str().into()));
            self.lanes.insert(paused.topic.clone(), Lane { cursor, paused_at: paused.paused_at });
        }
        // Resumed, and then stopped again by an operator: what is read so far goes out, the rest waits.
        self.lanes.retain(|topic, _| control.paused.get(topic).is_none_or(|paused| paused.resuming));
    }
}

enum Found {
    Something,
    Nothing,
    Closed,
}

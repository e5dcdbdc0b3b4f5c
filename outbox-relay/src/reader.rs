//! Reads ahead of the producer: pages of the main flow, and of topics that catch up after a pause, in one sequence.
//!
//! After a full page comes the next at once, after a small one when Kafka has it. When nothing is found the pauses grow
//! with the time that nothing was found for, from 1 ms to 100 ms.

use crate::{
    control::Control,
    database::Database,
    position::{Cursor, Page, ReadError, UpTo},
};
use saga_core::clock;
use sqlx::PgConnection;
use std::{collections::HashMap, sync::Arc, time::Duration};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

/// Pauses between polls that find nothing.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// After a page of few rows the next is read when Kafka has acknowledged it, or so much later: what comes meanwhile shares
/// one poll, one request to Kafka and one transaction of the consumer.
const ACKNOWLEDGED: Duration = Duration::from_millis(10);
const FEW_ROWS: usize = 500;
/// A pause is this part of the time that nothing was found for: what comes after a while waits that much longer. When
/// pauses doubled, a message of a conversation waited as long again as the answer before it had taken: 64 sagas went
/// round in one convoy, at a sixth of the pace (measured).
const PATIENCE: u32 = 16;

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
    /// Pages given to the publisher, and how many of them it has done with.
    given: usize,
    done: watch::Receiver<usize>,
}

struct Lane {
    cursor: Cursor,
    paused_at: OffsetDateTime,
}

impl Reader {
    pub(crate) fn new(
        main: Cursor,
        control: watch::Receiver<Arc<Control>>,
        items: mpsc::Sender<Item>,
        done: watch::Receiver<usize>,
    ) -> Self {
        Self { main, lanes: HashMap::new(), ended: HashMap::new(), control, items, given: 0, done }
    }

    /// Reads until nobody wants more.
    pub(crate) async fn run(mut self, database: Database) -> Result<(), ReadError> {
        let mut db = database.connect().await?;
        self.run_with(&database, &mut db).await?;
        db.give_back();
        Ok(())
    }

    async fn run_with(&mut self, database: &Database, db: &mut PgConnection) -> Result<(), ReadError> {
        let mut found_last = clock::monotonic();
        loop {
            match self.run_once(database, db).await? {
                Found::Rows(rows) => {
                    found_last = clock::monotonic();
                    if rows < FEW_ROWS {
                        let acknowledged = async { drop(self.done.wait_for(|done| *done >= self.given).await) };
                        // Rows that do not go to Kafka (their topic is paused) need no acknowledgement.
                        let breath = tokio::time::sleep(FIRST_PAUSE);
                        tokio::join!(tokio::time::timeout(ACKNOWLEDGED, acknowledged), breath).0.ok();
                    }
                }
                Found::Nothing => {
                    let idle = clock::monotonic().duration_since(found_last);
                    let pause = (idle / PATIENCE).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        changed = self.control.changed() => if changed.is_err() { return Ok(()) },
                        () = self.items.closed() => return Ok(()),
                    }
                }
                Found::Closed => return Ok(()),
            }
        }
    }

    /// One page of the main flow, and one of each topic that is catching up. The database has to answer in time; the
    /// publisher may take a page when it likes.
    async fn run_once(&mut self, database: &Database, db: &mut PgConnection) -> Result<Found, ReadError> {
        let control = self.control.borrow_and_update().clone();
        if control.whole {
            return Ok(Found::Nothing);
        }
        let mut found = None;
        self.open_lanes(&control);
        if let Some(page) = database.within(self.main.next(db, UpTo::Now)).await? {
            *found.get_or_insert(0) += page.rows.len();
            self.given += 1;
            if self.items.send(Item::Page(page)).await.is_err() {
                return Ok(Found::Closed);
            }
        }
        let finished = self.main.finished().cloned();
        let mut caught_up = Vec::new();
        for (topic, lane) in &mut self.lanes {
            match database.within(lane.cursor.next(db, UpTo::Snapshot(self.main.base()))).await? {
                Some(page) => {
                    *found.get_or_insert(0) += page.rows.len();
                    self.given += 1;
                    if self.items.send(Item::Page(page)).await.is_err() {
                        return Ok(Found::Closed);
                    }
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
            found.get_or_insert(0);
        }
        Ok(found.map_or(Found::Nothing, Found::Rows))
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
    /// So many rows; none when only a topic caught up.
    Rows(usize),
    Nothing,
    Closed,
}

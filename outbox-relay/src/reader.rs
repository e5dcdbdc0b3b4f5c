//! Reads ahead of the producer: pages of the main flow, and of topics that catch up after a pause, in one sequence.
//!
//! After a full page comes the next at once, after a small one when Kafka has it and a pause is over. The pauses grow with
//! the time that nothing was found for, from 1 ms (5 ms while services tell of their commits) to 100 ms, and end when a
//! service tells of a commit.

use crate::{
    control::Control,
    database::Database,
    nudges::Nudges,
    position::{Cursor, Page, ReadError, UpTo},
};
use saga_core::clock;
use sqlx::PgConnection;
use std::{
    collections::HashMap,
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

/// Pauses between polls that find little or nothing.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(100);
/// Shortest pause while services tell of their commits: then it is for the few that do not, and a look in between, which
/// finds nothing, is spared.
const NUDGED_PAUSE: Duration = Duration::from_millis(5);
/// For so long after the last time.
const NUDGED: Duration = Duration::from_secs(1);
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
    pauses: RangeInclusive<Duration>,
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
        Self { main, lanes: HashMap::new(), ended: HashMap::new(), control, items, given: 0, done, pauses: PAUSES }
    }

    /// Reads until nobody wants more.
    pub(crate) async fn run(mut self, database: Database) -> Result<(), ReadError> {
        let mut db = database.connect().await?;
        self.run_with(&database, &mut db).await?;
        db.give_back();
        Ok(())
    }

    async fn run_with(&mut self, database: &Database, db: &mut PgConnection) -> Result<(), ReadError> {
        let nudges = Nudges::listen(database.options());
        let (mut found_last, mut nudged_last) = (clock::monotonic(), None::<Instant>);
        loop {
            // What has been told of by now is in the window that is opened next.
            if !self.main.knows_more() && nudges.take() {
                nudged_last = Some(clock::monotonic());
            }
            let small_page = match self.run_once(database, db).await? {
                Found::Closed => return Ok(()),
                Found::Rows(rows) => {
                    found_last = clock::monotonic();
                    if rows >= FEW_ROWS || self.main.knows_more() {
                        continue;
                    }
                    true
                }
                Found::Nothing => false,
            };
            let idle = clock::monotonic().duration_since(found_last);
            let nudged = nudged_last.is_some_and(|last| last.elapsed() < NUDGED);
            let shortest = if nudged { NUDGED_PAUSE } else { *self.pauses.start() };
            let pause = (idle / PATIENCE).clamp(shortest, shortest.max(*self.pauses.end()));
            // Copies, in which a change is seen that stays new for `run_once`.
            let (mut control, mut done) = (self.control.clone(), self.done.clone());
            let paused = async {
                tokio::select! {
                    () = tokio::time::sleep(pause) => false,
                    () = nudges.heard() => {
                        nudged_last = Some(clock::monotonic());
                        false
                    }
                    changed = control.changed() => changed.is_err(),
                    () = self.items.closed() => true,
                }
            };
            let acknowledged = async {
                if small_page {
                    let acknowledged = async { drop(done.wait_for(|done| *done >= self.given).await) };
                    // Rows that do not go to Kafka (their topic is paused) need no acknowledgement, but a breath all the same.
                    let breath = tokio::time::sleep(*self.pauses.start());
                    tokio::join!(tokio::time::timeout(ACKNOWLEDGED, acknowledged), breath).0.ok();
                }
            };
            let (closed, ()) = tokio::join!(paused, acknowledged);
            if closed {
                return Ok(());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Position;
    use saga_core::{
        outbox::nudge,
        service::messaging_migrations,
        testkit::{TestDatabase, eventually},
    };
    use std::str::FromStr;
    use tokio_util::task::AbortOnDropHandle;

    const HOUR: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_secs(30);

    /// How many connections of the relay's have done what begins like this, and do nothing now.
    async fn idle(database: &TestDatabase, after: &str) -> i64 {
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and state = 'idle' and query ilike $1 || '%'",
        )
        .bind(after)
        .fetch_one(&database.pool)
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn a_reader_that_would_pause_for_an_hour_reads_at_once_what_it_is_told_of() {
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let options = sqlx::postgres::PgConnectOptions::from_str(&database.url).unwrap();
        let (_control, wanted) = watch::channel(Arc::new(Control::default()));
        let (items, mut read) = mpsc::channel(1);
        let (_done, done) = watch::channel(0);
        let mut reader = Reader::new(Cursor::new(Position::initial(), None), wanted, items, done);
        reader.pauses = HOUR..=HOUR;
        let _reading = AbortOnDropHandle::new(tokio::spawn(reader.run(Database::new(options, 2, SOON))));
        eventually(SOON, || async { (idle(&database, "listen").await == 1).then_some(()) }).await;
        // It has looked, found nothing, and pauses.
        eventually(SOON, || async { (idle(&database, "(select null::bigint").await == 1).then_some(()) }).await;
        sqlx::query("select outbox_append('orders.events', 'a', 'test.v1', ''::bytea)")
            .execute(&database.pool)
            .await
            .unwrap();
        nudge(&database.pool);
        let item = tokio::time::timeout(SOON, read.recv()).await.expect("it is read").unwrap();
        assert!(matches!(item, Item::Page(page) if page.rows.len() == 1));
    }
}

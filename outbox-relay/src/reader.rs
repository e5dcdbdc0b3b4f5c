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

/// How long nothing is read.
struct Pauses {
    /// Between polls that find little or nothing.
    idle: RangeInclusive<Duration>,
    /// The shortest while services tell of their commits: then it is for the few that do not, and a look in between, which
    /// finds nothing, is spared.
    nudged: Duration,
    /// After a page of few rows the next is read when Kafka has acknowledged it, or so much later: what comes meanwhile
    /// shares one poll, one request to Kafka and one transaction of the consumer. Rows that do not go to Kafka, as their topic
    /// is paused, wait for nothing: there is one look for what was told of during the last.
    acknowledged: Duration,
}

const PAUSES: Pauses = Pauses {
    idle: Duration::from_millis(1)..=Duration::from_millis(100),
    nudged: Duration::from_millis(5),
    acknowledged: Duration::from_millis(10),
};
/// Services tell of their commits for so long after the last time.
const NUDGED: Duration = Duration::from_secs(1);
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
    pauses: Pauses,
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
            let shortest = if nudged { self.pauses.nudged } else { *self.pauses.idle.start() };
            let pause = (idle / PATIENCE).clamp(shortest, shortest.max(*self.pauses.idle.end()));
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
                    tokio::time::timeout(self.pauses.acknowledged, acknowledged).await.ok();
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
    use crate::{
        pause::{Cause, Paused},
        position::Position,
    };
    use saga_core::{
        outbox::nudge,
        service::messaging_migrations,
        testkit::{Log, TestDatabase, eventually},
    };
    use std::str::FromStr;
    use tokio_util::task::AbortOnDropHandle;

    const HOUR: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_secs(30);

    /// A reader that would pause for an hour, whatever it waits for, on a database of its own; the test is its publisher.
    struct Reading {
        database: TestDatabase,
        control: watch::Sender<Arc<Control>>,
        items: mpsc::Receiver<Item>,
        done: watch::Sender<usize>,
        _reader: AbortOnDropHandle<Result<(), ReadError>>,
    }

    impl Reading {
        /// It listens, has looked, found nothing, and pauses.
        async fn start() -> Self {
            let database = TestDatabase::new(&[messaging_migrations()]).await;
            let options = sqlx::postgres::PgConnectOptions::from_str(&database.url).unwrap();
            let (control, wanted) = watch::channel(Arc::new(Control::default()));
            let (sender, items) = mpsc::channel(1);
            let (done, seen) = watch::channel(0);
            let mut reader = Reader::new(Cursor::new(Position::initial(), None), wanted, sender, seen);
            reader.pauses = Pauses { idle: HOUR..=HOUR, nudged: HOUR, acknowledged: HOUR };
            let _reader = AbortOnDropHandle::new(tokio::spawn(reader.run(Database::new(options, 2, SOON))));
            let reading = Self { database, control, items, done, _reader };
            for last in ["listen", "(select null::bigint"] {
                eventually(SOON, || async { (reading.idle_after(last).await == 1).then_some(()) }).await;
            }
            reading
        }

        /// How many connections of the relay's have done what begins like this, and do nothing now.
        async fn idle_after(&self, last: &str) -> i64 {
            sqlx::query_scalar(
                "select count(*) from pg_stat_activity
                  where datname = current_database() and state = 'idle' and query ilike $1 || '%'",
            )
            .bind(last)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
        }

        /// Commits a row of each topic, and does not tell of them.
        async fn append(&self, topics: &[&str]) {
            sqlx::query("select outbox_append(topic, 'a', 'test.v1', ''::bytea) from unnest($1::text[]) as topic")
                .bind(topics)
                .execute(&self.database.pool)
                .await
                .unwrap();
        }

        async fn item(&mut self) -> Item {
            tokio::time::timeout(SOON, self.items.recv()).await.expect("it is read").unwrap()
        }

        /// The lane, and the topics of the rows.
        async fn page(&mut self) -> (Option<String>, Vec<String>) {
            let Item::Page(Page { lane, rows, .. }) = self.item().await else { panic!("a topic has caught up") };
            (lane.map(|lane| lane.to_string()), rows.iter().map(|row| row.topic().to_owned()).collect())
        }

        fn page_is_done(&self) {
            self.done.send_modify(|done| *done += 1);
        }

        fn tell(&self, paused: Option<Paused>) {
            let paused = paused.into_iter().map(|paused| (paused.topic.clone(), paused)).collect();
            self.control.send_replace(Arc::new(Control { paused, ..Control::default() }));
        }
    }

    #[tokio::test]
    async fn a_reader_that_would_pause_for_an_hour_reads_at_once_what_it_is_told_of() {
        let mut reading = Reading::start().await;
        reading.append(&["orders"]).await;
        nudge(&reading.database.pool);
        assert_eq!(reading.page().await, (None, vec!["orders".to_owned()]));
    }

    #[tokio::test]
    async fn what_is_told_of_while_a_small_page_is_being_acknowledged_is_read_as_soon_as_it_is() {
        let mut reading = Reading::start().await;
        let mut others = reading.database.nudges().await;
        reading.append(&["first"]).await;
        nudge(&reading.database.pool);
        assert_eq!(reading.page().await, (None, vec!["first".to_owned()]));
        others.recv().await.unwrap();
        // It waits for Kafka, and is told meanwhile.
        reading.append(&["second"]).await;
        nudge(&reading.database.pool);
        others.recv().await.unwrap();
        reading.append(&["third"]).await;
        nudge(&reading.database.pool);
        others.recv().await.unwrap();
        reading.page_is_done();
        // In one page: it did not look before the first was acknowledged.
        assert_eq!(reading.page().await, (None, vec!["second".to_owned(), "third".to_owned()]));
    }

    #[tokio::test]
    async fn a_paused_topic_that_services_tell_of_costs_one_look_each_time_and_its_rows_come_when_it_resumes() {
        const TIMES: usize = 20;
        let log = Log::hear("sqlx::query=debug");
        let looks = || log.statements().iter().filter(|sql| sql.contains("null::bigint")).count();
        let mut reading = Reading::start().await;
        let at = |resuming| Paused {
            topic: "paused".to_owned(),
            cause: Cause::Operator,
            paused_at: OffsetDateTime::UNIX_EPOCH,
            resuming,
            position: Some(Position::initial()),
        };
        reading.tell(Some(at(false)));
        let both = ["paused".to_owned(), "flows".to_owned()];
        for _ in 0..TIMES {
            reading.append(&["paused", "flows"]).await;
            nudge(&reading.database.pool);
            // The publisher passes over the one, and has the other acknowledged.
            assert_eq!(reading.page().await, (None, both.to_vec()));
            reading.page_is_done();
        }
        reading.tell(Some(at(true)));
        assert_eq!(reading.page().await, (Some("paused".to_owned()), vec!["paused".to_owned(); TIMES]));
        reading.page_is_done();
        // And one that is appended meanwhile, which the main flow passes over first; then it has caught up.
        reading.append(&["paused"]).await;
        nudge(&reading.database.pool);
        assert_eq!(reading.page().await, (None, vec!["paused".to_owned()]));
        reading.page_is_done();
        nudge(&reading.database.pool);
        assert_eq!(reading.page().await, (Some("paused".to_owned()), vec!["paused".to_owned()]));
        reading.page_is_done();
        nudge(&reading.database.pool);
        assert!(matches!(reading.item().await, Item::CaughtUp(CaughtUp { topic, .. }) if &*topic == "paused"));
        reading.tell(None);
        reading.append(&["paused"]).await;
        nudge(&reading.database.pool);
        assert_eq!(reading.page().await, (None, vec!["paused".to_owned()]));
        // The first, one for each of the three changes of the pause, and one for each time that it was told.
        assert!((TIMES..=1 + 3 + TIMES + 4).contains(&looks()), "{} looks", looks());
    }
}

//! The reader of one stream reads ahead of the producer: the main stream's rows, or those of a topic that is set apart.
//!
//! After a full page of the main stream the reader takes the next at once. After a small page it waits until Kafka has
//! that page, and for a pause. The pauses grow with the time in which nothing was found, from 1 ms to 100 ms; the
//! shortest is 5 ms while services nudge. A nudge ends a pause. A topic's reader follows the main stream at a pace of
//! its own.

use crate::{
    control::Control,
    database::Database,
    position::{Position, ReadError},
    read::{
        cursor::{Cursor, Page},
        nudges::Nudges,
    },
};
use saga_core::clock;
use sqlx::PgConnection;
use std::{
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

/// How long the reader pauses.
struct Pauses {
    /// The pause between polls that find little or nothing.
    idle: RangeInclusive<Duration>,
    /// The shortest pause while services nudge. Then the pause serves only the few services that do not, and a look in
    /// between, which finds nothing, is spared.
    nudged: Duration,
    /// After a page of few rows, the longest wait for Kafka's acknowledgement before the next read. Rows that come
    /// meanwhile share one poll, one request to Kafka and one transaction of the consumer. Rows that do not go to
    /// Kafka, as their topic is paused, wait for nothing: one look covers all nudges of the last.
    acknowledged: Duration,
}

const PAUSES: Pauses = Pauses {
    idle: Duration::from_millis(1)..=Duration::from_millis(100),
    nudged: Duration::from_millis(5),
    acknowledged: Duration::from_millis(10),
};
/// How long after the last nudge services count as nudging.
const NUDGING_FOR: Duration = Duration::from_secs(1);
const FEW_ROWS: usize = 500;
/// A pause is this part of the time in which nothing was found: what comes after a while waits that much longer. When
/// pauses doubled, a message of a conversation waited as long again as the answer before it had taken. 64 sagas went
/// round in one convoy, at a sixth of the pace (measured).
const PAUSE_PART: u32 = 16;

/// The pause between two looks of a topic's reader at what the main stream has passed: each is a statement or two.
const FOLLOW_EVERY: Duration = Duration::from_millis(50);
/// An empty stretch is recorded no more often than this.
const EMPTY_RECORDED_EVERY: Duration = Duration::from_secs(1);

/// An item for the publisher, in order.
pub(crate) enum ReaderItem {
    /// Rows to publish.
    Page(Page),
    /// The reader has handed out every row of the topic that the main stream had passed at this position.
    CaughtUp(Position),
}

/// Reads the main stream.
pub(crate) struct Reader {
    cursor: Cursor,
    control: watch::Receiver<Arc<Control>>,
    items: mpsc::Sender<ReaderItem>,
    /// How many pages the publisher got, and how many of them it has done with.
    given: usize,
    done: watch::Receiver<usize>,
    pauses: Pauses,
}

impl Reader {
    pub(crate) fn new(
        cursor: Cursor,
        control: watch::Receiver<Arc<Control>>,
        items: mpsc::Sender<ReaderItem>,
        done: watch::Receiver<usize>,
    ) -> Self {
        Self { cursor, control, items, given: 0, done, pauses: PAUSES }
    }

    /// Reads until the publisher takes no more.
    pub(crate) async fn run(mut self, database: Database, nudges: Arc<Nudges>) -> Result<(), ReadError> {
        let mut db = database.connect().await?;
        self.run_with(&database, &mut db, &nudges).await?;
        db.give_back();
        Ok(())
    }

    async fn run_with(&mut self, database: &Database, db: &mut PgConnection, nudges: &Nudges) -> Result<(), ReadError> {
        let (mut found_last, mut nudged_last) = (clock::monotonic(), None::<Instant>);
        loop {
            // Commits with a nudge so far are in the window that is opened next.
            if !self.cursor.knows_more() && nudges.take() {
                nudged_last = Some(clock::monotonic());
            }
            let small_page = match self.run_once(database, db).await? {
                PollResult::Closed => return Ok(()),
                PollResult::Rows(rows) => {
                    found_last = clock::monotonic();
                    if rows >= FEW_ROWS || self.cursor.knows_more() {
                        continue;
                    }
                    true
                }
                PollResult::Nothing => false,
            };
            let idle = clock::monotonic().duration_since(found_last);
            let nudged = nudged_last.is_some_and(|last| last.elapsed() < NUDGING_FOR);
            let shortest = if nudged { self.pauses.nudged } else { *self.pauses.idle.start() };
            let pause = (idle / PAUSE_PART).clamp(shortest, shortest.max(*self.pauses.idle.end()));
            // The copies see a change that stays new for `run_once`.
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

    /// Reads one page. The database has to answer in time; the publisher may take the page at any time.
    async fn run_once(&mut self, database: &Database, db: &mut PgConnection) -> Result<PollResult, ReadError> {
        if self.control.borrow_and_update().whole {
            return Ok(PollResult::Nothing);
        }
        self.cursor.make_room().await;
        let Some(page) = database.within(self.cursor.next(db)).await? else { return Ok(PollResult::Nothing) };
        let rows = page.rows.len();
        self.given += 1;
        let taken = self.items.send(ReaderItem::Page(page)).await;
        Ok(if taken.is_ok() { PollResult::Rows(rows) } else { PollResult::Closed })
    }
}

enum PollResult {
    Rows(usize),
    Nothing,
    Closed,
}

/// Reads the rows of a topic that is set apart, as far as the main stream has passed them.
pub(crate) struct Follower {
    pub(crate) cursor: Cursor,
    /// The main stream's position.
    pub(crate) main: watch::Receiver<Position>,
    pub(crate) items: mpsc::Sender<ReaderItem>,
}

impl Follower {
    /// Reads until the publisher takes no more.
    pub(crate) async fn run(mut self, database: Database) -> Result<(), ReadError> {
        let mut recorded = None::<Instant>;
        loop {
            let main = self.main.borrow_and_update().clone();
            self.cursor.make_room().await;
            let began = clock::monotonic();
            let page = database.ask(async |db| self.cursor.follow(db, &main).await).await?;
            // If the main stream has passed no more than was read, the next step waits for it.
            let follows = page.is_none();
            let item = match page {
                Some(page)
                    if page.rows.is_empty() && recorded.is_some_and(|last| last.elapsed() < EMPTY_RECORDED_EVERY) =>
                {
                    None
                }
                Some(page) => {
                    recorded = Some(clock::monotonic());
                    Some(ReaderItem::Page(page))
                }
                None if self.cursor.has_reached(&main) => Some(ReaderItem::CaughtUp(main)),
                None => None,
            };
            // The pause is as long as the step took: the main stream reads from the same database.
            let pause = if follows { FOLLOW_EVERY } else { began.elapsed().min(FOLLOW_EVERY) };
            if let Some(item) = item
                && self.items.send(item).await.is_err()
            {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.items.closed() => return Ok(()),
            }
            if follows {
                tokio::select! {
                    // The main stream has passed further rows, or has ended.
                    changed = self.main.changed() => if changed.is_err() { return Ok(()) },
                    () = self.items.closed() => return Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        budget::{Areas, Budget, default},
        row::Row,
        snapshot::Snapshot,
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

    /// A reader that would pause for an hour, whatever it waits for, on a database of its own; the test is its
    /// publisher.
    struct Reading {
        database: TestDatabase,
        _control: watch::Sender<Arc<Control>>,
        items: mpsc::Receiver<ReaderItem>,
        done: watch::Sender<usize>,
        _reader: AbortOnDropHandle<Result<(), ReadError>>,
    }

    impl Reading {
        /// Starts a reader that listens, has looked, found nothing, and pauses.
        async fn start() -> Self {
            let database = TestDatabase::new(&[messaging_migrations()]).await;
            let options = sqlx::postgres::PgConnectOptions::from_str(&database.url).unwrap();
            let (control, wanted) = watch::channel(Arc::new(Control::default()));
            let (sender, items) = mpsc::channel(1);
            let (done, seen) = watch::channel(0);
            let cursor = Cursor::new(Position::initial(), None, Areas::new(&Budget::new(default(1), 1)).main);
            let mut reader = Reader::new(cursor, wanted, sender, seen);
            reader.pauses = Pauses { idle: HOUR..=HOUR, nudged: HOUR, acknowledged: HOUR };
            let nudges = Arc::new(Nudges::listen(options.clone()));
            let _reader = AbortOnDropHandle::new(tokio::spawn(reader.run(Database::new(options, 2, SOON), nudges)));
            let reading = Self { database, _control: control, items, done, _reader };
            for last in ["listen", "(select null::bigint"] {
                eventually(SOON, || async { (reading.idle_after(last).await == 1).then_some(()) }).await;
            }
            reading
        }

        /// How many connections of the relay have run a statement that begins like this, and are idle now.
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

        /// Commits a row of each topic, without a nudge.
        async fn append(&self, topics: &[&str]) {
            sqlx::query("select outbox_append(topic, 'a', 'test.v1', ''::bytea) from unnest($1::text[]) as topic")
                .bind(topics)
                .execute(&self.database.pool)
                .await
                .unwrap();
        }

        async fn item(&mut self) -> ReaderItem {
            tokio::time::timeout(SOON, self.items.recv()).await.expect("it is read").unwrap()
        }

        /// The lane, and the topics of the rows.
        async fn page(&mut self) -> (Option<String>, Vec<String>) {
            let ReaderItem::Page(Page { only_topic, rows, .. }) = self.item().await else {
                panic!("a topic has caught up")
            };
            (
                only_topic.map(|only_topic| only_topic.to_string()),
                rows.iter().map(|row| row.topic().to_owned()).collect(),
            )
        }

        fn page_is_done(&self) {
            self.done.send_modify(|done| *done += 1);
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
        // The reader waits for Kafka, and gets a nudge meanwhile.
        reading.append(&["second"]).await;
        nudge(&reading.database.pool);
        others.recv().await.unwrap();
        reading.append(&["third"]).await;
        nudge(&reading.database.pool);
        others.recv().await.unwrap();
        reading.page_is_done();
        // Both rows come in one page: the reader did not look before the first page was acknowledged.
        assert_eq!(reading.page().await, (None, vec!["second".to_owned(), "third".to_owned()]));
    }

    #[tokio::test]
    async fn rows_that_no_broker_gets_cost_one_look_each_time_that_services_tell() {
        const TIMES: usize = 20;
        let log = Log::hear("sqlx::query=debug");
        let looks = || log.statements().iter().filter(|sql| sql.contains("null::bigint")).count();
        let mut reading = Reading::start().await;
        let both = ["paused".to_owned(), "flows".to_owned()];
        for _ in 0..TIMES {
            reading.append(&["paused", "flows"]).await;
            nudge(&reading.database.pool);
            // The publisher passes over one row, and has the other acknowledged.
            assert_eq!(reading.page().await, (None, both.to_vec()));
            reading.page_is_done();
        }
        // There is the first look, and one for each nudge of a service.
        assert!((TIMES..=1 + TIMES).contains(&looks()), "{} looks", looks());
    }

    #[tokio::test]
    async fn a_topics_reader_goes_on_after_a_step_that_took_long() {
        let reading = Reading::start().await;
        reading.append(&["flows", "apart"]).await;
        let base: String =
            sqlx::query_scalar("select pg_current_snapshot()::text").fetch_one(&reading.database.pool).await.unwrap();
        reading.append(&["flows", "apart"]).await;
        let target: String =
            sqlx::query_scalar("select pg_current_snapshot()::text").fetch_one(&reading.database.pool).await.unwrap();
        let (base, target): (Snapshot, Snapshot) = (base.parse().unwrap(), target.parse().unwrap());
        // The main stream has passed all, and gets no more rows.
        let (_main, following) = watch::channel(Position::at(target.clone()));
        let mut lock = reading.database.pool.begin().await.unwrap();
        sqlx::query("lock table outbox in access exclusive mode").execute(&mut *lock).await.unwrap();
        let (items, mut handed) = mpsc::channel(8);
        let at = Position { base, target, after: 3 };
        let area = Areas::new(&Budget::new(default(1), 1)).topic().await;
        let cursor = Cursor::new(at, Some("apart".into()), area);
        let follower = Follower { cursor, main: following, items };
        let options = sqlx::postgres::PgConnectOptions::from_str(&reading.database.url).unwrap();
        let _follower = AbortOnDropHandle::new(tokio::spawn(follower.run(Database::new(options, 1, SOON))));
        eventually(SOON, || async {
            let waits = "select count(*) from pg_stat_activity
                          where datname = current_database() and wait_event_type = 'Lock' and query like '%with piece%'
                            and clock_timestamp() - query_start > interval '0.2 seconds'";
            let waits: i64 = sqlx::query_scalar(waits).fetch_one(&reading.database.pool).await.unwrap();
            (waits == 1).then_some(())
        })
        .await;
        lock.rollback().await.unwrap();
        let found = async {
            loop {
                match handed.recv().await.expect("it reads") {
                    ReaderItem::Page(page) if page.rows.is_empty() => {}
                    ReaderItem::Page(page) => return page.rows.iter().map(Row::id).collect::<Vec<_>>(),
                    ReaderItem::CaughtUp(_) => panic!("it has a row"),
                }
            }
        };
        assert_eq!(tokio::time::timeout(SOON, found).await.expect("it goes on"), [4]);
    }

    #[tokio::test]
    async fn a_topics_reader_follows_the_main_stream_and_never_passes_it() {
        let mut reading = Reading::start().await;
        let options = sqlx::postgres::PgConnectOptions::from_str(&reading.database.url).unwrap();
        let (main, following) = watch::channel(Position::initial());
        let (items, mut handed) = mpsc::channel(1);
        let area = Areas::new(&Budget::new(default(1), 1)).topic().await;
        let cursor = Cursor::new(Position::initial(), Some("apart".into()), area);
        let follower = Follower { cursor, main: following, items };
        let _follower = AbortOnDropHandle::new(tokio::spawn(follower.run(Database::new(options, 1, SOON))));
        // A stretch without rows is handed out, too, to be recorded.
        let mut next = async || loop {
            match tokio::time::timeout(SOON, handed.recv()).await.expect("it reads").unwrap() {
                ReaderItem::Page(page) if page.rows.is_empty() => {}
                item => return item,
            }
        };
        assert!(matches!(next().await, ReaderItem::CaughtUp(at) if at == Position::initial()));
        reading.append(&["apart", "flows", "apart", "flows", "apart"]).await;
        nudge(&reading.database.pool);
        let ReaderItem::Page(page) = reading.item().await else { panic!("a page") };
        // The main stream has gone through the first three rows of its page.
        let at = |after| Position { base: page.base.clone(), target: page.target.clone(), after };
        let third = page.rows[2].id();
        main.send_replace(at(third));
        let ReaderItem::Page(mine) = next().await else { panic!("a page") };
        assert_eq!(mine.rows.iter().map(Row::id).collect::<Vec<_>>(), [page.rows[0].id(), third]);
        assert!(matches!(next().await, ReaderItem::CaughtUp(reached) if reached == at(third)));
        main.send_replace(at(page.to));
        let ReaderItem::Page(mine) = next().await else { panic!("a page") };
        assert_eq!(mine.rows.iter().map(Row::id).collect::<Vec<_>>(), [page.to]);
        assert!(matches!(next().await, ReaderItem::CaughtUp(reached) if reached == at(page.to)));
    }
}

//! Publishes: takes what the reader read, in order, decides what becomes of each row, and keeps many in flight.
//!
//! ```text
//!  reader ──pages──▶ session ──records──▶ librdkafka ──▶ Kafka
//!                      ▲  │                   │
//!                      │  └──progress──▶ recorder ──▶ batch log
//!                      └── in flight ◀── delivery reports
//! ```
//!
//! One session is one producer. Whatever goes wrong ends it; the next one reads the position from the batch log and sends
//! again what has no delivery report, one row at a time until the row that was refused is known. A row that this process
//! saw acknowledged beyond the recorded prefix is not sent a second time.

use crate::{
    commit::{CommitError, Progress},
    control::Control,
    database::Database,
    fate::Fate,
    in_flight::{Decided, Flight, GivenUp, Ticket},
    metric,
    parking::Blocked,
    pause::{Cause, LeftBehind},
    position::{Page, Position, ReadError},
    producer::{Offered, Publisher},
    reader::{CaughtUp, Item},
    record::{self, Built, RecordBuilder},
    refusal::Refusal,
    row::Row,
    topics::Topics,
};
use rdkafka::types::RDKafkaErrorCode;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Rows on their way to Kafka at most: enough to keep its batches full, few enough to be sent again after a failure.
const ROWS_IN_FLIGHT: usize = 60_000;
/// Bytes of large payloads on their way at most. One page may exceed it alone.
const BYTES_IN_FLIGHT: usize = 64 << 20;
/// So many records are made before the first of them is handed over. The library begins to send with the first record that
/// it gets: when the others follow without a pause, they are in the same request.
const TOGETHER: usize = 500;
/// How often a producer that reports nothing is asked whether it still lives.
const LOOK_AT_PRODUCER: Duration = Duration::from_secs(1);
/// How long a stop waits for what is in flight; what is not acknowledged by then is sent again by the next owner.
const LAST_DELIVERIES: Duration = Duration::from_secs(10);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The process stops.
    #[error("stopped")]
    Stopped,
    /// Batches have to be smaller, because a topic allows no larger ones; everything sent was acknowledged.
    #[error("a topic allows at most {0} bytes")]
    SmallerBatches(usize),
    /// A topic that was catching up is not there any more.
    #[error("the topic {0:?} cannot catch up now")]
    Stalled(String),
    /// Kafka refused a row, or the producer gave up.
    #[error("Kafka refused a record: {code} (row {id:?})")]
    Refused {
        /// The first row in flight that failed.
        id: Option<i64>,
        /// How.
        code: RDKafkaErrorCode,
        /// Nothing else was in flight, or it was refused on the spot: it is this row that is refused.
        alone: bool,
    },
    /// Nobody says any more what is wanted.
    #[error("looking up what operators want ended")]
    Control,
    /// Reading ended; its own error says why.
    #[error("reading the outbox ended")]
    Reader,
    /// The rows could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What was done could not be recorded.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The database, on another errand.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// What one session leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Acknowledged, but beyond the recorded prefix.
    pub(crate) acknowledged: HashSet<i64>,
    /// Rows still to be sent one at a time.
    pub(crate) careful: usize,
    /// What the last one found out about a row.
    pub(crate) verdict: Option<(i64, RDKafkaErrorCode)>,
}

/// One producer's life.
pub(crate) struct Session {
    pub(crate) outbox: String,
    pub(crate) db: Database,
    pub(crate) topics: Topics,
    pub(crate) publisher: Publisher,
    pub(crate) builder: RecordBuilder,
    pub(crate) memory: Memory,
    pub(crate) blocked: Arc<Blocked>,
    /// Passed over in the main flow.
    pub(crate) paused: HashSet<String>,
    /// Pauses that ended in this session, by when they began.
    pub(crate) resumed: HashMap<String, OffsetDateTime>,
    /// `max.message.bytes` of the topics seen.
    pub(crate) limits: HashMap<String, usize>,
    /// Where the main flow stands.
    pub(crate) at: Position,
    pub(crate) control: watch::Receiver<Arc<Control>>,
    pub(crate) progress: mpsc::Sender<Progress>,
    /// How many of the reader's pages need nothing more.
    pub(crate) pages_done: watch::Sender<usize>,
    pub(crate) stop: CancellationToken,
}

impl Session {
    /// Publishes until something ends it.
    pub(crate) async fn run(&mut self, mut items: mpsc::Receiver<Item>) -> Ended {
        if let Err(ended) = self.obey().await {
            return ended;
        }
        loop {
            if let Err(ended) = self.run_once(&mut items).await {
                return ended;
            }
        }
    }

    async fn run_once(&mut self, items: &mut mpsc::Receiver<Item>) -> Result<(), Ended> {
        self.complete().await?;
        let in_flight = self.publisher.in_flight.clone();
        let room = in_flight.has_room(ROWS_IN_FLIGHT, BYTES_IN_FLIGHT);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Ended::Stopped),
            () = in_flight.changed.notified() => Ok(()),
            () = tokio::time::sleep(LOOK_AT_PRODUCER) => self.look_at_producer(),
            changed = self.control.changed() => match changed {
                Ok(()) => self.obey().await,
                Err(_) => Err(Ended::Control),
            },
            () = self.progress.closed() => Err(CommitError::Fenced.into()),
            item = items.recv(), if room => match item {
                Some(Item::Page(page)) => self.send(page).await,
                Some(Item::CaughtUp(caught_up)) => self.catch_up(caught_up).await,
                None => Err(Ended::Reader),
            },
        }
    }

    /// Hands on what is complete, and notices a failure.
    pub(crate) async fn complete(&mut self) -> Result<(), Ended> {
        while let Some(flight) = self.publisher.in_flight.take_complete() {
            self.pages_done.send_modify(|done| *done += usize::from(flight.is_page()));
            metric::published(&self.outbox, &flight, &self.builder.clock);
            // A recorder that has gone has its own reason, which is told where it is joined.
            self.progress.send(flight.into_progress()).await.map_err(|_| CommitError::Fenced)?;
        }
        if let Some((id, code)) = self.publisher.in_flight.failure() {
            let alone = self.memory.careful > 0;
            return Err(Ended::Refused { id, code, alone });
        }
        Ok(())
    }

    /// A producer that is fatal sends nothing any more, and may never report what it holds.
    fn look_at_producer(&self) -> Result<(), Ended> {
        self.publisher.ask_for_brokers(&self.outbox, &self.topics);
        let Some(reason) = self.publisher.fatal() else { return Ok(()) };
        warn!(outbox = self.outbox, reason, "the producer gave up");
        Err(Ended::Refused { id: None, code: RDKafkaErrorCode::Fatal, alone: false })
    }

    /// Puts something into the sequence that is true as soon as all before it is.
    async fn mark(&mut self, progress: Progress) -> Result<(), Ended> {
        self.publisher.in_flight.mark(progress);
        self.complete().await
    }

    /// Does what operators want: leaves a topic behind.
    async fn obey(&mut self) -> Result<(), Ended> {
        let control = self.control.borrow_and_update().clone();
        for (topic, paused) in &control.paused {
            if self.paused.contains(topic) || self.resumed.get(topic) == Some(&paused.paused_at) {
                continue;
            }
            self.paused.insert(topic.clone());
            if paused.position.is_none() {
                info!(outbox = self.outbox, topic, "the topic is paused");
                let (cause, position) = (paused.cause, self.at.clone());
                let left = LeftBehind { topic: topic.clone(), cause, reason: String::new(), position };
                self.mark(Progress::LeftBehind(left)).await?;
            }
        }
        Ok(())
    }

    /// A topic goes on in the main flow, unless it has been paused again: then it stays where its lane stopped.
    async fn catch_up(&mut self, caught_up: CaughtUp) -> Result<(), Ended> {
        let CaughtUp { topic, paused_at } = &caught_up;
        let paused = self.control.borrow().paused.get(&**topic).map(|paused| paused.paused_at);
        if paused.is_some_and(|again| again != *paused_at) {
            return Ok(());
        }
        self.paused.remove(&**topic);
        self.resumed.insert(topic.to_string(), *paused_at);
        info!(outbox = self.outbox, topic = &**topic, "the topic has caught up");
        self.mark(Progress::CaughtUp(caught_up)).await
    }

    async fn send(&mut self, page: Page) -> Result<(), Ended> {
        let number = self.publisher.in_flight.open(Flight::of(&page));
        let mut decided = Decided::default();
        let sent = self.send_rows(&page, number, &mut decided).await;
        if page.lane.is_none() && sent.is_ok() {
            let after = page.to;
            self.at = Position { base: page.base, target: page.target, after };
        }
        // Also where sending failed: what is acknowledged of the page has still to be told from what is not.
        self.publisher.in_flight.seal(number, decided);
        sent
    }

    async fn send_rows(&mut self, page: &Page, number: usize, decided: &mut Decided) -> Result<(), Ended> {
        let mut before = page.after;
        let mut rows = page.rows.iter().enumerate();
        loop {
            let together = if self.memory.careful > 0 { 1 } else { TOGETHER };
            let mut ready = Vec::new();
            let mut taken = 0;
            for (index, row) in rows.by_ref().take(together) {
                taken += 1;
                // To ask about a topic may take its time: nobody waits for that but rows of the topic, and what follows.
                if !self.limits.contains_key(row.topic()) {
                    self.send_all(&mut ready).await?;
                }
                let ticket = Ticket::new(number, index);
                if let Some(built) = self.ready(page, row, before, ticket, decided).await? {
                    ready.push((row, built, ticket));
                }
                before = row.id();
            }
            if taken == 0 {
                return Ok(());
            }
            self.send_all(&mut ready).await?;
        }
    }

    async fn send_all(&mut self, ready: &mut Vec<(&Row, Built, Ticket)>) -> Result<(), Ended> {
        for (row, built, ticket) in ready.drain(..) {
            self.send_row(row, built, ticket).await?;
        }
        Ok(())
    }

    /// The row's record, if it goes to Kafka.
    async fn ready(
        &mut self,
        page: &Page,
        row: &Row,
        before: i64,
        ticket: Ticket,
        decided: &mut Decided,
    ) -> Result<Option<Built>, Ended> {
        let index = ticket.row();
        match self.fate(page, row, before).await? {
            Fate::Send(built) => {
                decided.oldest.get_or_insert_with(|| row.created_at());
                return Ok(Some(built));
            }
            Fate::Park(park) => {
                let (id, topic, reason) = (park.id, row.topic(), &park.reason);
                record::span(row).in_scope(|| warn!(outbox = self.outbox, id, topic, reason, "parked a row"));
                metric::parked(&self.outbox, row.topic());
                decided.parked.push((index, park));
            }
            Fate::Leave(left) => {
                let LeftBehind { topic, reason, .. } = &left;
                warn!(outbox = self.outbox, topic, reason, "the topic is paused; others go on");
                self.paused.insert(topic.clone());
                decided.left_behind.push((index, left));
            }
            Fate::Pass => {}
        }
        self.publisher.in_flight.passed(ticket);
        Ok(None)
    }

    async fn send_row(&mut self, row: &Row, built: Built, ticket: Ticket) -> Result<(), Ended> {
        if let Some(refused) = self.offer(row, built, ticket).await? {
            return Err(Ended::Refused { id: Some(row.id()), code: refused, alone: true });
        }
        if self.memory.careful > 0 {
            self.acknowledged(ticket).await.map_err(|ended| match ended {
                // Nothing else was in flight.
                Ended::Refused { code, .. } => Ended::Refused { id: Some(row.id()), code, alone: true },
                ended => ended,
            })?;
            self.memory.careful -= 1;
        }
        Ok(())
    }

    /// Gives a row to the producer, waiting for room; tells if it was refused on the spot.
    pub(crate) async fn offer(
        &mut self,
        row: &Row,
        built: Built,
        ticket: Ticket,
    ) -> Result<Option<RDKafkaErrorCode>, Ended> {
        let mut built = Some(built);
        loop {
            let record = built.take().unwrap_or_else(|| self.builder.build(row));
            match self.publisher.offer(row, record, ticket) {
                Offered::Taken => return Ok(None),
                Offered::Refused(code) => return Ok(Some(code)),
                Offered::Full => {
                    let sent = self.publisher.in_flight.sent();
                    self.wait_until(|session| session.publisher.in_flight.sent() < sent).await?;
                }
            }
        }
    }

    /// Waits until a row that was just sent is acknowledged.
    pub(crate) async fn acknowledged(&mut self, ticket: Ticket) -> Result<(), Ended> {
        self.wait_until(|session| session.publisher.in_flight.is_done(ticket)).await
    }

    /// Waits until everything sent so far is acknowledged.
    pub(crate) async fn settle(&mut self) -> Result<(), Ended> {
        self.wait_until(|session| session.publisher.in_flight.sent() == 0).await?;
        // The last of it may have been acknowledged since completed pages were looked for.
        self.complete().await
    }

    async fn wait_until(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), Ended> {
        let in_flight = self.publisher.in_flight.clone();
        in_flight.set_eager(true);
        let waited = loop {
            if let Err(ended) = self.complete().await {
                break Err(ended);
            }
            if done(self) {
                break Ok(());
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break Err(Ended::Stopped),
                () = in_flight.changed.notified() => {}
                () = tokio::time::sleep(LOOK_AT_PRODUCER) => if let Err(ended) = self.look_at_producer() {
                    break Err(ended);
                },
            }
        };
        in_flight.set_eager(false);
        waited
    }

    /// Drops the producer and says what the next session has to know. What is acknowledged is handed to the recorder
    /// first; a stop waits a while for the rest.
    pub(crate) async fn finish(mut self, ended: &Ended) -> Memory {
        if matches!(ended, Ended::Stopped) {
            let in_flight = self.publisher.in_flight.clone();
            in_flight.set_eager(true);
            let delivered = async {
                while in_flight.sent() > 0 && in_flight.failure().is_none() {
                    in_flight.changed.notified().await;
                }
            };
            if tokio::time::timeout(LAST_DELIVERIES, delivered).await.is_err() {
                warn!(
                    outbox = self.outbox,
                    "Kafka did not acknowledge everything in time; the next owner sends it again"
                );
            }
        }
        // Its failure is why we are here.
        self.complete().await.ok();
        let Self { publisher, progress, memory, .. } = self;
        let GivenUp { beginning, mut beyond, rows } = publisher.in_flight.give_up();
        if let Some(beginning) = beginning {
            progress.send(beginning).await.ok();
        }
        let mut careful = memory.careful;
        let mut verdict = memory.verdict;
        if let Ended::Refused { id, code, alone } = ended {
            careful = careful.max(rows);
            match Refusal::of(*code) {
                // The topic may have been deleted, and what was acknowledged with it.
                Refusal::Topic(Cause::Missing) => beyond.clear(),
                Refusal::Topic(_) => verdict = id.map(|id| (id, *code)),
                Refusal::Row if *alone => verdict = id.map(|id| (id, *code)),
                Refusal::Row | Refusal::Transient => {}
            }
        }
        beyond.extend(memory.acknowledged);
        Memory { acknowledged: beyond, careful, verdict }
    }
}

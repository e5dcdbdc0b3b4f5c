//! One producer's life in one stream: it takes the reader's pages, in order, and keeps many rows in flight.
//!
//! ```text
//!  reader ──pages──▶ session ──records──▶ librdkafka ──▶ Kafka
//!                      ▲  │                   │
//!                      │  └──progress──▶ recorder ──▶ batch log
//!                      └── in flight ◀── delivery reports
//! ```
//!
//! The main stream and each topic that is set apart have sessions of their own. Any failure ends a session; the next
//! one of its stream goes on behind what was acknowledged without a gap. A row that this process saw acknowledged
//! beyond that is not sent a second time.

mod fate;
mod handover;
mod sending;

pub(crate) use handover::{ReturningTopic, ReturningTopics};

use crate::{
    budget::Area,
    control::Control,
    database::Database,
    position::{Position, ReadError},
    publish::{
        in_flight::RefusedRow,
        kafka_record::RecordBuilder,
        producer::Publisher,
        refusal::{Refusal, is_of_all_topics},
        shared::Shared,
    },
    read::reader::ReaderItem,
    record::{
        commit::{CommitError, Recordable},
        parking::BlockedLanes,
        pause::{LeftBehind, PauseCause},
    },
    topics::Topics,
};
use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The most rows on their way to Kafka: enough to keep its batches full, few enough to be sent again after a failure.
const ROWS_IN_FLIGHT: usize = 60_000;
/// The most rows on their way to Kafka of a topic that is set apart, which has a pace of its own.
const ROWS_OF_A_TOPIC: usize = 10_000;
/// How often the session checks whether its producer still lives, and the queue for rows that are stuck.
pub(crate) const LOOK_AT_PRODUCER: Duration = Duration::from_secs(1);
/// How long a stop waits for rows in flight; the next owner sends again what is not acknowledged by then.
const LAST_DELIVERIES: Duration = Duration::from_secs(10);
/// How long the session waits for rows in flight where the stream cannot go on, and not the producer.
const OTHERS_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long the session waits, after a refusal, for reports of what brokers have already got.
const REPORTS_WAIT_MAX: Duration = Duration::from_millis(500);
/// How many failures, without progress in between, set apart a topic that they name, whatever the code.
const FAILURES_MAX: u32 = 3;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionEnd {
    /// The process stops.
    #[error("stopped")]
    Stopped,
    /// The whole outbox, or this topic, is not to be published now.
    #[error("paused")]
    Paused,
    /// The topic is in the main stream again.
    #[error("caught up")]
    Joined,
    /// A topic that was catching up takes nothing any more.
    #[error("the topic {0:?} cannot catch up now")]
    Stalled(String),
    /// No broker takes rows of these topics.
    #[error("no broker takes rows of {0:?}")]
    Stuck(BTreeSet<String>),
    /// Kafka refused a row, or the producer gave up.
    #[error("Kafka refused a record: {code} (row {id:?})")]
    Refused {
        /// The first row in flight that failed.
        id: Option<i64>,
        /// Kafka's error code.
        code: RDKafkaErrorCode,
    },
    /// The producer gave up by itself.
    #[error("the Kafka producer gave up: {0}")]
    GaveUp(String),
    /// The look-up of operators' wishes has ended.
    #[error("looking up what operators want ended")]
    Control,
    /// Reading ended; its own error says why.
    #[error("reading the outbox ended")]
    Reader,
    /// librdkafka does not accept the configuration.
    #[error("the Kafka producer could not be made: {0}")]
    Producer(#[from] KafkaError),
    /// The rows could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// What was done could not be recorded.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The database returned an error in other work.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// The state that one session of a stream leaves to the next.
#[derive(Debug)]
pub(crate) struct StreamState {
    /// The position up to which the stream has dealt with all rows.
    pub(crate) at: Position,
    /// `max.message.bytes` of the topics seen.
    pub(crate) limits: HashMap<String, usize>,
    /// Rows of a refused batch. Each is sent while nothing else is in flight, until the one is known that is refused.
    pub(crate) suspects: HashSet<i64>,
    /// Kafka's refusals of single rows.
    pub(crate) verdicts: HashMap<i64, RDKafkaErrorCode>,
    /// Failures since a page was last complete.
    pub(crate) failures: u32,
    /// When Kafka last refused a row.
    pub(crate) refused_at: Option<Instant>,
}

impl StreamState {
    pub(crate) fn at(at: Position) -> Self {
        let (limits, suspects, verdicts) = Default::default();
        Self { at, limits, suspects, verdicts, failures: 0, refused_at: None }
    }
}

/// The stream that a session belongs to.
pub(crate) enum StreamScope {
    /// The main stream, of all topics that are not set apart.
    Main {
        /// Topics that are about to come back.
        returning: ReturningTopics,
    },
    /// The stream of one topic that is set apart.
    Topic(Box<ReturningTopic>),
}

/// One producer's life in a stream.
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) scope: StreamScope,
    pub(crate) area: Arc<Area>,
    pub(crate) outbox: String,
    pub(crate) db: Database,
    pub(crate) topics: Topics,
    pub(crate) publisher: Publisher,
    pub(crate) builder: RecordBuilder,
    pub(crate) stream_state: StreamState,
    pub(crate) blocked: Arc<BlockedLanes>,
    /// Topics that are set apart; the main stream passes over their rows.
    pub(crate) paused: HashSet<String>,
    /// The stream's position.
    pub(crate) at: Position,
    pub(crate) control: watch::Receiver<Arc<Control>>,
    pub(crate) look_at: tokio::time::Interval,
    pub(crate) progress: mpsc::Sender<Recordable>,
    /// How many of the reader's pages need nothing more.
    pub(crate) pages_done: watch::Sender<usize>,
    pub(crate) stop: CancellationToken,
}

impl Session {
    /// Publishes until something ends it.
    pub(crate) async fn run(&mut self, mut items: mpsc::Receiver<ReaderItem>) -> SessionEnd {
        if let Err(ended) = self.obey().await {
            return ended;
        }
        loop {
            if let Err(ended) = self.run_once(&mut items).await {
                return ended;
            }
        }
    }

    async fn run_once(&mut self, items: &mut mpsc::Receiver<ReaderItem>) -> Result<(), SessionEnd> {
        self.complete().await?;
        let in_flight = self.publisher.in_flight.clone();
        let room = self.has_room();
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(SessionEnd::Stopped),
            () = in_flight.changed.notified() => Ok(()),
            _ = self.look_at.tick() => self.look_at_producer().await,
            changed = self.control.changed() => match changed {
                Ok(()) => self.obey().await,
                Err(_) => Err(SessionEnd::Control),
            },
            step = self.scope.next_handover_step(&self.shared.handover_requests) => self.hand_over(step).await,
            () = self.progress.closed() => Err(CommitError::Fenced.into()),
            item = items.recv(), if room => match item {
                Some(ReaderItem::Page(page)) => self.send(page).await,
                Some(ReaderItem::CaughtUp(at)) => self.caught_up(at).await,
                None => Err(SessionEnd::Reader),
            },
        }
    }

    /// Whether more rows may be sent before others are acknowledged.
    pub(crate) fn has_room(&self) -> bool {
        let rows = if matches!(self.scope, StreamScope::Main { .. }) { ROWS_IN_FLIGHT } else { ROWS_OF_A_TOPIC };
        self.publisher.in_flight.rows() < rows
    }

    /// Does what operators want: stops, or leaves a topic behind.
    async fn obey(&mut self) -> Result<(), SessionEnd> {
        let control = self.control.borrow_and_update().clone();
        if control.whole || self.scope.is_withdrawn(&control) {
            return Err(SessionEnd::Paused);
        }
        if matches!(self.scope, StreamScope::Topic(_)) {
            return Ok(());
        }
        for (topic, paused) in &control.paused {
            if self.paused.contains(topic) || self.shared.has_resumed(topic, paused.paused_at) {
                continue;
            }
            self.paused.insert(topic.clone());
            if paused.position.is_none() {
                info!(outbox = self.outbox, topic, "the topic is paused");
                let (cause, position) = (paused.cause, self.at.clone());
                let left = LeftBehind { topic: topic.clone(), cause, reason: String::new(), position };
                self.mark(Recordable::LeftBehind(left)).await?;
            }
        }
        Ok(())
    }

    /// Drops the producer and returns what the next session has to know. It first hands what is acknowledged to the
    /// recorder. A stop or a pause waits a while for what the brokers have already got.
    pub(crate) async fn finish(mut self, ended: &SessionEnd) -> StreamState {
        let mut all_reported = false;
        match ended {
            SessionEnd::Stopped => self.await_deliveries(LAST_DELIVERIES).await,
            SessionEnd::Paused => {
                self.publisher.purge();
                self.await_deliveries(LAST_DELIVERIES).await;
            }
            SessionEnd::Stuck(topics) => {
                let in_flight = self.publisher.in_flight.clone();
                in_flight.set_eager(true);
                let others = async {
                    while in_flight.sent_besides(topics) > 0 && in_flight.refusals() == 0 {
                        in_flight.changed.notified().await;
                    }
                };
                // The next session sends again what is not acknowledged by then.
                tokio::time::timeout(OTHERS_WAIT_MAX, others).await.ok();
            }
            // A fatal producer may be noticed before the reports that name the reason.
            SessionEnd::Refused { .. } | SessionEnd::GaveUp(_) => all_reported = self.await_refusals().await,
            SessionEnd::Commit(_) => {}
            // The producer is sound: what it has sent should not be sent again.
            _ => self.await_deliveries(OTHERS_WAIT_MAX).await,
        }
        // A failure here is the one that ended the session.
        self.complete().await.ok();
        let refused = self.publisher.in_flight.refused();
        let left = self.publisher.in_flight.give_up();
        if let Some((beginning, at)) = left.beginning {
            self.stream_state.at = at.unwrap_or(self.stream_state.at);
            self.progress.send(beginning).await.ok();
        }
        self.shared.remember(left.beyond);
        match &self.scope {
            StreamScope::Main { .. } => self.set_apart(ended, &refused).await,
            StreamScope::Topic(_) => self.suspect(ended, &refused, all_reported),
        }
        self.stream_state
    }

    async fn await_deliveries(&self, patience: Duration) {
        let in_flight = self.publisher.in_flight.clone();
        in_flight.set_eager(true);
        let delivered = async {
            while in_flight.sent() > 0 && in_flight.refusals() == 0 {
                in_flight.changed.notified().await;
            }
        };
        if tokio::time::timeout(patience, delivered).await.is_err() {
            warn!(
                outbox = self.outbox,
                "Kafka did not acknowledge everything in time; the rest is sent again when publishing goes on"
            );
        }
    }

    /// Waits until there is a report of each row; returns whether there is. The producer takes back what no broker has
    /// got yet, and the brokers answer for the rest.
    async fn await_refusals(&self) -> bool {
        self.publisher.purge();
        let in_flight = self.publisher.in_flight.clone();
        in_flight.set_eager(true);
        let reported = async {
            while in_flight.sent() > 0 {
                in_flight.changed.notified().await;
            }
        };
        tokio::time::timeout(REPORTS_WAIT_MAX, reported).await.is_ok()
    }

    /// Leaves behind, in the main stream, the topics that a failure is about. Each goes on, or waits, in a stream of
    /// its own, so that the others pay for a refusal once.
    async fn set_apart(&mut self, ended: &SessionEnd, refused: &[RefusedRow]) {
        let mut causes: HashMap<&str, (PauseCause, String)> = HashMap::new();
        if let SessionEnd::Stuck(topics) = ended {
            let reason = format!("no broker has taken its rows for {:?}", self.shared.stuck_after);
            causes.extend(topics.iter().map(|topic| (topic.as_str(), (PauseCause::Leaderless, reason.clone()))));
        }
        self.stream_state.failures += u32::from(matches!(ended, SessionEnd::Refused { .. } | SessionEnd::GaveUp(_)));
        for RefusedRow { id, topic, code } in refused {
            let said = format!("Kafka says of row {id}: {code}");
            let cause = match Refusal::of(*code) {
                Refusal::Topic(cause) => cause,
                Refusal::Row => PauseCause::Refusing,
                Refusal::Transient if self.stream_state.failures >= FAILURES_MAX && !is_of_all_topics(*code) => {
                    PauseCause::Refusing
                }
                Refusal::Transient => continue,
            };
            if cause == PauseCause::Missing {
                // The topic may have been deleted, and the acknowledged rows with it.
                self.shared.forget(topic);
            }
            causes.entry(topic).or_insert((cause, said));
        }
        if !causes.is_empty() {
            // The trouble is recorded with the topics, and perhaps no row of another topic comes to show that the
            // stream works.
            self.shared.loops.working(self.scope.name());
        }
        for (topic, (cause, reason)) in causes {
            warn!(outbox = self.outbox, topic, reason, "the topic is set apart; the others go on");
            self.stream_state.limits.remove(topic);
            self.stream_state.failures = 0;
            let left = LeftBehind { topic: topic.to_owned(), cause, reason, position: self.stream_state.at.clone() };
            self.progress.send(Recordable::LeftBehind(left)).await.ok();
        }
    }

    /// Finds the refused row in a topic's own stream: at once where Kafka names it, or where it was alone in its batch.
    /// The latter is certain only when there is a report of each row. Otherwise the rows of the refused batch are sent
    /// one by one.
    fn suspect(&mut self, ended: &SessionEnd, refused: &[RefusedRow], all_reported: bool) {
        if !matches!(ended, SessionEnd::Refused { .. } | SessionEnd::GaveUp(_)) {
            return;
        }
        self.stream_state.failures += 1;
        let named = refused.iter().any(|row| row.code == RDKafkaErrorCode::InvalidDifferentRecord);
        let of_rows: Vec<&RefusedRow> = refused.iter().filter(|row| Refusal::of(row.code) == Refusal::Row).collect();
        if !of_rows.is_empty() {
            self.stream_state.refused_at = Some(Instant::from_std(saga_core::clock::monotonic()));
        }
        let topical = |row: &&RefusedRow| matches!(Refusal::of(row.code), Refusal::Topic(_));
        if let Some(row) = refused.iter().find(topical) {
            self.stream_state.verdicts.insert(row.id, row.code);
        }
        if named || of_rows.len() == 1 && all_reported {
            self.stream_state.failures = 0;
            self.stream_state.verdicts.extend(of_rows.iter().map(|row| (row.id, row.code)));
        } else {
            self.stream_state.suspects.extend(of_rows.iter().map(|row| row.id));
        }
    }
}

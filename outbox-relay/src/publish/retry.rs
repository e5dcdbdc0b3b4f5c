//! Tries parked lanes again, when an operator asked for it: in order, many rows at a time, beside all other work.
//!
//! ```text
//!  parked ──claim──▶ being sent ──report──▶ published
//!    ▲                   │
//!    └──── refused ──────┘
//! ```
//!
//! The relay claims a row, in a commit of its own, before it sends it. Until its fate is known the row cannot be
//! discarded: what was discarded is never published. Retries have a producer of their own, so that a row that Kafka
//! refuses costs no other row anything. When the process dies in between, the next owner sends the claimed rows again:
//! the request still stands.

mod put_off;

use crate::{
    budget::{Area, Held, LEAST_BYTES, ROW_BYTES_MAX},
    control::Control,
    database::Database,
    loops::{self, Loops},
    outbox::Outbox,
    publish::{
        kafka_record::{self, Built, RecordBuilder, takes_dead_letters},
        refusal::{Refusal, too_large},
        retry_producer::{Choice, RetryProducer, Sending},
    },
    record::{
        parking::{self, BlockedLanes, Lane, Published},
        pause::PauseCause,
    },
    row::Row,
    topics::{TopicState, Topics},
};
use rdkafka::error::RDKafkaErrorCode as Code;
use saga_core::{clock::DatabaseClock, part, topic::is_legal_name};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use time::OffsetDateTime;
use tokio::sync::watch;
use tracing::{debug, info, warn};
use uuid::Uuid;

/// The most bytes that are sent together. One row may exceed it alone.
const BATCH_BYTES_MAX: usize = LEAST_BYTES;
/// The most rows that are read and sent together; one statement marks what was sent.
const BATCH_ROWS_MAX: usize = LEAST_BYTES / ROW_BYTES_MAX;
/// Kafka acknowledges at least one row within this. A topic whose rows cannot be sent is left alone for as long, so
/// that others are tried.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(10);
/// How many turns may fail one after the other before health shows it.
const FAILED_TURNS_MAX: u32 = 3;
/// The pause between two turns, after one that could do nothing.
const IDLE_PAUSE: Duration = Duration::from_millis(250);

/// A lane, the time of its request, how large a record may be, and the rows to send.
type Chosen = (Lane, OffsetDateTime, usize, Vec<i64>);

/// Tries parked lanes again, for one owner.
pub(crate) struct Retries {
    outbox: String,
    db: Database,
    owner: Uuid,
    topics: Topics,
    brokers: String,
    compression: String,
    builder: RecordBuilder,
    area: Arc<Area>,
    blocked: Arc<BlockedLanes>,
    control: watch::Receiver<Arc<Control>>,
    loops: Arc<Loops>,
    /// Requests that were met, by the time of the request: the last look may be a moment old.
    met: HashMap<Lane, OffsetDateTime>,
    /// How many rows are still to be sent one at a time, because a batch was refused and the culprit is not known.
    one_by_one: usize,
    /// Topics whose rows could not be sent, and until when they are left alone.
    silent: HashMap<String, std::time::Instant>,
    /// The lane that comes first in the next turn, because it found no room in the last.
    first: Option<Lane>,
    producer: Option<RetryProducer>,
}

impl Retries {
    pub(crate) fn new(
        outbox: &Outbox,
        owner: Uuid,
        epoch: Arc<str>,
        blocked: Arc<BlockedLanes>,
        control: watch::Receiver<Arc<Control>>,
    ) -> Self {
        let clock: Arc<DatabaseClock> = outbox.leases.clock.clone();
        Self {
            outbox: outbox.name.clone(),
            db: outbox.db.clone(),
            owner,
            topics: outbox.topics.clone(),
            brokers: outbox.brokers.clone(),
            compression: outbox.compression.clone(),
            builder: RecordBuilder::new(&outbox.name, epoch, clock),
            area: outbox.areas.retries.clone(),
            blocked,
            control,
            loops: outbox.status.loops.clone(),
            met: HashMap::new(),
            one_by_one: 0,
            silent: HashMap::new(),
            first: None,
            producer: None,
        }
    }

    /// Tries requested lanes until the future is dropped.
    pub(crate) async fn run(mut self) {
        let mut failures = 0;
        loop {
            let lanes = self.wanted();
            if lanes.is_empty() {
                self.producer = None;
                self.loops.working(loops::RETRIES);
                if self.control.changed().await.is_err() {
                    // The owner's time ends, and this future with it.
                    return std::future::pending().await;
                }
                continue;
            }
            match self.turn(lanes).await {
                Ok(done) => {
                    failures = 0;
                    if !done {
                        tokio::time::sleep(IDLE_PAUSE).await;
                    }
                }
                Err(error) => {
                    failures += 1;
                    debug!(outbox = self.outbox, %error, "trying parked rows again");
                    // An outage of the database ends this owner's time, and is reported for it.
                    if failures >= FAILED_TURNS_MAX {
                        self.loops.failing(loops::RETRIES, part::Cause::of(&error), &error.to_string());
                    }
                    tokio::time::sleep(IDLE_PAUSE * 4).await;
                }
            }
        }
    }

    /// The lanes that are to be tried now. Those of a paused topic are tried when it resumes.
    fn wanted(&mut self) -> Vec<(Lane, OffsetDateTime)> {
        let control = self.control.borrow_and_update().clone();
        self.met.retain(|lane, at| control.retry.get(lane) == Some(at));
        if control.whole {
            return Vec::new();
        }
        let now = saga_core::clock::monotonic();
        self.silent.retain(|_, until| *until > now);
        let open = |lane: &&Lane| !control.paused.contains_key(&lane.topic);
        let lanes = control.retry.iter().filter(|(lane, at)| open(lane) && self.met.get(*lane) != Some(*at));
        lanes.map(|(lane, at)| (lane.clone(), *at)).collect()
    }

    /// Sends rows of these lanes, as many as go together; returns whether anything was done.
    async fn turn(&mut self, mut lanes: Vec<(Lane, OffsetDateTime)>) -> Result<bool, sqlx::Error> {
        if let Some(at) = self.first.take().and_then(|first| lanes.iter().position(|(lane, _)| *lane == first)) {
            lanes.rotate_left(at);
        }
        let looked_at = self.area.take(BATCH_BYTES_MAX, BATCH_BYTES_MAX).await;
        let mut limits = HashMap::new();
        let (mut chosen, mut rows, mut bytes, mut done) = (Vec::new(), 0, 0, false);
        let most = if self.one_by_one > 0 { 1 } else { BATCH_ROWS_MAX };
        for (lane, requested) in lanes {
            if rows >= most || bytes >= BATCH_BYTES_MAX {
                self.first = self.first.take().or(Some(lane));
                break;
            }
            if !is_legal_name(&lane.topic) {
                warn!(
                    outbox = self.outbox,
                    topic = lane.topic,
                    "no topic can have this name; its rows can only be discarded"
                );
                self.met(lane, requested).await?;
                continue;
            }
            let Some(limit) = self.limit(&lane.topic, &mut limits).await? else { continue };
            match self.choose(&lane, limit, most - rows, BATCH_BYTES_MAX - bytes).await? {
                Choice::Rows(ids, their_bytes) => {
                    rows += ids.len();
                    bytes += their_bytes;
                    chosen.push((lane, requested, limit, ids));
                }
                Choice::Refused if lane.key.is_none() => done = true,
                Choice::Refused => {
                    done = true;
                    self.met(lane, requested).await?;
                }
                // The lane is the first of the next turn.
                Choice::NoRoom => self.first = self.first.take().or(Some(lane)),
                Choice::Nothing => done |= self.finish(lane, requested).await?,
            }
        }
        if chosen.is_empty() {
            return Ok(done);
        }
        drop(looked_at);
        let held = self.area.take(bytes, bytes).await;
        self.send(chosen, held).await
    }

    /// The first rows of a lane that fit. A row that its topic does not take is refused unread: alone if it has no key,
    /// else with all behind it.
    async fn choose(&self, lane: &Lane, limit: usize, most: usize, room: usize) -> Result<Choice, sqlx::Error> {
        let found = self.db.ask(async |db| parking::waiting(db, &self.outbox, lane, most).await).await?;
        if found.is_empty() {
            return Ok(Choice::Nothing);
        }
        let (mut ids, mut bytes, mut refused) = (Vec::new(), 0, false);
        for row in found {
            let size = row.bytes();
            // For a dead letter, as much is sent as fits.
            if size > limit && !takes_dead_letters(&lane.topic) {
                if lane.key.is_some() && !ids.is_empty() {
                    break;
                }
                self.refuse(&row, &too_large(size, limit)).await?;
                refused = true;
                if lane.key.is_some() {
                    break;
                }
                continue;
            }
            if bytes + row.cost() > room && !(ids.is_empty() && room == BATCH_BYTES_MAX) {
                break;
            }
            ids.push(row.id());
            bytes += row.cost();
        }
        Ok(match ids.is_empty() {
            false => Choice::Rows(ids, bytes),
            true if refused => Choice::Refused,
            true => Choice::NoRoom,
        })
    }

    /// How large a record of the topic may be; `None` when it takes none now.
    async fn limit(
        &mut self,
        topic: &str,
        known: &mut HashMap<String, Option<usize>>,
    ) -> Result<Option<usize>, sqlx::Error> {
        if self.silent.contains_key(topic) {
            return Ok(None);
        }
        if let Some(limit) = known.get(topic) {
            return Ok(*limit);
        }
        let limit = match self.topics.look(topic).await {
            Ok(TopicState::Ready { max_message_bytes }) => Some(max_message_bytes),
            Ok(TopicState::Missing(reason)) => self.put_off(topic, PauseCause::Missing, reason).await?,
            Ok(TopicState::Forbidden(reason)) => self.put_off(topic, PauseCause::Forbidden, reason).await?,
            Err(error) => {
                self.leave_alone(topic.to_owned(), &format!("the brokers do not say what it is like: {error}"));
                None
            }
        };
        known.insert(topic.to_owned(), limit);
        Ok(limit)
    }

    /// Claims the rows, sends them, and records their fate.
    async fn send(&mut self, chosen: Vec<Chosen>, held: Held) -> Result<bool, sqlx::Error> {
        let ids: Vec<i64> = chosen.iter().flat_map(|(.., ids)| ids.iter().copied()).collect();
        let claimed = self.db.ask(async |db| parking::claim(db, &self.outbox, self.owner, &ids).await).await?;
        let mut claimed: HashMap<i64, Row> = claimed.into_iter().map(|row| (row.id(), row)).collect();
        let (mut lanes, mut records, mut unsent) = (Vec::new(), Vec::new(), Vec::new());
        for (lane, requested, limit, ids) in chosen {
            let mut sending = Sending { lane, requested, rows: Vec::new() };
            let mut blocked = false;
            for row in ids.iter().filter_map(|id| claimed.remove(id)) {
                if blocked {
                    unsent.push(row.id());
                    continue;
                }
                match self.builder.fit(&row, limit) {
                    Ok(built) => {
                        records.push(built);
                        sending.rows.push(row);
                    }
                    Err(size) => {
                        self.refuse(&row, &too_large(size, limit)).await?;
                        blocked = sending.lane.key.is_some();
                        if blocked {
                            self.met(sending.lane.clone(), requested).await?;
                        }
                    }
                }
            }
            lanes.push(sending);
        }
        let reports = self.deliver(&lanes, records, held).await;
        let (done, more) = self.settle(lanes, reports).await?;
        unsent.extend(more);
        if !unsent.is_empty() {
            self.db.ask(async |db| parking::release(db, &self.outbox, self.owner, &unsent).await).await?;
        }
        Ok(done)
    }

    /// Sends the rows and waits for their reports; a row without one is in doubt.
    async fn deliver(&mut self, lanes: &[Sending], records: Vec<Built>, held: Held) -> Vec<Option<Result<(), Code>>> {
        let mut reports = vec![None; records.len()];
        let rows = || lanes.iter().flat_map(|lane| &lane.rows);
        if self.producer.is_none() {
            self.producer = RetryProducer::new(&self.outbox, &self.brokers, &self.compression);
        }
        let Some(producer) = &mut self.producer else { return reports };
        producer.held = Some(held);
        let (mut open, timestamp) = (0, self.builder.timestamp());
        for (index, (row, built)) in rows().zip(records).enumerate() {
            if let Err(code) = producer.send(kafka_record::of(row, built, index, timestamp)) {
                reports[index] = Some(Err(code));
                break;
            }
            open += 1;
        }
        while open > 0 {
            let Ok(Some((index, report))) = tokio::time::timeout(ACKNOWLEDGED_WITHIN, producer.reports.recv()).await
            else {
                let unreported = rows().zip(&reports).filter(|(_, report)| report.is_none());
                let topics: HashSet<String> = unreported.map(|(row, _)| row.topic().to_owned()).collect();
                topics.into_iter().for_each(|topic| self.leave_alone(topic, "Kafka acknowledges none of them"));
                self.producer = None;
                return reports;
            };
            reports[index] = Some(report);
            open -= 1;
            if report.is_err() {
                // The producer sends nothing more, and some rows behind this one never get a report.
                self.producer = None;
                return reports;
            }
        }
        producer.held = None;
        reports
    }

    /// Records the fate of the rows; returns whether anything was done, and which rows were surely not published.
    async fn settle(
        &mut self,
        lanes: Vec<Sending>,
        reports: Vec<Option<Result<(), Code>>>,
    ) -> Result<(bool, Vec<i64>), sqlx::Error> {
        let alone = reports.len() == 1;
        let mut reports = reports.into_iter();
        let (mut published, mut unsent, mut failed) = (Vec::new(), Vec::new(), None);
        for Sending { lane, requested, rows } in lanes {
            let mut ids = Vec::new();
            let mut behind = false;
            for row in rows {
                match reports.next().flatten() {
                    Some(Ok(())) => ids.push(row.id()),
                    Some(Err(code)) => {
                        // In other cases a broker may have the row all the same: it stays claimed, and is sent again.
                        if Refusal::of(code) != Refusal::Transient {
                            behind = lane.key.is_some();
                            unsent.push(row.id());
                        }
                        failed = Some((lane.clone(), requested, row, code));
                    }
                    // Kafka takes no record of a partition behind one that it refused.
                    None if behind => unsent.push(row.id()),
                    None => {}
                }
            }
            if !ids.is_empty() {
                published.push(Published { lane, requested, ids });
            }
        }
        let rows = published.iter().map(|lane| lane.ids.len()).sum::<usize>();
        self.one_by_one = self.one_by_one.saturating_sub(rows);
        if rows > 0 {
            let recorded = async |db: &mut _| parking::published(db, &self.outbox, self.owner, &published).await;
            if !self.db.ask(recorded).await? {
                debug!(outbox = self.outbox, "the lease is lost; published parked rows are sent again");
                return Ok((false, Vec::new()));
            }
        }
        if rows > 0 && failed.is_none() && self.silent.is_empty() {
            self.loops.working(loops::RETRIES);
        }
        let Some((lane, requested, row, code)) = failed else { return Ok((rows > 0, unsent)) };
        match Refusal::of(code) {
            Refusal::Row if alone => {
                self.one_by_one = self.one_by_one.saturating_sub(1);
                self.refuse(&row, &format!("Kafka refused it: {code}")).await?;
                if lane.key.is_some() {
                    self.met(lane, requested).await?;
                }
            }
            Refusal::Topic(cause) => {
                self.put_off(&lane.topic, cause, format!("Kafka says: {code}")).await?;
            }
            _ if !alone => self.one_by_one = BATCH_ROWS_MAX,
            _ => self.leave_alone(lane.topic, &format!("Kafka says: {code}")),
        }
        Ok((true, unsent))
    }

    async fn refuse(&self, row: &Row, reason: &str) -> Result<(), sqlx::Error> {
        kafka_record::span(row).in_scope(|| {
            let (id, topic) = (row.id(), row.topic());
            warn!(outbox = self.outbox, id, topic, reason, "a parked row was refused again");
        });
        self.db.ask(async |db| parking::refused(db, &self.outbox, self.owner, row.id(), reason).await).await
    }

    /// Frees a lane of which no requested row is left.
    async fn finish(&mut self, lane: Lane, requested: OffsetDateTime) -> Result<bool, sqlx::Error> {
        if !self.db.ask(async |db| self.blocked.free(db, &self.outbox, &lane).await).await? {
            return Ok(false);
        }
        if lane.key.is_some() {
            info!(outbox = self.outbox, topic = lane.topic, "no row of the lane is parked any more");
        }
        self.met(lane, requested).await?;
        Ok(true)
    }

    /// Records that the request is met, whatever came of it.
    async fn met(&mut self, lane: Lane, requested: OffsetDateTime) -> Result<(), sqlx::Error> {
        self.db.ask(async |db| parking::tried(db, &self.outbox, self.owner, &lane, requested).await).await?;
        self.met.insert(lane, requested);
        Ok(())
    }
}

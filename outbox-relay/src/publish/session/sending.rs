//! Sends the rows of a page, and waits for Kafka's reports on them.

use super::{LOOK_AT_PRODUCER, Session, SessionEnd, StreamScope, fate::Fate};
use crate::{
    control::Control,
    loops, metric,
    position::Position,
    publish::{
        flight::{Flight, RowDecisions},
        in_flight::DeliveryTag,
        kafka_record::{self, Built},
        producer::Offered,
    },
    read::cursor::Page,
    record::{
        commit::{CommitError, Recordable},
        pause::{LeftBehind, PauseCause},
    },
    row::Row,
};
use rdkafka::types::RDKafkaErrorCode;
use saga_core::{clock::DatabaseClock, part};
use std::{collections::BTreeSet, future::pending, pin::pin, sync::Arc};
use tokio::sync::watch;
use tracing::warn;

/// How many records are made before the first of them is handed over. librdkafka begins to send with the first record
/// that it gets. When the others follow without a pause, they are in the same request.
const MADE_TOGETHER: usize = 500;
/// How many topics with stuck rows the brokers are asked about at once.
const ASKED_ABOUT: usize = 8;

/// A record that is made, of a topic that takes at most `limit` bytes.
struct Ready<'a> {
    row: &'a Row,
    tag: DeliveryTag,
    built: Built,
    limit: usize,
}

impl Session {
    /// Hands complete flights to the recorder, and notices a failure.
    pub(crate) async fn complete(&mut self) -> Result<(), SessionEnd> {
        while let Some(flight) = self.publisher.in_flight.take_complete() {
            self.pages_done.send_modify(|done| *done += usize::from(flight.is_page()));
            published(&self.outbox, &flight, &self.shared.clock);
            if let Some(at) = flight.position() {
                self.stream_state.at = at;
            }
            if flight.oldest().is_some() {
                self.stream_state.failures = 0;
                self.shared.loops.working(self.scope.name());
            }
            // A recorder that has ended has its own reason, which its join returns.
            self.progress.send(flight.into_recordable()).await.map_err(|_| CommitError::Fenced)?;
        }
        if let Some((id, code)) = self.publisher.in_flight.failure() {
            return Err(SessionEnd::Refused { id, code });
        }
        Ok(())
    }

    /// Looks at the producer. A fatal one sends nothing any more, and may never report what it holds. A live one may
    /// hold rows that no broker takes.
    pub(crate) async fn look_at_producer(&mut self) -> Result<(), SessionEnd> {
        self.publisher.ask_for_brokers(&self.topics);
        if let Some(reason) = self.publisher.fatal() {
            warn!(outbox = self.outbox, reason, "the producer gave up");
            return Err(SessionEnd::GaveUp(reason));
        }
        let stuck = self.publisher.in_flight.stuck(self.shared.stuck_after);
        if stuck.topics.is_empty() || self.shared.kafka.state.are_away() {
            return Ok(());
        }
        let is_theirs = stuck.others_flow || self.is_held_up().await;
        let topics = if is_theirs { stuck.topics.clone() } else { self.leaderless(&stuck.topics).await };
        if topics.is_empty() {
            let topics: Vec<&str> = stuck.topics.iter().take(ASKED_ABOUT).map(String::as_str).collect();
            let reason = format!(
                "no broker has acknowledged a row for {:?} (topics {})",
                self.shared.stuck_after,
                topics.join(", ")
            );
            self.stream_state.failures = self.stream_state.failures.max(1);
            self.shared.loops.failing(self.scope.name(), part::Cause::KafkaAway, &reason);
            return Ok(());
        }
        if let StreamScope::Topic(_) = &self.scope {
            let topic = topics.into_iter().next().unwrap_or_default();
            let reason = format!("no broker has taken its rows for {:?}", self.shared.stuck_after);
            return Err(self.stall(topic, PauseCause::Leaderless, reason).await?);
        }
        Err(SessionEnd::Stuck(topics))
    }

    /// Whether stuck rows fill the main stream, so that no other topic's row can show that its broker takes it.
    async fn is_held_up(&self) -> bool {
        let is_full = !self.has_room() || self.area.is_full();
        matches!(self.scope, StreamScope::Main { .. }) && is_full && self.topics.reachable().await
    }

    /// The topics among these that have a partition without a leader, by the brokers' answer. A stream of one topic has
    /// nothing that flows meanwhile, so there it is enough that the brokers answer.
    async fn leaderless(&self, topics: &BTreeSet<String>) -> BTreeSet<String> {
        let mut leaderless = BTreeSet::new();
        for topic in topics.iter().take(ASKED_ABOUT) {
            match self.topics.lacks_leader(topic).await {
                Ok(lacks) if lacks || matches!(self.scope, StreamScope::Topic(_)) => {
                    leaderless.insert(topic.clone());
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        leaderless
    }

    /// Puts a mark into the sequence, which becomes true as soon as all before it is.
    pub(crate) async fn mark(&mut self, progress: Recordable) -> Result<(), SessionEnd> {
        self.publisher.in_flight.mark(progress);
        self.complete().await
    }

    pub(crate) async fn send(&mut self, mut page: Page) -> Result<(), SessionEnd> {
        let number = self.publisher.in_flight.open(Flight::of(&mut page));
        let mut decided = RowDecisions::default();
        let sent = self.send_rows(&page, number, &mut decided).await;
        // The page is sealed even if sending failed: its acknowledged rows still have to be separated from the others.
        self.publisher.in_flight.seal(number, decided);
        if sent.is_ok() {
            self.at = Position { base: page.base, target: page.target, after: page.to };
            if matches!(self.scope, StreamScope::Main { .. }) {
                self.shared.main.send_replace(self.at.clone());
            }
        }
        // Further pages may be there already: the lease is renewed in the same task, and needs its turn.
        tokio::task::yield_now().await;
        sent
    }

    async fn send_rows(&mut self, page: &Page, number: usize, decided: &mut RowDecisions) -> Result<(), SessionEnd> {
        let mut before = page.after;
        let mut ready = Vec::new();
        for (index, row) in page.rows.iter().enumerate() {
            let tag = DeliveryTag::new(number, index);
            let alone = !self.stream_state.suspects.is_empty() && self.stream_state.suspects.contains(&row.id());
            // A question about a topic may take its time: only rows of the topic, and those that follow, wait for it.
            if alone || ready.len() == MADE_TOGETHER || !self.stream_state.limits.contains_key(row.topic()) {
                self.send_all(&mut ready).await?;
                self.publisher.in_flight.given(number, index);
            }
            if let Some(made) = self.ready(page, row, before, tag, decided).await? {
                ready.push(made);
                if alone {
                    self.settle().await?;
                    self.send_all(&mut ready).await?;
                    self.publisher.in_flight.given(number, index + 1);
                    self.acknowledged(tag).await?;
                    self.stream_state.suspects.remove(&row.id());
                }
            }
            before = row.id();
        }
        self.send_all(&mut ready).await?;
        self.publisher.in_flight.given(number, page.rows.len());
        Ok(())
    }

    async fn send_all(&mut self, ready: &mut Vec<Ready<'_>>) -> Result<(), SessionEnd> {
        let timestamp = self.builder.timestamp();
        for made in ready.drain(..) {
            let row = made.row;
            if let Some(code) = self.offer(made, timestamp).await? {
                return Err(SessionEnd::Refused { id: Some(row.id()), code });
            }
        }
        Ok(())
    }

    /// The row's record, if it goes to Kafka; `None` otherwise.
    async fn ready<'r>(
        &mut self,
        page: &Page,
        row: &'r Row,
        before: i64,
        tag: DeliveryTag,
        decided: &mut RowDecisions,
    ) -> Result<Option<Ready<'r>>, SessionEnd> {
        let index = tag.row();
        match self.fate(page, row, before, tag).await? {
            Fate::Send(built, limit) => {
                decided.oldest.get_or_insert_with(|| row.created_at());
                return Ok(Some(Ready { row, tag, built, limit }));
            }
            Fate::Park(park) => {
                let (id, topic, reason) = (park.id, row.topic(), &park.reason);
                kafka_record::span(row).in_scope(|| warn!(outbox = self.outbox, id, topic, reason, "parked a row"));
                metric::parked(&self.outbox, row.topic());
                decided.parked.push((index, park));
            }
            Fate::Leave(left) => {
                let LeftBehind { topic, reason, .. } = &left;
                warn!(outbox = self.outbox, topic, reason, "the topic is set apart; the others go on");
                self.paused.insert(topic.clone());
                decided.left_behind.push((index, left));
            }
            Fate::Known => {
                self.publisher.in_flight.known(tag);
                return Ok(None);
            }
            Fate::Pass => {}
        }
        self.publisher.in_flight.passed(tag);
        Ok(None)
    }

    /// Gives a row to the producer, waiting for room; returns the code if it was refused on the spot.
    async fn offer(&mut self, ready: Ready<'_>, timestamp: i64) -> Result<Option<RDKafkaErrorCode>, SessionEnd> {
        let Ready { row, tag, built, limit } = ready;
        let left_out = built.left_out;
        let mut built = Some(built);
        loop {
            let record = built.take().unwrap_or_else(|| self.builder.build_without(row, left_out));
            match self.publisher.offer(kafka_record::of(row, record, tag.0, timestamp), tag, limit)? {
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
    pub(crate) async fn acknowledged(&mut self, tag: DeliveryTag) -> Result<(), SessionEnd> {
        self.wait_until(|session| session.publisher.in_flight.is_done(tag)).await
    }

    /// Waits until everything sent so far is acknowledged.
    pub(crate) async fn settle(&mut self) -> Result<(), SessionEnd> {
        self.wait_until(|session| session.publisher.in_flight.sent() == 0).await?;
        // The last of it may have been acknowledged since the last look for completed pages.
        self.complete().await
    }

    async fn wait_until(&mut self, done: impl Fn(&Self) -> bool) -> Result<(), SessionEnd> {
        let in_flight = self.publisher.in_flight.clone();
        let mut control = self.control.clone();
        in_flight.set_eager(true);
        let waited = loop {
            if let Err(ended) = self.complete().await {
                break Err(ended);
            }
            if done(self) {
                break Ok(());
            }
            if let Err(ended) = self.wait(&mut control).await {
                break Err(ended);
            }
        };
        in_flight.set_eager(false);
        waited
    }

    /// Waits for `word`; meanwhile rows in flight go on, and the stream obeys operators.
    pub(crate) async fn meanwhile<T>(&mut self, word: impl Future<Output = T>) -> Result<T, SessionEnd> {
        let mut word = pin!(word);
        let mut control = self.control.clone();
        loop {
            self.complete().await?;
            tokio::select! {
                biased;
                word = word.as_mut() => return Ok(word),
                waited = self.wait(&mut control) => waited?,
            }
        }
    }

    /// Waits until something changes.
    async fn wait(&mut self, control: &mut watch::Receiver<Arc<Control>>) -> Result<(), SessionEnd> {
        let in_flight = self.publisher.in_flight.clone();
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(SessionEnd::Stopped),
            () = withdrawn(control, &self.scope) => Err(SessionEnd::Paused),
            () = in_flight.changed.notified() => Ok(()),
            () = tokio::time::sleep(LOOK_AT_PRODUCER) => self.look_at_producer().await,
        }
    }
}

/// Counts the rows of an acknowledged page.
fn published(outbox: &str, flight: &Flight, clock: &DatabaseClock) {
    for (topic, rows) in flight.published() {
        metrics::counter!("outbox_published_total", "outbox" => outbox.to_owned(), "topic" => topic.to_owned())
            .increment(rows);
    }
    if let Some(oldest) = flight.oldest() {
        let duration = metrics::histogram!("outbox_publish_duration_seconds", "outbox" => outbox.to_owned());
        duration.record(clock.since(oldest));
    }
}

/// Waits until no row of the stream may be published any more.
async fn withdrawn(control: &mut watch::Receiver<Arc<Control>>, scope: &StreamScope) {
    let paused = control.wait_for(|control| control.whole || scope.is_withdrawn(control)).await.map(drop);
    // When the looking ends, the session ends by that.
    if paused.is_err() {
        pending::<()>().await;
    }
}

impl StreamScope {
    /// The stream's name in health and metrics.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Main { .. } => loops::MAIN,
            Self::Topic(leaving) => &leaving.topic,
        }
    }
}

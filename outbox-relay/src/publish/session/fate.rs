//! The fate of a row: it is sent, passed over, parked, or its topic is left behind with it.

use super::{Session, SessionEnd, StreamScope};
use crate::{
    budget::Held,
    position::Position,
    publish::{
        in_flight::DeliveryTag,
        kafka_record::{self, Built, takes_dead_letters},
        refusal::{MOST_ABSENT, Refusal, too_large},
    },
    read::cursor::Page,
    record::{
        parking::RowToPark,
        pause::{self, LeftBehind, PauseCause},
    },
    row::{Body, DELETED, Row},
    topics::TopicState,
};
use saga_core::{clock, part, retry::Backoff, topic::is_legal_name};
use std::{pin::pin, time::Duration};
use tokio::time::timeout;
use tracing::warn;

/// The log line about a dead letter that its topic does not take whole.
const LEFT_OUT: &str = "a dead letter is too large for its topic: what is left out is to be read where its original \
     stands (x-original-topic, x-original-partition, x-original-offset), as long as that topic keeps it";

/// The pauses between two questions about a topic of which the brokers say nothing.
const LOOK_PAUSES: Backoff = Backoff::doubling(Duration::from_millis(50), Duration::from_secs(2)).exact();

/// The fate of a row.
pub(crate) enum Fate {
    /// Nothing to do: the row is left behind with its topic, or gone.
    Pass,
    /// Nothing to do: Kafka has acknowledged the row already.
    Known,
    /// The row is sent, to a topic that takes at most so many bytes.
    Send(Built, usize),
    Park(RowToPark),
    Leave(LeftBehind),
}

impl Session {
    pub(crate) async fn fate(
        &mut self,
        page: &Page,
        row: &Row,
        before: i64,
        tag: DeliveryTag,
    ) -> Result<Fate, SessionEnd> {
        let topic = row.topic();
        if page.only_topic.is_none() && self.paused.contains(topic) && !self.is_back(topic).await? {
            return Ok(Fate::Pass);
        }
        if self.shared.was_acknowledged(topic, row.id()) {
            return Ok(Fate::Known);
        }
        if let Some(by) = self.blocked.behind(topic, row.key(), row.id()) {
            let reason = format!("row {by} of the same topic and key is parked");
            return Ok(Fate::Park(RowToPark { id: row.id(), reason, blocked_by: Some(by), bytes: row.bytes() }));
        }
        let limit = match self.stream_state.limits.get(topic).copied() {
            Some(limit) => limit,
            None if !is_legal_name(topic) => {
                return Ok(self.park(row, format!("{topic:?} is not a legal topic name")));
            }
            None if self.has_no_place_for(topic).await? => return Ok(self.park(row, no_place(topic))),
            None => match self.look(topic).await? {
                Ok(limit) => limit,
                Err((cause, _)) if cause.is_absence() && self.absent() >= MOST_ABSENT => {
                    return Ok(self.park(row, no_place(topic)));
                }
                Err((cause, reason)) => return self.leave(page, row, before, cause, reason).await,
            },
        };
        if let Some(code) = self.stream_state.verdicts.remove(&row.id()) {
            match Refusal::of(code) {
                Refusal::Row => return Ok(self.park(row, format!("Kafka refused it: {code}"))),
                Refusal::Topic(cause) => {
                    return self.leave(page, row, before, cause, format!("Kafka says: {code}")).await;
                }
                Refusal::Transient => {}
            }
        }
        let built = (!row.lacks_body()).then(|| self.builder.build(row));
        let size = built.as_ref().map_or(row.bytes(), |built| built.size);
        let mut limit = limit;
        if size > limit {
            // The limit may have been raised since it was read.
            limit = match self.look(topic).await? {
                Ok(limit) => limit,
                Err((cause, reason)) => return self.leave(page, row, before, cause, reason).await,
            };
            if size > limit {
                return self.too_large(row, size, limit, tag).await;
            }
        }
        let built = match built {
            Some(built) => built,
            None if !self.read_body(row, tag).await? => return Ok(Fate::Pass),
            None => self.builder.build(row),
        };
        if built.size > limit {
            return self.too_large(row, built.size, limit, tag).await;
        }
        Ok(Fate::Send(built, limit))
    }

    /// Decides on a row that is too large. A dead letter arrives all the same: what its topic does not take stands
    /// where its original does.
    async fn too_large(&mut self, row: &Row, size: usize, limit: usize, tag: DeliveryTag) -> Result<Fate, SessionEnd> {
        if takes_dead_letters(row.topic()) {
            let lacks_headers = row.headers().is_none() || row.lacks_key() || row.kind().is_empty();
            if row.lacks_body() && lacks_headers && !self.read_body(row, tag).await? {
                return Ok(Fate::Pass);
            }
            if let Some(built) = self.builder.build_within(row, limit) {
                let (id, topic, left_out) = (row.id(), row.topic(), built.left_out);
                kafka_record::span(row).in_scope(|| {
                    warn!(outbox = self.outbox, id, topic, size, limit, ?left_out, "{LEFT_OUT}");
                });
                return Ok(Fate::Send(built, limit));
            }
        }
        Ok(self.park(row, too_large(size, limit)))
    }

    /// How many topics the main stream has set apart because they are missing or forbidden.
    fn absent(&self) -> usize {
        let StreamScope::Main { .. } = &self.scope else { return 0 };
        let control = self.control.borrow();
        // A topic that was left behind a moment ago is not in the last look yet.
        let is_absent = |topic: &&String| control.paused.get(*topic).is_none_or(|paused| paused.cause.is_absence());
        self.paused.iter().filter(is_absent).count()
    }

    /// Whether as many topics are set apart as may be, and the brokers do not know this one either. The brokers answer
    /// for all topics at once: a question about each of thousands of invented names would delay everything else.
    async fn has_no_place_for(&mut self, topic: &str) -> Result<bool, SessionEnd> {
        if self.absent() < MOST_ABSENT {
            return Ok(false);
        }
        let topics = self.topics.clone();
        self.meanwhile(topics.lacks(topic)).await
    }

    /// Reads what its page left out of a row, when there is room for it; false when the row was deleted meanwhile.
    async fn read_body(&mut self, row: &Row, tag: DeliveryTag) -> Result<bool, SessionEnd> {
        let held = self.room_for(row).await?;
        let Some(body) = self.db.ask(async |db| Body::read(db, &[row.id()]).await).await?.pop() else {
            warn!(outbox = self.outbox, id = row.id(), "{DELETED}");
            return Ok(false);
        };
        row.set_body(body);
        self.publisher.in_flight.hold(tag, held);
        Ok(true)
    }

    async fn room_for(&mut self, row: &Row) -> Result<Held, SessionEnd> {
        let area = self.area.clone();
        let mut room = pin!(area.take_alone(row.cost()));
        if let Ok(held) = self.meanwhile(timeout(self.shared.stuck_after, room.as_mut())).await? {
            return Ok(held);
        }
        let reason = format!(
            "row {} of topic {} has {} bytes, and waits for another large row (HELD_MEBIBYTES has no room for both)",
            row.id(),
            row.topic(),
            row.bytes()
        );
        self.shared.loops.failing(self.scope.name(), part::Cause::Stalled, &reason);
        self.meanwhile(room).await
    }

    fn park(&mut self, row: &Row, reason: String) -> Fate {
        self.blocked.block(row.topic(), row.key(), row.id());
        Fate::Park(RowToPark { id: row.id(), reason, blocked_by: None, bytes: row.bytes() })
    }

    /// Leaves the row's topic behind just before this row, because the topic takes nothing now.
    async fn leave(
        &mut self,
        page: &Page,
        row: &Row,
        before: i64,
        cause: PauseCause,
        reason: String,
    ) -> Result<Fate, SessionEnd> {
        let topic = row.topic().to_owned();
        if page.only_topic.is_some() {
            return Err(self.stall(topic, cause, reason).await?);
        }
        let position = Position { base: page.base.clone(), target: page.target.clone(), after: before };
        Ok(Fate::Leave(LeftBehind { topic, cause, reason, position }))
    }

    /// Lets a topic that was catching up wait again, because it takes nothing now.
    pub(crate) async fn stall(
        &self,
        topic: String,
        cause: PauseCause,
        reason: String,
    ) -> Result<SessionEnd, SessionEnd> {
        warn!(outbox = self.outbox, topic, reason, "the topic cannot catch up yet; the others go on");
        self.db.ask(async |db| pause::stall(db, &self.outbox, &topic, cause, &reason).await).await?;
        Ok(SessionEnd::Stalled(topic))
    }

    /// Asks the brokers about a topic: its limit, or why it takes nothing. When no broker answers at all, the relay
    /// waits for them. When they answer without a word on this topic, the topic is what takes nothing.
    pub(crate) async fn look(&mut self, topic: &str) -> Result<Result<usize, (PauseCause, String)>, SessionEnd> {
        let topics = self.topics.clone();
        let mut looks = 0;
        let began = clock::monotonic();
        loop {
            match self.meanwhile(topics.look(topic)).await? {
                Ok(TopicState::Ready { max_message_bytes }) => {
                    self.stream_state.limits.insert(topic.to_owned(), max_message_bytes);
                    return Ok(Ok(max_message_bytes));
                }
                Ok(TopicState::Missing(reason)) => return Ok(Err((PauseCause::Missing, reason))),
                Ok(TopicState::Forbidden(reason)) => return Ok(Err((PauseCause::Forbidden, reason))),
                Err(problem) => {
                    if began.elapsed() >= self.shared.stuck_after {
                        let reason = format!("the brokers do not say what the topic {topic:?} is like: {problem}");
                        if self.meanwhile(topics.reachable()).await? {
                            return Ok(Err((PauseCause::Leaderless, reason)));
                        }
                        self.shared.loops.failing(self.scope.name(), part::Cause::KafkaAway, &reason);
                    }
                    looks += 1;
                    self.meanwhile(tokio::time::sleep(LOOK_PAUSES.delay(looks, 0))).await?;
                }
            }
        }
    }
}

/// The reason for parking a row of a missing topic, where rows of other missing topics wait in the outbox.
fn no_place(topic: &str) -> String {
    format!(
        "the topic {topic:?} is missing or forbidden, like {MOST_ABSENT} others that are set apart already, which is as many as \
         there may be; create it or grant the right to write to it, then have its parked rows tried again, or discard them"
    )
}

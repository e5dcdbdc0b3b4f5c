//! What becomes of a row: it is sent, passed over, parked, or its topic is left behind with it.

use crate::{
    budget::Held,
    in_flight::Ticket,
    parking::Park,
    pause::{self, Cause, LeftBehind},
    position::{Page, Position},
    record::Built,
    refusal::Refusal,
    row::{Body, DELETED, Row},
    session::{Ended, Session},
    topics::TopicState,
};
use saga_core::{clock, topic::is_legal_name};
use std::{pin::pin, time::Duration};
use tokio::time::timeout;
use tracing::warn;

/// What becomes of a row.
pub(crate) enum Fate {
    /// Nothing to do: it is left behind with its topic, or gone.
    Pass,
    /// Nothing to do: Kafka has acknowledged it already.
    Known,
    /// It is sent, to a topic that takes at most so many bytes.
    Send(Built, usize),
    Park(Park),
    Leave(LeftBehind),
}

impl Session {
    pub(crate) async fn fate(&mut self, page: &Page, row: &Row, before: i64, ticket: Ticket) -> Result<Fate, Ended> {
        let topic = row.topic();
        if page.lane.is_none() && self.paused.contains(topic) && !self.is_back(topic).await? {
            return Ok(Fate::Pass);
        }
        if self.shared.was_acknowledged(topic, row.id()) {
            return Ok(Fate::Known);
        }
        if let Some(by) = self.blocked.behind(topic, row.key(), row.id()) {
            let reason = format!("row {by} of the same topic and key is parked");
            return Ok(Fate::Park(Park { id: row.id(), reason, blocked_by: Some(by), bytes: row.bytes() }));
        }
        let limit = match self.memory.limits.get(topic) {
            Some(&limit) => limit,
            None if !is_legal_name(topic) => {
                return Ok(self.park(row, format!("{topic:?} is not a legal topic name")));
            }
            None => match self.look(topic).await? {
                Ok(limit) => limit,
                Err((cause, reason)) => return self.leave(page, row, before, cause, reason).await,
            },
        };
        if let Some(code) = self.memory.verdicts.remove(&row.id()) {
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
                return Ok(self.park(row, too_large(size, limit)));
            }
        }
        let built = match built {
            Some(built) => built,
            None if !self.read_body(row, ticket).await? => return Ok(Fate::Pass),
            None => self.builder.build(row),
        };
        if built.size > limit {
            return Ok(self.park(row, too_large(built.size, limit)));
        }
        Ok(Fate::Send(built, limit))
    }

    /// Reads what its page left out of a row, when there is room for it; false when the row was deleted meanwhile.
    async fn read_body(&mut self, row: &Row, ticket: Ticket) -> Result<bool, Ended> {
        let held = self.room_for(row).await?;
        let Some(body) = self.db.ask(async |db| Body::read(db, &[row.id()]).await).await?.pop() else {
            warn!(outbox = self.outbox, id = row.id(), "{DELETED}");
            return Ok(false);
        };
        row.set_body(body);
        self.publisher.in_flight.hold(ticket, held);
        Ok(true)
    }

    async fn room_for(&mut self, row: &Row) -> Result<Held, Ended> {
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
        self.shared.loops.failing(self.scope.name(), &reason);
        self.meanwhile(room).await
    }

    fn park(&mut self, row: &Row, reason: String) -> Fate {
        self.blocked.block(row.topic(), row.key(), row.id());
        Fate::Park(Park { id: row.id(), reason, blocked_by: None, bytes: row.bytes() })
    }

    /// The row's topic takes nothing now: it is left behind just before this row.
    async fn leave(
        &mut self,
        page: &Page,
        row: &Row,
        before: i64,
        cause: Cause,
        reason: String,
    ) -> Result<Fate, Ended> {
        let topic = row.topic().to_owned();
        if page.lane.is_some() {
            return Err(self.stall(topic, cause, reason).await?);
        }
        let position = Position { base: page.base.clone(), target: page.target.clone(), after: before };
        Ok(Fate::Leave(LeftBehind { topic, cause, reason, position }))
    }

    /// A topic that was catching up takes nothing now: it waits again.
    pub(crate) async fn stall(&self, topic: String, cause: Cause, reason: String) -> Result<Ended, Ended> {
        warn!(outbox = self.outbox, topic, reason, "the topic cannot catch up yet; the others go on");
        self.db.ask(async |db| pause::stall(db, &self.outbox, &topic, cause, &reason).await).await?;
        Ok(Ended::Stalled(topic))
    }

    /// Asks the brokers about a topic: its limit, or why it takes nothing. When no broker answers at all, it waits for them;
    /// when they answer and say nothing of this topic, the topic is what takes nothing.
    pub(crate) async fn look(&mut self, topic: &str) -> Result<Result<usize, (Cause, String)>, Ended> {
        let topics = self.topics.clone();
        let mut pause = Duration::from_millis(50);
        let began = clock::monotonic();
        loop {
            match self.meanwhile(topics.look(topic)).await? {
                Ok(TopicState::Ready { max_message_bytes }) => {
                    self.memory.limits.insert(topic.to_owned(), max_message_bytes);
                    return Ok(Ok(max_message_bytes));
                }
                Ok(TopicState::Missing(reason)) => return Ok(Err((Cause::Missing, reason))),
                Ok(TopicState::Forbidden(reason)) => return Ok(Err((Cause::Forbidden, reason))),
                Err(problem) => {
                    if began.elapsed() >= self.shared.stuck_after {
                        let reason = format!("the brokers do not say what the topic {topic:?} is like: {problem}");
                        if self.meanwhile(topics.reachable()).await? {
                            return Ok(Err((Cause::Leaderless, reason)));
                        }
                        self.shared.loops.failing(self.scope.name(), &reason);
                    }
                    self.meanwhile(tokio::time::sleep(pause)).await?;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }
}

/// Why a row is parked without being sent.
pub(crate) fn too_large(size: usize, limit: usize) -> String {
    format!("the record has {size} bytes, and the topic takes {limit} (max.message.bytes)")
}

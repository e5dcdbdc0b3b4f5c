//! What becomes of a row: it is sent, passed over, parked, or its topic is left behind with it.

use crate::{
    parking::Park,
    pause::{self, Cause, LeftBehind},
    position::{Page, Position},
    refusal::Refusal,
    row::{Body, DELETED, Row},
    session::{Ended, Session},
    topics::TopicState,
};
use saga_core::topic::is_legal_name;
use std::time::Duration;
use tracing::warn;

/// What becomes of a row.
pub(crate) enum Fate {
    /// Nothing to do: it is acknowledged already, or left behind with its topic.
    Pass,
    Send(crate::record::Built),
    Park(Park),
    Leave(LeftBehind),
}

impl Session {
    pub(crate) async fn fate(&mut self, page: &Page, row: &Row, before: i64) -> Result<Fate, Ended> {
        let topic = row.topic();
        if page.lane.is_none() && self.paused.contains(topic) && !self.is_back(topic).await? {
            return Ok(Fate::Pass);
        }
        if self.shared.was_acknowledged(topic, row.id()) {
            return Ok(Fate::Pass);
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
            None if !self.read_body(row).await? => return Ok(Fate::Pass),
            None => self.builder.build(row),
        };
        if built.size > limit {
            return Ok(self.park(row, too_large(built.size, limit)));
        }
        Ok(Fate::Send(built))
    }

    /// Reads what its page left out of a row; false when the row was deleted meanwhile.
    async fn read_body(&self, row: &Row) -> Result<bool, sqlx::Error> {
        let body = self.db.ask(async |db| Body::read(db, &[row.id()]).await).await?.pop();
        match body {
            Some(body) => {
                row.set_body(body);
                Ok(true)
            }
            None => {
                warn!(outbox = self.outbox, id = row.id(), "{DELETED}");
                Ok(false)
            }
        }
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

    /// Asks the brokers about a topic, for as long as it takes them to answer: its limit, or why it takes nothing.
    pub(crate) async fn look(&mut self, topic: &str) -> Result<Result<usize, (Cause, String)>, Ended> {
        let mut pause = Duration::from_millis(50);
        let mut said = false;
        loop {
            let asked = tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                asked = self.topics.look(topic) => asked,
            };
            match asked {
                Ok(TopicState::Ready { max_message_bytes }) => {
                    self.memory.limits.insert(topic.to_owned(), max_message_bytes);
                    return Ok(Ok(max_message_bytes));
                }
                Ok(TopicState::Missing(reason)) => return Ok(Err((Cause::Missing, reason))),
                Ok(TopicState::Forbidden(reason)) => return Ok(Err((Cause::Forbidden, reason))),
                Err(problem) => {
                    if !std::mem::replace(&mut said, true) {
                        warn!(outbox = self.outbox, topic, %problem, "waiting for Kafka to say what the topic is like");
                    }
                    tokio::time::sleep(pause).await;
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

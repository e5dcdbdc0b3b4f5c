//! Parked rows whose topic takes nothing now: the relay pauses the topic, so that it looks for it, or leaves it alone
//! for a while. No state is lost when the process dies: the request still stands.

use super::{ACKNOWLEDGED_WITHIN, Retries};
use crate::{
    loops,
    publish::refusal::MOST_ABSENT,
    record::pause::{self, PauseCause},
};
use saga_core::part;
use tracing::warn;

impl Retries {
    /// Pauses a topic that takes nothing now, so that the relay looks for it. Then its lanes are tried again.
    pub(super) async fn put_off(
        &mut self,
        topic: &str,
        cause: PauseCause,
        reason: String,
    ) -> Result<Option<usize>, sqlx::Error> {
        let absent = self.control.borrow().paused.values().filter(|paused| paused.cause.is_absence()).count();
        if cause.is_absence() && absent >= MOST_ABSENT {
            self.leave_alone(topic.to_owned(), &reason);
            return Ok(None);
        }
        warn!(outbox = self.outbox, topic, reason, "parked rows cannot be tried again yet");
        self.db.ask(async |db| pause::begin(db, &self.outbox, topic, cause, &reason).await).await?;
        Ok(None)
    }

    /// Leaves a topic alone whose parked rows cannot be sent now: those of other topics are tried meanwhile.
    pub(super) fn leave_alone(&mut self, topic: String, reason: &str) {
        warn!(outbox = self.outbox, topic, reason, "parked rows of the topic cannot be sent; they are tried again");
        let reason = format!("parked rows of topic {topic} cannot be sent: {reason}");
        self.loops.failing(loops::RETRIES, part::Cause::Refused, &reason);
        self.silent.insert(topic, saga_core::clock::monotonic() + ACKNOWLEDGED_WITHIN);
    }
}

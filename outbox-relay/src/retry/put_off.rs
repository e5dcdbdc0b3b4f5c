//! Parked rows whose topic takes nothing now: the topic is paused, so that it is looked for, or left alone for a while. Nothing of
//! that is lost when the process dies: the request still stands.

use super::{REPORT, Retries};
use crate::{
    fate::MOST_ABSENT,
    loops,
    pause::{self, Cause},
};
use saga_core::part;
use tracing::warn;

impl Retries {
    /// The topic takes nothing now: it is paused, so that it is looked for. Then its lines are tried again.
    pub(super) async fn put_off(
        &mut self,
        topic: &str,
        cause: Cause,
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

    /// Parked rows of the topic cannot be sent now: those of other topics are tried meanwhile.
    pub(super) fn leave_alone(&mut self, topic: String, reason: &str) {
        warn!(outbox = self.outbox, topic, reason, "parked rows of the topic cannot be sent; they are tried again");
        let reason = format!("parked rows of topic {topic} cannot be sent: {reason}");
        self.loops.failing(loops::RETRIES, part::Cause::Refused, &reason);
        self.silent.insert(topic, saga_core::clock::monotonic() + REPORT);
    }
}

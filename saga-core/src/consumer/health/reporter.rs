//! What one partition's worker reports to its consumer's health.

use super::HealthState;
use crate::{
    clock,
    part::{Cause, HealthIssue},
};
use std::sync::Arc;

/// The reports of one partition's worker. When it is dropped, the partition no longer waits here.
pub(in crate::consumer) struct Reporter {
    pub(in crate::consumer) health: Arc<HealthState>,
    pub(in crate::consumer) partition: (String, i32),
}

impl Reporter {
    /// The database cannot be used.
    pub(in crate::consumer) fn fails(&self, reason: &str) {
        self.health.database.failing(reason);
    }

    /// An operator has to set this right, or another session to let go of a lock. Nothing is counted or given up
    /// meanwhile.
    pub(in crate::consumer) fn waits(&self, cause: Cause, reason: &str) {
        let (now, issue) = (clock::monotonic(), HealthIssue::new(cause, reason));
        let known = {
            let mut state = self.health.lock();
            let since = state.waiting.get(&self.partition).map_or(now, |(_, since)| *since);
            state.waiting.insert(self.partition.clone(), (issue.clone(), since))
        };
        if known.is_none_or(|(known, _)| known != issue) {
            let ((topic, partition), group) = (&self.partition, &self.health.group);
            tracing::error!(
                group,
                topic,
                partition,
                reason,
                "the partition waits until this is set right; nothing is given up"
            );
        }
    }

    /// The database did what it was asked for.
    pub(in crate::consumer) fn works(&self) {
        self.health.database.working();
        if self.health.lock().waiting.remove(&self.partition).is_some() {
            let ((topic, partition), group) = (&self.partition, &self.health.group);
            tracing::info!(group, topic, partition, "the partition goes on: what it waited for was set right");
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.health.lock().waiting.remove(&self.partition);
    }
}

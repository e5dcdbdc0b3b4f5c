//! The effects that wait to be performed, and since when none of them has moved, for health. A look that fails is no
//! sign that nothing waits.

use super::Intents;
use crate::{
    clock,
    part::{Cause, HealthIssue, LookFailures, Movement, PartReport, STALLED_AFTER, WaitingWork},
    participant::queue::{self, Oldest},
};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use time::OffsetDateTime;
use uuid::Uuid;

/// How often the executor looks at what waits, and counts intents for the gauges.
const GAUGE_EVERY: Duration = Duration::from_secs(5);

/// What the last look saw.
#[derive(Debug, Default)]
pub(super) struct EffectsProgress(Mutex<EffectsSeen>);

#[derive(Debug, Default)]
struct EffectsSeen {
    /// Intents that this process settled. One intent that cannot be settled is no sign that none can.
    settled: u64,
    movement: Movement<(u64, Uuid)>,
    waiting: Option<WaitingWork>,
    looks: LookFailures,
    /// The last error of the intent that waits for longest.
    last_error: Option<String>,
    /// When an intent was last not settled because of what an operator has to set right.
    in_vain: Option<OffsetDateTime>,
    /// Why no intent can be claimed.
    unclaimed: Option<HealthIssue>,
}

impl EffectsProgress {
    fn lock(&self) -> MutexGuard<'_, EffectsSeen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an intent that was settled.
    pub(super) fn settled(&self) {
        self.lock().settled += 1;
    }

    /// Records a look that failed: what was known before stands.
    pub(super) fn missed(&self, error: &sqlx::Error) {
        self.lock().looks.missed(&error.into());
    }

    /// An intent could not be settled, until an operator acts.
    pub(super) fn in_vain(&self, now: OffsetDateTime) {
        self.lock().in_vain = Some(now);
    }

    /// Intents can be claimed, or cannot, for the reason in `but`.
    pub(super) fn claims(&self, but: Option<HealthIssue>) {
        self.lock().unclaimed = but;
    }

    pub(super) fn unclaimed(&self) -> Option<HealthIssue> {
        self.lock().unclaimed.clone()
    }

    /// `oldest` is the intent that waits for longest. Returns whether all intents that were tried here in vain have
    /// been settled, by whichever replica.
    pub(super) fn seen(&self, oldest: Option<Oldest>) -> bool {
        let mut known = self.lock();
        let known = &mut *known;
        known.looks.seen();
        let waits_since = oldest.as_ref().map(|(_, since, ..)| *since);
        let over = known.in_vain.take_if(|last| waits_since.is_none_or(|since| since > *last)).is_some();
        let Some((command, since, last_error, count)) = oldest else {
            known.movement.rests();
            (known.waiting, known.last_error) = (None, None);
            return over;
        };
        let still_since = known.movement.waits((known.settled, command));
        known.waiting = Some(WaitingWork { items: u64::try_from(count).ok(), oldest: Some(since), still_since });
        known.last_error = last_error;
        over
    }

    /// Reports the known trouble, or that looks fail, or that nothing moves and the last error; and what waits.
    pub(super) fn report(&self, issue: Option<HealthIssue>) -> PartReport {
        let known = self.lock();
        let issue = issue.or_else(|| known.looks.issue()).or_else(|| {
            let since = known.waiting?.still_since;
            let still = clock::monotonic().saturating_duration_since(since);
            let said = known.last_error.as_deref().unwrap_or("no answer yet");
            let reason = format!("no effect that waits was performed for {} s: {said}", still.as_secs());
            (still >= STALLED_AFTER)
                .then(|| HealthIssue { since: Some(since), ..HealthIssue::new(Cause::Stalled, reason) })
        });
        PartReport { issue, waiting: known.waiting }
    }
}

impl Intents {
    /// Keeps the gauge `participant_intents{state}`. Effects in doubt, or open for long, need an operator.
    pub(super) async fn keep_gauges(&self) {
        loop {
            // The oldest intent is read alone: what waits, and for how long, is known even when there is too much to be
            // counted in time.
            match self.bound().within(self.oldest()).await {
                Ok(oldest) => {
                    if self.progress.seen(oldest) {
                        self.setup.working();
                    }
                }
                Err(error) => self.progress.missed(&error),
            }
            // The gauges keep their last values while the intents cannot be counted.
            let counts = self.bound().within(self.counts()).await.inspect_err(|error| {
                tracing::debug!(participant = self.participant.name, %error, "intents were not counted");
            });
            for (state, count) in counts.unwrap_or_default() {
                #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
                metrics::gauge!("participant_intents", "participant" => self.participant.name, "state" => state)
                    .set(count as f64);
            }
            tokio::time::sleep(GAUGE_EVERY).await;
        }
    }

    async fn counts(&self) -> Result<Vec<(String, i64)>, sqlx::Error> {
        let mut tx = self.begin().await?;
        let counts = queue::count_in(&mut tx).await?;
        tx.commit_quietly().await?;
        Ok(counts)
    }

    async fn oldest(&self) -> Result<Option<Oldest>, sqlx::Error> {
        let mut tx = self.begin().await?;
        let oldest = queue::oldest_in(&mut tx).await?;
        tx.commit_quietly().await?;
        Ok(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_in_vain_is_over_when_all_that_waits_came_later() {
        let (progress, failed) = (EffectsProgress::default(), clock::now());
        let waits = |after: i64| Some((Uuid::now_v7(), failed + time::Duration::seconds(after), None, 1));
        assert!(!progress.seen(None), "nothing was in vain");
        progress.in_vain(failed);
        assert!(!progress.seen(waits(-1)), "it still waits");
        assert!(progress.seen(waits(1)), "another replica has settled it");
        assert!(!progress.seen(waits(1)));
        progress.in_vain(failed);
        assert!(progress.seen(None));
    }

    #[test]
    fn effects_that_cannot_be_looked_at_still_wait_and_that_is_said() {
        let progress = EffectsProgress::default();
        progress.seen(Some((Uuid::now_v7(), clock::now(), None, 7)));
        let waiting = progress.report(None).waiting.expect("seven wait");
        let slow = sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
        progress.missed(&slow);
        let report = progress.report(None);
        assert_eq!((report.issue, report.waiting), (None, Some(waiting)), "one look says nothing");
        progress.missed(&slow);
        progress.missed(&slow);
        let report = progress.report(None);
        assert_eq!(report.waiting, Some(waiting), "nothing of it was seen to move");
        assert!(report.issue.is_some_and(|issue| issue.reason.contains("what waits is not known")));
        progress.seen(None);
        assert_eq!(progress.report(None), PartReport::fine());
    }
}

//! What a worker does with parked records. The first of a lane is tried alone, counted. The records behind it are
//! handled together once the first is.
//!
//! A process that dies during such an attempt has counted it, and the next worker makes the next one when it is due. An
//! attempt that waited for a lock in vain is taken back.

use super::{
    Handler,
    claim::CountedAttempt,
    failure::{RecordFault, Remedy, UNREADABLE},
    parking::{self, NextDue, Parked},
    portion::Portion,
    record::Poison,
    transaction::PartitionContext,
    worker::{Worker, WorkerEnd, fatal, is_poison},
};
use crate::clock;
use std::time::Duration;

/// How often a partition looks for parked records that another process made due.
const LOOK_AT_PARKED: Duration = Duration::from_secs(5);
/// How long a worker waits for another partition's attempt to end, and how soon it looks again: new records are taken
/// in between.
const ALONE_WITHIN: Duration = Duration::from_millis(250);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The most parked records that are tried before new ones get their turn, and how long trying them may take.
const RETRIES_PER_TURN: usize = 32;
const RETRIES_TURN: Duration = Duration::from_secs(1);

impl<H: Handler> Worker<H> {
    /// Tries the parked records whose time has come, within a turn's bounds.
    pub(super) async fn retry_what_is_due(&mut self) -> Result<(), WorkerEnd> {
        let began = clock::monotonic();
        for _ in 0..RETRIES_PER_TURN {
            let now = clock::monotonic();
            if now < self.look_at_parked || now > began + RETRIES_TURN {
                return Ok(());
            }
            self.context.prefetched.give_back();
            let context = &self.context;
            let due = || async { Ok(parking::next_due(context.brief().await?, context.place()).await?) };
            match self.must(due).await? {
                NextDue::Nothing => self.look_at_parked = clock::monotonic() + LOOK_AT_PARKED,
                NextDue::In(wait) => self.look_at_parked = clock::monotonic() + wait.min(LOOK_AT_PARKED),
                NextDue::Unreadable { id, reason } => self.put_off(id, &reason).await?,
                NextDue::Now(parked) => {
                    // Another partition's attempt may hang for its whole bound: new records of this partition do not
                    // wait for it.
                    if !self.be_alone_within(ALONE_WITHIN).await? {
                        self.look_at_parked = clock::monotonic() + LOOK_AGAIN;
                        return Ok(());
                    }
                    let retried = self.count_and_retry(&parked).await;
                    self.be_with_others();
                    let handled = retried?;
                    self.counted = None;
                    if let (true, Some(lane)) = (handled, parked.lane) {
                        self.drain(lane).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Tries a parked record once more; returns whether it is handled.
    async fn count_and_retry(&mut self, parked: &Parked) -> Result<bool, WorkerEnd> {
        let (context, offset) = (&self.context, parked.message.at.offset);
        let delay = context.delay(parked.attempts + 1, offset);
        let count = || async { Ok(parking::count_retry(context.brief().await?, parked.id, delay).await?) };
        let Some(attempt) = self.must(count).await? else { return Ok(false) };
        self.counted = Some(CountedAttempt::Parked { id: parked.id });
        self.pass_attempt_counted()?;
        let context = &self.context;
        let retried = match attempt > context.config.attempts {
            true => Err(fatal(context.config.attempts)),
            false => self.insist(|| context.retry(parked)).await?,
        };
        let Err(fault) = retried else { return Ok(true) };
        if fault.gives_up(attempt, context.config.attempts) {
            self.must(|| context.give_up_parked(parked, attempt.min(context.config.attempts), &fault)).await?;
        } else if fault.remedy == Remedy::Wait {
            let backoff = &context.config.backoff;
            let note = || async { Ok(parking::note_wait(context.brief().await?, parked.id, backoff, &fault).await?) };
            self.must(note).await?;
        } else {
            let note = || async { Ok(parking::note(context.brief().await?, parked.id, delay, &fault).await?) };
            self.must(note).await?;
        }
        Ok(false)
    }

    /// A row that this build cannot read costs its own key, and nothing else: another build may have written it.
    async fn put_off(&self, id: i64, reason: &str) -> Result<(), WorkerEnd> {
        let (context, fault) = (&self.context, RecordFault::new(UNREADABLE, reason, Remedy::Retry));
        let PartitionContext { config, topic, partition, .. } = context;
        tracing::error!(
            group = config.group,
            topic,
            partition,
            id,
            reason,
            "a row of inbox_parked cannot be read by this build; it is put off, and the records of its key wait behind it"
        );
        let note = || async { Ok(parking::note(context.brief().await?, id, config.backoff.max, &fault).await?) };
        self.must(note).await
    }

    /// Handles together the records that waited behind one that is now handled, until a culprit is the first, which is
    /// due. While a record may kill the process, each is tried alone, as nothing is counted here.
    async fn drain(&mut self, lane: i64) -> Result<(), WorkerEnd> {
        let (mut portions, mut poison) = (self.portions, Poison::new());
        while self.records_to_note == 0 && !self.stop.is_cancelled() {
            let (context, began) = (&self.context, clock::monotonic());
            let Portion::Together(size) = portions.next(context.config.batch_max) else { break };
            match self.insist(|| context.drain(lane, size, &poison)).await? {
                Ok(drained) => {
                    let took = clock::monotonic().saturating_duration_since(began);
                    portions.handled(drained, took, context.config.attempt_timeout);
                    if drained < size {
                        break;
                    }
                }
                Err(fault) if is_poison(&mut poison, &fault) => {}
                Err(fault) => portions.failed(size, fault.remedy, None),
            }
        }
        self.portions.fit_like(&portions);
        Ok(())
    }
}

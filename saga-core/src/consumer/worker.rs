//! One partition's worker: takes what has arrived, makes a transaction of it, then stores the offset.
//!
//! ```text
//!  parked records that are due  ->  a batch of what has arrived  ->  its offset  ->  again
//!                                     | it fails, or takes too long
//!                                     v
//!                                   portions: smaller ones, and the culprit alone
//! ```
//!
//! After an unclean stop one of the records that come again may be what killed the process, though most such stops have
//! another reason. So the worker notes the first batches before it tries them. Only when the process ends during one
//! that was noted, the records of it are taken one by one, each attempt counted. A counted attempt is the only one in
//! its process: were another one made meanwhile, a death would be counted against both.
//!
//! The worker's invariant: an offset is stored only when every record up to it is handled, parked or dead-lettered in a
//! transaction that is committed. When the process dies anywhere, the partition's next worker starts at or before what
//! is done. The inbox takes out what was.

use super::{
    Handler, Message,
    buffer::Buffer,
    claim::{self, CountedAttempt, NotedBatch},
    failure::{AttemptFailure, RecordFault, Remedy},
    health::Reporter,
    offsets::Offsets,
    portion::{Portion, Portions},
    record::{Poison, Raw, RecordBatch},
    transaction::PartitionContext,
};
use crate::{clock, fail_point::fail_point, gather::Gathering, inbox, part::Cause};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How long the transaction may take that is open when the worker is to stop. With [`RELEASE_MAX`], less than the
/// worker gets.
const FINISH_MAX: Duration = Duration::from_secs(6);
/// How long letting go of a partition in good order may take.
const RELEASE_MAX: Duration = Duration::from_secs(3);
/// Batches of few records begin at least so long after one another. Records that arrive meanwhile share a transaction,
/// whose fixed cost is that of dozens of records. A record that comes alone does not wait for this.
const GATHER_FOR: Duration = Duration::from_micros(1_500);
const FEW_RECORDS: usize = 100;

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerEnd {
    /// The worker was asked to stop.
    Stopped,
    /// A test let the worker die: nothing is cleaned up.
    Crashed,
}

pub(super) struct Worker<H> {
    pub(super) context: PartitionContext<H>,
    pub(super) buffer: Arc<Buffer>,
    pub(super) offsets: Offsets,
    pub(super) report: Reporter,
    pub(super) stop: CancellationToken,
    /// The worker's id, made anew by each worker.
    pub(super) owner: Uuid,
    /// How many fresh records are still to be noted before they are tried, because one of them may kill the process.
    pub(super) records_to_note: usize,
    /// What the process had noted when it ended: those records are taken one by one.
    pub(super) noted: Option<NotedBatch>,
    pub(super) look_at_parked: Instant,
    pub(super) portions: Portions,
    /// The attempt that is counted and not decided.
    pub(super) counted: Option<CountedAttempt>,
    /// The permit to be alone, while a counted attempt is made.
    pub(super) alone: Mutex<Option<SemaphorePermit<'static>>>,
}

impl<H: Handler> Worker<H> {
    /// Works until the stop token is cancelled. The transaction that is open then is finished, if that takes no longer
    /// than a bound.
    pub(super) async fn run(mut self) -> WorkerEnd {
        let stop = self.stop.clone();
        let overdue = async {
            stop.cancelled().await;
            tokio::time::sleep(FINISH_MAX).await;
        };
        let ended = tokio::select! {
            Err(ended) = self.work() => ended,
            () = overdue => {
                tracing::warn!(
                    topic = self.context.topic,
                    partition = self.context.partition,
                    "the open transaction did not end within {FINISH_MAX:?} and is rolled back; its messages are handled again"
                );
                WorkerEnd::Stopped
            }
        };
        self.context.prefetched.give_back();
        self.be_with_others();
        // Without this the next worker notes its first batches, which is slower and as right.
        if ended == WorkerEnd::Stopped {
            tokio::time::timeout(RELEASE_MAX, self.release()).await.ok();
        }
        ended
    }

    async fn release(&self) -> Result<(), AttemptFailure> {
        Ok(claim::release(self.context.brief().await?, self.context.place(), self.owner, self.counted).await?)
    }

    async fn work(&mut self) -> Result<Infallible, WorkerEnd> {
        self.claim().await?;
        let mut gathering = Gathering::default();
        loop {
            self.retry_what_is_due().await?;
            let prefetched = self.context.prefetched.until();
            let raws = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(WorkerEnd::Stopped),
                raws = self.buffer.take(self.portions.most(), &mut gathering) => raws,
                () = tokio::time::sleep_until(self.look_at_parked.into()) => continue,
                () = tokio::time::sleep_until(prefetched.unwrap_or(self.look_at_parked).into()), if prefetched.is_some() => {
                    self.context.prefetched.give_back();
                    continue;
                }
            };
            let Some(last) = raws.last().map(|raw| raw.offset) else { continue };
            let (few, began) = (raws.len() < FEW_RECORDS, clock::monotonic());
            self.process(raws).await?;
            self.store(last)?;
            if few {
                tokio::time::sleep_until((began + GATHER_FOR).into()).await;
            }
        }
    }

    async fn claim(&mut self) -> Result<(), WorkerEnd> {
        let context = &self.context;
        let claim = || async {
            let asked = clock::monotonic();
            let claimed =
                claim::claim(context.brief().await?, context.place(), self.owner, self.offsets.topic_id()).await?;
            context.clock.heard(claimed.time, asked);
            Ok(claimed)
        };
        let claimed = self.must(claim).await?;
        if !claimed.clean {
            (self.records_to_note, self.noted) = (context.config.batch_max, claimed.noted);
        }
        // Where the server has no bound of its own, each transaction brings one.
        self.context.silence =
            if claimed.silence.is_zero() { self.context.config.attempt_timeout } else { claimed.silence };
        Ok(())
    }

    /// Sees to it that every record is handled, parked or dead-lettered.
    async fn process(&mut self, mut raws: Vec<Raw>) -> Result<(), WorkerEnd> {
        let suspects = self.noted.filter(|_| self.records_to_note > 0).map_or(0..0, NotedBatch::suspects);
        let mut rest = raws.split_off(raws.partition_point(|raw| raw.offset < suspects.start));
        let others = rest.split_off(rest.partition_point(|raw| raw.offset < suspects.end));
        let (survived, suspects) = (raws, rest);
        if !survived.is_empty() {
            self.in_portions(survived, false).await?;
        }
        if !suspects.is_empty() {
            self.one_by_one(suspects).await?;
        }
        if !others.is_empty() {
            self.in_portions(others, self.records_to_note > 0).await?;
        }
        Ok(())
    }

    /// Handles all records in one transaction; when that goes wrong, in portions.
    async fn in_portions(&mut self, raws: Vec<Raw>, noted: bool) -> Result<(), WorkerEnd> {
        let mut rest = self.decode(raws).await?;
        while !rest.is_empty() {
            // Records that are done are in the inbox; the partition's next worker passes over them.
            if self.stop.is_cancelled() {
                return Err(WorkerEnd::Stopped);
            }
            if rest.messages.is_empty() {
                // No record is to be handled, and dead letters are to be written: no fault of a record can keep them
                // from being written.
                self.dead_letter_refused(&mut rest).await?;
                break;
            }
            match self.portions.next(rest.messages.len()) {
                Portion::Together(size) if size >= rest.messages.len() => {
                    let whole = std::mem::take(&mut rest);
                    rest = self.together(whole, noted).await?;
                }
                Portion::Together(size) => {
                    self.dead_letter_refused(&mut rest).await?;
                    let portion = rest.split_first(size);
                    let mut left = self.together(portion, noted).await?;
                    left.append(rest);
                    rest = left;
                }
                Portion::Alone => {
                    self.dead_letter_refused(&mut rest).await?;
                    let single = rest.split_first(1);
                    self.alone(&single).await?;
                }
            }
        }
        Ok(())
    }

    /// Decodes records. A record that the inbox does not remember is refused, unless the clocks differ so much that its
    /// age is not known.
    async fn decode(&self, raws: Vec<Raw>) -> Result<RecordBatch, WorkerEnd> {
        let context = &self.context;
        let mut batch = RecordBatch::decode(&context.topic, context.partition, raws);
        if batch.is_admissible(&context.config, context.clock.now()) {
            return Ok(batch);
        }
        let judge = || async {
            let asked = clock::monotonic();
            context.clock.heard(claim::time(context.brief().await?).await?, asked);
            match context.clock.check() {
                Err(reason) if batch.has_doubtful_ages(&context.config, context.clock.now()) => {
                    Err(AttemptFailure::Configuration(
                        Cause::ClockSkew,
                        format!("{reason}; messages that are too old for the inbox, or from the future, wait for that"),
                    ))
                }
                _ => Ok(()),
            }
        };
        self.must(judge).await?;
        batch.refuse_inadmissible(&context.config, context.clock.now());
        Ok(batch)
    }

    /// Dead-letters the refused records, apart from what is handled in portions.
    async fn dead_letter_refused(&self, batch: &mut RecordBatch) -> Result<(), WorkerEnd> {
        let refused = RecordBatch { refused: std::mem::take(&mut batch.refused), ..RecordBatch::default() };
        if refused.is_empty() {
            return Ok(());
        }
        self.must(|| self.context.take(&refused)).await.map(drop)
    }

    /// Handles the batch in one transaction; returns the part that is not handled.
    async fn together(&mut self, mut batch: RecordBatch, noted: bool) -> Result<RecordBatch, WorkerEnd> {
        let (size, began) = (batch.messages.len(), clock::monotonic());
        if let (true, Some(last)) = (noted, batch.messages.last()) {
            self.note(last.at.offset).await?;
        }
        loop {
            let mut fault = match self.insist(|| self.context.take(&batch)).await? {
                Ok(fresh) => {
                    let took = clock::monotonic().saturating_duration_since(began);
                    self.records_to_note = self.records_to_note.saturating_sub(fresh);
                    self.portions.handled(size, took, self.context.config.attempt_timeout);
                    return Ok(RecordBatch::default());
                }
                Err(fault) => fault,
            };
            if let [message] = &batch.messages[..] {
                fault.culprit = Some(message.envelope.id);
            }
            if is_poison(&mut batch.poison, &fault) {
                continue;
            }
            let culprit = fault.culprit.and_then(|culprit| batch.position(culprit));
            self.fails(size, &fault, culprit);
            return Ok(batch);
        }
    }

    fn fails(&mut self, size: usize, fault: &RecordFault, culprit: Option<usize>) {
        let was_slow = self.portions.is_slow();
        self.portions.failed(size, fault.remedy, culprit);
        if self.portions.is_slow() && !was_slow {
            let PartitionContext { config, topic, partition, .. } = &self.context;
            tracing::warn!(
                group = config.group,
                topic,
                partition,
                messages = size,
                reason = fault.reason,
                "a batch took too long; smaller ones are tried until one is handled in time"
            );
        }
    }

    async fn note(&self, last: i64) -> Result<(), WorkerEnd> {
        let context = &self.context;
        let note = || async { Ok(claim::note_batch(context.brief().await?, context.place(), self.owner, last).await?) };
        self.must(note).await?;
        let passed = || -> Result<(), AttemptFailure> {
            fail_point!("consumer.after-note", &context.config.group);
            Ok(())
        };
        passed().map_err(|_| WorkerEnd::Crashed)
    }

    /// Handles each record in a transaction of its own, its attempt counted before.
    async fn one_by_one(&mut self, raws: Vec<Raw>) -> Result<(), WorkerEnd> {
        self.context.prefetched.give_back();
        let mut rest = self.decode(raws).await?;
        self.dead_letter_refused(&mut rest).await?;
        // After an unclean stop most of the records that come again are done: one question spares two commits for each
        // of those.
        let context = &self.context;
        let arrivals = rest.arrivals(&context.config, context.clock.now());
        let known = || async {
            let mut tx = context.brief().await?;
            Ok(inbox::known(&mut **tx, &context.config.group, &arrivals).await?)
        };
        let known = self.must(known).await?;
        context.count_duplicates(known.iter().filter(|known| **known).count());
        for known in known {
            if self.stop.is_cancelled() {
                return Err(WorkerEnd::Stopped);
            }
            let single = rest.split_first(1);
            if !known {
                self.alone(&single).await?;
            }
        }
        Ok(())
    }

    /// Handles a single record, counted, while no other counted attempt is made in the process.
    async fn alone(&mut self, single: &RecordBatch) -> Result<(), WorkerEnd> {
        let Some(message) = single.messages.first() else { return Ok(()) };
        self.be_alone().await?;
        let done = self.count_and_take(single, message).await;
        self.be_with_others();
        done?;
        self.counted = None;
        Ok(())
    }

    async fn count_and_take(&mut self, single: &RecordBatch, message: &Message) -> Result<(), WorkerEnd> {
        let (context, offset, began) = (&self.context, message.at.offset, clock::monotonic());
        let count = || async { Ok(claim::count_attempt(context.brief().await?, context.place(), offset).await?) };
        let attempt = self.must(count).await?;
        self.counted = Some(CountedAttempt::Fresh);
        self.pass_attempt_counted()?;
        let context = &self.context;
        let taken = match attempt > context.config.attempts {
            true => Err(fatal(context.config.attempts)),
            false => self.insist(|| context.take(single)).await?,
        };
        match taken {
            Ok(fresh) => {
                let took = clock::monotonic().saturating_duration_since(began);
                self.records_to_note = self.records_to_note.saturating_sub(fresh);
                self.portions.handled(1, took, self.context.config.attempt_timeout);
                return Ok(());
            }
            Err(fault) if fault.gives_up(attempt, context.config.attempts) => {
                self.must(|| context.give_up(single, attempt.min(context.config.attempts), &fault)).await?;
            }
            Err(fault) => {
                let spent = attempt - u32::from(fault.remedy == Remedy::Wait);
                self.must(|| context.park(single, spent, &fault)).await?;
                self.look_at_parked = self.look_at_parked.min(clock::monotonic() + context.delay(spent, offset));
            }
        }
        self.records_to_note = self.records_to_note.saturating_sub(1);
        self.portions.set_aside();
        Ok(())
    }

    /// Stores the offset of what is done; the library commits it to Kafka with the next automatic commit, or when the
    /// partition goes.
    fn store(&self, last: i64) -> Result<(), WorkerEnd> {
        let passed = || -> Result<(), AttemptFailure> {
            fail_point!("consumer.before-store", &self.context.config.group);
            Ok(())
        };
        passed().map_err(|_| WorkerEnd::Crashed)?;
        self.offsets.store(&self.context.topic, self.context.partition, last);
        Ok(())
    }

    pub(super) fn pass_attempt_counted(&self) -> Result<(), WorkerEnd> {
        let passed = || -> Result<(), AttemptFailure> {
            fail_point!("consumer.after-attempt", &self.context.config.group);
            Ok(())
        };
        passed().map_err(|_| WorkerEnd::Crashed)
    }
}

/// Notes that messages, which the handler has named, are poison; `false` if that is not new, and does not help.
pub(super) fn is_poison(known: &mut Poison, fault: &RecordFault) -> bool {
    match (fault.remedy, fault.culprit) {
        (Remedy::Nothing, Some(message)) => {
            let others = fault.others.iter().map(|unfit| (unfit.message, RecordFault::unfit(unfit)));
            let all = others.chain([(message, RecordFault { others: Vec::new(), ..fault.clone() })]);
            all.fold(false, |new, (message, fault)| known.insert(message, fault).is_none() || new)
        }
        _ => false,
    }
}

/// The fault of a record that was never seen to fail and has used up its attempts: the process died each time.
pub(super) fn fatal(attempts: u32) -> RecordFault {
    RecordFault::new("unclean-stop", &format!("the process ended during each of {attempts} attempts"), Remedy::Nothing)
}

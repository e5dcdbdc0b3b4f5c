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
    claim::{self, Counted, Noted},
    failure::{Failure, Fault, Remedy},
    health::Reporter,
    offsets::Offsets,
    portion::{Portion, Portions},
    record::{Batch, Poison, Raw},
    transaction::Desk,
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
const GATHER: Duration = Duration::from_micros(1_500);
const FEW: usize = 100;

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The worker was asked to stop.
    Stopped,
    /// A test let the worker die: nothing is cleaned up.
    Crashed,
}

pub(super) struct Worker<H> {
    pub(super) desk: Desk<H>,
    pub(super) buffer: Arc<Buffer>,
    pub(super) offsets: Offsets,
    pub(super) report: Reporter,
    pub(super) stop: CancellationToken,
    /// The worker's id, made anew by each worker.
    pub(super) owner: Uuid,
    /// How many fresh records are still to be noted before they are tried, because one of them may kill the process.
    pub(super) careful: usize,
    /// What the process had noted when it ended: those records are taken one by one.
    pub(super) noted: Option<Noted>,
    pub(super) look_at_parked: Instant,
    pub(super) portions: Portions,
    /// The attempt that is counted and not decided.
    pub(super) counted: Option<Counted>,
    /// The permit to be alone, while a counted attempt is made.
    pub(super) alone: Mutex<Option<SemaphorePermit<'static>>>,
}

impl<H: Handler> Worker<H> {
    /// Works until the stop token is cancelled. The transaction that is open then is finished, if that takes no longer
    /// than a bound.
    pub(super) async fn run(mut self) -> Ended {
        let stop = self.stop.clone();
        let overdue = async {
            stop.cancelled().await;
            tokio::time::sleep(FINISH_MAX).await;
        };
        let ended = tokio::select! {
            Err(ended) = self.work() => ended,
            () = overdue => {
                tracing::warn!(
                    topic = self.desk.topic,
                    partition = self.desk.partition,
                    "the open transaction did not end within {FINISH_MAX:?} and is rolled back; its messages are handled again"
                );
                Ended::Stopped
            }
        };
        self.desk.ahead.give_back();
        self.be_with_others();
        // Without this the next worker is careful, which is slower and as right.
        if ended == Ended::Stopped {
            tokio::time::timeout(RELEASE_MAX, self.release()).await.ok();
        }
        ended
    }

    async fn release(&self) -> Result<(), Failure> {
        Ok(claim::release(self.desk.brief().await?, self.desk.place(), self.owner, self.counted).await?)
    }

    async fn work(&mut self) -> Result<Infallible, Ended> {
        self.claim().await?;
        let mut gathering = Gathering::default();
        loop {
            self.retry_what_is_due().await?;
            let ahead = self.desk.ahead.until();
            let raws = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                raws = self.buffer.take(self.portions.most(), &mut gathering) => raws,
                () = tokio::time::sleep_until(self.look_at_parked.into()) => continue,
                () = tokio::time::sleep_until(ahead.unwrap_or(self.look_at_parked).into()), if ahead.is_some() => {
                    self.desk.ahead.give_back();
                    continue;
                }
            };
            let Some(last) = raws.last().map(|raw| raw.offset) else { continue };
            let (few, began) = (raws.len() < FEW, clock::monotonic());
            self.process(raws).await?;
            self.store(last)?;
            if few {
                tokio::time::sleep_until((began + GATHER).into()).await;
            }
        }
    }

    async fn claim(&mut self) -> Result<(), Ended> {
        let desk = &self.desk;
        let claim = || async {
            let asked = clock::monotonic();
            let claimed = claim::claim(desk.brief().await?, desk.place(), self.owner, self.offsets.topic_id()).await?;
            desk.clock.heard(claimed.time, asked);
            Ok(claimed)
        };
        let claimed = self.must(claim).await?;
        if !claimed.clean {
            (self.careful, self.noted) = (desk.config.batch_max, claimed.noted);
        }
        // Where the server has no bound of its own, each transaction brings one.
        self.desk.silence = if claimed.silence.is_zero() { self.desk.config.attempt_timeout } else { claimed.silence };
        Ok(())
    }

    /// Sees to it that every record is handled, parked or dead-lettered.
    async fn process(&mut self, mut raws: Vec<Raw>) -> Result<(), Ended> {
        let suspects = self.noted.filter(|_| self.careful > 0).map_or(0..0, Noted::suspects);
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
            self.in_portions(others, self.careful > 0).await?;
        }
        Ok(())
    }

    /// Handles all records in one transaction; when that goes wrong, in portions.
    async fn in_portions(&mut self, raws: Vec<Raw>, noted: bool) -> Result<(), Ended> {
        let mut rest = self.decode(raws).await?;
        while !rest.is_empty() {
            // Records that are done are in the inbox; the partition's next worker passes over them.
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
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
    async fn decode(&self, raws: Vec<Raw>) -> Result<Batch, Ended> {
        let desk = &self.desk;
        let mut batch = Batch::decode(&desk.topic, desk.partition, raws);
        if batch.is_admissible(&desk.config, desk.clock.now()) {
            return Ok(batch);
        }
        let judge = || async {
            let asked = clock::monotonic();
            desk.clock.heard(claim::time(desk.brief().await?).await?, asked);
            match desk.clock.check() {
                Err(reason) if batch.has_doubtful_ages(&desk.config, desk.clock.now()) => Err(Failure::Configuration(
                    Cause::ClockSkew,
                    format!("{reason}; messages that are too old for the inbox, or from the future, wait for that"),
                )),
                _ => Ok(()),
            }
        };
        self.must(judge).await?;
        batch.refuse_inadmissible(&desk.config, desk.clock.now());
        Ok(batch)
    }

    /// Dead-letters the refused records, apart from what is handled in portions.
    async fn dead_letter_refused(&self, batch: &mut Batch) -> Result<(), Ended> {
        let refused = Batch { refused: std::mem::take(&mut batch.refused), ..Batch::default() };
        if refused.is_empty() {
            return Ok(());
        }
        self.must(|| self.desk.take(&refused)).await.map(drop)
    }

    /// Handles the batch in one transaction; returns the part that is not handled.
    async fn together(&mut self, mut batch: Batch, noted: bool) -> Result<Batch, Ended> {
        let (size, began) = (batch.messages.len(), clock::monotonic());
        if let (true, Some(last)) = (noted, batch.messages.last()) {
            self.note(last.at.offset).await?;
        }
        loop {
            let mut fault = match self.insist(|| self.desk.take(&batch)).await? {
                Ok(fresh) => {
                    let took = clock::monotonic().saturating_duration_since(began);
                    self.careful = self.careful.saturating_sub(fresh);
                    self.portions.handled(size, took, self.desk.config.attempt_timeout);
                    return Ok(Batch::default());
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

    fn fails(&mut self, size: usize, fault: &Fault, culprit: Option<usize>) {
        let was_slow = self.portions.is_slow();
        self.portions.failed(size, fault.remedy, culprit);
        if self.portions.is_slow() && !was_slow {
            let Desk { config, topic, partition, .. } = &self.desk;
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

    async fn note(&self, last: i64) -> Result<(), Ended> {
        let desk = &self.desk;
        let note = || async { Ok(claim::note_batch(desk.brief().await?, desk.place(), self.owner, last).await?) };
        self.must(note).await?;
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.after-note", &desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)
    }

    /// Handles each record in a transaction of its own, its attempt counted before.
    async fn one_by_one(&mut self, raws: Vec<Raw>) -> Result<(), Ended> {
        self.desk.ahead.give_back();
        let mut rest = self.decode(raws).await?;
        self.dead_letter_refused(&mut rest).await?;
        // After an unclean stop most of the records that come again are done: one question spares two commits for each
        // of those.
        let desk = &self.desk;
        let arrivals = rest.arrivals(&desk.config, desk.clock.now());
        let known = || async {
            let mut tx = desk.brief().await?;
            Ok(inbox::known(&mut **tx, &desk.config.group, &arrivals).await?)
        };
        let known = self.must(known).await?;
        desk.count_duplicates(known.iter().filter(|known| **known).count());
        for known in known {
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            let single = rest.split_first(1);
            if !known {
                self.alone(&single).await?;
            }
        }
        Ok(())
    }

    /// Handles a single record, counted, while no other counted attempt is made in the process.
    async fn alone(&mut self, single: &Batch) -> Result<(), Ended> {
        let Some(message) = single.messages.first() else { return Ok(()) };
        self.be_alone().await?;
        let done = self.count_and_take(single, message).await;
        self.be_with_others();
        done?;
        self.counted = None;
        Ok(())
    }

    async fn count_and_take(&mut self, single: &Batch, message: &Message) -> Result<(), Ended> {
        let (desk, offset, began) = (&self.desk, message.at.offset, clock::monotonic());
        let count = || async { Ok(claim::count_attempt(desk.brief().await?, desk.place(), offset).await?) };
        let attempt = self.must(count).await?;
        self.counted = Some(Counted::Fresh);
        self.pass_attempt_counted()?;
        let desk = &self.desk;
        let taken = match attempt > desk.config.attempts {
            true => Err(fatal(desk.config.attempts)),
            false => self.insist(|| desk.take(single)).await?,
        };
        match taken {
            Ok(fresh) => {
                let took = clock::monotonic().saturating_duration_since(began);
                self.careful = self.careful.saturating_sub(fresh);
                self.portions.handled(1, took, self.desk.config.attempt_timeout);
                return Ok(());
            }
            Err(fault) if fault.gives_up(attempt, desk.config.attempts) => {
                self.must(|| desk.give_up(single, attempt.min(desk.config.attempts), &fault)).await?;
            }
            Err(fault) => {
                let spent = attempt - u32::from(fault.remedy == Remedy::Wait);
                self.must(|| desk.park(single, spent, &fault)).await?;
                self.look_at_parked = self.look_at_parked.min(clock::monotonic() + desk.delay(spent, offset));
            }
        }
        self.careful = self.careful.saturating_sub(1);
        self.portions.set_aside();
        Ok(())
    }

    /// Stores the offset of what is done; the library commits it to Kafka with the next automatic commit, or when the
    /// partition goes.
    fn store(&self, last: i64) -> Result<(), Ended> {
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.before-store", &self.desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)?;
        self.offsets.store(&self.desk.topic, self.desk.partition, last);
        Ok(())
    }

    pub(super) fn pass_attempt_counted(&self) -> Result<(), Ended> {
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.after-attempt", &self.desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)
    }
}

/// Notes that messages, which the handler has named, are poison; `false` if that is not new, and does not help.
pub(super) fn is_poison(known: &mut Poison, fault: &Fault) -> bool {
    match (fault.remedy, fault.culprit) {
        (Remedy::Nothing, Some(message)) => {
            let others = fault.others.iter().map(|unfit| (unfit.message, Fault::unfit(unfit)));
            let all = others.chain([(message, Fault { others: Vec::new(), ..fault.clone() })]);
            all.fold(false, |new, (message, fault)| known.insert(message, fault).is_none() || new)
        }
        _ => false,
    }
}

/// The fault of a record that was never seen to fail and has used up its attempts: the process died each time.
pub(super) fn fatal(attempts: u32) -> Fault {
    Fault::new("unclean-stop", &format!("the process ended during each of {attempts} attempts"), Remedy::Nothing)
}

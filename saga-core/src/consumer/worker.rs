//! One partition's worker: takes what has arrived, makes a transaction of it, then stores the offset.
//!
//! ```text
//!  parked records that are due  ->  a batch of what has arrived  ->  its offset  ->  again
//! ```
//!
//! After an unclean stop one of the records that come again may be what killed the process, though most such stops have
//! another reason. So the first batches are noted before they are tried, and only when the process ends during one that
//! was noted its records are taken one by one, each attempt counted. What is noted or counted is the only such thing that
//! is tried in the process at that time: no two are suspected because of one death.
//!
//! Its invariant: an offset is stored only when every record up to it is handled, parked or dead-lettered in a
//! transaction that is committed. When the process dies anywhere, the partition's next worker starts at or before what
//! is done, and the inbox takes out what was.

use super::{
    Handler,
    buffer::Buffer,
    failure::{Failure, Fault, Retry},
    health::Pulse,
    parking::{self, Due, LeftBehind, Noted, Parked},
    poll::Offsets,
    record::{Batch, Raw},
    transaction::Desk,
};
use crate::{clock, fail_point::fail_point, gather::Gathering, inbox};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often a partition looks for parked records that somebody else made due.
const LOOK_AT_PARKED: Duration = Duration::from_secs(5);
/// How long letting go of a partition in good order may take; while the database is away nobody should wait for that.
const RELEASE_MAX: Duration = Duration::from_secs(1);
/// Batches of few records begin at least so long after one another: what arrives meanwhile shares a transaction, whose
/// fixed cost is that of dozens of records. One that comes alone does not wait for this.
const GATHER: Duration = Duration::from_micros(1_500);
const FEW: usize = 100;
/// Most parked records that are tried before new ones get their turn.
const RETRIES_PER_TURN: usize = 32;
/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was told to.
    Stopped,
    /// A test let it die: nothing is cleaned up.
    Crashed,
}

pub(super) struct Worker<H> {
    pub(super) desk: Desk<H>,
    pub(super) buffer: Arc<Buffer>,
    pub(super) offsets: Offsets,
    pub(super) pulse: Arc<Pulse>,
    pub(super) stop: CancellationToken,
    /// Made anew by each worker.
    pub(super) owner: Uuid,
    /// How many fresh records are still to be noted before they are tried, because one of them may kill.
    pub(super) careful: usize,
    /// What the process had noted when it ended: that is taken one by one.
    pub(super) noted: Option<Noted>,
    pub(super) look_at_parked: Instant,
    /// Lanes in which something failed when they were taken in batches.
    pub(super) stumbling: HashSet<i64>,
    /// While an attempt is made that is noted or counted.
    pub(super) alone: Mutex<Option<SemaphorePermit<'static>>>,
}

impl<H: Handler> Worker<H> {
    /// Works until told to stop; the transaction that is open then is finished.
    pub(super) async fn run(mut self) -> Ended {
        let ended = match self.work().await {
            Ok(never) => match never {},
            Err(ended) => ended,
        };
        self.desk.ahead.give_back();
        // Without this the next worker is careful, which is slower and as right.
        if ended == Ended::Stopped {
            tokio::time::timeout(RELEASE_MAX, self.release()).await.ok();
        }
        ended
    }

    async fn release(&self) -> Result<(), sqlx::Error> {
        let (pool, place) = (&self.desk.pool, self.desk.place());
        match self.careful {
            0 => parking::release(pool, place, self.owner).await,
            // Nothing died of what we noted.
            _ => parking::withdraw(pool, place, self.owner, self.noted).await,
        }
    }

    async fn work(&mut self) -> Result<std::convert::Infallible, Ended> {
        let desk = &self.desk;
        let left = self.must(|| async { Ok(parking::claim(&desk.pool, desk.place(), self.owner).await?) }).await?;
        (self.careful, self.noted) = match left {
            LeftBehind::Clean => (0, None),
            LeftBehind::Unclean { noted } => (desk.config.batch_max, noted),
        };
        let mut gathering = Gathering::default();
        loop {
            self.retry_what_is_due().await?;
            let ahead = self.desk.ahead.until();
            let raws = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                raws = self.buffer.take(self.desk.config.batch_max, &mut gathering) => raws,
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

    /// Sees to it that every record is handled, parked or dead-lettered.
    async fn process(&mut self, mut raws: Vec<Raw>) -> Result<(), Ended> {
        let suspects = self.noted.filter(|_| self.careful > 0).map_or(0..0, Noted::suspects);
        let mut rest = raws.split_off(raws.partition_point(|raw| raw.offset < suspects.start));
        let others = rest.split_off(rest.partition_point(|raw| raw.offset < suspects.end));
        let (survived, suspects) = (raws, rest);
        if !survived.is_empty() {
            self.in_one(survived, false).await?;
        }
        if !suspects.is_empty() {
            self.one_by_one(self.decode(suspects)).await?;
        }
        if !others.is_empty() {
            self.in_one(others, self.careful > 0).await?;
        }
        Ok(())
    }

    /// All of them in one transaction; when that goes wrong, each in one of its own.
    async fn in_one(&mut self, raws: Vec<Raw>, noted: bool) -> Result<(), Ended> {
        let last = raws.last().map_or(0, |raw| raw.offset);
        let batch = self.decode(raws);
        let taken = match noted {
            true => self.take_noted(&batch, last).await?,
            false => self.insist(|| self.desk.take(&batch)).await?,
        };
        match taken {
            Ok(fresh) => self.careful = self.careful.saturating_sub(fresh),
            Err(_) => self.one_by_one(batch).await?,
        }
        Ok(())
    }

    fn decode(&self, raws: Vec<Raw>) -> Batch {
        Batch::decode(&self.desk.topic, self.desk.partition, raws, &self.desk.config, clock::now())
    }

    /// In one transaction like any batch, but alone, and when the process ends with it that is known.
    async fn take_noted(&self, batch: &Batch, last: i64) -> Result<Result<usize, Fault>, Ended> {
        self.be_alone().await?;
        let taken = self.note_and_take(batch, last).await;
        self.be_with_others();
        taken
    }

    async fn note_and_take(&self, batch: &Batch, last: i64) -> Result<Result<usize, Fault>, Ended> {
        let desk = &self.desk;
        self.must(|| async { Ok(parking::note_batch(&desk.pool, desk.place(), self.owner, last).await?) }).await?;
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.after-note", &desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)?;
        self.insist(|| desk.take(batch)).await
    }

    /// Each record in a transaction of its own, its attempt counted before.
    async fn one_by_one(&mut self, batch: Batch) -> Result<(), Ended> {
        self.desk.ahead.give_back();
        // After an unclean stop most of what comes again is done: one question spares two commits for each of those.
        let arrivals = batch.arrivals(&self.desk.config);
        let pool = &self.desk.pool;
        let known = self
            .insist(|| async { Ok(inbox::known(pool, &self.desk.config.group, &arrivals).await?) })
            .await?
            .unwrap_or_else(|_| vec![false; arrivals.len()]);
        let done: HashSet<i64> = batch
            .messages
            .iter()
            .zip(known)
            .filter(|(_, known)| *known)
            .map(|(message, _)| message.at.offset)
            .collect();
        self.desk.count_duplicates(done.len());
        for single in batch.into_singles() {
            // What is done is in the inbox; whoever has the partition next passes over it.
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            if single.messages.iter().all(|message| !done.contains(&message.at.offset)) {
                self.be_alone().await?;
                let done = self.one(&single).await;
                self.be_with_others();
                done?;
            }
        }
        Ok(())
    }

    async fn one(&mut self, single: &Batch) -> Result<(), Ended> {
        let desk = &self.desk;
        let Some(message) = single.messages.first() else {
            // Nothing to handle, a dead letter to write: no fault of the record can keep it from being written.
            return self.must(|| desk.take(single)).await.map(drop);
        };
        let offset = message.at.offset;
        let attempt =
            self.must(|| async { Ok(parking::count_attempt(&desk.pool, desk.place(), offset).await?) }).await?;
        self.pass_attempt_counted()?;
        if attempt > desk.config.attempts {
            let fault = fatal(desk.config.attempts);
            return self.must(|| desk.give_up(single, desk.config.attempts, &fault)).await;
        }
        match self.insist(|| desk.take(single)).await? {
            Ok(fresh) => self.careful = self.careful.saturating_sub(fresh),
            Err(fault) if fault.retry == Retry::Pointless || attempt >= desk.config.attempts => {
                self.must(|| desk.give_up(single, attempt, &fault)).await?;
                self.careful = self.careful.saturating_sub(1);
            }
            Err(fault) => {
                self.must(|| desk.park(single, attempt, &fault)).await?;
                self.careful = self.careful.saturating_sub(1);
                self.look_at_parked = self.look_at_parked.min(clock::monotonic() + desk.delay(attempt, offset));
            }
        }
        Ok(())
    }

    /// Tries the parked records whose time has come, within a turn's bound.
    async fn retry_what_is_due(&mut self) -> Result<(), Ended> {
        for _ in 0..RETRIES_PER_TURN {
            if clock::monotonic() < self.look_at_parked {
                return Ok(());
            }
            self.desk.ahead.give_back();
            let desk = &self.desk;
            let due = self.must(|| async { Ok(parking::next_due(&desk.pool, desk.place()).await?) }).await?;
            match due {
                Due::Nothing => {
                    self.stumbling.clear();
                    self.look_at_parked = clock::monotonic() + LOOK_AT_PARKED;
                }
                Due::In(wait) => self.look_at_parked = clock::monotonic() + wait.min(LOOK_AT_PARKED),
                Due::Now(parked) => {
                    self.be_alone().await?;
                    let retried = self.retry(&parked).await;
                    self.be_with_others();
                    if let Some(lane) = retried? {
                        self.drain(lane).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Tries a parked record once more; names the lane that waited behind it when it is handled.
    async fn retry(&mut self, parked: &Parked) -> Result<Option<i64>, Ended> {
        let desk = &self.desk;
        let delay = desk.delay(parked.attempts + 1, parked.message.at.offset);
        let counted = self.must(|| async { Ok(parking::count_retry(&desk.pool, parked.id, delay).await?) }).await?;
        let Some(attempt) = counted else { return Ok(None) };
        self.pass_attempt_counted()?;
        if attempt > desk.config.attempts {
            let fault = fatal(desk.config.attempts);
            return self.must(|| desk.give_up_parked(parked, desk.config.attempts, &fault)).await.map(|()| None);
        }
        match self.insist(|| desk.retry(parked)).await? {
            Ok(()) => Ok(parked.lane),
            Err(fault) => {
                if let Some(lane) = parked.lane {
                    self.stumbling.remove(&lane);
                }
                let desk = &self.desk;
                if fault.retry == Retry::Pointless || attempt >= desk.config.attempts {
                    self.must(|| desk.give_up_parked(parked, attempt, &fault)).await?;
                } else {
                    self.must(|| async { Ok(parking::note(&desk.pool, parked.id, &fault).await?) }).await?;
                }
                Ok(None)
            }
        }
    }

    /// Handles in batches what waited behind a record that is now handled. When one of it fails, all of it is taken one
    /// by one until the culprit has been found; likewise while a record may kill, as nothing is counted here.
    async fn drain(&mut self, lane: i64) -> Result<(), Ended> {
        while self.careful == 0 && !self.stumbling.contains(&lane) && !self.stop.is_cancelled() {
            let desk = &self.desk;
            match self.insist(|| desk.drain(lane)).await? {
                Ok(drained) if drained < desk.config.batch_max => break,
                Ok(_) => {}
                Err(_) => {
                    self.stumbling.insert(lane);
                }
            }
        }
        Ok(())
    }

    /// Stores the offset of what is done; Kafka hears of it with the next automatic commit, or when the partition goes.
    fn store(&self, last: i64) -> Result<(), Ended> {
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.before-store", &self.desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)?;
        self.offsets.store(&self.desk.topic, self.desk.partition, last);
        Ok(())
    }

    fn pass_attempt_counted(&self) -> Result<(), Ended> {
        let passed = || -> Result<(), Failure> {
            fail_point!("consumer.after-attempt", &self.desk.config.group);
            Ok(())
        };
        passed().map_err(|_| Ended::Crashed)
    }
}

/// The fault of a record that was never seen to fail and has used up its attempts: the process died each time.
fn fatal(attempts: u32) -> Fault {
    Fault::new("unclean-stop", &format!("the process ended during each of {attempts} attempts"), Retry::Pointless)
}

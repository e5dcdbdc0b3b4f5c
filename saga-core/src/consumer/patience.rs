//! A worker's patience. Work that counts nothing is repeated for as long as it takes. A counted attempt is the only one
//! of its kind in the process.

use super::{
    Handler,
    failure::{AttemptFailure, RecordFault, Remedy},
    transaction::Stage,
    worker::{Worker, WorkerEnd},
};
use crate::{
    clock,
    error_class::{ErrorClass, classify, in_words, is_pool_full, renew_connections},
    inbox::{self, FUTURE_MAX},
    outage::Outage,
    part::Cause,
    retry::Backoff,
    transaction::{database_answers, why_none},
};
use std::{
    pin::pin,
    sync::PoisonError,
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// The pauses before work that counts nothing is repeated: short at first (a deadlock is over at once), then longer (an
/// outage is not).
const REPEAT_PAUSES: Backoff = Backoff::doubling(Duration::from_millis(10), Duration::from_secs(2));

/// What works again within this time is no outage: a deadlock, one connection that was lost.
const SILENT_FOR: Duration = Duration::from_millis(500);

/// Held by the worker that makes an attempt that is counted.
static ALONE: Semaphore = Semaphore::const_new(1);

impl<H: Handler> Worker<H> {
    /// Repeats what counts nothing for as long as it takes. A record's fault is an answer.
    pub(super) async fn insist<T, F, Fut>(&self, mut attempt: F) -> Result<Result<T, RecordFault>, WorkerEnd>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, AttemptFailure>>,
    {
        let mut delays = REPEAT_PAUSES.delays();
        let (mut again, mut silent, mut failed) = (false, false, None);
        loop {
            let failure = match self.within_bound(attempt()).await {
                Ok(value) => {
                    self.report.works();
                    return Ok(Ok(value));
                }
                Err(failure) => failure,
            };
            let (was_silent, first) = (std::mem::take(&mut silent), *failed.get_or_insert_with(clock::monotonic));
            match failure {
                AttemptFailure::Fault(fault) => {
                    self.report.works();
                    return Ok(Err(fault));
                }
                // The connection was lost twice in a row, each time after so long: it is no outage.
                AttemptFailure::Silent(fault) if was_silent => return Ok(Err(fault)),
                AttemptFailure::Silent(_) => silent = true,
                #[cfg(feature = "testkit")]
                AttemptFailure::Crash => return Err(WorkerEnd::Crashed),
                // The batch is repeated at once, unless the handler wants that over and over.
                AttemptFailure::Again if !std::mem::replace(&mut again, true) => continue,
                AttemptFailure::Again => {
                    self.report.waits(Cause::Fault, "its handler wants the same batch again and again");
                }
                AttemptFailure::Configuration(cause, reason) => self.report.waits(cause, &reason),
                AttemptFailure::Unprepared => self.prepare(first).await,
                AttemptFailure::Passing(cause, reason) => self.repeat(cause, &reason, first),
                AttemptFailure::NoConnection => {
                    // When handlers of ours have all connections it is no outage: they give them back within their
                    // bounds.
                    match why_none(&self.context.pool, sqlx::Error::PoolTimedOut).await {
                        error if is_pool_full(&error) => {}
                        error => self.report.fails(&error.to_string()),
                    }
                }
                AttemptFailure::Stale(cause, reason) => {
                    renew_connections();
                    self.repeat(cause, &reason, first);
                }
            }
            self.pause(delays.next().unwrap_or(REPEAT_PAUSES.max)).await?;
        }
    }

    /// The database cannot be used, since `first`. A database that answers and does not do this is the partition's
    /// trouble. Its answers to others are no sign that the partition goes on.
    fn repeat(&self, cause: Cause, reason: &str, first: Instant) {
        match cause {
            _ if clock::monotonic().saturating_duration_since(first) <= SILENT_FOR => {}
            Cause::Locked | Cause::DatabaseReadOnly => self.report.waits(cause, reason),
            _ => self.report.fails(reason),
        }
    }

    /// The outcome of an attempt: a time-out when its handler needs too long, and an outage when the database does. The
    /// wait for a connection is not a part of it: the pool has a bound for that.
    async fn within_bound<T>(
        &self,
        attempt: impl Future<Output = Result<T, AttemptFailure>>,
    ) -> Result<T, AttemptFailure> {
        let (context, bound) = (&self.context, self.context.config.attempt_timeout);
        context.stage.send_replace(Stage::Beginning);
        let mut stage = context.stage.subscribe();
        let begun = async { drop(stage.wait_for(|stage| *stage != Stage::Beginning).await) };
        let wait = context.pool.options().get_acquire_timeout().saturating_add(bound);
        {
            // An attempt that is given up lets go of its connection at the end of this block.
            let mut attempt = pin!(attempt);
            let attempted = tokio::select! {
                biased;
                attempted = &mut attempt => Some(attempted),
                () = begun => tokio::time::timeout(bound, attempt).await.ok(),
                () = tokio::time::sleep(wait) => None,
            };
            if let Some(attempted) = attempted {
                return attempted;
            }
        }
        let stage = *context.stage.borrow();
        let pool = &self.context.pool;
        if stage == Stage::Handling && Outage::of_database(pool).answers(database_answers(pool)).await {
            return Err(AttemptFailure::Fault(RecordFault::timed_out(bound)));
        }
        let reason = format!("no answer within {bound:?}; another connection is tried");
        self.report.fails(&reason);
        Err(AttemptFailure::Passing(Cause::DatabaseAway, reason))
    }

    /// Makes the inbox's partitions: upkeep is behind.
    async fn prepare(&self, first: Instant) {
        // A message that is refused for its age never comes here, so a partition can be made.
        const { assert!(FUTURE_MAX.as_secs() < 14 * 24 * 3600) };
        let made =
            self.context.bound().within(inbox::add_partitions(&self.context.pool, self.context.config.horizon)).await;
        let late = clock::monotonic().saturating_duration_since(first) > SILENT_FOR;
        match made {
            Ok(_) if late => {
                self.report.waits(Cause::TableMissing, "the inbox has no partition for a message that it remembers");
            }
            Ok(_) => {}
            Err(error) if classify(&error) == ErrorClass::Configuration => {
                let reason = format!("the inbox's partitions cannot be made: {error}");
                self.report.waits(Cause::of(&error), &reason);
            }
            Err(error) => self.repeat(Cause::of(&error), &in_words(&error), first),
        }
    }

    /// Waits; other workers may make counted attempts meanwhile.
    async fn pause(&self, time: Duration) -> Result<(), WorkerEnd> {
        self.context.prefetched.give_back();
        let alone = self.be_with_others();
        tokio::select! {
            () = self.stop.cancelled() => return Err(WorkerEnd::Stopped),
            () = tokio::time::sleep(time) => {}
        }
        if alone { self.be_alone().await } else { Ok(()) }
    }

    pub(super) async fn be_alone(&self) -> Result<(), WorkerEnd> {
        self.context.prefetched.give_back();
        let alone = tokio::select! {
            () = self.stop.cancelled() => return Err(WorkerEnd::Stopped),
            // The semaphore is never closed.
            alone = ALONE.acquire() => alone.ok(),
        };
        *self.alone.lock().unwrap_or_else(PoisonError::into_inner) = alone;
        Ok(())
    }

    /// Becomes alone like [`Worker::be_alone`], if that takes no longer than `patience`.
    pub(super) async fn be_alone_within(&self, patience: Duration) -> Result<bool, WorkerEnd> {
        tokio::time::timeout(patience, self.be_alone()).await.map_or(Ok(false), |alone| alone.map(|()| true))
    }

    /// Lets other workers make counted attempts; returns whether this one was alone.
    pub(super) fn be_with_others(&self) -> bool {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// Insists like [`Worker::insist`], for our own statements. A fault there is ours, there is no record to try
    /// instead, and health reports it.
    pub(super) async fn must<T, F, Fut>(&self, mut attempt: F) -> Result<T, WorkerEnd>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, AttemptFailure>>,
    {
        let attempt = || {
            let attempt = attempt();
            async move {
                attempt.await.map_err(|failure| match failure {
                    AttemptFailure::Fault(RecordFault { remedy: Remedy::Smaller, reason, .. }) => {
                        AttemptFailure::Passing(Cause::DatabaseAway, reason)
                    }
                    AttemptFailure::Fault(RecordFault { remedy: Remedy::Wait, reason, .. }) => {
                        AttemptFailure::Passing(Cause::Locked, reason)
                    }
                    AttemptFailure::Fault(fault) => {
                        AttemptFailure::Configuration(Cause::Fault, format!("{}: {}", fault.class, fault.reason))
                    }
                    other => other,
                })
            }
        };
        match self.insist(attempt).await? {
            Ok(value) => Ok(value),
            Err(fault) => unreachable!("every fault was made passing: {fault:?}"),
        }
    }
}

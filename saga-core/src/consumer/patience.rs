//! A worker's patience: what will pass by itself is repeated for as long as it takes, and an attempt that is noted or counted
//! is the only one of its kind in the process.

use super::{
    HandleError, Handler,
    failure::{Failure, Fault},
    worker::{Ended, Worker},
};
use crate::{
    inbox::{self, FUTURE_MAX},
    retry::Backoff,
};
use std::{sync::PoisonError, time::Duration};
use tokio::sync::Semaphore;

/// Repeats of what will pass by itself: soon at first (a deadlock is over at once), then at leisure (an outage is not).
const PATIENCE: Backoff = Backoff::doubling(Duration::from_millis(10), Duration::from_secs(2));

/// Held by whoever makes an attempt that is noted or counted.
static ALONE: Semaphore = Semaphore::const_new(1);

impl<H: Handler> Worker<H> {
    /// Repeats what will pass by itself for as long as it takes, counting nothing. A record's fault is an answer.
    pub(super) async fn insist<T, F, Fut>(&self, mut attempt: F) -> Result<Result<T, Fault>, Ended>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let mut delays = PATIENCE.delays();
        let mut again = false;
        loop {
            let bound = self.desk.config.attempt_timeout;
            let attempted = tokio::time::timeout(bound, attempt()).await;
            let attempted = attempted.unwrap_or_else(|_| {
                Err(Failure::Passing(format!("no answer within {} s; another connection is tried", bound.as_secs())))
            });
            let reason = match attempted {
                Ok(value) => {
                    self.pulse.database_answers();
                    return Ok(Ok(value));
                }
                Err(Failure::Fault(fault)) => {
                    self.pulse.database_answers();
                    return Ok(Err(fault));
                }
                #[cfg(feature = "testkit")]
                Err(Failure::Crash) => return Err(Ended::Crashed),
                Err(Failure::Unprepared) => {
                    // Upkeep is behind. What is refused for its age never comes here, so a partition can be made.
                    debug_assert!(FUTURE_MAX < Duration::from_secs(14 * 24 * 3600));
                    let made = inbox::add_partitions(&self.desk.pool, self.desk.config.horizon).await;
                    made.err().map_or_else(|| "an inbox partition was missing".to_owned(), |error| error.to_string())
                }
                Err(Failure::Passing(reason)) => {
                    again = false;
                    reason
                }
                // At once, unless it wants that over and over.
                Err(Failure::Again) if !again => {
                    again = true;
                    continue;
                }
                Err(Failure::Again) => HandleError::Again.to_string(),
            };
            self.pulse.database_fails(&reason);
            self.pause(delays.next().unwrap_or(PATIENCE.max)).await?;
        }
    }

    /// Waits; others may be alone meanwhile.
    async fn pause(&self, time: Duration) -> Result<(), Ended> {
        self.desk.ahead.give_back();
        let alone = self.be_with_others();
        tokio::select! {
            () = self.stop.cancelled() => return Err(Ended::Stopped),
            () = tokio::time::sleep(time) => {}
        }
        if alone { self.be_alone().await } else { Ok(()) }
    }

    pub(super) async fn be_alone(&self) -> Result<(), Ended> {
        self.desk.ahead.give_back();
        let alone = tokio::select! {
            () = self.stop.cancelled() => return Err(Ended::Stopped),
            // It is never closed.
            alone = ALONE.acquire() => alone.ok(),
        };
        *self.alone.lock().unwrap_or_else(PoisonError::into_inner) = alone;
        Ok(())
    }

    /// Says whether it was alone.
    pub(super) fn be_with_others(&self) -> bool {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// Likewise, for our own statements: there a fault is ours, and there is nobody else to try.
    pub(super) async fn must<T, F, Fut>(&self, mut attempt: F) -> Result<T, Ended>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let attempt = || {
            let attempt = attempt();
            async move {
                attempt.await.map_err(|failure| match failure {
                    Failure::Fault(fault) => Failure::Passing(format!("{}: {}", fault.class, fault.reason)),
                    passing => passing,
                })
            }
        };
        match self.insist(attempt).await? {
            Ok(value) => Ok(value),
            Err(fault) => unreachable!("every fault was made passing: {fault:?}"),
        }
    }
}

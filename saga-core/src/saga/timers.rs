//! Time passing: sagas that are due, and replies that were set aside, taken from the database.
//!
//! Any number of replicas do this at once; each leaves out the rows that another holds. A process that dies with a
//! batch in hand has changed nothing, and the rows are claimed again at once. The timers wait for no transaction
//! without a bound: they give up one with a silent connection, and repeat it on another.

use super::{
    backlog::Backlog,
    batch::BatchError,
    due,
    engine::Engine,
    measure,
    runner::IncomingReply,
    store::{self, Undecided},
    timers_health::Overdue,
};
use crate::{
    error_class::{ErrorClass, is_outage, is_pool_full, renew_connections},
    fail_point::fail_point,
    id::{MessageId, SagaId},
    outage::Outage,
    part::PartReport,
    transaction::is_timeout,
};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How many sagas one transaction takes: enough to share its cost, few enough that a reply does not wait for it.
const BATCH_MAX: i64 = 200;
/// The pause between two rounds with little to do: how long a due saga may lie.
const IDLE_PAUSE: Duration = Duration::from_millis(200);
/// How long to wait when the database does not answer.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(1);
/// How long a saga, or a reply, that cannot be decided is left alone.
pub(super) const PUT_OFF: Duration = Duration::from_secs(60);
/// How long a saga that is not at fault is left alone: another transaction was in the way, a table or a right is
/// missing.
const PUT_OFF_WHAT_PASSES: Duration = Duration::from_secs(5);
/// How long the timers wait for a lock: other sagas are due, too.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// How old the gauges may be.
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// What one round of the timers took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ticked {
    /// Sagas for which something was due.
    pub due: usize,
    /// Replies that had been set aside.
    pub undecided: usize,
}

impl Engine {
    /// Whether the timers do their work, for the service's health.
    ///
    /// # Errors
    /// Why they do not, in words, and since when.
    pub fn check_timers(&self) -> Result<(), String> {
        self.timers_health().check()
    }

    /// What stands in the way of the timers, and since when the saga is due that waits for longest.
    #[must_use]
    pub fn timers_report(&self) -> PartReport {
        let report = self.timers_health().report();
        // A transaction of theirs may wait for its whole bound before it is known that the database is away.
        let issue = report.issue.or_else(|| Outage::of_database(self.pool()).issue());
        PartReport { issue, ..report }
    }

    /// Works off what is due, until `token` is cancelled. When the database is away the timers log that once, and wait.
    ///
    /// # Errors
    /// None: errors are logged, and what met them is repeated.
    pub async fn run_timers(&self, token: CancellationToken) -> Result<(), sqlx::Error> {
        measure::describe();
        let mut counted = None::<Instant>;
        while !token.is_cancelled() {
            // The token does not interrupt a round: work in flight finishes, within its bound.
            let pause = match self.tick().await {
                Ok(ticked) => {
                    self.timers_health().none_since();
                    if counted.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
                        counted = Some(crate::clock::monotonic());
                        self.look_at_what_waits().await;
                    }
                    if ticked.due + ticked.undecided >= BATCH_MAX as usize { Duration::ZERO } else { IDLE_PAUSE }
                }
                Err(error) => {
                    self.timers_health().is(&error, PAUSE_AFTER_ERROR);
                    PAUSE_AFTER_ERROR
                }
            };
            token.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
        Ok(())
    }

    /// One round: a batch of what was set aside, and, when that was all of it, a batch of what is due.
    ///
    /// # Errors
    /// The database is away, or has no connection to spare. What meets one saga alone is logged, and the saga is put off.
    pub async fn tick(&self) -> Result<Ticked, sqlx::Error> {
        // Replies come first: the engine does not resend what was answered in time.
        let undecided = self.tick_undecided().await?;
        if undecided >= BATCH_MAX as usize {
            return Ok(Ticked { due: 0, undecided });
        }
        let due = match self.within(self.tick_due()).await {
            Ok(due) => due,
            Err(error) if is_everybodys(&error) => return Err(error.into_database()),
            Err(error) => {
                tracing::debug!(%error, "a batch of due sagas did not work; taking them one by one");
                self.tick_one_by_one().await?
            }
        };
        Ok(Ticked { due, undecided })
    }

    async fn tick_due(&self) -> Result<usize, BatchError> {
        let mut tx = self.begin_waiting(LOCK_MAX).await?;
        let backlog = self.read_backlog_in(&mut tx).await?;
        let rows = due::claim_in(&mut tx, self.known(), &backlog, BATCH_MAX).await?;
        let all = rows.len() < BATCH_MAX as usize;
        let due = if rows.is_empty() { 0 } else { self.take_due_in(&mut tx, rows, &backlog).await? };
        if due == 0 {
            tx.commit_quietly().await?;
        } else {
            fail_point!("saga.timers.before-commit", self.reply_topic());
            tx.commit_within_its_edges().await?;
            fail_point!("saga.timers.after-commit", self.reply_topic());
            self.timers_health().decided(due);
        }
        if all {
            self.patience().has_passed_over(&backlog);
        }
        Ok(due)
    }

    /// Takes due sagas one by one. A saga that cannot be decided, or not in time, must not stop the others: it is put
    /// off and logged.
    async fn tick_one_by_one(&self) -> Result<usize, sqlx::Error> {
        let (ids, backlog) = self.within(self.due_ids()).await?;
        for id in &ids {
            let saga = SagaId(*id);
            match self.within(self.tick_one(saga, &backlog)).await {
                Ok(()) => {}
                Err(error) if is_everybodys(&error) => return Err(error.into_database()),
                Err(error) => {
                    let wait = put_off_after(&error);
                    self.timers_health().may_be(&error, wait);
                    tracing::error!(%saga, %error, ?wait, "a due saga cannot be decided now; it is put off, and tried again");
                    self.within(self.put_off(saga, wait)).await?;
                }
            }
        }
        Ok(ids.len())
    }

    async fn due_ids(&self) -> Result<(Vec<Uuid>, Backlog), sqlx::Error> {
        let mut tx = self.begin().await?;
        let backlog = self.read_backlog_in(&mut tx).await?;
        let ids = due::due_ids_in(&mut tx, self.known(), &backlog, BATCH_MAX).await?;
        tx.commit_quietly().await?;
        Ok((ids, backlog))
    }

    async fn put_off(&self, saga: SagaId, wait: Duration) -> Result<(), sqlx::Error> {
        let mut tx = self.begin().await?;
        due::put_off_in(&mut tx, &[saga], wait).await?;
        tx.commit_quietly().await?;
        self.timers_health().puts_off([saga.0]);
        Ok(())
    }

    async fn tick_one(&self, saga: SagaId, backlog: &Backlog) -> Result<(), BatchError> {
        let mut tx = self.begin_waiting(LOCK_MAX).await?;
        let rows = store::load_in(&mut tx, &[saga]).await?;
        let decided = self.take_due_in(&mut tx, rows, backlog).await?;
        tx.commit().await?;
        self.timers_health().decided(decided);
        Ok(())
    }

    async fn tick_undecided(&self) -> Result<usize, sqlx::Error> {
        match self.within(self.take_undecided()).await {
            Ok(taken) => Ok(taken),
            Err(error) if is_everybodys(&error) => Err(error.into_database()),
            Err(error) => {
                tracing::debug!(%error, "a batch of replies that were set aside did not work; taking them one by one");
                self.take_undecided_one_by_one().await
            }
        }
    }

    async fn put_off_undecided(&self, message: MessageId, wait: Duration) -> Result<(), sqlx::Error> {
        let mut tx = self.begin().await?;
        store::put_off_undecided_in(&mut tx, message, wait).await?;
        tx.commit_quietly().await
    }

    async fn take_undecided(&self) -> Result<usize, BatchError> {
        let mut tx = self.begin_waiting(LOCK_MAX).await?;
        let replies = store::take_undecided_in(&mut tx, self.known(), BATCH_MAX, None).await?;
        if !replies.is_empty() {
            let taken =
                self.take_replies_in(&mut tx, replies.iter().map(IncomingReply::from_undecided).collect()).await;
            if let Err(error) = taken {
                // The rollback comes now: the rows are passed over while this transaction has them locked.
                tx.rollback().await?;
                return Err(error);
            }
            tx.commit().await?;
        }
        Ok(replies.len())
    }

    /// Takes replies one by one. A reply that cannot be taken must not stop the others: it is put off, or dropped if it
    /// cannot be understood.
    async fn take_undecided_one_by_one(&self) -> Result<usize, sqlx::Error> {
        let mut tx = self.begin().await?;
        let replies = store::take_undecided_in(&mut tx, self.known(), BATCH_MAX, None).await?;
        tx.rollback().await?;
        for reply in &replies {
            match self.within(self.take_undecided_one(reply)).await {
                Ok(()) => {}
                Err(error) if is_everybodys(&error) => return Err(error.into_database()),
                Err(error) => {
                    let (saga, message_id, wait) = (reply.saga, reply.message, put_off_after(&error));
                    tracing::error!(%saga, %message_id, %error, ?wait,
                        "a reply that was set aside cannot be taken now; it is put off, and tried again");
                    self.within(self.put_off_undecided(message_id, wait)).await?;
                }
            }
        }
        Ok(replies.len())
    }

    /// Takes one reply. A reply that cannot be understood is dropped: its command will be sent again, and answered
    /// again.
    async fn take_undecided_one(&self, reply: &Undecided) -> Result<(), BatchError> {
        let mut tx = self.begin_waiting(LOCK_MAX).await?;
        let replies = store::take_undecided_in(&mut tx, self.known(), 1, Some(reply.message)).await?;
        let mut attempt = sqlx::Acquire::begin(&mut *tx).await?;
        match self.take_replies_in(&mut attempt, replies.iter().map(IncomingReply::from_undecided).collect()).await {
            Ok(()) => attempt.commit().await?,
            Err(BatchError::Poison(why, _)) => {
                attempt.rollback().await?;
                tracing::error!(
                    saga = %reply.saga,
                    saga_type = reply.definition,
                    step = reply.step,
                    command = %reply.command,
                    message_id = %reply.message,
                    why,
                    "a reply that was set aside cannot be understood; it is dropped"
                );
            }
            Err(error) => return Err(error),
        }
        Ok(tx.commit().await?)
    }

    /// Reads what waits, then the gauges. What health asks comes first and alone: it is known even when the sagas are
    /// too many to be counted.
    async fn look_at_what_waits(&self) {
        match self.within(self.overdue()).await {
            Ok((oldest, put_off)) => self.timers_health().overdue(oldest, &put_off),
            Err(error) => self.timers_health().missed(&error),
        }
        self.within(self.count()).await.unwrap_or_else(|error| tracing::debug!(%error, "sagas were not counted"));
    }

    async fn overdue(&self) -> Result<(Option<Overdue>, Vec<Overdue>), sqlx::Error> {
        let put_off = self.timers_health().were_put_off();
        let mut tx = self.begin().await?;
        let overdue = (due::oldest_in(&mut tx).await?, due::overdue_in(&mut tx, &put_off).await?);
        tx.commit_quietly().await?;
        Ok(overdue)
    }

    async fn count(&self) -> Result<(), sqlx::Error> {
        let mut tx = self.begin().await?;
        measure::counted(&due::count_in(&mut tx, self.known()).await?, &self.known().definitions);
        tx.commit_quietly().await
    }
}

/// How long failed work is left alone.
fn put_off_after(error: &BatchError) -> Duration {
    match error.class() {
        ErrorClass::Own => PUT_OFF,
        _ if matches!(error, BatchError::Database(error) if is_timeout(error)) => PUT_OFF,
        _ => PUT_OFF_WHAT_PASSES,
    }
}

/// Whether an error meets every saga: the database is away, or has no connection left for this process. A timed-out
/// attempt is another matter: the fault was its own or a silent connection's. The next attempt, on another connection,
/// shows which. So is what a local effect has wrapped in words of its own. Stale connections are replaced in each case.
fn is_everybodys(error: &BatchError) -> bool {
    let is_stale = error.class() == ErrorClass::Stale;
    if is_stale {
        renew_connections();
    }
    match error {
        BatchError::Database(error) => is_stale || is_pool_full(error) || is_outage(error) && !is_timeout(error),
        _ => false,
    }
}

//! Claims, calls and settles external effects.
//!
//! ```text
//!   open ──claim (commit: attempt counted)──► call, no tx ──┬─ answered ─► fence + records + reply, intent gone
//!                                                           ├─ in doubt ─► back-off, open again
//!                                                           ├─ not made, not let in ─► pause, open again, not counted
//!                                                           └─ attempts ran out ─► `failed` reply, in doubt
//! ```
//!
//! Invariant: an intent settles once. The worker that settles it holds its claim and the fence's lock. Each claim has
//! an id of its own, which the settling transaction checks. A worker that was overtaken, even by its own process,
//! changes nothing.
//!
//! When the process dies, the claim's lease runs out and another process calls again, under the same idempotency key.
//! Open intents are resolved in the same way after a start.

mod config;
mod outcome;
mod progress;
mod slot;

pub use config::IntentConfig;

use super::{
    Participant, batch,
    entry::{CommandEntry, Settlement},
    fence::{Fence, UndoState},
    handler::Performed,
    queue::{self, AttemptCount, ClaimLimits, ClaimedIntent, IntentScope},
    store,
    unsettled::{LATER_BUILD_PAUSE, NOT_LET_IN_PAUSE, Unsettled},
};
use crate::{
    clock::{self, DatabaseClock},
    command::{Failed, Op, Why},
    consumer::HandleError,
    error_class::{ErrorClass, classify, in_words, renew_connections},
    fail_point::fail_point,
    outage::Outage,
    outbox::Tx,
    panics::panic_text,
    part::{Cause, HealthIssue, PartReport},
    reason::reason,
    transaction::{Bound, Transaction, database_answers},
};
use futures::FutureExt;
use progress::EffectsProgress;
use serde_json::Value;
use slot::Slots;
use sqlx::PgPool;
use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};
use uuid::Uuid;

/// Shortest pause after a call that was not made, so that a handler that makes none does not run in a hot loop.
const NOT_MADE_MIN: Duration = Duration::from_millis(50);

/// Executes a participant's intents.
#[derive(Clone)]
pub struct Intents {
    participant: Arc<Participant>,
    pool: PgPool,
    database: Arc<Outage>,
    clock: Arc<DatabaseClock>,
    /// What an operator has to set right before effects can be recorded.
    setup: Arc<Outage>,
    /// Slots of calls in flight whose intents had been called before.
    again: Slots,
    progress: Arc<EffectsProgress>,
    config: IntentConfig,
}

impl Intents {
    pub(super) fn new(participant: Arc<Participant>, pool: PgPool) -> Self {
        let setup = Outage::of(&format!("effects of {}", participant.name));
        let (database, again, progress) = (Outage::of_database(&pool), Slots::default(), Arc::default());
        let clock = DatabaseClock::of(database.dependency());
        Self { database, clock, setup, again, progress, participant, pool, config: IntentConfig::default() }
    }

    /// Replaces the default limits.
    #[must_use]
    pub fn with_config(self, config: IntentConfig) -> Self {
        Self { config, ..self }
    }

    /// Whether effects can be recorded, for the service's health.
    ///
    /// # Errors
    /// What an operator has to set right, in words, and since when.
    pub fn check(&self) -> Result<(), String> {
        self.setup.check()
    }

    /// What stands in the way of effects, and which effect waits for longest.
    #[must_use]
    pub fn report(&self) -> PartReport {
        let known = self.setup.issue().or_else(|| self.progress.unclaimed()).or_else(|| self.database.issue());
        self.progress.report(known)
    }

    /// Executes intents until `token` is cancelled; then it starts nothing new and waits for the calls in flight. Each
    /// of them ends within [`IntentConfig::call_timeout`]. When the database is away, it waits.
    pub async fn run(&self, token: CancellationToken) {
        tokio::select! {
            () = self.execute_all(token) => {}
            () = self.keep_gauges() => {}
        }
    }

    async fn execute_all(&self, token: CancellationToken) {
        let mut calls = JoinSet::new();
        while !token.is_cancelled() {
            let free = self.config.concurrency.saturating_sub(calls.len());
            let pause = match self.start(&mut calls, free).await {
                Ok(pause) => {
                    self.database.working();
                    self.progress.claims(None);
                    pause
                }
                Err(error) => {
                    if classify(&error) == ErrorClass::Stale {
                        renew_connections();
                    }
                    self.cannot_claim(&error);
                    self.config.poll
                }
            };
            tokio::select! {
                () = token.cancelled() => {}
                () = self.participant.wake.notified(), if calls.len() < self.config.concurrency => {}
                Some(_) = calls.join_next() => {}
                () = tokio::time::sleep(pause), if calls.len() < self.config.concurrency => {}
            }
        }
        while calls.join_next().await.is_some() {}
    }

    /// A database that answers and does not do this is a trouble of effects alone: what others ask of it is no sign that they go on.
    fn cannot_claim(&self, error: &sqlx::Error) {
        let reason = format!("{} cannot claim intents: {}", self.participant.name, in_words(error));
        match Cause::of(error) {
            // It is said of the pool.
            Cause::PoolFull => {}
            Cause::DatabaseAway => self.database.failing(&reason),
            cause => self.progress.claims(Some(HealthIssue::new(cause, reason))),
        }
    }

    /// What keeps this process from settling any, until an operator acts.
    fn in_vain(&self, cause: Cause, reason: &str) {
        self.setup.failing_of(cause, reason);
        self.progress.in_vain(self.clock.now());
    }

    /// Executes what is due now, once each, and tells how many that were.
    ///
    /// # Errors
    /// The database returned an error while intents were claimed. What one call meets is logged.
    pub async fn run_once(&self) -> Result<usize, sqlx::Error> {
        let mut calls = JoinSet::new();
        self.start(&mut calls, self.config.concurrency).await?;
        let started = calls.len();
        while calls.join_next().await.is_some() {}
        Ok(started)
    }

    /// Claims and starts up to `free` intents; returns how long to pause when no notification comes.
    async fn start(&self, calls: &mut JoinSet<()>, free: usize) -> Result<Duration, sqlx::Error> {
        if free == 0 {
            return Ok(self.config.poll);
        }
        let kinds: Vec<&str> = self.participant.entries.keys().copied().collect();
        let lease = self.config.call_timeout.saturating_add(self.config.claim_margin);
        // Calls that keep failing slowly get at most half of the slots: others go on beside them.
        let again = (self.config.concurrency / 2).max(1).saturating_sub(self.again.taken());
        let limits = ClaimLimits { all: free, again };
        let (claims, due) = self.bound().within(self.claim(&kinds, limits, lease)).await?;
        let full = claims.len() == free;
        for claim in claims {
            let this = self.clone();
            let span = claim.span();
            let slot = (claim.attempts > 1).then(|| self.again.take());
            calls.spawn(
                async move {
                    this.execute(claim).await;
                    drop(slot);
                }
                .instrument(span),
            );
        }
        if full {
            return Ok(Duration::ZERO);
        }
        Ok(due.map_or(self.config.poll, |due| due.min(self.config.poll)))
    }

    /// The intents that were claimed, and how long until the next one is due.
    async fn claim(
        &self,
        kinds: &[&str],
        limits: ClaimLimits,
        lease: Duration,
    ) -> Result<(Vec<ClaimedIntent>, Option<Duration>), sqlx::Error> {
        let mut tx = self.begin().await?;
        let claims = queue::claim_in(&mut tx, kinds, limits, Uuid::now_v7(), lease).await?;
        // If no slot is left for intents that are called again, one of those in flight ends before the next of them is
        // due.
        let again_left = claims.iter().filter(|claim| claim.attempts > 1).count() < limits.again;
        let due = match claims.len() == limits.all {
            true => None,
            false => {
                queue::next_due_in(&mut tx, kinds, if again_left { IntentScope::All } else { IntentScope::Fresh })
                    .await?
            }
        };
        tx.commit_quietly().await?;
        Ok((claims, due))
    }

    async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        Transaction::begin(&self.pool, self.bound()).await
    }

    /// Runs the effect's own code in a transaction. Code that takes too long, or is silent until the server ends its
    /// transaction, is at fault itself and counted: otherwise it would be repeated without an end. It has less time than
    /// the transaction and more than a wait for a lock, so neither passes for the other.
    async fn effect<T>(&self, work: impl Future<Output = Result<T, HandleError>>) -> Result<T, Unsettled> {
        let (bound, began) = (self.config.database_timeout * 3 / 4, clock::monotonic());
        match timeout(bound, work).await {
            // The server's bound covers what came before the effect's code, too: a wait for a lock, say.
            Ok(Err(error))
                if error.ran_out_of_time() && (!error.is_of_its_transaction() || began.elapsed() >= bound / 2) =>
            {
                Err(Unsettled::Slow(error.to_string()))
            }
            Ok(done) => Ok(done?),
            Err(_) if self.database.answers(database_answers(&self.pool)).await => {
                Err(Unsettled::Slow(format!("it did not end within {bound:?}, and the database answers")))
            }
            Err(_) => Err(self.bound().no_answer().into()),
        }
    }

    fn bound(&self) -> Bound {
        Bound::new(self.config.database_timeout)
    }

    /// Executes one claim, to its end.
    async fn execute(&self, claim: ClaimedIntent) {
        let Some((kind, entry)) = self.participant.entries.get_key_value(claim.kind.as_str()) else { return };
        let work = async {
            if claim.ready {
                self.resume(&claim, kind, entry.as_ref()).await
            } else {
                self.call(&claim, entry.as_ref()).await
            }
        };
        // The effect is the service's code. A panic counts as an attempt like any other. Otherwise it would be repeated
        // without an end, and the orchestrator would get no answer.
        let work = async {
            AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
                let text = panic_text(panic.as_ref());
                Err(HandleError::Failed(anyhow::anyhow!("the effect panicked: {text}")).into())
            })
        };
        // A wait for the fence's lock may come before the effect's own code.
        let longest = [self.config.database_timeout, self.bound().lock()];
        let longest = longest.into_iter().fold(self.config.call_timeout, Duration::saturating_add);
        let result = Bound::new(longest).within(work).await;
        let Err(error) = result else { return };
        if error.is_crash() {
            return;
        }
        // Nothing was committed: the next claim calls again and gets the same answer.
        error.tell(&claim, "an intent was not settled; trying again");
        let (class, reason) = (error.class(), error.to_string());
        if class == ErrorClass::Stale {
            renew_connections();
        }
        if class == ErrorClass::Configuration {
            self.in_vain(error.cause(), &reason);
        }
        let unsettled = if error.is_of_a_later_build() {
            self.bound().within(self.release(&claim, AttemptCount::No, LATER_BUILD_PAUSE, &reason)).await
        } else if class.counts_nothing() {
            self.bound().within(self.back_off(&claim, AttemptCount::No, &reason)).await
        } else if claim.attempts >= self.config.max_attempts {
            self.bound().within(self.give_up(&claim, &reason.as_str().into())).await
        } else {
            self.bound().within(self.back_off(&claim, AttemptCount::Yes, &reason)).await
        };
        if let Err(error) = unsettled {
            error.tell(&claim, "the claim is left to run out");
        }
    }

    async fn call(&self, claim: &ClaimedIntent, entry: &dyn CommandEntry) -> Result<(), Unsettled> {
        fail_point!("participant.before-call", self.participant.name, [&claim.intent.cx.saga]);
        let performed = timeout(self.config.call_timeout, entry.perform(&claim.intent)).await;
        fail_point!("participant.after-call", self.participant.name, [&claim.intent.cx.saga]);
        match performed.unwrap_or_else(|_| Performed::InDoubt(Failed::new(Why::Unreachable, "the call took too long")))
        {
            Performed::Answered(answer) => self.settle(claim, entry, answer).await,
            Performed::InDoubt(failed) if claim.attempts >= self.config.max_attempts => {
                self.give_up(claim, &failed).await
            }
            Performed::Contradiction(reason) => self.give_up(claim, &Failed::new(Why::Contradiction, &reason)).await,
            Performed::InDoubt(failed) => self.back_off(claim, AttemptCount::Yes, &failed.reason).await,
            Performed::NotMade { reason, again_after } => {
                self.release(claim, AttemptCount::No, again_after.max(NOT_MADE_MIN), &reason).await
            }
            Performed::NotLetIn { reason } => {
                self.in_vain(Cause::ProviderForbidden, &reason);
                self.release(claim, AttemptCount::No, NOT_LET_IN_PAUSE, &reason).await
            }
        }
    }

    /// Takes a certain answer: records it, replies, closes the intent.
    async fn settle(&self, claim: &ClaimedIntent, entry: &dyn CommandEntry, answer: Value) -> Result<(), Unsettled> {
        let mut tx = self.begin().await?;
        let mut fences = store::lock_fences_in(&mut tx, &claim.fence()).await?.all()?;
        if !queue::close_intent_in(&mut tx, claim.intent.cx.saga.command, claim.owner).await? {
            return Ok(());
        }
        let settled = self.effect(outcome::record_in(&mut tx, entry, claim.intent.clone(), answer)).await?;
        if let Some(fence) = fences.get_mut(&claim.key) {
            let closed = fence.settle(claim.intent.cx.saga.op, &settled);
            queue::delete_intents_in(&mut tx, closed.as_slice()).await?;
            self.wake_undo_in(&mut tx, claim, fence).await?;
        }
        let (outcome, payload) = batch::reply_of(&settled);
        outcome::write_in(&mut tx, claim, &fences, outcome, payload).await?;
        fail_point!("participant.before-settle-commit", self.participant.name, [&claim.intent.cx.saga]);
        tx.commit_within_its_edges().await?;
        fail_point!("participant.after-settle-commit", self.participant.name, [&claim.intent.cx.saga]);
        batch::count_reply(&claim.kind, outcome);
        self.setup.working();
        self.progress.settled();
        Ok(())
    }

    /// Ends the attempts, because they ran out or another changes nothing. The effect stays in doubt; the orchestrator
    /// gets `failed`.
    async fn give_up(&self, claim: &ClaimedIntent, failed: &Failed) -> Result<(), Unsettled> {
        let reason = &failed.reason;
        let op = claim.intent.cx.saga.op;
        let command = claim.intent.cx.saga.command;
        let mut tx = self.begin().await?;
        let mut fences = store::lock_fences_in(&mut tx, &claim.fence()).await?.all()?;
        let held = if claim.ready {
            queue::close_intent_in(&mut tx, command, claim.owner).await?
        } else {
            queue::doubt_intent_in(&mut tx, command, claim.owner, reason).await?
        };
        if !held {
            return Ok(());
        }
        if let Some(fence) = fences.get_mut(&claim.key) {
            if claim.ready {
                fence.undo = UndoState::Open;
            } else {
                fence.in_doubt(op);
            }
            self.wake_undo_in(&mut tx, claim, fence).await?;
        }
        let (outcome, payload) = batch::reply_of(&Settlement::Failed(failed.clone()));
        outcome::write_in(&mut tx, claim, &fences, outcome, payload).await?;
        tx.commit().await?;
        batch::count_reply(&claim.kind, outcome);
        tracing::warn!(%command, saga = %claim.key.saga, kind = claim.kind, attempts = claim.attempts, reason,
            "no certain answer: the effect stays in doubt; the saga gets `failed` and asks again");
        Ok(())
    }

    async fn back_off(&self, claim: &ClaimedIntent, counted: AttemptCount, why: &str) -> Result<(), Unsettled> {
        // An uncounted attempt is repeated for as long as it takes, and calls the provider each time: the pause is
        // long.
        let delay = match counted {
            AttemptCount::Yes => self.config.delay(claim.attempts),
            AttemptCount::No => self.config.delay(6),
        };
        self.release(claim, counted, delay, why).await
    }

    async fn release(
        &self,
        claim: &ClaimedIntent,
        counted: AttemptCount,
        delay: Duration,
        why: &str,
    ) -> Result<(), Unsettled> {
        let reason = &reason(why);
        // In an outage every command comes here again and again; the part that knows of the outage has logged it once.
        tracing::debug!(command = %claim.intent.cx.saga.command, saga = %claim.key.saga, kind = claim.kind,
            attempts = claim.attempts, reason, ?delay, "no certain answer yet");
        let mut tx = self.begin().await?;
        queue::release_in(&mut tx, claim, counted, delay, reason).await?;
        Ok(tx.commit_quietly().await?)
    }

    /// Handles an undo that waited like one that has just come.
    async fn resume(
        &self,
        claim: &ClaimedIntent,
        kind: &'static str,
        entry: &dyn CommandEntry,
    ) -> Result<(), Unsettled> {
        let mut tx = self.begin().await?;
        let mut fences = store::lock_fences_in(&mut tx, &claim.fence()).await?.all()?;
        if !queue::close_intent_in(&mut tx, claim.intent.cx.saga.command, claim.owner).await? {
            return Ok(());
        }
        if let Some(fence) = fences.get_mut(&claim.key) {
            fence.undo = UndoState::Absent;
        }
        let mut work = batch::Work::locked(fences);
        let command = batch::Incoming {
            key: claim.key.clone(),
            asked: self.participant.asked(entry, &claim.intent.cx.saga),
            kind,
            entry,
            cx: claim.intent.cx.clone(),
            payload: &claim.intent.payload,
            trace: claim.trace.clone(),
            span: Span::current(),
        };
        self.effect(batch::run_apart_in(&mut tx, &[command], &mut work)).await?;
        work.write_in(&mut tx).await?;
        tx.commit().await?;
        self.participant.wake.notify_one();
        Ok(())
    }

    async fn wake_undo_in(&self, tx: &mut Tx<'_>, claim: &ClaimedIntent, fence: &Fence) -> Result<(), Unsettled> {
        if let (Op::Do, UndoState::Waiting, Some(undo)) = (claim.intent.cx.saga.op, &fence.undo, fence.undo_command) {
            queue::ready_undo_in(tx, undo).await?;
            // The undo runs after the poll interval at the latest; a permit that comes before the commit costs one
            // look.
            self.participant.wake.notify_one();
        }
        Ok(())
    }
}

//! Starts that come at one moment: one transaction for all of them, and nobody waits for another's trouble.
//!
//! ```text
//!   start ─> queue ─> a moment, a connection, then whoever waits ─> [saga, event, due | outbox] one commit
//!                                                                   │ somebody's lock, or a mistake
//!                                                                   └─> each alone, apart from the queue
//! ```
//!
//! Whoever asked is told. What waits belongs to the one task that takes it: when that ends before its time, because its
//! runtime did or because it panicked, all who wait are told so, and the next start begins another. When the process
//! dies nobody is told, and what was committed is started.

use super::{
    engine::{Engine, no_answer},
    error::StartError,
    start::New,
};
use crate::{
    clock,
    fail_point::fail_point,
    id::SagaId,
    outbox::{self, NewMessage},
    service::database::{is_conflict, is_outage},
};
use sqlx::{Connection, PgConnection, Postgres, pool::PoolConnection};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Sagas that one transaction starts at most.
const SET: usize = 256;

/// How long a set waits for a lock (somebody has written one of its keys and not committed yet), and how long a start
/// that is alone waits between two looks. Short, because everybody waits with a set; far longer than a commit takes.
const LOOK: Duration = Duration::from_millis(100);

/// Where starts follow one another, a set waits so long for more after its first. Whoever starts sagas when others end
/// does so for all that ended in one batch, one after the other; and what starts apart stays apart, a batch of its own at
/// every hop (a fifth more processor time for a saga: measured).
const GATHER: Duration = Duration::from_millis(1);

/// A start that comes later than this after the last set is alone, and does not wait.
const BUSY: Duration = Duration::from_millis(100);

/// [`LOOK`] comes with the begin, in the same round trip. PostgreSQL looks for deadlocks after a second: this is sooner.
const BEGIN: &str = "begin; set local lock_timeout = '100ms'";

/// How many starts that are alone use a connection at one time: the pool is there for others too.
const ALONE: usize = 4;

/// A saga that is to be started, and whoever waits for it.
pub(super) struct Waiting {
    /// Here, so that whatever is under way keeps its engine, and the queue does not.
    pub(super) engine: Arc<Engine>,
    pub(super) new: New,
    pub(super) tell: oneshot::Sender<Result<(), StartError>>,
}

/// The way to the task that takes what waits.
pub(super) struct Starts {
    /// As long as the callers are many: each has one in it. `None` until the first start.
    queue: Mutex<Option<mpsc::UnboundedSender<Waiting>>>,
    alone: Semaphore,
}

impl Default for Starts {
    fn default() -> Self {
        Self { queue: Mutex::default(), alone: Semaphore::new(ALONE) }
    }
}

impl Starts {
    /// Hands it to the task that takes what waits, a new one if there is none or it has ended.
    pub(super) fn push(&self, waiting: Waiting) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = match &*queue {
            None => waiting,
            Some(running) => match running.send(waiting) {
                Ok(()) => return,
                Err(mpsc::error::SendError(waiting)) => waiting,
            },
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        // The receiver is here.
        sender.send(waiting).ok();
        tokio::spawn(take_what_waits(receiver));
        *queue = Some(sender);
    }
}

/// Ends when the engine does.
async fn take_what_waits(mut queue: mpsc::UnboundedReceiver<Waiting>) {
    let mut last = None;
    while let Some(first) = first_of_a_set(&mut queue, last).await {
        let engine = Arc::clone(&first.engine);
        let connection = engine.within(async { engine.pool().acquire().await }).await;
        // Whoever came while there was no connection is in the set, too. Where there is none to be had, all are told: set
        // after set would wait as long, to hear the same.
        let room = if connection.is_ok() { SET } else { usize::MAX };
        let mut set = vec![first];
        while set.len() < room
            && let Ok(waiting) = queue.try_recv()
        {
            set.push(waiting);
        }
        match connection {
            Ok(connection) => engine.start_together(connection, set).await,
            Err(error) => tell_all(set, &error),
        }
        last = Some(clock::monotonic());
    }
}

/// The next that waits; where starts follow one another, after a moment in which others may join it.
async fn first_of_a_set<W>(queue: &mut mpsc::UnboundedReceiver<W>, last: Option<Instant>) -> Option<W> {
    let first = queue.recv().await?;
    if last.is_some_and(|last| last.elapsed() < BUSY) {
        tokio::time::sleep(GATHER).await;
    }
    Some(first)
}

/// A start apart from the queue. It looks again and again rather than to wait in PostgreSQL: no connection waits with it,
/// and if it is its own caller who holds the lock, nothing else stands still.
async fn start_alone(Waiting { engine, new, tell }: Waiting) {
    let mut obstacle = None;
    let looks = async {
        loop {
            let turn = engine.starts().alone.acquire().await;
            match engine.look(&new).await {
                Err(StartError::Database(error)) if is_in_the_way(&error) => obstacle = Some(error),
                answer => break answer,
            }
            drop(turn);
            tokio::time::sleep(LOOK).await;
        }
    };
    let answer = tokio::time::timeout(engine.attempt_max(), looks).await;
    let answer = answer.unwrap_or_else(|_| Err(StartError::Database(obstacle.unwrap_or_else(no_answer))));
    // Whoever asked may have gone.
    tell.send(answer).ok();
}

impl Engine {
    async fn start_together(&self, mut connection: PoolConnection<Postgres>, mut set: Vec<Waiting>) {
        let sagas: Vec<&New> = set.iter().map(|waiting| &waiting.new).collect();
        match self.within(self.start_set(&mut connection, &sagas)).await {
            Ok(started) => {
                for Waiting { new, tell, .. } in set {
                    tell.send(new_or_not(&started, &new)).ok();
                }
                outbox::nudge_with(&mut connection).await;
            }
            // Perhaps they were committed: to try again would tell their own callers that they exist.
            Err(StartError::Database(error)) if is_outage(&error) => tell_all(set, &error),
            Err(StartError::Database(error)) if set.len() > 1 || is_in_the_way(&error) => {
                // One of them does not fit, or stands behind a lock; the others do not wait to learn which.
                tracing::debug!(%error, sagas = set.len(), "sagas do not start together; starting each alone");
                set.into_iter().for_each(|waiting| drop(tokio::spawn(start_alone(waiting))));
            }
            Err(error) => drop(set.pop().map(|only| only.tell.send(Err(error)))),
        }
    }

    async fn look(&self, new: &New) -> Result<(), StartError> {
        let mut connection = self.pool().acquire().await?;
        new_or_not(&self.start_set(&mut connection, &[new]).await?, new)
    }

    /// Says which of them are new.
    async fn start_set(&self, connection: &mut PgConnection, set: &[&New]) -> Result<HashSet<SagaId>, StartError> {
        // Nearly always all of them, so their commands are written by the same statement.
        let mut tx = connection.begin_with(BEGIN).await?;
        let mut started = self.insert(&mut tx, set, &messages(set.iter())).await?;
        if started.len() < set.len() {
            tx.rollback().await?;
            tx = connection.begin_with(BEGIN).await?;
            started = self.insert(&mut tx, set, &[]).await?;
            let sent = messages(set.iter().filter(|new| started.contains(&new.saga())));
            outbox::append_in(&mut tx, &sent).await.map_err(|error| StartError::Database(error.into()))?;
        }
        fail_point!("saga.before-start", self.reply_topic());
        tx.commit().await?;
        Ok(started)
    }
}

fn messages<'n>(sagas: impl Iterator<Item = &'n &'n New>) -> Vec<NewMessage> {
    sagas.filter_map(|new| new.message().cloned()).collect()
}

fn new_or_not(started: &HashSet<SagaId>, new: &New) -> Result<(), StartError> {
    if started.contains(&new.saga()) { Ok(()) } else { Err(StartError::Exists) }
}

/// All of them, of one error, which cannot be cloned.
fn tell_all(set: Vec<Waiting>, error: &sqlx::Error) {
    let kind = if let sqlx::Error::Io(error) = error { error.kind() } else { std::io::ErrorKind::Other };
    for waiting in set {
        let told = sqlx::Error::Io(std::io::Error::new(kind, error.to_string()));
        waiting.tell.send(Err(StartError::Database(told))).ok();
    }
}

/// Somebody else's transaction: a lock that it holds, or a conflict with it. Gone when that has ended.
fn is_in_the_way(error: &sqlx::Error) -> bool {
    let locked = matches!(error, sqlx::Error::Database(database) if database.code().as_deref() == Some("55P03"));
    locked || is_conflict(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_that_comes_alone_does_not_wait_for_others_and_one_that_follows_them_does_for_a_moment() {
        let (sender, mut queue) = mpsc::unbounded_channel();
        let began = tokio::time::Instant::now();
        for last in [None, clock::monotonic().checked_sub(BUSY)] {
            sender.send("alone").unwrap();
            assert_eq!(first_of_a_set(&mut queue, last).await, Some("alone"));
            assert_eq!(began.elapsed(), Duration::ZERO);
        }

        sender.send("one of many").unwrap();
        assert_eq!(first_of_a_set(&mut queue, Some(clock::monotonic())).await, Some("one of many"));
        assert!(began.elapsed() >= GATHER);
    }
}

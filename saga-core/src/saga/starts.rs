//! Starts that come at one moment share one transaction, and no caller waits for another's trouble.
//!
//! ```text
//!   start ─> queue ─> a moment, a connection, then all that wait ─> [saga, event, due | outbox] one commit
//!                                                                   │ another's lock, or a mistake
//!                                                                   └─> each alone, apart from the queue
//! ```
//!
//! Every caller gets an answer. The starts that wait belong to the one task that takes them. When that task ends early,
//! because its runtime did or because it panicked, all waiting callers get an error. The next start then begins another
//! task. When the process dies no caller gets an answer, and what was committed is started.

use super::{engine::Engine, error::StartError, start::New};
use crate::{
    clock,
    error_class::{is_conflict, is_outage, lock_wait},
    fail_point::fail_point,
    gather::{Gathering, SET_WAIT},
    id::SagaId,
    outbox,
    transaction::connection,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, pool::PoolConnection};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// How many sagas one transaction starts at most.
const SET_MAX: usize = 256;

/// How long a set waits for a lock: another transaction has written one of its keys and not committed yet. A start that
/// is alone waits as long between two looks. Short, because all callers of a set wait with it; far longer than a commit
/// takes. PostgreSQL looks for deadlocks after a second: this is sooner.
const LOCK_MAX: Duration = Duration::from_millis(100);

/// How many starts that are alone use a connection at one time: the pool serves other work too.
const ALONE_MAX: usize = 4;

/// A saga that is to be started, and the caller that waits for it.
pub(super) struct WaitingStart {
    /// Held here, so that a start under way keeps its engine alive, and the queue does not.
    pub(super) engine: Arc<Engine>,
    pub(super) new: New,
    pub(super) tell: oneshot::Sender<Result<(), StartError>>,
}

/// The way to the task that takes the waiting starts.
pub(super) struct Starts {
    /// The queue is as long as the callers are many: each has one start in it. `None` until the first start.
    queue: Mutex<Option<mpsc::UnboundedSender<WaitingStart>>>,
    alone: Semaphore,
}

impl Default for Starts {
    fn default() -> Self {
        Self { queue: Mutex::default(), alone: Semaphore::new(ALONE_MAX) }
    }
}

impl Starts {
    /// Hands a start to the task that takes them; spawns a task if there is none or it has ended.
    pub(super) fn push(&self, waiting: WaitingStart) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = match &*queue {
            None => waiting,
            Some(running) => match running.send(waiting) {
                Ok(()) => return,
                Err(mpsc::error::SendError(waiting)) => waiting,
            },
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        // The send cannot fail: the receiver is here.
        sender.send(waiting).ok();
        tokio::spawn(take_what_waits(StartQueue { receiver, gathering: Gathering::default() }));
        *queue = Some(sender);
    }
}

/// Takes the waiting starts, set after set. The task ends when the engine does.
async fn take_what_waits(mut queue: StartQueue<WaitingStart>) {
    while let Some(first) = queue.first_of_a_set().await {
        let engine = Arc::clone(&first.engine);
        let taken = engine.within(connection(engine.pool())).await;
        // Starts that came while there was no connection are in the set, too. Where the pool has none to give, all
        // callers get its error: set after set would wait as long for the same answer.
        let room = if taken.is_ok() { SET_MAX } else { usize::MAX };
        let mut set = vec![first];
        while set.len() < room
            && let Ok(waiting) = queue.receiver.try_recv()
        {
            set.push(waiting);
        }
        queue.gathering.begins(set.len().min(SET_MAX), clock::monotonic());
        match taken {
            Ok(connection) => engine.start_together(connection, set).await,
            Err(error) => tell_all(set, &error),
        }
    }
}

/// The waiting starts, as their task sees them.
struct StartQueue<W> {
    receiver: mpsc::UnboundedReceiver<W>,
    gathering: Gathering,
}

impl<W> StartQueue<W> {
    /// The next start; where many start together, after a moment in which others may join it. A service that starts
    /// sagas when others end does so for a whole batch, one after the other.
    async fn first_of_a_set(&mut self) -> Option<W> {
        let first = self.receiver.recv().await?;
        if self.gathering.waits(self.receiver.len() + 1, clock::monotonic()) {
            tokio::time::sleep(SET_WAIT).await;
        }
        Some(first)
    }
}

/// Makes a start apart from the queue. It looks again and again instead of waiting in PostgreSQL, so no connection
/// waits with it. If its own caller holds the lock, nothing else stands still.
async fn start_alone(WaitingStart { engine, new, tell }: WaitingStart) {
    let mut obstacle = None;
    let looks = async {
        loop {
            let turn = engine.starts().alone.acquire().await;
            match engine.look(&new).await {
                Err(StartError::Database(error)) if is_in_the_way(&error) => obstacle = Some(error),
                answer => break answer,
            }
            drop(turn);
            tokio::time::sleep(LOCK_MAX).await;
        }
    };
    let answer = tokio::time::timeout(engine.bound().client(), looks).await;
    let answer =
        answer.unwrap_or_else(|_| Err(StartError::Database(obstacle.unwrap_or_else(|| engine.bound().no_answer()))));
    // The caller may have gone.
    tell.send(answer).ok();
}

impl Engine {
    async fn start_together(&self, mut connection: PoolConnection<Postgres>, mut set: Vec<WaitingStart>) {
        let sagas: Vec<&New> = set.iter().map(|waiting| &waiting.new).collect();
        match self.within(self.start_set(&mut connection, &sagas)).await {
            Ok(started) => {
                for WaitingStart { new, tell, .. } in set {
                    tell.send(new_or_not(&started, &new)).ok();
                }
                outbox::nudge_with(&mut connection).await;
            }
            // The sagas may have been committed: a second try would report to their own callers that they exist.
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
        let mut connection = connection(self.pool()).await?;
        new_or_not(&self.start_set(&mut connection, &[new]).await?, new)
    }

    /// Starts a set in one transaction; returns the ids of those that are new.
    async fn start_set(&self, connection: &mut PgConnection, set: &[&New]) -> Result<HashSet<SagaId>, StartError> {
        let commands: Vec<_> = set.iter().filter_map(|new| new.message().cloned()).collect();
        let mut tx = connection.begin_with(AssertSqlSafe(self.bound().with_lock(LOCK_MAX).begin_sql(""))).await?;
        let started = self.insert_in(&mut tx, set, &commands).await?;
        fail_point!("saga.before-start", self.reply_topic());
        tx.commit().await?;
        Ok(started)
    }
}

fn new_or_not(started: &HashSet<SagaId>, new: &New) -> Result<(), StartError> {
    if started.contains(&new.saga()) { Ok(()) } else { Err(StartError::Exists) }
}

/// Answers all callers with one error, which cannot be cloned.
fn tell_all(set: Vec<WaitingStart>, error: &sqlx::Error) {
    let kind = if let sqlx::Error::Io(error) = error { error.kind() } else { std::io::ErrorKind::Other };
    for waiting in set {
        let shared = match error {
            sqlx::Error::PoolTimedOut => sqlx::Error::PoolTimedOut,
            error => sqlx::Error::Io(std::io::Error::new(kind, error.to_string())),
        };
        waiting.tell.send(Err(StartError::Database(shared))).ok();
    }
}

/// Whether another transaction is in the way, by a lock or a conflict. The obstacle is gone when that transaction has
/// ended.
fn is_in_the_way(error: &sqlx::Error) -> bool {
    lock_wait(error).is_some() || is_conflict(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn where_many_start_together_one_waits_a_moment_for_others_and_a_full_set_for_nobody() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut queue = StartQueue { receiver, gathering: Gathering::default() };
        sender.send(0).unwrap();
        assert_eq!(queue.first_of_a_set().now_or_never(), Some(Some(0)));

        // An hour ahead: however long this process is kept from running, the last set counts as recent.
        let late = clock::monotonic() + Duration::from_secs(3600);
        queue.gathering.begins(SET_MAX, late);
        sender.send(1).unwrap();
        let mut follows = Box::pin(queue.first_of_a_set());
        assert_eq!(follows.as_mut().now_or_never(), None);
        assert_eq!(follows.await, Some(1));

        (0..100).for_each(|_| queue.gathering.begins(SET_MAX, late));
        (0..SET_MAX).for_each(|n| sender.send(n).unwrap());
        assert_eq!(queue.first_of_a_set().now_or_never(), Some(Some(0)));
    }
}

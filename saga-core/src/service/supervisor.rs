//! Named tasks that start, fail and stop together.
//!
//! The first task that ends before it was asked to takes the process down with it. Half a service, one that answers
//! HTTP but no longer reads Kafka, say, is worse than one that is restarted. When asked to stop, each task has
//! [`GRACE_PERIOD`] to finish what is in flight. A task that is left then is dropped, which is what a crash would do and
//! therefore safe.

use crate::{panics::panic_text, reason::chain};
use futures::{FutureExt, future::BoxFuture};
use std::{panic::AssertUnwindSafe, process::ExitCode, time::Duration};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long work in flight may take once the process is asked to stop. Shorter than the 30 s after which orchestrators
/// kill.
pub const GRACE_PERIOD: Duration = Duration::from_secs(20);

/// The error of any task.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A named part of a process. See [`task`].
pub struct Task {
    name: &'static str,
    future: BoxFuture<'static, Result<(), BoxError>>,
}

/// A named part of a process: runs until its token is cancelled.
pub fn task<F, E>(name: &'static str, future: F) -> Task
where
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<BoxError>,
{
    Task { name, future: future.map(|result| result.map_err(Into::into)).boxed() }
}

/// Why a process ended without having been asked to.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A task ended with an error.
    #[error("`{task}` failed: {source}")]
    Failed {
        /// The name of the task.
        task: &'static str,
        /// The error that the task returned.
        source: BoxError,
    },
    /// A task ended although it was not asked to.
    #[error("`{task}` ended by itself")]
    Ended {
        /// The name of the task.
        task: &'static str,
    },
    /// Tasks did not finish in time and were dropped.
    #[error("{0} tasks did not stop in time")]
    Hung(usize),
}

/// Runs `tasks` until `token` is cancelled or one of them ends; then cancels `token` and waits for the others, within
/// [`GRACE_PERIOD`].
///
/// # Errors
/// A task failed, ended before it was asked to, or did not stop in time.
pub async fn run_all(token: &CancellationToken, tasks: Vec<Task>) -> Result<(), SupervisorError> {
    run_within(GRACE_PERIOD, token, tasks).await
}

async fn run_within(grace: Duration, token: &CancellationToken, tasks: Vec<Task>) -> Result<(), SupervisorError> {
    let mut running = JoinSet::new();
    for Task { name, future } in tasks {
        running.spawn(async move {
            // A panic is a failure with a name, not a task that is missing.
            let result = AssertUnwindSafe(future).catch_unwind().await;
            (name, result.unwrap_or_else(|panic| Err(format!("panicked: {}", panic_text(&*panic)).into())))
        });
    }
    let mut first = None;
    tokio::select! {
        () = token.cancelled() => {}
        Some(Ok((task, result))) = running.join_next() => {
            first = verdict(task, result, token.is_cancelled());
            token.cancel();
        }
    }
    let drain = async {
        while let Some(ended) = running.join_next().await {
            let Ok((task, result)) = ended else { continue };
            if let Some(error) = verdict(task, result, true) {
                tracing::error!(%error, "while stopping");
                first.get_or_insert(error);
            }
        }
    };
    if tokio::time::timeout(grace, drain).await.is_err() {
        let hung = SupervisorError::Hung(running.len());
        tracing::error!(error = %hung, "dropping what is left");
        first.get_or_insert(hung);
    }
    first.map_or(Ok(()), Err)
}

fn verdict(task: &'static str, result: Result<(), BoxError>, asked: bool) -> Option<SupervisorError> {
    match result {
        Ok(()) if asked => None,
        Ok(()) => Some(SupervisorError::Ended { task }),
        Err(source) => Some(SupervisorError::Failed { task, source }),
    }
}

/// Logs why the process ends, if it was not asked to, and returns the exit code for its parent.
#[must_use]
pub fn exit_code<E: Into<anyhow::Error>>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error.into()), "ended with an error");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    async fn until(token: CancellationToken) -> Result<(), BoxError> {
        token.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn asked_to_stop_all_finish_and_nothing_is_wrong() {
        let token = CancellationToken::new();
        token.cancel();
        run_all(&token, vec![task("a", until(token.clone())), task("b", until(token.clone()))]).await.unwrap();
    }

    #[tokio::test]
    async fn the_first_failure_stops_the_others_which_finish_their_work() {
        let token = CancellationToken::new();
        let finished = Arc::new(AtomicBool::new(false));
        let (flag, other) = (Arc::clone(&finished), token.clone());
        let careful = async move {
            other.cancelled().await;
            flag.store(true, Ordering::SeqCst);
            Ok::<_, BoxError>(())
        };
        let error =
            run_all(&token, vec![task("careful", careful), task("bad", async { Err("no") })]).await.unwrap_err();
        assert_eq!(error.to_string(), "`bad` failed: no");
        assert!(finished.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn a_panic_or_an_end_that_nobody_asked_for_is_a_failure() {
        let token = CancellationToken::new();
        let error = run_all(&token, vec![task("a", async { Ok::<_, BoxError>(()) })]).await.unwrap_err();
        assert_eq!(error.to_string(), "`a` ended by itself");
        let token = CancellationToken::new();
        #[allow(unreachable_code)]
        let panics = async { panic!("oh") as Result<(), BoxError> };
        let error = run_all(&token, vec![task("b", panics)]).await.unwrap_err();
        assert_eq!(error.to_string(), "`b` failed: panicked: oh");
    }

    #[tokio::test]
    async fn a_task_that_does_not_stop_is_dropped_when_the_grace_is_over() {
        let token = CancellationToken::new();
        token.cancel();
        let stuck = task("stuck", std::future::pending::<Result<(), BoxError>>());
        assert!(matches!(
            run_within(Duration::from_millis(5), &token, vec![stuck]).await,
            Err(SupervisorError::Hung(1))
        ));
    }
}

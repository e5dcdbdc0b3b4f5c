//! Waiting for a condition with a deadline, never for an amount of time.

use std::{
    future::Future,
    sync::mpsc,
    time::{Duration, Instant},
};

/// How long a test waits for the cleaning up after it.
const CLEANED_WITHIN: Duration = Duration::from_secs(3);

/// Calls `look` again and again until it returns `Ok`, or until `deadline` has passed. Then it returns the last error,
/// which says what was there instead.
///
/// The pauses between two looks grow from 1 ms to 50 ms: quick conditions cost nothing, slow ones little.
///
/// # Errors
/// The last error of `look`, when the deadline has passed.
pub async fn within<T, E, F, Fut>(deadline: Duration, mut look: F) -> Result<T, E>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match look().await {
            Err(_) if started.elapsed() < deadline => {}
            seen => return seen,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Like [`within`], for a condition without an error: panics when `deadline` has passed, at the caller's line.
#[track_caller]
pub fn eventually<T, F, Fut>(deadline: Duration, mut condition: F) -> impl Future<Output = T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let caller = std::panic::Location::caller();
    async move {
        let look = || {
            let asked = condition();
            async move { asked.await.ok_or(()) }
        };
        let seen = within(deadline, look).await;
        seen.unwrap_or_else(|()| panic!("{caller}: the condition did not come true within {deadline:?}"))
    }
}

/// Runs `cleaning` on a thread of its own, and waits for its end, but not for ever.
///
/// A `drop` blocks its task. Another future of that task may hold what the server waits for: `drop database` waits for
/// every session that logs in meanwhile, to any database. After the bound both the test and the cleaning go on.
pub(super) fn clean_up(cleaning: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        cleaning();
        done.send(()).ok();
    });
    is_done.recv_timeout(CLEANED_WITHIN).ok();
}

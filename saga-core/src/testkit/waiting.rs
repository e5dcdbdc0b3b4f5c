//! Waiting for a condition with a deadline, never for an amount of time.

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Looks again and again until it sees what is waited for, or `deadline` has passed: then the last look's answer says what
/// was there instead.
///
/// The pauses between two looks grow from 1 ms to 50 ms: quick conditions cost nothing, slow ones little.
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

/// Likewise, where there is nothing to say: panics when `deadline` has passed, at the caller's line.
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

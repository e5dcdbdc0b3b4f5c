//! Waiting for a condition with a deadline, never for an amount of time.

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Asks `condition` again and again until it is `Some`; panics when `deadline` has passed, at the caller's line.
///
/// The pauses between two questions grow from 1 ms to 50 ms: quick conditions cost nothing, slow ones little.
#[track_caller]
pub fn eventually<T, F, Fut>(deadline: Duration, mut condition: F) -> impl Future<Output = T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let caller = std::panic::Location::caller();
    async move {
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            assert!(started.elapsed() < deadline, "{caller}: the condition did not come true within {deadline:?}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

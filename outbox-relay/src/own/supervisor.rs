//! Runs an outbox, and starts it again when a fault in the relay itself ends it. What happens to one outbox stops no
//! other.

use crate::{outbox::Outbox, own::turns};
use saga_core::retry::Backoff;
use std::{sync::Arc, time::Duration};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::error;

/// The pauses between a panic and the next start. None is shorter than a lease: the panic gave it not back, and what the
/// process has sent may still be on its way. It would stand by until then, as if another process published.
const PAUSES: Backoff = Backoff::doubling(Duration::from_millis(500), Duration::from_secs(30)).exact();

/// Runs `outbox` until `stop`.
pub(crate) async fn supervise(outbox: Arc<Outbox>, stop: CancellationToken) {
    let run = || {
        let (outbox, stop) = (outbox.clone(), stop.clone());
        async move { turns::run(&outbox, &stop).await }
    };
    let reported = |panic: String| {
        error!(
            outbox = outbox.name,
            panic, "a fault in the relay itself ended this outbox; it is started again, and the others go on"
        );
        outbox.status.fault(panic);
    };
    let pause = |panics| PAUSES.delay(panics, 0).max(outbox.leases.length);
    restart(run, reported, pause, &stop).await;
}

/// Runs the future that `run` makes, and a new one after each panic, until it ends by itself or `stop`.
async fn restart<F>(
    run: impl Fn() -> F,
    reported: impl Fn(String),
    pause: impl Fn(u32) -> Duration,
    stop: &CancellationToken,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut panics = 0;
    while let Err(panic) = AbortOnDropHandle::new(tokio::spawn(run())).await {
        reported(panic.to_string());
        panics += 1;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause(panics)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    #[tokio::test]
    async fn what_panics_is_started_again_and_each_panic_is_told() {
        let starts = Arc::new(AtomicUsize::new(0));
        let reported = Mutex::new(Vec::new());
        let run = || {
            let starts = starts.clone();
            async move {
                let start = starts.fetch_add(1, Ordering::SeqCst);
                assert!(start >= 2, "fault {start}");
            }
        };
        let soon = |_| Duration::from_millis(1);
        restart(run, |panic| reported.lock().unwrap().push(panic), soon, &CancellationToken::new()).await;
        assert_eq!(starts.load(Ordering::SeqCst), 3);
        let reported = reported.into_inner().unwrap();
        assert!(reported.len() == 2 && reported[1].contains("fault 1"), "{reported:?}");
    }
}

//! The signal to stop. One token carries it to everything; see [`super::supervisor`] for how long each task may take.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that SIGTERM or SIGINT cancels. A second signal ends the process at once, for an operator without patience.
///
/// # Panics
/// When called outside a tokio runtime, or when the system refuses a signal handler (it then could not be stopped).
#[must_use]
pub fn token() -> CancellationToken {
    let token = CancellationToken::new();
    let stop = token.clone();
    let mut terminate = signal(SignalKind::terminate()).expect("a process that cannot hear SIGTERM must not start");
    let mut interrupt = signal(SignalKind::interrupt()).expect("a process that cannot hear SIGINT must not start");
    tokio::spawn(async move {
        let mut name = next_signal(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = name, "stopping: work in flight is finished first");
        stop.cancel();
        name = next_signal(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = name, "stopping at once");
        std::process::exit(130);
    });
    token
}

async fn next_signal(
    terminate: &mut tokio::signal::unix::Signal,
    interrupt: &mut tokio::signal::unix::Signal,
) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

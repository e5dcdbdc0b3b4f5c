//! Runs a stream for each topic that is set apart and may go on. What happens to one stream stops no other.

use crate::publish::{shared::Shared, stream::run_topic};
use saga_core::{
    clock,
    part::{Cause, HealthIssue},
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use tracing::error;

/// The pause between the failure of a topic's stream and its next start.
const RESTART_AFTER: Duration = Duration::from_secs(2);

/// Runs the topics' streams until the process stops and they have.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut control = shared.control.clone();
    let mut running = JoinSet::new();
    let mut topics: HashMap<tokio::task::Id, String> = HashMap::new();
    let mut failed: HashMap<String, Instant> = HashMap::new();
    while !shared.stop.is_cancelled() {
        let wanted = control.borrow_and_update().clone();
        failed.retain(|_, at| at.elapsed() < RESTART_AFTER);
        for paused in wanted.paused.values().filter(|paused| paused.resuming && paused.position.is_some()) {
            let topic = &paused.topic;
            let known = topics.values().any(|running| running == topic) || failed.contains_key(topic);
            if wanted.whole || known || shared.has_resumed(topic, paused.paused_at) {
                continue;
            }
            let (shared, name) = (shared.clone(), topic.clone());
            let stream = running.spawn(async move { run_topic(&shared, &name).await });
            topics.insert(stream.id(), topic.clone());
        }
        tokio::select! {
            () = shared.stop.cancelled() => {}
            changed = control.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(RESTART_AFTER), if !failed.is_empty() => {}
            Some(ended) = running.join_next_with_id() => {
                let (id, failure) = match ended {
                    Ok((id, ended)) => (id, ended.err().map(|error| error.issue())),
                    Err(panic) => (panic.id(), Some(HealthIssue::new(Cause::Fault, format!("a fault in the relay itself: {panic}")))),
                };
                let topic = topics.remove(&id).unwrap_or_default();
                match failure {
                    None => shared.loops.ended(&topic),
                    Some(HealthIssue { cause, reason: problem, .. }) => {
                        error!(outbox = shared.outbox, topic, problem, "the topic's own stream ended; it starts again");
                        shared.loops.failing(&topic, cause, &problem);
                        failed.insert(topic, clock::monotonic());
                    }
                }
            }
        }
    }
    while running.join_next().await.is_some() {}
}

//! The hand-over: a topic comes back into the main stream, without a row left out, sent twice or overtaken.
//!
//! ```text
//!  topic's stream ──ask──▶ main stream        It has published all that the main stream has passed, or nearly.
//!                 ◀─split─ at its position    Rows behind the split are the main stream's, if it comes to that.
//!                 ──done─▶                    All rows before the split are acknowledged: the topic is back.
//! ```
//!
//! If a row behind the split comes before `done`, the main stream waits for `done`, for a moment. If it does not come,
//! the topic stays set apart, and asks again. When the process dies in between, the topic is still recorded as set
//! apart, at a position that its stream has published up to.

use super::{Session, SessionEnd, StreamScope};
use crate::{
    control::Control,
    position::Position,
    publish::handover_requests::{HandoverRequest, HandoverRequests, HandoverSplit},
    record::{commit::Recordable, pause::CaughtUp},
};
use saga_core::{clock, retry::Backoff};
use std::{
    future::{Future as _, pending, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use time::OffsetDateTime;
use tokio::{
    sync::oneshot::{self, error::RecvError},
    time::Instant,
};
use tracing::info;

/// How long the main stream waits at a row of a topic that is about to come back: as long as a page takes, at a slow
/// time.
const HOLD_MAX: Duration = Duration::from_millis(250);
/// The pauses of a topic that was not back in time, before it asks again.
const LATE_PAUSES: Backoff = Backoff::doubling(HOLD_MAX, Duration::from_secs(30)).exact();

/// Topics that are about to come back into the main stream.
#[derive(Default)]
pub(crate) struct ReturningTopics(Vec<AgreedReturn>);

/// The main stream has answered with a split, and waits until all before it is acknowledged.
struct AgreedReturn {
    topic: String,
    paused_at: OffsetDateTime,
    done: oneshot::Receiver<()>,
}

impl ReturningTopics {
    fn take(&mut self, topic: &str) -> Option<AgreedReturn> {
        let at = self.0.iter().position(|agreed| agreed.topic == topic)?;
        Some(self.0.swap_remove(at))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(CaughtUp, Result<(), RecvError>)> {
        for at in 0..self.0.len() {
            if let Poll::Ready(word) = Pin::new(&mut self.0[at].done).poll(cx) {
                let AgreedReturn { topic, paused_at, .. } = self.0.swap_remove(at);
                return Poll::Ready((CaughtUp { topic, paused_at }, word));
            }
        }
        Poll::Pending
    }
}

/// The topic of a stream that is set apart, on its way back.
pub(crate) struct ReturningTopic {
    pub(crate) topic: String,
    /// When its pause began: a later pause of the topic is another pause.
    pub(crate) paused_at: OffsetDateTime,
    /// The earliest time for a hand-over, because Kafka has refused rows of the topic, or because it was not back in
    /// time. `None`: at once.
    pub(crate) not_before: Option<Instant>,
    /// A position up to which this stream has read and sent all that the main stream had passed.
    caught_up: Option<Position>,
    asked: Option<oneshot::Receiver<HandoverSplit>>,
    split: Option<HandoverSplit>,
    /// How many splits were not made in time.
    late: u32,
}

impl ReturningTopic {
    pub(crate) fn new(topic: String, paused_at: OffsetDateTime, not_before: Option<Instant>) -> Self {
        Self { topic, paused_at, not_before, caught_up: None, asked: None, split: None, late: 0 }
    }

    /// Whether the topic has been quiet for long enough.
    fn is_quiet(&self) -> bool {
        self.not_before.is_none_or(|at| Instant::from_std(clock::monotonic()) >= at)
    }

    /// Sets the next pause: the main stream passed a row of the topic because the answer came too late.
    fn was_late(&mut self) {
        self.late += 1;
        self.not_before = Some(Instant::from_std(clock::monotonic()) + LATE_PAUSES.delay(self.late, 0));
    }

    async fn next_step(&mut self) -> HandoverStep {
        if let Some(asked) = &mut self.asked {
            let split = asked.await;
            self.asked = None;
            return HandoverStep::Split(split);
        }
        match self.not_before {
            Some(at) if self.caught_up.is_some() && self.split.is_none() && !self.is_quiet() => {
                tokio::time::sleep_until(at).await;
                HandoverStep::Quiet
            }
            _ => pending().await,
        }
    }
}

/// The next step of a hand-over.
pub(crate) enum HandoverStep {
    /// For the main stream: a topic's stream asks.
    Asked(HandoverRequest),
    /// For the main stream: all before the split is acknowledged, or the topic's stream has ended.
    Done(CaughtUp, Result<(), RecvError>),
    /// For a topic's stream: the split; an error if the main stream does not know the topic as set apart.
    Split(Result<HandoverSplit, RecvError>),
    /// The topic has refused nothing for long enough.
    Quiet,
}

impl StreamScope {
    /// Waits for the next step of a hand-over.
    pub(crate) async fn next_handover_step(&mut self, requests: &HandoverRequests) -> HandoverStep {
        match self {
            Self::Main { returning } => {
                tokio::select! {
                    request = requests.next() => HandoverStep::Asked(request),
                    (caught_up, word) = poll_fn(|cx| returning.poll(cx)) => HandoverStep::Done(caught_up, word),
                }
            }
            Self::Topic(leaving) => leaving.next_step().await,
        }
    }

    /// Whether the topic is not to be published now, or is another stream's.
    pub(crate) fn is_withdrawn(&self, control: &Control) -> bool {
        let Self::Topic(leaving) = self else { return false };
        let paused = control.paused.get(&leaving.topic);
        paused.is_none_or(|paused| !paused.resuming || paused.paused_at != leaving.paused_at)
    }
}

impl Session {
    pub(crate) async fn hand_over(&mut self, step: HandoverStep) -> Result<(), SessionEnd> {
        match step {
            HandoverStep::Asked(request) => {
                self.split(request);
                Ok(())
            }
            HandoverStep::Done(caught_up, Ok(())) => self.take_back(caught_up).await,
            // The topic's stream asks again, or its next one does.
            HandoverStep::Done(_, Err(_)) => Ok(()),
            HandoverStep::Split(Ok(split)) => {
                if let StreamScope::Topic(leaving) = &mut self.scope {
                    leaving.split = Some(split);
                }
                self.go_on_returning().await
            }
            // The session ends as paused, so that the topic's state is looked up again.
            HandoverStep::Split(Err(_)) => Err(SessionEnd::Paused),
            HandoverStep::Quiet => self.go_on_returning().await,
        }
    }

    fn split(&mut self, HandoverRequest { topic, paused_at, split }: HandoverRequest) {
        let StreamScope::Main { returning } = &mut self.scope else { return };
        if !self.paused.contains(&topic) {
            return;
        }
        let (done, word) = oneshot::channel();
        // If the topic's stream has ended, the failed send does not matter.
        if split.send(HandoverSplit { at: self.at.clone(), done }).is_ok() {
            returning.take(&topic);
            returning.0.push(AgreedReturn { topic, paused_at, done: word });
        }
    }

    /// Called at a row of a topic that is set apart: whether the topic is back in the main stream with it.
    pub(crate) async fn is_back(&mut self, topic: &str) -> Result<bool, SessionEnd> {
        let StreamScope::Main { returning } = &mut self.scope else { return Ok(false) };
        let Some(AgreedReturn { topic, paused_at, mut done }) = returning.take(topic) else { return Ok(false) };
        let is_back = match tokio::time::timeout(HOLD_MAX, &mut done).await {
            Ok(word) => word.is_ok(),
            Err(_) => {
                done.close();
                done.try_recv().is_ok()
            }
        };
        if !is_back {
            return Ok(false);
        }
        self.take_back(CaughtUp { topic: topic.clone(), paused_at }).await?;
        Ok(!self.paused.contains(&topic))
    }

    /// Lets a topic go on in the main stream, unless it has been paused again: then it stays where its stream stopped.
    async fn take_back(&mut self, caught_up: CaughtUp) -> Result<(), SessionEnd> {
        let CaughtUp { topic, paused_at } = &caught_up;
        let paused = self.control.borrow().paused.get(topic).map(|paused| paused.paused_at);
        if paused.is_some_and(|again| again != *paused_at) {
            return Ok(());
        }
        self.paused.remove(topic);
        self.shared.has_come_back(topic, *paused_at);
        info!(outbox = self.outbox, topic, "the topic has caught up");
        self.mark(Recordable::CaughtUp(caught_up)).await
    }

    /// Records that every row that the main stream had passed at `at` is sent.
    pub(crate) async fn caught_up(&mut self, at: Position) -> Result<(), SessionEnd> {
        if let StreamScope::Topic(leaving) = &mut self.scope {
            leaving.caught_up = Some(at);
        }
        self.go_on_returning().await
    }

    async fn go_on_returning(&mut self) -> Result<(), SessionEnd> {
        let StreamScope::Topic(leaving) = &mut self.scope else { return Ok(()) };
        let Some(caught_up) = &leaving.caught_up else { return Ok(()) };
        let Some(split) = leaving.split.take_if(|split| caught_up.includes(&split.at)) else {
            if leaving.split.is_none() && leaving.asked.is_none() && leaving.is_quiet() {
                // Rows on their way may take longer than the main stream waits.
                self.settle().await?;
                let StreamScope::Topic(leaving) = &mut self.scope else { return Ok(()) };
                let (split, asked) = oneshot::channel();
                leaving.asked = Some(asked);
                self.shared.handover_requests.ask(HandoverRequest {
                    topic: leaving.topic.clone(),
                    paused_at: leaving.paused_at,
                    split,
                });
            }
            return Ok(());
        };
        self.settle().await?;
        // If `done` came too late, the main stream has passed a row, which this stream reads next.
        match split.done.send(()) {
            Ok(()) => Err(SessionEnd::Joined),
            Err(_) => {
                if let StreamScope::Topic(leaving) = &mut self.scope {
                    leaving.was_late();
                }
                Ok(())
            }
        }
    }
}

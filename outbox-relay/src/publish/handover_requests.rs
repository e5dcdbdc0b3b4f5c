//! The questions of topics' streams whether they may hand their topics over, until the main stream answers them.
//!
//! An answer is the main stream's position. If either stream ends in between, its end of the channel goes with it, so
//! the other one notices. When the process dies, the questions are lost: the topics are still recorded as set apart.

use crate::position::Position;
use std::sync::{Mutex, PoisonError};
use time::OffsetDateTime;
use tokio::sync::{Notify, oneshot};

/// The question of a topic's stream whether it may hand its topic over.
pub(crate) struct HandoverRequest {
    pub(crate) topic: String,
    pub(crate) paused_at: OffsetDateTime,
    pub(crate) split: oneshot::Sender<HandoverSplit>,
}

/// The main stream's position at this moment.
pub(crate) struct HandoverSplit {
    pub(crate) at: Position,
    pub(crate) done: oneshot::Sender<()>,
}

/// Questions that the main stream has not answered yet.
#[derive(Default)]
pub(crate) struct HandoverRequests {
    waiting: Mutex<Vec<HandoverRequest>>,
    asked: Notify,
}

impl HandoverRequests {
    pub(crate) fn ask(&self, request: HandoverRequest) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        self.asked.notify_one();
    }

    pub(crate) async fn next(&self) -> HandoverRequest {
        loop {
            let request = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match request {
                Some(request) => return request,
                None => self.asked.notified().await,
            }
        }
    }
}

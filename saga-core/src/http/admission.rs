//! Admission of requests: a request's body is read first, then the request waits for a slot, for a moment.
//!
//! A body that comes slowly holds no slot. So clients that never finish theirs hold up no other client. When no slot
//! becomes free in time, the request is shed with 503 and `Retry-After`. A queue without a bound would answer no client
//! in time.
//!
//! A handler that changes something runs as a task of its own and takes its slot along. A client that hangs up ends the
//! waiting, never the work, and hanging up often enough piles up no work.

use super::{
    api::{Limits, mutates},
    connections::Connection,
    extract::body_problem,
    problem::Problem,
};
use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use std::sync::Arc;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

/// Lets requests in, and gives each a slot.
#[derive(Clone)]
pub(super) struct Admission {
    limits: Limits,
    slots: Arc<Semaphore>,
    in_flight: TaskTracker,
}

impl Admission {
    pub(super) fn new(limits: Limits, in_flight: TaskTracker) -> Self {
        Self { limits, slots: Arc::new(Semaphore::new(limits.concurrency)), in_flight }
    }

    async fn body(&self, request: Request) -> Result<Request, Problem> {
        let (parts, body) = request.into_parts();
        let declared =
            parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if declared.is_some_and(|bytes| bytes > self.limits.body_bytes) {
            return Err(body_problem(StatusCode::PAYLOAD_TOO_LARGE));
        }
        let read = timeout(self.limits.body_within, axum::body::to_bytes(body, self.limits.body_bytes)).await;
        let body: Bytes = match read {
            Ok(read) => read.map_err(|error| body_problem(reading_failed(&error)))?,
            Err(_) => return Err(self.too_slow()),
        };
        Ok(Request::from_parts(parts, Body::from(body)))
    }

    fn too_slow(&self) -> Problem {
        count_refused("slow_body");
        Problem::new(StatusCode::REQUEST_TIMEOUT, "slow", "The body did not arrive in time")
            .detail(format!("A body has {} s to arrive.", self.limits.body_within.as_secs_f64()))
    }

    async fn slot(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let slots = Arc::clone(&self.slots);
        match timeout(self.limits.slot_within, slots.acquire_owned()).await {
            Ok(slot) => slot.map_err(|closed| Problem::internal(&closed)),
            Err(_) => {
                count_refused("slot");
                Err(Problem::busy())
            }
        }
    }
}

/// Counts a request or a connection that was turned away before its work began, in `http_refused_total` by reason.
pub fn count_refused(reason: &'static str) {
    metrics::counter!("http_refused_total", "reason" => reason).increment(1);
}

pub(super) async fn admitted(State(admission): State<Admission>, request: Request, next: Next) -> Response {
    match admit(&admission, request, next).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

async fn admit(admission: &Admission, request: Request, next: Next) -> Result<Response, Problem> {
    let mutates = mutates(request.method());
    let connection = request.extensions().get::<Connection>().cloned();
    connection.iter().for_each(Connection::heard);
    let request = if mutates { admission.body(request).await? } else { request };
    // From here on the client waits for this process, and not the other way round.
    let _working = connection.as_ref().map(Connection::working);
    let slot = admission.slot().await?;
    let handler = async move {
        let response = next.run(request).await;
        drop(slot);
        response
    };
    if !mutates {
        return Ok(handler.await);
    }
    match admission.in_flight.spawn(handler.instrument(Span::current())).await {
        Ok(response) => Ok(response),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(Problem::internal(&error)),
    }
}

/// The status for a body that could not be read: it was too large, or the client broke it off.
fn reading_failed(error: &axum::Error) -> StatusCode {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.to_string().contains("length limit exceeded") {
            return StatusCode::PAYLOAD_TOO_LARGE;
        }
        cause = error.source();
    }
    StatusCode::BAD_REQUEST
}

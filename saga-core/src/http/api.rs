//! What surrounds every API: request ids, traces, limits, timeouts, panics; and handlers that a hang-up cannot cancel.
//!
//! From the outside in:
//!
//! ```text
//! headers -> span + x-request-id -> panic to 500 -> own host and origin -> timeout to 503 -> [mutating: body read] -> a slot -> your handler
//! ```
//!
//! A handler that changes something runs as a task of its own once its body has arrived: a client that hangs up, or
//! the timeout, ends the waiting, never the work. So a `commit` is never cut in the middle, and no connection goes back
//! to its pool inside a transaction (see [`crate::service::database`]). A process that dies loses what was not
//! committed, and the client's retry under the same Idempotency-Key finds out.

use super::{
    admission::{Admission, admitted},
    hosts::{Hosts, Listener, own_requests},
    problem::Problem,
};
use crate::{card::holds_a_card_number, clock, panics::panic_text, trace, transaction::Bound};
use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use std::{any::Any, time::Duration};
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

/// The header that names a request in logs and in answers.
pub const REQUEST_ID: &str = "x-request-id";

/// The bound of one request's transaction: shorter than [`Limits::timeout`], so that the client hears what became of
/// it.
pub const REQUEST_MAX: Bound = Bound::new(REQUEST_WITHIN);
const REQUEST_WITHIN: Duration = Duration::from_secs(30);

/// The limits of one listener's requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest body, in bytes; 64 KiB holds a thousand order lines.
    pub body_bytes: usize,
    /// How long a body may take to arrive; then 408.
    pub body_within: Duration,
    /// The longest time that a client waits for the beginning of an answer; then 503. It is longer than body, slot, and
    /// transaction or `Prefer: wait` together.
    pub timeout: Duration,
    /// How many requests are worked on at once, from when their body is there until their answer begins.
    pub concurrency: usize,
    /// How long a request waits for its turn among those; then 503.
    pub slot_within: Duration,
    /// How many connections are open at once, and never more than a quarter of the files that the process may open: it
    /// has two listeners. A new connection takes the place of the one that has waited longest for its client.
    pub connections: usize,
}

impl Limits {
    const DEFAULT: Self = Self {
        body_bytes: 64 * 1024,
        body_within: Duration::from_secs(10),
        timeout: Duration::from_secs(45),
        concurrency: 1024,
        slot_within: Duration::from_secs(2),
        connections: 2048,
    };
}

const _: () = {
    let Limits { body_within, timeout, slot_within, .. } = Limits::DEFAULT;
    assert!(body_within.as_secs() + slot_within.as_secs() + REQUEST_WITHIN.as_secs() < timeout.as_secs());
};

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A router and the layers around it, ready for [`crate::service::serve`].
#[derive(Debug)]
pub struct Api {
    router: Router,
    pub(crate) limits: Limits,
    hosts: Hosts,
}

impl Api {
    /// Surrounds `router` with the default limits.
    #[must_use]
    pub fn new(router: Router) -> Self {
        Self::with_limits(router, Limits::default())
    }

    /// Surrounds `router` with `limits`.
    #[must_use]
    pub fn with_limits(router: Router, limits: Limits) -> Self {
        Self { router, limits, hosts: Hosts::default() }
    }

    /// Sets the names that the API is reached by, beside IP addresses and `localhost`.
    #[must_use]
    pub fn reached_as(self, hosts: Hosts) -> Self {
        Self { hosts, ..self }
    }

    /// The router as it is on loopback, for tests that call it without a listener.
    pub fn into_router(self) -> Router {
        self.surrounded(true).0
    }

    /// The router of a listener that, with `loopback`, only this machine reaches. Also returns its detached handlers,
    /// which the process waits for at shutdown.
    pub(crate) fn surrounded(self, loopback: bool) -> (Router, TaskTracker) {
        let Self { router, limits, hosts } = self;
        let in_flight = TaskTracker::new();
        let router = router
            .method_not_allowed_fallback(method_not_allowed)
            .fallback(not_found)
            .layer(DefaultBodyLimit::max(limits.body_bytes))
            .layer(middleware::from_fn_with_state(Admission::new(limits, in_flight.clone()), admitted))
            .layer(middleware::from_fn_with_state(limits.timeout, time_limited))
            .layer(middleware::from_fn_with_state(Listener::new(hosts, loopback), own_requests))
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn(observed))
            .layer(middleware::from_fn(with_headers));
        (router, in_flight)
    }
}

impl From<Router> for Api {
    fn from(router: Router) -> Self {
        Self::new(router)
    }
}

/// Whether a request may change something.
pub(super) fn mutates(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

async fn time_limited(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "timeout", "It took too long")
            .detail("What was asked for may still happen. Repeat it under the same Idempotency-Key to find out.")
            .retry_after(1)
            .into_response(),
    }
}

/// The policy for everything but the page at `/docs`: it is data, no document, and no cache keeps it unless its handler
/// says so.
const DATA_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// The policy for the page at `/docs`, which loads its own scripts and styles, and shows its own pictures.
const DOCS_POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'";

/// Headers for browsers, on each answer whose handler set no others.
async fn with_headers(request: Request, next: Next) -> Response {
    let docs = request.uri().path().starts_with("/docs");
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    };
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    set(header::CONTENT_SECURITY_POLICY, if docs { DOCS_POLICY } else { DATA_POLICY });
    if !docs {
        set(header::CACHE_CONTROL, "no-store");
    }
    response
}

async fn observed(mut request: Request, next: Next) -> Response {
    let begun = clock::monotonic();
    let id = request_id(request.headers());
    let method = method_label(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = request_span(&request, &id, &route);
    request.headers_mut().insert(REQUEST_ID, id.clone());

    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, took) = (response.status(), begun.elapsed());
    span.record("http.response.status_code", status.as_u16());
    span.in_scope(|| tracing::debug!(status = status.as_u16(), took_ms = took.as_secs_f64() * 1e3, "answered"));
    let labels = [("method", method.to_owned()), ("route", route)];
    metrics::histogram!("http_request_duration_seconds", &labels).record(took.as_secs_f64());
    let [method, route] = labels;
    metrics::counter!("http_requests_total", &[method, route, ("status", status.as_str().to_owned())]).increment(1);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The label of a method. A client can invent methods without end, and a label must not have values without end.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

/// The span that everything a request causes is in; a child of the caller's span, if it sent a `traceparent`.
fn request_span(request: &Request, id: &HeaderValue, route: &str) -> Span {
    let method = request.method();
    let span = tracing::info_span!(
        "http",
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        http.request.method = %method,
        http.route = route,
        request_id = id.to_str().unwrap_or_default(),
        http.response.status_code = tracing::field::Empty,
    );
    if request.headers().contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&TraceHeaders(request.headers()));
        // The error says that there is no OpenTelemetry layer or that it filters this span: nothing to continue.
        span.set_parent(parent).ok();
    }
    span
}

struct TraceHeaders<'a>(&'a HeaderMap);

impl Extractor for TraceHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        trace::carried(key, self.0.get(key)?.to_str().ok()?)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// The caller's id if it is 1 to 128 visible ASCII characters without a card number, or a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sensible = |value: &&HeaderValue| {
        (1..=128).contains(&value.len())
            && value.as_bytes().iter().all(u8::is_ascii_graphic)
            && value.to_str().is_ok_and(|id| !holds_a_card_number(id))
    };
    headers.get(REQUEST_ID).filter(sensible).cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&Uuid::now_v7().to_string()).unwrap_or_else(|_| HeaderValue::from_static("none"))
    })
}

// `CatchPanicLayer` gives the panic away.
#[allow(clippy::needless_pass_by_value)]
fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!(panic = panic_text(panic.as_ref()), "a handler panicked");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "Something went wrong here")
        .detail("It is logged under this request's x-request-id.")
        .into_response()
}

async fn not_found() -> Problem {
    Problem::not_found("There is no such route.")
}

async fn method_not_allowed() -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", "This method is not for this resource")
}

//! Problem details (RFC 9457): the only shape an error has on our HTTP interfaces.
//!
//! `type` is stable and relative (`/problems/out-of-range`); clients branch on it, never on the text. It holds nothing
//! of the inside (SQL, paths, other customers' data). An unexpected error is logged with its cause, and answered with
//! the request's id, by which the log line is found.

use crate::{
    error_class::{ErrorClass, classify, is_outage, is_pool_full, renew_connections},
    outage::Outage,
};
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

/// Something went wrong, in the shape of RFC 9457.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// What kind of problem: a stable, relative URI.
    #[serde(rename = "type")]
    #[schema(example = "/problems/validation")]
    kind: String,
    /// The kind in words, always the same for one `type`.
    title: &'static str,
    /// The HTTP status.
    #[serde(serialize_with = "status_number")]
    #[schema(value_type = u16, example = 422)]
    status: StatusCode,
    /// What is special about this occurrence.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// Which fields of the request are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    #[serde(skip)]
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// One wrong field of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// Where, as a path: `items[1].quantity`; a query or path parameter by its name; a header by its name.
    #[schema(example = "items[1].quantity")]
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// Names a field and what is wrong with it.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl Problem {
    /// A problem of the kind `/problems/<kind>`.
    #[must_use]
    pub fn new(status: StatusCode, kind: &str, title: &'static str) -> Self {
        Self { kind: format!("/problems/{kind}"), title, status, detail: None, errors: Vec::new(), headers: Vec::new() }
    }

    /// 422: the request is well formed, and these fields are wrong.
    #[must_use]
    pub fn validation(errors: Vec<FieldError>) -> Self {
        let mut problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "validation", "The request is not valid");
        problem.errors = errors;
        problem
    }

    /// 422 for one field.
    #[must_use]
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::validation(vec![FieldError::new(field, message)])
    }

    /// 400: the request cannot be understood at all.
    #[must_use]
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", "The request cannot be understood").detail(detail)
    }

    /// 404: there is no such thing, for the reason in `detail`.
    #[must_use]
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "There is no such thing here").detail(detail)
    }

    /// 409 of the kind `/problems/<kind>`: the request does not fit the state that things are in.
    #[must_use]
    pub fn conflict(kind: &str, title: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, kind, title)
    }

    /// 412: `If-Match` names another version than the current one.
    #[must_use]
    pub fn stale() -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, "stale", "It was changed in the meantime")
            .detail("Read it again and send its current ETag as If-Match.")
    }

    /// 503: something that this needs is away; the same request may work in a moment.
    #[must_use]
    pub fn unavailable() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Not available at the moment").retry_after(1)
    }

    /// 503: this process has more to do than it can carry; the same request may work in a moment.
    #[must_use]
    pub fn busy() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "Too much is being asked for at the moment")
            .detail("This process works on as much as it can. The same request may work in a moment.")
            .retry_after(1)
    }

    /// 500: logs `error` with its causes; the client hears nothing of it.
    #[must_use]
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = causes(error), "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "Something went wrong here")
            .detail("It is logged under this request's x-request-id.")
    }

    /// Sets what is special about this occurrence.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds a wrong field.
    #[must_use]
    pub fn with_field(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.errors.push(FieldError::new(field, message));
        self
    }

    /// Sets after how many seconds the client may come back.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        self.header(header::RETRY_AFTER, HeaderValue::from(seconds))
    }

    /// Adds a response header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The HTTP status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The stable kind, `/problems/<kind>`.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The wrong fields of the request.
    #[must_use]
    pub fn errors(&self) -> &[FieldError] {
        &self.errors
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.extend(self.headers);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }
}

impl From<sqlx::Error> for Problem {
    /// An error that [`classify`] does not call the item's own is 503, and the client may repeat the request; any other
    /// is our mistake. A constraint that a client can violate is mapped by its name where the SQL is, before it comes
    /// here.
    fn from(error: sqlx::Error) -> Self {
        match classify(&error) {
            ErrorClass::Own => return Self::internal(&error),
            ErrorClass::Stale => renew_connections(),
            ErrorClass::Passing | ErrorClass::Configuration => {}
        }
        // A read asks the pool directly, which returns the same error when the database is away; health has seen that
        // by then.
        if is_pool_full(&error) && !Outage::is_of_any_database() {
            return Self::busy();
        }
        // In an outage every request fails like this; the health check logs the outage once.
        if is_outage(&error) || is_pool_full(&error) {
            tracing::debug!(%error, "a request failed: the database cannot be used now");
        } else {
            tracing::warn!(%error, "a request failed in the database; the client may repeat it");
        }
        Self::unavailable()
    }
}

impl From<serde_json::Error> for Problem {
    fn from(error: serde_json::Error) -> Self {
        Self::internal(&error)
    }
}

fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // An error that only wraps another has its text.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn status_number<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

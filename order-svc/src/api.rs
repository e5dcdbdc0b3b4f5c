//! The HTTP API: routes, the state they share, and how errors become problems.
//!
//! | module | what it is |
//! |---|---|
//! | [`place`] | `POST /v1/orders` |
//! | [`read`] | `GET /v1/orders/{id}`, `GET /v1/orders` |
//! | [`cancel`] | `POST /v1/orders/{id}/cancel` |
//! | [`events`] | `GET /v1/orders/{id}/events`: server-sent events |
//! | [`prefer`] | `Prefer: wait=N` |
//! | [`view`] | what an order looks like from outside |
//!
//! Handlers are thin: they turn a request into a question to [`Orders`] and the answer into a response. A handler that
//! writes runs detached from the connection ([`saga_core::http::api`]), so a client that hangs up cancels nothing.

pub mod cancel;
pub mod events;
pub mod place;
pub mod prefer;
pub mod read;
pub mod view;

use crate::{
    domain::{BadField, Order},
    orders::{CancelOrderError, Orders, PlaceError, STUCK},
    store::StoreError,
};
use axum::Router;
use http::HeaderValue;
use saga_core::{
    http::{FieldError, Problem, openapi::complete},
    outbox::AppendError,
    saga::{CancelError, StartError},
};
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

/// The state that the handlers share.
#[derive(Clone)]
pub struct ApiState {
    /// The orders that the handlers ask.
    pub orders: Orders,
    /// Ends streams and waits when the process stops: an open stream would keep it from stopping.
    pub shutdown: CancellationToken,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Orders",
        description = "Place, follow and cancel orders. A saga carries each order through: it holds the money, puts the stock \
                       aside and takes the money. When one of these is refused, it undoes what was done."
    ),
    tags((name = "orders", description = "Orders and what becomes of them"))
)]
struct Document;

/// The API, its description at `/openapi.json` and a page to try it at `/docs`. The caller surrounds it with limits and
/// with detached handlers ([`saga_core::http::api`]).
pub fn router(state: ApiState) -> Router {
    let router = documented().split_for_parts().0;
    router.with_state(state).merge(SwaggerUi::new("/docs").url("/openapi.json", document()))
}

/// The API's description, generated from its handlers.
pub fn document() -> utoipa::openapi::OpenApi {
    complete(documented().split_for_parts().1)
}

fn documented() -> OpenApiRouter<ApiState> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(place::place_order, read::list_orders))
        .routes(routes!(read::get_order))
        .routes(routes!(cancel::cancel_order))
        .routes(routes!(events::order_events))
}

/// The order's version as a strong entity tag, with [`STUCK`] behind it for an order that waits for an operator.
fn etag(order: &Order) -> String {
    let stuck = if order.stuck { STUCK } else { "" };
    format!("\"{}{stuck}\"", order.version)
}

fn etag_header(order: &Order) -> HeaderValue {
    HeaderValue::from_str(&etag(order)).unwrap_or(HeaderValue::from_static("\"\""))
}

fn refused(bad: Vec<BadField>) -> Problem {
    Problem::validation(bad.into_iter().map(|bad| FieldError::new(bad.field, bad.fault.to_string())).collect())
}

impl From<PlaceError> for Problem {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Refused(bad) => refused(bad),
            PlaceError::Database(error) | PlaceError::Start(StartError::Database(error)) => error.into(),
            PlaceError::Start(StartError::Local(error)) => Self::internal(error.as_ref()),
            PlaceError::Start(error) => Self::internal(&error),
        }
    }
}

impl From<CancelOrderError> for Problem {
    fn from(error: CancelOrderError) -> Self {
        match error {
            CancelOrderError::Saga(CancelError::Database(error))
            | CancelOrderError::Store(StoreError::Database(error) | StoreError::Append(AppendError::Database(error))) => {
                error.into()
            }
            // While a new version is rolled out, another replica may know the definition, or the format, of this
            // order's saga.
            CancelOrderError::Saga(error @ (CancelError::Undefined(..) | CancelError::Unreadable(..))) => {
                tracing::warn!(%error, "an order cannot be cancelled by this replica");
                Self::unavailable()
            }
            error => Self::internal(&error),
        }
    }
}

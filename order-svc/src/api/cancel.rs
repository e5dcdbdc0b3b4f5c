//! The handler of `POST /v1/orders/{id}/cancel`: cancels an order in time.

use super::{ApiState, etag_header, read::no_such_order, view::OrderView};
use crate::{
    domain::{Order, StatusName},
    orders::CancelOutcome,
};
use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use contracts::OrderId;
use http::{HeaderMap, StatusCode, header};
use saga_core::http::{IfMatch, Json, Path, Problem};
use uuid::Uuid;

/// Cancel an order
///
/// Possible until its payment is being taken. The answer is final: 202, and the order will be cancelled, whatever else
/// happens; 200, and it is; 409, and it will be confirmed or is. Asking again changes nothing. With `If-Match`, only the
/// version that the client saw is cancelled.
#[utoipa::path(
    post,
    path = "/v1/orders/{id}/cancel",
    tag = "orders",
    operation_id = "cancelOrder",
    params(
        ("id" = Uuid, Path, description = "The order's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the version that the client saw"),
    ),
    responses(
        (status = 202, description = "What was done for it is being undone", body = OrderView),
        (status = 200, description = "It is cancelled", body = OrderView),
        (status = 400, description = "The id is not a UUID, or If-Match neither `*` nor a list of ETags", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such order", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Too late: its payment is being taken, or was", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "It is not at the version that the client saw", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Not at the moment; ask again", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn cancel_order(
    State(state): State<ApiState>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    match state.orders.cancel(OrderId(id), IfMatch::read(&headers)?.as_ref()).await? {
        CancelOutcome::Cancelled(order) => {
            let cancelled = order.status.name() == StatusName::Cancelled;
            Ok(answer(if cancelled { StatusCode::OK } else { StatusCode::ACCEPTED }, *order))
        }
        CancelOutcome::TooLate(order) => Err(too_late(&order)),
        CancelOutcome::Stale => Err(Problem::stale()),
        CancelOutcome::Unknown => Err(no_such_order(id)),
    }
}

fn answer(status: StatusCode, order: Order) -> Response {
    (status, [(header::ETAG, etag_header(&order))], Json(OrderView::from(order))).into_response()
}

fn too_late(order: &Order) -> Problem {
    let what = match order.status.name() {
        StatusName::Confirmed => "It is confirmed and paid.",
        StatusName::Pending | StatusName::Cancelling | StatusName::Cancelled => "Its payment is being taken.",
    };
    Problem::conflict("too-late", "The order can no longer be cancelled").detail(what)
}

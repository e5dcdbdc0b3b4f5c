//! The handler of `POST /v1/orders`: places an order under its Idempotency-Key.

use super::{ApiState, etag, etag_header, prefer, prefer::PreferWait, refused, view::OrderView};
use crate::domain::{Order, OrderStatus, PlaceOrderRequest, PlacedOrder};
use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use saga_core::{
    clock,
    http::{
        Json, Problem,
        idempotency::{self, IdempotencyKey, IdempotentAnswer, Once},
    },
};
use std::time::Duration;

/// The scope that keeps this operation's keys apart from other operations'. The caller joins it once callers are known.
const SCOPE: &str = "POST /v1/orders";

/// Place an order
///
/// The order, its saga and the saga's first command are written together, then the answer is given: 202, and the order
/// is pending. With `Prefer: wait=N` the answer comes when the order is confirmed or cancelled (201), or after N seconds
/// (202), 30 at most; at once (202) when too many requests wait already. A request that is repeated under its Idempotency-Key gets the first answer again and places
/// nothing.
#[utoipa::path(
    post,
    path = "/v1/orders",
    tag = "orders",
    operation_id = "placeOrder",
    params(
        ("Idempotency-Key" = String, Header, description = "New with each new order, the same when a request is repeated", min_length = 1, max_length = 200),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: wait up to N seconds, 30 at most, for the order's end", example = "wait=5"),
    ),
    request_body = PlaceOrderRequest,
    responses(
        (status = 202, description = "Placed; what becomes of it is still open", body = OrderView, headers(
            ("Location" = String, description = "The order"),
            ("ETag" = String, description = "Its version"),
            ("Preference-Applied" = Option<String>, description = "How long was waited for at most"),
            ("Idempotency-Replayed" = Option<String>, description = "`true`: the first answer, given again"),
        )),
        (status = 201, description = "Placed, and confirmed or cancelled within the time that the client waited", body = OrderView),
        (status = 400, description = "No Idempotency-Key, or the body is not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "A request with this Idempotency-Key is being worked on", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "The body is of another type than JSON", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Fields are wrong, each named; or the Idempotency-Key was used for another request", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Not at the moment; repeat it under the same key", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn place_order(
    State(state): State<ApiState>,
    key: IdempotencyKey,
    PreferWait(wait): PreferWait,
    Json(request): Json<PlaceOrderRequest>,
) -> Result<Response, Problem> {
    let order = request.validate().map_err(refused)?;
    let orders = state.orders.clone();
    let done = idempotency::once(&state.orders.pool, SCOPE, &key, &request, move |tx| {
        Box::pin(async move {
            let placed = placed(orders.place_in(tx, order, clock::now()).await?);
            let answer = IdempotentAnswer::json(StatusCode::ACCEPTED, &OrderView::from(placed.clone()))?
                .location(location(&placed))
                .etag(etag(&placed));
            Ok((answer, placed))
        })
    });
    let (answer, placed) = match done.await? {
        Once::Now(answer, placed) => (answer, placed),
        Once::Before(answer) => return Ok(answer.into_response()),
    };
    tracing::info!(order = %placed.id, saga = %placed.id, "order placed");
    match wait {
        Some(wait) => Ok(waited(&state, &placed, wait).await.unwrap_or_else(|| answer.into_response())),
        None => Ok(answer.into_response()),
    }
}

/// The answer after waiting; `None` when the service could not wait. In that case the first answer is as good: the
/// order is placed, and nothing that goes wrong from here on may change that answer.
async fn waited(state: &ApiState, placed: &Order, wait: Duration) -> Option<Response> {
    let settled = state.orders.settle(placed.id, placed.version, wait, &state.shutdown).await;
    let order =
        settled.inspect_err(|error| tracing::warn!(order = %placed.id, %error, "waiting was cut short")).ok()??;
    let status = if order.status.name().is_terminal() { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    let headers = [
        (header::LOCATION, location(&order).parse().ok()?),
        (header::ETAG, etag_header(&order)),
        (prefer::PREFERENCE_APPLIED, prefer::applied(wait)),
    ];
    Some((status, headers, Json(OrderView::from(order))).into_response())
}

fn location(order: &Order) -> String {
    format!("/v1/orders/{}", order.id)
}

/// Builds the order as it was just written.
fn placed(order: PlacedOrder) -> Order {
    Order {
        id: order.id,
        customer: order.customer,
        lines: order.lines,
        total: order.total,
        status: OrderStatus::Pending,
        cause: None,
        stuck: false,
        version: 1,
        placed_at: order.placed_at,
    }
}

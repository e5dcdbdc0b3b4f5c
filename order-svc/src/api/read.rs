//! `GET /v1/orders/{id}` and `GET /v1/orders`.

use super::{ApiState, etag_header, view::OrderView};
use crate::{
    domain::{CustomerId, StatusName},
    store::{self, OrderFilter},
};
use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use contracts::OrderId;
use http::{HeaderMap, StatusCode, header};
use saga_core::http::{Cursor, Json, Limit, List, Path, Problem, Query};
use serde::Deserialize;
use uuid::Uuid;

/// One order
///
/// Its ETag is its version: with `If-None-Match` an order that has not changed is 304.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}",
    tag = "orders",
    operation_id = "getOrder",
    params(
        ("id" = Uuid, Path, description = "The order's id"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of the version that the client has"),
    ),
    responses(
        (status = 200, description = "The order", body = OrderView, headers(("ETag" = String, description = "Its version"))),
        (status = 304, description = "It has not changed"),
        (status = 400, description = "The id is not a UUID", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such order", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn get_order(
    State(state): State<ApiState>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let order = store::find(&state.orders.pool, OrderId(id)).await?.ok_or_else(|| no_such_order(id))?;
    let etag = etag_header(&order);
    if matches(&headers, etag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    Ok(([(header::ETAG, etag)], Json(OrderView::from(order))).into_response())
}

/// Which orders to list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only this customer's
    #[param(value_type = Option<String>, example = "customer-17")]
    customer_id: Option<CustomerId>,
    /// Only those that stand here
    status: Option<StatusName>,
    /// How many at most, 1 to 200
    #[serde(default)]
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200, default = 50)]
    limit: Limit,
    /// `next_cursor` of the page before
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// List orders
///
/// Newest first. An order that is placed while a client turns pages is on the first page, not on a later one.
#[utoipa::path(
    get,
    path = "/v1/orders",
    tag = "orders",
    operation_id = "listOrders",
    params(ListQuery),
    responses(
        (status = 200, description = "A page of orders", body = List<OrderView>),
        (status = 400, description = "A parameter is wrong, and named", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn list_orders(
    State(state): State<ApiState>,
    Query(query): Query<ListQuery>,
) -> Result<Json<List<OrderView>>, Problem> {
    let before = query.cursor.map(|cursor| cursor.key()).transpose()?;
    let filter = OrderFilter { customer: query.customer_id, status: query.status };
    let orders = store::list(&state.orders.pool, &filter, before, query.limit.and_one()).await?;
    Ok(Json(List::page(orders, query.limit, |order| order.id)?.map(OrderView::from)))
}

pub(super) fn no_such_order(id: Uuid) -> Problem {
    Problem::not_found(format!("There is no order {id}."))
}

/// Whether `If-None-Match` names this version, by weak comparison, as RFC 9110 wants it here.
fn matches(headers: &HeaderMap, etag: &[u8]) -> bool {
    headers.get_all(header::IF_NONE_MATCH).iter().any(|value| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii)
            .any(|candidate| candidate == b"*" || candidate.strip_prefix(b"W/").unwrap_or(candidate) == etag)
    })
}

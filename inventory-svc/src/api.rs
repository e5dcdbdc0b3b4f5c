//! The HTTP API and its OpenAPI document.

// `#[utoipa::path]` repeats the handlers' types with a path of its own.
#![allow(unused_qualifications)]

use crate::{
    domain::{BadField, Delta, Item, Price, Text},
    items::{self, ItemChange, ItemError},
    stock::{self, AdjustError, Movement},
};
use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
};
use contracts::{
    OrderId,
    money::{self, Money},
    product::Sku,
};
use http::{HeaderMap, StatusCode, header};
use saga_core::{
    http::{
        Cursor, IfMatch, Json, Limit, List, Path, Problem, Query, REQUEST_MAX,
        idempotency::{self, IdempotencyKey, IdempotentAnswer},
        openapi::complete,
    },
    transaction::Transaction,
};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use time::OffsetDateTime;
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

#[derive(OpenApi)]
#[openapi(
    info(title = "Inventory", description = "Items, stock and reservations."),
    components(schemas(Problem)),
    tags((name = "items", description = "What can be ordered, and how much of it there is"))
)]
struct Document;

/// The routes, with `/openapi.json` and `/docs`.
pub fn router(pool: PgPool) -> Router {
    let documents = SwaggerUi::new("/docs").url("/openapi.json", document());
    routes().with_state(pool).split_for_parts().0.merge(documents)
}

/// The API's description.
pub fn document() -> utoipa::openapi::OpenApi {
    complete(routes().split_for_parts().1)
}

fn routes() -> OpenApiRouter<PgPool> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(create, list))
        .routes(routes!(read, change))
        .routes(routes!(adjust))
        .routes(routes!(movements))
}

/// A new item.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewItem {
    /// 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'.
    #[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,64}$", example = "WIDGET-1")]
    sku: Sku,
    /// 1 to 200 characters.
    #[schema(min_length = 1, max_length = 200, example = "Widget")]
    name: String,
    /// What one piece costs.
    #[serde(deserialize_with = "money::strictly")]
    unit_price: Money,
}

/// The changes of an item; a field that is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ItemPatch {
    /// 1 to 200 characters.
    #[schema(min_length = 1, max_length = 200)]
    name: Option<String>,
    /// What one piece costs from now on. Orders that were placed keep their price.
    #[serde(default, deserialize_with = "money::strictly_if_any")]
    unit_price: Option<Money>,
}

/// An item as it is now.
#[derive(Debug, Serialize, ToSchema)]
struct ItemView {
    #[schema(value_type = String, example = "WIDGET-1")]
    sku: Sku,
    name: String,
    unit_price: Money,
    /// Pieces that are free.
    on_hand: i64,
    /// Pieces that are put aside for orders.
    reserved: i64,
    /// Counts the changes of name and price; the ETag, without its quotes.
    version: i64,
}

/// Pieces to be added, or taken away when negative.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Adjustment {
    /// Not 0; at most a thousand million either way.
    #[schema(example = 100)]
    delta: i64,
    /// The reason, for readers of the ledger; 1 to 200 characters.
    #[schema(min_length = 1, max_length = 200, example = "delivery 4711")]
    reason: String,
}

/// An adjustment as it was made.
#[derive(Debug, Serialize, ToSchema)]
struct AdjustmentView {
    /// The id of its row in the ledger.
    movement: i64,
    #[schema(value_type = String, example = "WIDGET-1")]
    sku: Sku,
    delta: i64,
    /// Pieces that were free after it.
    on_hand: i64,
    /// Pieces that were put aside after it.
    reserved: i64,
}

/// A row of an item's ledger.
#[derive(Debug, Serialize, ToSchema)]
struct MovementView {
    id: i64,
    /// `adjusted`, `reserved`, `released` or `committed`.
    kind: String,
    on_hand_delta: i64,
    reserved_delta: i64,
    /// The order that the pieces are for; absent for an adjustment.
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<OrderId>,
    /// The reason of an adjustment; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    moved_at: OffsetDateTime,
}

/// The page of a list to return.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields, default)]
struct Page {
    /// Rows of the page, 1 to 200.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 200)]
    limit: Limit,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// Create an item; its stock is 0.
#[utoipa::path(
    post, path = "/v1/items", tag = "items", operation_id = "createItem", request_body = NewItem,
    params(("idempotency-key" = String, Header, description = "new with each new request")),
    responses(
        (status = 201, body = ItemView, headers(("location" = String), ("etag" = String))),
        (status = 400, description = "no Idempotency-Key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "the sku is taken, or in flight", body = Problem,
         content_type = "application/problem+json"),
        (status = 422, description = "a field is wrong, or the key was used for something else", body = Problem,
         content_type = "application/problem+json"),
    )
)]
async fn create(
    State(pool): State<PgPool>,
    key: IdempotencyKey,
    Json(body): Json<NewItem>,
) -> Result<Response, Problem> {
    let (name, price) = both(Text::parse("name", &body.name), Price::parse(body.unit_price))?;
    let sku = body.sku.clone();
    let done = idempotency::once(&pool, "POST /v1/items", &key, &body, move |tx| {
        Box::pin(async move {
            let item = items::create_in(tx, &sku, &name, price).await.map_err(item_problem)?;
            let (location, etag) = (format!("/v1/items/{}", item.sku), etag(&item));
            Ok((IdempotentAnswer::json(StatusCode::CREATED, &view(item))?.location(location).etag(etag), ()))
        })
    });
    Ok(done.await?.into_response())
}

/// Items by sku.
#[utoipa::path(
    get, path = "/v1/items", tag = "items", operation_id = "listItems", params(Page),
    responses((status = 200, body = List<ItemView>))
)]
async fn list(State(pool): State<PgPool>, Query(page): Query<Page>) -> Result<Json<List<ItemView>>, Problem> {
    let after: Option<Sku> = page.cursor.as_ref().map(Cursor::key).transpose()?;
    let rows = items::list(&pool, after.as_ref(), page.limit.and_one()).await?;
    Ok(Json(List::page(rows, page.limit, |item| item.sku.clone())?.map(view)))
}

/// One item.
#[utoipa::path(
    get, path = "/v1/items/{sku}", tag = "items", operation_id = "getItem", params(("sku" = String, Path)),
    responses(
        (status = 200, body = ItemView, headers(("etag" = String))),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
async fn read(State(pool): State<PgPool>, Path(sku): Path<String>) -> Result<Response, Problem> {
    let sku = known(&sku)?;
    let item = items::find(&pool, &sku).await?.ok_or_else(|| unknown(&sku))?;
    Ok(answer(item).into_response())
}

/// Change an item's name or price.
#[utoipa::path(
    patch, path = "/v1/items/{sku}", tag = "items", operation_id = "changeItem", request_body = ItemPatch,
    params(("sku" = String, Path), ("if-match" = String, Header, description = "the item's ETag")),
    responses(
        (status = 200, body = ItemView, headers(("etag" = String))),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "it was changed", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "a field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 428, description = "no If-Match", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn change(
    State(pool): State<PgPool>,
    Path(sku): Path<String>,
    headers: HeaderMap,
    Json(body): Json<ItemPatch>,
) -> Result<Response, Problem> {
    let sku = known(&sku)?;
    let seen = if_match(&headers)?;
    let seen = |version: i64| seen.allows(&version.to_string());
    let name = body.name.map(|name| Text::parse("name", &name)).transpose();
    let unit_price = body.unit_price.map(Price::parse).transpose();
    let (name, unit_price) = both(name, unit_price)?;
    let mut tx = Transaction::begin(&pool, REQUEST_MAX).await?;
    let item = items::change_in(&mut tx, &sku, &ItemChange { name, unit_price }, seen).await.map_err(item_problem)?;
    tx.commit().await?;
    Ok(answer(item).into_response())
}

/// Add pieces to an item's stock, or take them away.
#[utoipa::path(
    post, path = "/v1/items/{sku}/adjustments", tag = "items", operation_id = "adjustStock", request_body = Adjustment,
    params(("sku" = String, Path), ("idempotency-key" = String, Header, description = "new with each new request")),
    responses(
        (status = 201, body = AdjustmentView),
        (status = 400, description = "no Idempotency-Key", body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "not that many, or in flight", body = Problem,
         content_type = "application/problem+json"),
        (status = 422, description = "a field is wrong, or the key was used for something else", body = Problem,
         content_type = "application/problem+json"),
    )
)]
async fn adjust(
    State(pool): State<PgPool>,
    Path(sku): Path<String>,
    key: IdempotencyKey,
    Json(body): Json<Adjustment>,
) -> Result<Response, Problem> {
    let sku = known(&sku)?;
    let (delta, reason) = both(Delta::parse(body.delta), Text::parse("reason", &body.reason))?;
    let request = (sku.clone(), body);
    let done = idempotency::once(&pool, "POST /v1/items/{sku}/adjustments", &key, &request, move |tx| {
        Box::pin(async move {
            let adjusted = stock::adjust_in(tx, &sku, delta, &reason).await.map_err(adjust_problem)?;
            let view = AdjustmentView {
                movement: adjusted.movement,
                sku,
                delta: delta.get(),
                on_hand: adjusted.on_hand,
                reserved: adjusted.reserved,
            };
            Ok((IdempotentAnswer::json(StatusCode::CREATED, &view)?, ()))
        })
    });
    Ok(done.await?.into_response())
}

/// An item's ledger, newest first: why its stock is what it is.
#[utoipa::path(
    get, path = "/v1/items/{sku}/movements", tag = "items", operation_id = "listMovements", params(("sku" = String, Path), Page),
    responses(
        (status = 200, body = List<MovementView>),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    )
)]
async fn movements(
    State(pool): State<PgPool>,
    Path(sku): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<List<MovementView>>, Problem> {
    let sku = known(&sku)?;
    let before: i64 = page.cursor.as_ref().map_or(Ok(i64::MAX), Cursor::key)?;
    let rows = stock::movements(&pool, &sku, before, page.limit.and_one()).await?;
    if rows.is_empty() && items::find(&pool, &sku).await?.is_none() {
        return Err(unknown(&sku));
    }
    Ok(Json(List::page(rows, page.limit, |row| row.id)?.map(movement_view)))
}

fn view(item: Item) -> ItemView {
    let Item { sku, name, unit_price, version, on_hand, reserved } = item;
    ItemView { sku, name, unit_price, on_hand, reserved, version }
}

fn movement_view(row: Movement) -> MovementView {
    let Movement { id, kind, on_hand_delta, reserved_delta, order, reason, moved_at } = row;
    MovementView { id, kind, on_hand_delta, reserved_delta, order, reason, moved_at }
}

fn answer(item: Item) -> impl IntoResponse {
    ([(header::ETAG, etag(&item))], Json(view(item)))
}

fn etag(item: &Item) -> String {
    format!("\"{}\"", item.version)
}

/// A sku in a path that is not well-formed belongs to no item.
fn known(sku: &str) -> Result<Sku, Problem> {
    sku.parse().map_err(|_| unknown(sku))
}

fn unknown(sku: impl std::fmt::Display) -> Problem {
    Problem::not_found(format!("There is no item {:?}.", sku.to_string().chars().take(64).collect::<String>()))
}

/// Two parsed values, or every field that is wrong.
fn both<A, B>(a: Result<A, BadField>, b: Result<B, BadField>) -> Result<(A, B), Problem> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (a, b) => {
            let wrong = a.err().into_iter().chain(b.err());
            Err(wrong.fold(Problem::validation(Vec::new()), |problem, bad| problem.with_field(bad.field, bad.message)))
        }
    }
}

fn if_match(headers: &HeaderMap) -> Result<IfMatch, Problem> {
    IfMatch::read(headers)?.ok_or_else(|| {
        Problem::new(StatusCode::PRECONDITION_REQUIRED, "if-match", "An If-Match is needed")
            .detail("Read the item and send its ETag, so that nobody's change is overwritten unseen.")
            .with_field("If-Match", "is required")
    })
}

fn item_problem(error: ItemError) -> Problem {
    match error {
        ItemError::Exists(sku) => Problem::conflict("item-exists", "The sku is taken")
            .detail(format!("There is an item {sku} already."))
            .with_field("sku", "is taken"),
        ItemError::Unknown(sku) => unknown(sku),
        ItemError::Stale { .. } => Problem::stale(),
        ItemError::Database(error) => error.into(),
        ItemError::Append(error) => sqlx::Error::from(error).into(),
        ItemError::Event(error) => error.into(),
    }
}

fn adjust_problem(error: AdjustError) -> Problem {
    match error {
        AdjustError::Unknown(sku) => unknown(sku),
        AdjustError::Negative => Problem::conflict("out-of-stock", "There is not that much on hand")
            .with_field("delta", "takes away more than is on hand"),
        AdjustError::TooMany => Problem::conflict("too-many", "The books cannot hold that many")
            .with_field("delta", "adds more than can be counted"),
        AdjustError::Database(error) => error.into(),
    }
}

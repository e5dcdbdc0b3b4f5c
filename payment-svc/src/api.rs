//! The HTTP API: payments and the ledger that explains them. Reads only: payments are changed by commands.

#![allow(unused_qualifications, reason = "utoipa writes the path of a query extractor out")]

use crate::{
    domain::Status,
    store::{self, Entry, PaymentFilter, Recorded, RecordedDifference},
};
use axum::{Router, extract::State};
use contracts::{OrderId, money::Money};
use saga_core::http::{Cursor, Json, Limit, List, Path, Problem, Query, TimeKey, openapi::complete};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use time::OffsetDateTime;
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;
use uuid::Uuid;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Payments",
        description = "What became of the payment of each order, and the ledger that explains it. Payments are changed by \
                       commands on `payments.commands`."
    ),
    tags((name = "payments", description = "Payments and their ledger"))
)]
struct Document;

/// The API's routes, its description at `/openapi.json` and a page to try it at `/docs`.
pub fn router(pool: PgPool) -> Router {
    let router: Router = documented().split_for_parts().0.with_state(pool);
    router.merge(SwaggerUi::new("/docs").url("/openapi.json", document()))
}

/// The API's description, generated from its handlers.
pub fn document() -> utoipa::openapi::OpenApi {
    complete(documented().split_for_parts().1)
}

fn documented() -> OpenApiRouter<PgPool> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(list_payments))
        .routes(routes!(get_payment))
        .routes(routes!(get_ledger))
}

/// A payment as it is now.
#[derive(Debug, Serialize, ToSchema)]
pub struct PaymentView {
    /// The order that is paid.
    order: OrderId,
    /// The id of the paying customer.
    customer: String,
    /// The amount to pay, with its currency.
    amount: Money,
    /// The payment's status.
    #[schema(example = "authorized")]
    status: &'static str,
    /// The code of the gateway's refusal; absent unless declined.
    #[serde(skip_serializing_if = "Option::is_none")]
    decline_reason: Option<String>,
    /// The gateway's reference of the authorization.
    #[serde(skip_serializing_if = "Option::is_none")]
    authorization: Option<String>,
    /// The gateway's reference of the capture.
    #[serde(skip_serializing_if = "Option::is_none")]
    capture: Option<String>,
    /// Minor units held at the gateway.
    held: i64,
    /// Minor units that were taken.
    captured: i64,
    /// Minor units given back of what was taken.
    refunded: i64,
    /// The answer that leaves the payment in doubt: it has another amount or currency than was asked for. Absent
    /// otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    in_doubt: Option<DifferenceView>,
    /// When the payment was first asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When the payment last changed.
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
}

/// An answer of the gateway of another amount or currency than was asked for. It settled nothing.
#[derive(Debug, Serialize, ToSchema)]
pub struct DifferenceView {
    /// The difference in words.
    #[schema(example = "asked to capture 1000 EUR, the gateway answered 999 EUR")]
    reason: String,
    /// `authorize`, `void`, `capture` or `refund`.
    movement: String,
    /// The amount that was asked for.
    asked: Money,
    /// The amount that was answered.
    answered: Money,
    /// The gateway's reference in that answer.
    reference: String,
    /// When the gateway first answered so.
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
}

/// One side of a movement of money; the entries of a payment add up to nothing.
#[derive(Debug, Serialize, ToSchema)]
pub struct EntryView {
    /// The entry's id; it grows along the ledger.
    id: i64,
    /// `authorize`, `void`, `capture` or `refund`.
    movement: String,
    /// `customer`, `held` or `merchant`.
    account: String,
    /// The amount in minor units, negative where the account loses it.
    amount: i64,
    /// The gateway's reference of the operation.
    reference: String,
    /// When the entry was made.
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
}

/// The ledger of one order's payment.
#[derive(Debug, Serialize, ToSchema)]
pub struct LedgerView {
    /// The order that is paid.
    order: OrderId,
    /// The entries, oldest first.
    entries: Vec<EntryView>,
    /// What was asked for and answered otherwise, oldest first; none of it is an entry.
    differences: Vec<DifferenceView>,
}

/// The payments to list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only payments of this status: `authorizing`, `authorized`, `declined`, `captured` or `voided`; all when left
    /// out.
    #[param(inline)]
    status: Option<StatusName>,
    /// Only this customer's payments; all customers' when left out.
    customer: Option<String>,
    /// The most rows of the page, 1 to 200; 50 when left out.
    #[serde(default)]
    #[param(value_type = Option<u32>)]
    limit: Limit,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<Cursor>,
}

/// The status of a payment.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StatusName {
    /// The gateway is being asked.
    Authorizing,
    /// The money is held.
    Authorized,
    /// The gateway refused; nothing is held.
    Declined,
    /// The money was taken.
    Captured,
    /// The gateway holds nothing, and will not.
    Voided,
}

/// Payments, newest first
#[utoipa::path(get, path = "/v1/payments", tag = "payments", operation_id = "listPayments", params(ListQuery),
    responses((status = 200, body = List<PaymentView>), (status = 400, body = Problem)))]
pub async fn list_payments(
    State(pool): State<PgPool>,
    Query(query): Query<ListQuery>,
) -> Result<Json<List<PaymentView>>, Problem> {
    let filter =
        PaymentFilter { status: query.status.map(|status| status.name().to_owned()), customer: query.customer };
    let after = query.cursor.map(|cursor| cursor.key::<(TimeKey, Uuid)>()).transpose()?;
    let after = after.map(|(TimeKey(at), order)| (at, order));
    let rows = store::list(&pool, &filter, after, query.limit.and_one()).await?;
    let page = List::page(rows, query.limit, |row| (TimeKey(row.created_at), row.payment.order.0))?;
    let orders: Vec<_> = page.items.iter().map(|row| row.payment.order).collect();
    let mut doubts = store::in_doubt(&pool, &orders).await?;
    Ok(Json(page.map(|row| {
        let doubt = doubts.remove(&row.payment.order);
        view(row, doubt)
    })))
}

/// The payment of an order
#[utoipa::path(get, path = "/v1/payments/{order}", tag = "payments", operation_id = "getPayment", params(("order" = uuid::Uuid, Path)),
    responses((status = 200, body = PaymentView), (status = 404, body = Problem)))]
pub async fn get_payment(State(pool): State<PgPool>, Path(order): Path<OrderId>) -> Result<Json<PaymentView>, Problem> {
    let found = store::find(&pool, order).await?.ok_or_else(|| no_payment(order))?;
    let doubt = store::in_doubt(&pool, &[order]).await?.remove(&order);
    Ok(Json(view(found, doubt)))
}

/// The ledger of an order's payment
#[utoipa::path(get, path = "/v1/payments/{order}/ledger", tag = "payments", operation_id = "getLedger", params(("order" = uuid::Uuid, Path)),
    responses((status = 200, body = LedgerView), (status = 404, body = Problem)))]
pub async fn get_ledger(State(pool): State<PgPool>, Path(order): Path<OrderId>) -> Result<Json<LedgerView>, Problem> {
    store::find(&pool, order).await?.ok_or_else(|| no_payment(order))?;
    let entries = store::ledger(&pool, order).await?.into_iter().map(EntryView::from).collect();
    let differences = store::differences(&pool, order).await?.into_iter().map(DifferenceView::from).collect();
    Ok(Json(LedgerView { order, entries, differences }))
}

fn no_payment(order: OrderId) -> Problem {
    Problem::not_found(format!("No payment of order {order} was ever asked for."))
}

fn view(Recorded { payment, created_at, updated_at }: Recorded, doubt: Option<RecordedDifference>) -> PaymentView {
    let mut view = PaymentView {
        order: payment.order,
        customer: payment.customer,
        amount: payment.amount,
        status: payment.status.name(),
        decline_reason: None,
        authorization: None,
        capture: None,
        held: 0,
        captured: 0,
        refunded: 0,
        in_doubt: doubt.map(DifferenceView::from),
        created_at,
        updated_at,
    };
    match payment.status {
        Status::Authorizing | Status::Voided => {}
        Status::Declined { reason } => view.decline_reason = Some(reason),
        Status::Authorized { authorization } => {
            view.authorization = Some(authorization);
            view.held = payment.amount.amount;
        }
        Status::Captured { authorization, capture, refunded, .. } => {
            view.authorization = Some(authorization);
            view.capture = Some(capture);
            view.captured = payment.amount.amount;
            view.refunded = refunded;
        }
    }
    view
}

impl From<RecordedDifference> for DifferenceView {
    fn from(difference: RecordedDifference) -> Self {
        let reason = difference.reason();
        let RecordedDifference { movement, asked, answered, reference, at, .. } = difference;
        Self { reason, movement, asked, answered, reference, at }
    }
}

impl From<Entry> for EntryView {
    fn from(Entry { id, movement, account, amount, reference, at }: Entry) -> Self {
        Self { id, movement, account, amount, reference, at }
    }
}

impl StatusName {
    fn name(self) -> &'static str {
        match self {
            Self::Authorizing => "authorizing",
            Self::Authorized => "authorized",
            Self::Declined => "declined",
            Self::Captured => "captured",
            Self::Voided => "voided",
        }
    }
}

//! The SQL of orders: the only file that touches `orders`, `order_line` and `order_status_history`.
//!
//! Invariant: an order, its history and the event that tells of it change in one transaction, the caller's; every
//! function that writes says so with `_in`. Each locks the order's row before it appends to the outbox, so the events of
//! one order leave in the order of its history. When the process dies here, the transaction never happened.

use crate::domain::{Change, NotAllowed, Order, OrderStatus, PlaceOrder, PricedLine, StatusName};
use contracts::{
    OrderId,
    money::Money,
    orders::{OrderCancelled, OrderConfirmed, OrderPlaced},
    topics::ORDERS_EVENTS,
};
use saga_core::outbox::{self, NewMessage, Tx};
use sqlx::{PgExecutor, Row, postgres::PgRow};
use std::str::FromStr;
use time::OffsetDateTime;
use uuid::Uuid;

/// Why an order was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database said no.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// The graph does not have this change.
    #[error("order {order}: {source}")]
    NotAllowed {
        /// Which order.
        order: OrderId,
        /// What was tried.
        source: NotAllowed,
    },
    /// There is no such order.
    #[error("there is no order {0}")]
    Unknown(OrderId),
    /// An event could not be written as JSON.
    #[error("an order's event could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// An event could not be appended to the outbox.
    #[error(transparent)]
    Append(#[from] outbox::AppendError),
}

/// One row of an order's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// 1 when placed, one more with each change.
    pub sequence: i64,
    /// Where the order stood from then on.
    pub status: OrderStatus,
    /// Since when.
    pub at: OffsetDateTime,
}

/// What to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only this customer's.
    pub customer: Option<String>,
    /// Only those that stand here.
    pub status: Option<StatusName>,
}

/// Writes a placed order with its lines, the first row of its history, and the event.
pub async fn insert_in(tx: &mut Tx<'_>, order: &PlaceOrder) -> Result<(), StoreError> {
    let lines = &order.lines;
    sqlx::query(
        "with placed as (
            insert into orders (id, customer, total, currency, placed_at)
            values ($1, $2, $3, $4, $5)
         ), lines as (
            insert into order_line (order_id, position, sku, quantity, unit_price)
            select $1, line.ordinality - 1, line.sku, line.quantity, line.unit_price
            from unnest($6::text[], $7::bigint[], $8::bigint[]) with ordinality as line (sku, quantity, unit_price)
         )
         insert into order_status_history (order_id, sequence, status, at)
         values ($1, 1, 'pending', $5)",
    )
    .bind(order.order.0)
    .bind(order.customer.as_str())
    .bind(order.total.amount)
    .bind(order.total.currency.as_str())
    .bind(order.placed_at)
    .bind(lines.iter().map(|line| line.sku.as_str()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.quantity.get()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.unit_price.amount).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    let event = message(order.order, OrderPlaced::TYPE, &order.event())?;
    Ok(outbox::append_in(tx, &[event]).await?)
}

/// Moves an order along the graph: its row, its history, and the event where the world is told of the change.
pub async fn change_in(
    tx: &mut Tx<'_>,
    order: OrderId,
    change: Change,
    now: OffsetDateTime,
) -> Result<OrderStatus, StoreError> {
    let current = status_for_update_in(tx, order).await?;
    let next = current.transition(change, now).map_err(|source| StoreError::NotAllowed { order, source })?;
    sqlx::query(
        "with changed as (
            update orders
            set    status = $3, reason = $4, closed_at = $5, version = version + 1
            where  id = $1 and status = $2
            returning version
         )
         insert into order_status_history (order_id, sequence, previous, status, reason, at)
         select $1, version, $2, $3, $4, $6 from changed",
    )
    .bind(order.0)
    .bind(current.name().as_str())
    .bind(next.name().as_str())
    .bind(next.reason().map(|reason| reason.as_str()))
    .bind(next.closed_at())
    .bind(now)
    .execute(&mut **tx)
    .await?;
    let event = match next {
        OrderStatus::Confirmed { .. } => Some(message(order, OrderConfirmed::TYPE, &OrderConfirmed { order })?),
        OrderStatus::Cancelled { reason, .. } => {
            let cancelled = OrderCancelled { order, reason: reason.to_string() };
            Some(message(order, OrderCancelled::TYPE, &cancelled)?)
        }
        OrderStatus::Pending | OrderStatus::Cancelling { .. } => None,
    };
    outbox::append_in(tx, event.as_slice()).await?;
    Ok(next)
}

/// Locks an order's row to the end of the transaction and says where the order stands.
pub async fn status_for_update_in(tx: &mut Tx<'_>, order: OrderId) -> Result<OrderStatus, StoreError> {
    let row = sqlx::query("select status, reason, closed_at from orders where id = $1 for update")
        .bind(order.0)
        .fetch_optional(&mut **tx)
        .await?
        .ok_or(StoreError::Unknown(order))?;
    Ok(assemble(&row, parsed(&row, "status")?, row.try_get("closed_at")?)?)
}

/// The columns that [`to_order`] reads; `tail` says which orders.
macro_rules! select_orders {
    ($tail:literal) => {
        concat!(
            "select o.id, o.customer, o.total, o.currency, o.status, o.reason, o.closed_at, o.version, o.placed_at,
                    line.skus, line.quantities, line.unit_prices
             from   orders o
             cross join lateral (
                 select array_agg(sku        order by position) as skus,
                        array_agg(quantity   order by position) as quantities,
                        array_agg(unit_price order by position) as unit_prices
                 from   order_line
                 where  order_id = o.id
             ) line ",
            $tail
        )
    };
}

/// One order, if there is one.
pub async fn find(db: impl PgExecutor<'_>, order: OrderId) -> Result<Option<Order>, sqlx::Error> {
    let row = sqlx::query(select_orders!("where o.id = $1")).bind(order.0).fetch_optional(db).await?;
    row.map(|row| to_order(&row)).transpose()
}

/// Up to `limit` orders, newest first, that were placed before `before`. Each combination of filters is a statement of
/// its own, so that each is planned for its own index (a generic plan for `$1 is null or …` uses none).
pub async fn list(
    db: impl PgExecutor<'_>,
    filter: &Filter,
    before: Option<OrderId>,
    limit: i64,
) -> Result<Vec<Order>, sqlx::Error> {
    let before = before.map_or(Uuid::max(), |order| order.0);
    let status = filter.status.map(StatusName::as_str);
    let query = match (&filter.customer, status) {
        (None, None) => sqlx::query(select_orders!("where o.id < $1 order by o.id desc limit $2")),
        (Some(_), None) => {
            sqlx::query(select_orders!("where o.id < $1 and o.customer = $3 order by o.id desc limit $2"))
        }
        (None, Some(_)) => sqlx::query(select_orders!("where o.id < $1 and o.status = $3 order by o.id desc limit $2")),
        (Some(_), Some(_)) => sqlx::query(select_orders!(
            "where o.id < $1 and o.customer = $3 and o.status = $4 order by o.id desc limit $2"
        )),
    };
    let query = query.bind(before).bind(limit);
    let query = filter.customer.iter().map(String::as_str).chain(status).fold(query, |query, value| query.bind(value));
    query.fetch_all(db).await?.iter().map(to_order).collect()
}

/// The rows of an order's history that come after `sequence`.
pub async fn history_after(
    db: impl PgExecutor<'_>,
    order: OrderId,
    sequence: i64,
) -> Result<Vec<HistoryEntry>, sqlx::Error> {
    sqlx::query(
        "select sequence, status, reason, at
         from   order_status_history
         where  order_id = $1 and sequence > $2
         order  by sequence",
    )
    .bind(order.0)
    .bind(sequence)
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| {
        let at = row.try_get("at")?;
        let name: StatusName = parsed(row, "status")?;
        let status = assemble(row, name, name.is_terminal().then_some(at))?;
        Ok(HistoryEntry { sequence: row.try_get("sequence")?, status, at })
    })
    .collect()
}

/// The versions of those of `orders` that exist.
pub async fn versions(db: impl PgExecutor<'_>, orders: &[Uuid]) -> Result<Vec<(OrderId, i64)>, sqlx::Error> {
    let rows = sqlx::query_as("select id, version from orders where id = any($1)").bind(orders).fetch_all(db).await?;
    Ok(rows.into_iter().map(|(id, version)| (OrderId(id), version)).collect())
}

fn message<T: serde::Serialize>(order: OrderId, kind: &str, event: &T) -> Result<NewMessage, serde_json::Error> {
    NewMessage::json(ORDERS_EVENTS.name, &order.to_string(), kind, event)
}

fn to_order(row: &PgRow) -> Result<Order, sqlx::Error> {
    let currency = parsed(row, "currency")?;
    let skus: Vec<String> = row.try_get("skus")?;
    let quantities: Vec<i64> = row.try_get("quantities")?;
    let prices: Vec<i64> = row.try_get("unit_prices")?;
    let lines = skus.into_iter().zip(quantities).zip(prices).map(|((sku, quantity), amount)| {
        Ok(PricedLine {
            sku: sku.parse().map_err(|error| undecodable("skus", error))?,
            quantity: quantity.try_into().map_err(|error| undecodable("quantities", error))?,
            unit_price: Money { amount, currency },
        })
    });
    Ok(Order {
        id: OrderId(row.try_get("id")?),
        customer: parsed(row, "customer")?,
        lines: lines.collect::<Result<_, sqlx::Error>>()?,
        total: Money { amount: row.try_get("total")?, currency },
        status: assemble(row, parsed(row, "status")?, row.try_get("closed_at")?)?,
        version: row.try_get("version")?,
        placed_at: row.try_get("placed_at")?,
    })
}

fn assemble(row: &PgRow, name: StatusName, closed_at: Option<OffsetDateTime>) -> Result<OrderStatus, sqlx::Error> {
    let reason = match row.try_get::<Option<&str>, _>("reason")? {
        Some(text) => Some(text.parse().map_err(|error| undecodable("reason", error))?),
        None => None,
    };
    OrderStatus::from_parts(name, reason, closed_at).ok_or_else(|| undecodable("status", "does not fit its data"))
}

fn parsed<T: FromStr<Err: Into<sqlx::error::BoxDynError>>>(row: &PgRow, column: &str) -> Result<T, sqlx::Error> {
    row.try_get::<&str, _>(column)?.parse().map_err(|error| undecodable(column, error))
}

fn undecodable(column: &str, error: impl Into<sqlx::error::BoxDynError>) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.into(), source: error.into() }
}

//! The SQL of orders: the only file that touches `orders`, `order_line` and `order_status_history`.
//!
//! Invariant: an order, its history and the event that announces the change move in one transaction, the caller's.
//! Every function that writes in it ends in `_in`. Each locks the order's row before it appends to the outbox, so the
//! events of one order leave in the order of its history. When the process dies here, the transaction never happened.

use crate::domain::{CustomerId, NotAllowed, Order, OrderStatus, PlacedOrder, PricedLine, StatusChange, StatusName};
use contracts::{
    OrderId,
    money::{Currency, Money},
    orders::{OrderCancelled, OrderConfirmed, OrderPlaced},
    topics::ORDERS_EVENTS,
};
use saga_core::outbox::{self, NewMessage, Tx};
use sqlx::{PgExecutor, Row, postgres::PgRow};
use std::{collections::HashMap, str::FromStr};
use time::OffsetDateTime;
use uuid::Uuid;

/// Why an order was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    /// The graph does not have this change.
    #[error("order {order}: {source}")]
    NotAllowed {
        /// The order that the change was for.
        order: OrderId,
        /// The change that was tried.
        source: NotAllowed,
    },
    /// There is no order of this id.
    #[error("there is no order {0}")]
    Unknown(OrderId),
    /// An event could not be written as JSON.
    #[error("an order's event could not be encoded")]
    Encode(#[from] serde_json::Error),
    /// An event could not be appended to the outbox.
    #[error("{0}")]
    Append(#[from] outbox::AppendError),
}

/// One row of an order's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryEntry {
    /// 1 when placed, one more with each change.
    pub sequence: i64,
    /// The status of the order from then on.
    pub status: OrderStatus,
    /// When the order got this status.
    pub at: OffsetDateTime,
}

/// The orders to list; both fields `None`: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrderFilter {
    /// Only this customer's orders; `None`: all customers'.
    pub customer: Option<CustomerId>,
    /// Only orders of this status; `None`: of any.
    pub status: Option<StatusName>,
}

/// Writes a placed order with its lines, the first row of its history, and the event.
pub async fn insert_in(tx: &mut Tx<'_>, order: &PlacedOrder) -> Result<(), StoreError> {
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
    .bind(order.id.0)
    .bind(order.customer.as_str())
    .bind(order.total.amount)
    .bind(order.total.currency.as_str())
    .bind(order.placed_at)
    .bind(lines.iter().map(|line| line.sku.as_str()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.quantity.get()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.unit_price.amount).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    let event = message(order.id, OrderPlaced::TYPE, &order.event())?;
    Ok(outbox::append_in(tx, &[event]).await?)
}

/// Moves orders along the graph: their rows, their histories, and the events that announce a change. It takes four
/// statements, whatever the number of orders; each order stands in `changes` once. Nothing is written when one of them
/// is refused.
pub async fn change_in(
    tx: &mut Tx<'_>,
    changes: &[(OrderId, StatusChange)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    let current = statuses_for_update_in(tx, changes.iter().map(|(order, _)| order.0).collect()).await?;
    let mut moves = Vec::with_capacity(changes.len());
    let mut events = Vec::with_capacity(changes.len());
    for &(order, change) in changes {
        let (from, _) = *current.get(&order).ok_or(StoreError::Unknown(order))?;
        let to = from.transition(change, now).map_err(|source| StoreError::NotAllowed { order, source })?;
        events.extend(event_of(order, to)?);
        moves.push((order, from, to));
    }
    sqlx::query(
        "with changed as (
             update orders o
                set status = move.status, reason = move.reason, closed_at = move.closed_at, version = o.version + 1
               from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::timestamptz[])
                        as move (id, previous, status, reason, closed_at)
              where o.id = move.id and o.status = move.previous
          returning o.id, o.version, move.previous, o.status, o.reason
         )
         insert into order_status_history (order_id, sequence, previous, status, reason, at)
         select id, version, previous, status, reason, $6
           from changed",
    )
    .bind(moves.iter().map(|(order, _, _)| order.0).collect::<Vec<_>>())
    .bind(moves.iter().map(|(_, from, _)| from.name().as_str()).collect::<Vec<_>>())
    .bind(moves.iter().map(|(_, _, to)| to.name().as_str()).collect::<Vec<_>>())
    .bind(moves.iter().map(|(_, _, to)| to.reason().map(|reason| reason.as_str())).collect::<Vec<_>>())
    .bind(moves.iter().map(|(_, _, to)| to.closed_at()).collect::<Vec<_>>())
    .bind(now)
    .execute(&mut **tx)
    .await?;
    Ok(outbox::append_in(tx, &events).await?)
}

/// Notes what made a step of each order's saga fail.
pub async fn note_causes_in(tx: &mut Tx<'_>, causes: &[(OrderId, &str)]) -> Result<(), StoreError> {
    if causes.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update orders o set cause = noted.cause from unnest($1::uuid[], $2::text[]) as noted (id, cause) where o.id = noted.id",
    )
    .bind(causes.iter().map(|(order, _)| order.0).collect::<Vec<_>>())
    .bind(causes.iter().map(|(_, cause)| *cause).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Locks an order's row to the end of the transaction and returns the order's status and version.
pub async fn status_for_update_in(tx: &mut Tx<'_>, order: OrderId) -> Result<(OrderStatus, i64), StoreError> {
    statuses_for_update_in(tx, vec![order.0]).await?.remove(&order).ok_or(StoreError::Unknown(order))
}

async fn statuses_for_update_in(
    tx: &mut Tx<'_>,
    orders: Vec<Uuid>,
) -> Result<HashMap<OrderId, (OrderStatus, i64)>, sqlx::Error> {
    // `order by` is the order in which rows are locked, here as everywhere: by id.
    sqlx::query("select id, status, reason, closed_at, version from orders where id = any($1) order by id for update")
        .bind(orders)
        .fetch_all(&mut **tx)
        .await?
        .iter()
        .map(|row| {
            let status = assemble(row, parsed(row, "status")?, row.try_get("closed_at")?)?;
            Ok((OrderId(row.try_get("id")?), (status, row.try_get("version")?)))
        })
        .collect()
}

fn event_of(order: OrderId, status: OrderStatus) -> Result<Option<NewMessage>, serde_json::Error> {
    match status {
        OrderStatus::Confirmed { .. } => message(order, OrderConfirmed::TYPE, &OrderConfirmed { order }).map(Some),
        OrderStatus::Cancelled { reason, .. } => {
            let cancelled = OrderCancelled { order, reason: reason.to_string() };
            message(order, OrderCancelled::TYPE, &cancelled).map(Some)
        }
        // A promise between the customer and this service: other services learn only of the outcome.
        OrderStatus::Pending | OrderStatus::Cancelling { .. } => Ok(None),
    }
}

/// The columns that [`to_order`] reads; `tail` selects the orders.
macro_rules! select_orders {
    ($tail:literal) => {
        concat!(
            "select o.id, o.customer, o.total, o.currency, o.status, o.reason, o.cause, o.closed_at, o.version, o.placed_at,
                    exists (select from saga where saga_id = o.id and saga.status = 'stuck') as stuck,
                    line.skus, line.quantities, line.unit_prices
               from orders o
              cross join lateral (
                    select array_agg(sku        order by position) as skus,
                           array_agg(quantity   order by position) as quantities,
                           array_agg(unit_price order by position) as unit_prices
                      from order_line
                     where order_id = o.id
              ) line ",
            $tail
        )
    };
}

/// Finds an order by its id; `None` if it does not exist.
pub async fn find(db: impl PgExecutor<'_>, order: OrderId) -> Result<Option<Order>, sqlx::Error> {
    let row = sqlx::query(select_orders!("where o.id = $1")).bind(order.0).fetch_optional(db).await?;
    row.map(|row| to_order(&row)).transpose()
}

/// Up to `limit` orders, newest first, that were placed before `before`. Each combination of filters is a statement of
/// its own. So each is planned for its own index (a generic plan for `$1 is null or …` uses none).
pub async fn list(
    db: impl PgExecutor<'_>,
    filter: &OrderFilter,
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
    let query =
        filter.customer.iter().map(CustomerId::as_str).chain(status).fold(query, |query, value| query.bind(value));
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
           from order_status_history
          where order_id = $1 and sequence > $2
          order by sequence",
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
    let currency = Currency::stored(row.try_get("currency")?).map_err(|error| undecodable("currency", error))?;
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
        cause: row.try_get("cause")?,
        stuck: row.try_get("stuck")?,
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

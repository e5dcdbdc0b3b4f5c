//! SQL of balances, reservations, and the ledger that explains the balances.
//!
//! Invariant: one statement writes a balance and the movement that explains it. Before that, every caller locks the
//! rows of `stock`, in the order of their skus. A process that dies here has moved nothing.

use crate::domain::{Closing, Delta, Text, decide};
use crate::items::parse_sku;
use contracts::{OrderId, inventory::OutOfStock, product::Sku};
use saga_core::{id::CommandId, outbox::Tx};
use sqlx::{PgPool, Row};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// What can go wrong with an adjustment.
#[derive(Debug, thiserror::Error)]
pub enum AdjustError {
    /// No item has this sku.
    #[error("there is no item {0}")]
    Unknown(Sku),
    /// The adjustment would take away more than there is.
    #[error("fewer than nothing would be on hand")]
    Negative,
    /// More would be on hand than the table's limit.
    #[error("more would be on hand than can be counted")]
    TooMany,
    /// The database returned another error.
    #[error("{0}")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for AdjustError {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|database| database.constraint()) {
            Some("stock_on_hand_not_negative") => Self::Negative,
            Some("stock_limit") => Self::TooMany,
            _ => Self::Database(error),
        }
    }
}

/// An adjustment as it stands in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adjusted {
    /// The id of the movement in the ledger.
    pub movement: i64,
    /// Pieces that are free now.
    pub on_hand: i64,
    /// Pieces that are put aside now.
    pub reserved: i64,
}

/// Adds pieces, or takes them away; never below zero.
pub async fn adjust_in(tx: &mut Tx<'_>, sku: &Sku, delta: Delta, reason: &Text) -> Result<Adjusted, AdjustError> {
    let row = sqlx::query(
        "with adjusted as (
             update stock set on_hand = on_hand + $2 where sku = $1
             returning sku, on_hand, reserved
         ), moved as (
             insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reason)
             select sku, 'adjusted', $2, 0, $3 from adjusted
             returning id
         )
         select moved.id, adjusted.on_hand, adjusted.reserved from adjusted, moved",
    )
    .bind(sku.as_str())
    .bind(delta.get())
    .bind(reason.as_str())
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(|| AdjustError::Unknown(sku.clone()))?;
    Ok(Adjusted { movement: row.try_get("id")?, on_hand: row.try_get("on_hand")?, reserved: row.try_get("reserved")? })
}

/// The result of a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reserving {
    /// That many pieces are put aside.
    Reserved(i64),
    /// One item or more falls short; nothing was written.
    Short(OutOfStock),
    /// The order has a reservation already; nothing was written.
    HasOne,
}

/// Puts aside every line or none. `id` is the command that asks.
pub async fn reserve_in(
    tx: &mut Tx<'_>,
    id: CommandId,
    order: OrderId,
    wanted: &BTreeMap<Sku, i64>,
) -> Result<Reserving, sqlx::Error> {
    let on_hand = lock_in(tx, wanted.keys()).await?;
    let pieces = match decide(wanted, &on_hand) {
        Ok(pieces) => pieces,
        Err(short) => return Ok(Reserving::Short(short)),
    };
    let made = sqlx::query("insert into reservation (id, order_id) values ($1, $2) on conflict do nothing")
        .bind(id.0)
        .bind(order.0)
        .execute(&mut **tx)
        .await?;
    if made.rows_affected() == 0 {
        return Ok(Reserving::HasOne);
    }
    let (skus, quantities) = columns(wanted);
    sqlx::query(
        "with line as (
             insert into reservation_line (reservation_id, sku, quantity)
             select $1, sku, quantity from unnest($2::text[], $3::bigint[]) as line (sku, quantity)
             returning sku, quantity
         ), moved as (
             insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reservation_id)
             select sku, 'reserved', -quantity, quantity, $1 from line order by sku
         )
         update stock s
            set on_hand = s.on_hand - line.quantity, reserved = s.reserved + line.quantity
           from line
          where s.sku = line.sku",
    )
    .bind(id.0)
    .bind(&skus)
    .bind(&quantities)
    .execute(&mut **tx)
    .await?;
    Ok(Reserving::Reserved(pieces))
}

/// The result of a release or a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// The reservation has ended as asked, now or before.
    Done,
    /// The order has no reservation that could end.
    NoReservation,
    /// The reservation ended the other way: what was committed cannot be released.
    EndedOtherwise,
}

/// Ends an order's reservation: the pieces go back, or leave the house.
pub async fn close_in(tx: &mut Tx<'_>, order: OrderId, closing: Closing) -> Result<Closed, sqlx::Error> {
    let found = sqlx::query(
        "select id, status
           from reservation
          where order_id = $1
          order by (status = 'released'), reserved_at desc
          limit 1
            for update",
    )
    .bind(order.0)
    .fetch_optional(&mut **tx)
    .await?;
    let Some(found) = found else { return Ok(Closed::NoReservation) };
    let id: Uuid = found.try_get("id")?;
    match found.try_get::<&str, _>("status")? {
        "reserved" => {}
        ended if ended == closing.status() => return Ok(Closed::Done),
        _ => return Ok(Closed::EndedOtherwise),
    }
    let skus: Vec<Sku> = sqlx::query("select sku from reservation_line where reservation_id = $1")
        .bind(id)
        .fetch_all(&mut **tx)
        .await?
        .iter()
        .map(parse_sku)
        .collect::<Result<_, _>>()?;
    lock_in(tx, skus.iter()).await?;
    sqlx::query(
        "with closed as (
             update reservation set status = $2, closed_at = now() where id = $1 and status = 'reserved'
             returning id
         ), line as (
             select sku, quantity, case $2 when 'released' then quantity else 0 end as back
               from reservation_line
               join closed on closed.id = reservation_id
         ), moved as (
             insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reservation_id)
             select sku, $2, back, -quantity, $1 from line order by sku
         )
         update stock s
            set on_hand = s.on_hand + line.back, reserved = s.reserved - line.quantity
           from line
          where s.sku = line.sku",
    )
    .bind(id)
    .bind(closing.status())
    .execute(&mut **tx)
    .await?;
    Ok(Closed::Done)
}

/// Locks the balances of `skus`, and of what is put aside for `orders`, all in the order of the skus. It is for a
/// transaction that will want them one after the other.
pub async fn lock_all_in(tx: &mut Tx<'_>, skus: &[Sku], orders: &[OrderId]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "select s.sku
           from stock s
          where s.sku in (select unnest($1::text[])
                          union all
                          select l.sku
                            from reservation r
                            join reservation_line l on l.reservation_id = r.id
                           where r.order_id = any($2) and r.status = 'reserved')
          order by s.sku collate \"C\"
            for no key update of s",
    )
    .bind(skus.iter().map(Sku::as_str).collect::<Vec<_>>())
    .bind(orders.iter().map(|order| order.0).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Locks the balances of `skus`, in the order of the skus, and reads what is on hand.
async fn lock_in<'a>(tx: &mut Tx<'_>, skus: impl Iterator<Item = &'a Sku>) -> Result<BTreeMap<Sku, i64>, sqlx::Error> {
    let skus: Vec<&str> = skus.map(Sku::as_str).collect();
    // `collate "C"` is the order that Rust sorts in; all transactions have to use one order.
    let rows =
        sqlx::query("select sku, on_hand from stock where sku = any($1) order by sku collate \"C\" for no key update")
            .bind(&skus)
            .fetch_all(&mut **tx)
            .await?;
    rows.iter().map(|row| Ok((parse_sku(row)?, row.try_get("on_hand")?))).collect()
}

fn columns(lines: &BTreeMap<Sku, i64>) -> (Vec<&str>, Vec<i64>) {
    lines.iter().map(|(sku, quantity)| (sku.as_str(), *quantity)).unzip()
}

/// A row of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Movement {
    /// The movement's id; later ones are greater.
    pub id: i64,
    /// `adjusted`, `reserved`, `released` or `committed`.
    pub kind: String,
    /// Change of the free pieces.
    pub on_hand_delta: i64,
    /// Change of the pieces that are put aside.
    pub reserved_delta: i64,
    /// The order that the pieces are for; `None` for an adjustment.
    pub order: Option<OrderId>,
    /// The reason of an adjustment; `None` otherwise.
    pub reason: Option<String>,
    /// When the pieces moved, by the database's clock.
    pub moved_at: OffsetDateTime,
}

/// At most `limit` movements of an item before the one with the id `before`, newest first.
pub async fn movements(pool: &PgPool, sku: &Sku, before: i64, limit: i64) -> Result<Vec<Movement>, sqlx::Error> {
    let rows = sqlx::query(
        "select m.id, m.kind, m.on_hand_delta, m.reserved_delta, r.order_id, m.reason, m.moved_at
           from stock_movement m
           left join reservation r on r.id = m.reservation_id
          where m.sku = $1 and m.id < $2
          order by m.id desc
          limit $3",
    )
    .bind(sku.as_str())
    .bind(before)
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Movement {
                id: row.try_get("id")?,
                kind: row.try_get("kind")?,
                on_hand_delta: row.try_get("on_hand_delta")?,
                reserved_delta: row.try_get("reserved_delta")?,
                order: row.try_get::<Option<Uuid>, _>("order_id")?.map(OrderId),
                reason: row.try_get("reason")?,
                moved_at: row.try_get("moved_at")?,
            })
        })
        .collect()
}

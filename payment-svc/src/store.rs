//! The SQL of payments and their ledger.

use crate::domain::{Movement, MovementKind, Payment, Status};
use contracts::{
    OrderId,
    money::{Currency, Money, UnknownCurrency},
};
use saga_core::{
    id::CommandId,
    outbox::Tx,
    transaction::{Bound, Transaction},
};
use sqlx::{PgPool, Row, postgres::PgRow};
use std::collections::HashMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// One side of a movement, as it was entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The entry's id; it grows along the ledger.
    pub id: i64,
    /// The kind of movement: `authorize`, `void`, `capture`, `refund`.
    pub movement: String,
    /// The account of this side: `customer`, `held`, `merchant`.
    pub account: String,
    /// The amount in minor units, negative where the account loses it.
    pub amount: i64,
    /// The gateway's reference of the operation.
    pub reference: String,
    /// When the entry was made.
    pub at: OffsetDateTime,
}

/// A payment with its row's times.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The payment, without its row's times.
    pub payment: Payment,
    /// When the payment was first asked for.
    pub created_at: OffsetDateTime,
    /// When the payment last changed.
    pub updated_at: OffsetDateTime,
}

/// An answer of the gateway of another amount or currency than was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The order whose payment it is.
    pub order: OrderId,
    /// The command under whose id the gateway was asked.
    pub command: CommandId,
    /// What was asked for: `authorize`, `void`, `capture`, `refund`.
    pub movement: &'static str,
    /// The amount that was asked for.
    pub asked: Money,
    /// The amount that was answered.
    pub answered: Money,
    /// The gateway's reference in that answer.
    pub reference: String,
}

impl Difference {
    /// The difference in words, for people.
    pub fn reason(&self) -> String {
        difference_in_words(self.movement, self.asked, self.answered)
    }
}

/// A [`Difference`] as it is on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedDifference {
    /// The order whose payment it is.
    pub order: OrderId,
    /// What was asked for: `authorize`, `void`, `capture`, `refund`.
    pub movement: String,
    /// The amount that was asked for.
    pub asked: Money,
    /// The amount that was answered.
    pub answered: Money,
    /// The gateway's reference in that answer.
    pub reference: String,
    /// When the gateway first answered so.
    pub at: OffsetDateTime,
}

impl RecordedDifference {
    /// The difference in words, for people.
    pub fn reason(&self) -> String {
        difference_in_words(&self.movement, self.asked, self.answered)
    }
}

fn difference_in_words(movement: &str, asked: Money, answered: Money) -> String {
    let text = |money: Money| format!("{} {}", money.amount, money.currency);
    format!("asked to {movement} {}, the gateway answered {}", text(asked), text(answered))
}

/// The payments that a list shows; both fields `None`: all.
#[derive(Debug, Clone, Default)]
pub struct PaymentFilter {
    /// Only payments of this status; `None`: of any.
    pub status: Option<String>,
    /// Only this customer's payments; `None`: all customers'.
    pub customer: Option<String>,
}

/// The columns of a payment, by name: a statement that is prepared keeps working when a later release adds one.
macro_rules! payments {
    ($rest:literal) => {
        concat!(
            "select order_id, customer, currency, amount, status, authorize_key, \"authorization\", capture, decline_reason,
                    held, captured, refunded, refunding, created_at, updated_at
               from payment ",
            $rest
        )
    };
}

macro_rules! differences {
    ($from:literal) => {
        concat!(
            "select order_id, movement, asked_amount, asked_currency, answered_amount, answered_currency, reference, at
               from ",
            $from
        )
    };
}

/// Reads the order's payment and locks it; `None` if there is none.
pub async fn lock_in(tx: &mut Tx<'_>, order: OrderId) -> Result<Option<Payment>, sqlx::Error> {
    let row = sqlx::query(payments!("where order_id = $1 for update")).bind(order.0).fetch_optional(&mut **tx).await?;
    row.as_ref().map(payment).transpose()
}

/// Inserts a payment of which nothing is held; false when the order has one already.
pub async fn insert_in(tx: &mut Tx<'_>, payment: &Payment) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "insert into payment (order_id, customer, currency, amount, status, authorize_key)
         values ($1, $2, $3, $4, $5, $6)
             on conflict on constraint payment_pkey do nothing",
    )
    .bind(payment.order.0)
    .bind(&payment.customer)
    .bind(payment.amount.currency.as_str())
    .bind(payment.amount.amount)
    .bind(payment.status.name())
    .bind(payment.authorize_key.0)
    .execute(&mut **tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Writes a locked payment and enters the movements that `command` made.
pub async fn save_in(
    tx: &mut Tx<'_>,
    payment: &Payment,
    command: CommandId,
    movements: &[Movement],
) -> Result<(), sqlx::Error> {
    let columns = Columns::of(&payment.status, payment.amount.amount);
    sqlx::query(
        r#"update payment
              set customer = $2, currency = $3, amount = $4, status = $5, authorize_key = $6, "authorization" = $7,
                  capture = $8, decline_reason = $9, held = $10, captured = $11, refunded = $12, refunding = $13,
                  updated_at = clock_timestamp()
            where order_id = $1"#,
    )
    .bind(payment.order.0)
    .bind(&payment.customer)
    .bind(payment.amount.currency.as_str())
    .bind(payment.amount.amount)
    .bind(payment.status.name())
    .bind(payment.authorize_key.0)
    .bind(columns.authorization)
    .bind(columns.capture)
    .bind(columns.decline_reason)
    .bind(columns.held)
    .bind(columns.captured)
    .bind(columns.refunded)
    .bind(columns.refunding)
    .execute(&mut **tx)
    .await?;
    enter_in(tx, payment, command, movements).await
}

async fn enter_in(
    tx: &mut Tx<'_>,
    payment: &Payment,
    command: CommandId,
    movements: &[Movement],
) -> Result<(), sqlx::Error> {
    for Movement { kind, amount, reference } in movements {
        let (from, to) = kind.accounts();
        sqlx::query(
            "insert into ledger_entry (order_id, command_id, movement, account, amount, currency, reference)
             select $1, $2, $3, e.account, e.amount, $6, $7
               from unnest($4::text[], $5::int8[]) as e (account, amount)",
        )
        .bind(payment.order.0)
        .bind(command.0)
        .bind(kind.name())
        .bind(vec![from.name(), to.name()])
        .bind(vec![-amount.amount, amount.amount])
        .bind(amount.currency.as_str())
        .bind(reference)
        .execute(&mut **tx)
        .await?;
    }
    Ok(())
}

/// The gateway's reference of the movement that `command` caused, if the ledger has it. Then the command was done,
/// whatever record of the command itself was lost since.
pub async fn entered_reference_in(
    tx: &mut Tx<'_>,
    order: OrderId,
    command: CommandId,
    movement: MovementKind,
) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select reference from ledger_entry where order_id = $1 and command_id = $2 and movement = $3 limit 1",
    )
    .bind(order.0)
    .bind(command.0)
    .bind(movement.name())
    .fetch_optional(&mut **tx)
    .await
}

/// Finds the order's payment, with its row's times; `None` if there is none.
pub async fn find(pool: &PgPool, order: OrderId) -> Result<Option<Recorded>, sqlx::Error> {
    let row = sqlx::query(payments!("where order_id = $1")).bind(order.0).fetch_optional(pool).await?;
    row.as_ref().map(recorded).transpose()
}

/// The order's ledger, in the order of its entries.
pub async fn ledger(pool: &PgPool, order: OrderId) -> Result<Vec<Entry>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, movement, account, amount, reference, at from ledger_entry where order_id = $1 order by id",
    )
    .bind(order.0)
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Entry {
                id: row.try_get("id")?,
                movement: row.try_get("movement")?,
                account: row.try_get("account")?,
                amount: row.try_get("amount")?,
                reference: row.try_get("reference")?,
                at: row.try_get("at")?,
            })
        })
        .collect()
}

/// The amounts that may be held of the authorization under this key, as long as that is not certain. First comes what
/// was asked for, then what else the gateway answered. Empty where no payment is of this key, or nothing of it can be
/// held.
pub async fn may_be_held(
    pool: &PgPool,
    bound: Bound,
    order: OrderId,
    authorize_key: CommandId,
) -> Result<Vec<Money>, sqlx::Error> {
    let read = async {
        let mut tx = Transaction::begin(pool, bound).await?;
        let rows = sqlx::query(
            "with p as (
                 select amount, currency, status
                   from payment
                  where order_id = $1 and authorize_key = $2 and status in ('authorizing', 'authorized')
             )
             select amount, currency, 0::bigint as id from p
              union all
             select d.answered_amount, d.answered_currency, d.id
               from payment_difference d, p
              where d.command_id = $2 and d.order_id = $1 and p.status = 'authorizing'
              order by id",
        )
        .bind(order.0)
        .bind(authorize_key.0)
        .fetch_all(&mut **tx)
        .await?;
        tx.commit_quietly().await?;
        rows.iter().map(|row| money(row, "amount", "currency")).collect()
    };
    bound.within(read).await
}

/// Puts a difference on record, in a commit of its own; once, however often it is answered.
pub async fn record_difference(pool: &PgPool, bound: Bound, difference: &Difference) -> Result<(), sqlx::Error> {
    let write = async {
        let mut tx = Transaction::begin(pool, bound).await?;
        sqlx::query(
            "insert into payment_difference
                    (order_id, command_id, movement, asked_amount, asked_currency, answered_amount, answered_currency,
                     reference)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
                 on conflict on constraint payment_difference_once do nothing",
        )
        .bind(difference.order.0)
        .bind(difference.command.0)
        .bind(difference.movement)
        .bind(difference.asked.amount)
        .bind(difference.asked.currency.as_str())
        .bind(difference.answered.amount)
        .bind(difference.answered.currency.as_str())
        .bind(&difference.reference)
        .execute(&mut **tx)
        .await?;
        tx.commit_quietly().await
    };
    bound.within(write).await
}

/// The order's differences, oldest first.
pub async fn differences(pool: &PgPool, order: OrderId) -> Result<Vec<RecordedDifference>, sqlx::Error> {
    let rows = sqlx::query(concat!(differences!("payment_difference"), " where order_id = $1 order by id"))
        .bind(order.0)
        .fetch_all(pool)
        .await?;
    rows.iter().map(difference).collect()
}

/// Those of these payments that are in doubt because of a difference, with the difference.
pub async fn in_doubt(pool: &PgPool, orders: &[OrderId]) -> Result<HashMap<OrderId, RecordedDifference>, sqlx::Error> {
    let rows = sqlx::query(concat!(differences!("payment_in_doubt"), " where order_id = any($1)"))
        .bind(orders.iter().map(|order| order.0).collect::<Vec<_>>())
        .fetch_all(pool)
        .await?;
    rows.iter().map(|row| difference(row).map(|difference| (difference.order, difference))).collect()
}

/// Up to `limit` payments, newest first, that come after the one with this time and order.
pub async fn list(
    pool: &PgPool,
    filter: &PaymentFilter,
    after: Option<(OffsetDateTime, Uuid)>,
    limit: i64,
) -> Result<Vec<Recorded>, sqlx::Error> {
    let rows = sqlx::query(payments!(
        "where ($1::text is null or status = $1)
            and ($2::text is null or customer = $2)
            and ($3::timestamptz is null
                 or (created_at, order_id) < ($3, $4))
          order by created_at desc, order_id desc
          limit $5"
    ))
    .bind(&filter.status)
    .bind(&filter.customer)
    .bind(after.map(|(at, _)| at))
    .bind(after.map(|(_, order)| order))
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter().map(recorded).collect()
}

/// The payments that the ledger does not explain: always none.
pub async fn imbalances(pool: &PgPool) -> Result<Vec<OrderId>, sqlx::Error> {
    let orders: Vec<Uuid> = sqlx::query_scalar("select order_id from payment_imbalance").fetch_all(pool).await?;
    Ok(orders.into_iter().map(OrderId).collect())
}

/// The columns of a status.
#[derive(Default)]
struct Columns<'a> {
    authorization: Option<&'a str>,
    capture: Option<&'a str>,
    decline_reason: Option<&'a str>,
    held: i64,
    captured: i64,
    refunded: i64,
    refunding: i64,
}

impl<'a> Columns<'a> {
    fn of(status: &'a Status, amount: i64) -> Self {
        match status {
            Status::Authorizing | Status::Voided => Self::default(),
            Status::Authorized { authorization } => {
                Self { authorization: Some(authorization), held: amount, ..Self::default() }
            }
            Status::Declined { reason } => Self { decline_reason: Some(reason), ..Self::default() },
            Status::Captured { authorization, capture, refunded, refunding } => Self {
                authorization: Some(authorization),
                capture: Some(capture),
                captured: amount,
                refunded: *refunded,
                refunding: *refunding,
                ..Self::default()
            },
        }
    }
}

fn payment(row: &PgRow) -> Result<Payment, sqlx::Error> {
    let reference = |name: &str| row.try_get::<String, _>(name);
    let status = match row.try_get("status")? {
        "authorizing" => Status::Authorizing,
        "authorized" => Status::Authorized { authorization: reference("authorization")? },
        "declined" => Status::Declined { reason: reference("decline_reason")? },
        "captured" => Status::Captured {
            authorization: reference("authorization")?,
            capture: reference("capture")?,
            refunded: row.try_get("refunded")?,
            refunding: row.try_get("refunding")?,
        },
        "voided" => Status::Voided,
        other => return Err(sqlx::Error::Decode(format!("payment with status {other:?}").into())),
    };
    Ok(Payment {
        order: OrderId(row.try_get("order_id")?),
        customer: row.try_get("customer")?,
        amount: money(row, "amount", "currency")?,
        authorize_key: CommandId(row.try_get("authorize_key")?),
        status,
    })
}

fn money(row: &PgRow, amount: &str, currency: &str) -> Result<Money, sqlx::Error> {
    let currency = Currency::stored(row.try_get(currency)?);
    Ok(Money {
        amount: row.try_get(amount)?,
        currency: currency.map_err(|error: UnknownCurrency| sqlx::Error::Decode(error.into()))?,
    })
}

fn difference(row: &PgRow) -> Result<RecordedDifference, sqlx::Error> {
    Ok(RecordedDifference {
        order: OrderId(row.try_get("order_id")?),
        movement: row.try_get("movement")?,
        asked: money(row, "asked_amount", "asked_currency")?,
        answered: money(row, "answered_amount", "answered_currency")?,
        reference: row.try_get("reference")?,
        at: row.try_get("at")?,
    })
}

fn recorded(row: &PgRow) -> Result<Recorded, sqlx::Error> {
    Ok(Recorded {
        payment: payment(row)?,
        created_at: row.try_get("created_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}

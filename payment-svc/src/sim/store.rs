//! The simulated provider's SQL: answers by idempotency key, authorizations, movements.

use super::tokens::Operation;
use contracts::money::{Currency, Money};
use saga_core::outbox::Tx;
use serde::Serialize;
use serde_json::Value;
use sqlx::{PgExecutor, PgPool, Row, postgres::PgRow};

/// An authorization as the provider knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(super) struct Authorization {
    /// The provider's reference of the authorization.
    pub(super) reference: String,
    /// The merchant's id of the order.
    pub(super) order: String,
    /// The token of the means of payment.
    pub(super) method: String,
    /// The currency's code, ISO 4217.
    #[schema(value_type = String)]
    pub(super) currency: Currency,
    /// The minor units that were authorized.
    pub(super) amount: i64,
    /// The minor units that are still held.
    pub(super) held: i64,
    /// The minor units that were taken.
    pub(super) captured: i64,
    /// The minor units that were let go.
    pub(super) voided: i64,
    /// The minor units that were given back of those taken.
    pub(super) refunded: i64,
}

/// The sum of all movements in a currency.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(super) struct Totals {
    /// The currency's code, ISO 4217.
    pub(super) currency: String,
    /// The minor units that were ever authorized.
    pub(super) authorized: i64,
    /// The minor units that are held now.
    pub(super) held: i64,
    /// The minor units that were ever captured.
    pub(super) captured: i64,
    /// The minor units that were ever voided.
    pub(super) voided: i64,
    /// The minor units that were ever refunded.
    pub(super) refunded: i64,
}

/// The answer that a key got.
pub(super) struct Answered {
    /// The request that was answered; `None` when the key was answered before its request came.
    pub(super) request: Option<Value>,
    pub(super) status: u16,
    pub(super) body: Value,
}

/// Counts an arrival of `key`, in a commit of its own; 1 for the first.
pub(super) async fn count_arrival(pool: &PgPool, key: &str) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar(
        "insert into gateway_arrival (key, count) values ($1, 1)
             on conflict (key) do update set count = gateway_arrival.count + 1
          returning count",
    )
    .bind(key)
    .fetch_one(pool)
    .await
}

/// Lets one request per key in at a time.
pub(super) async fn lock_key_in(tx: &mut Tx<'_>, key: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_advisory_xact_lock(hashtextextended($1, 0))").bind(key).execute(&mut **tx).await?;
    Ok(())
}

pub(super) async fn answer(db: impl PgExecutor<'_>, key: &str) -> Result<Option<Answered>, sqlx::Error> {
    let row = sqlx::query("select request, status, body from gateway_answer where key = $1")
        .bind(key)
        .fetch_optional(db)
        .await?;
    row.map(|row| {
        Ok(Answered {
            request: row.try_get("request")?,
            status: u16::try_from(row.try_get::<i32, _>("status")?).unwrap_or(500),
            body: row.try_get("body")?,
        })
    })
    .transpose()
}

pub(super) async fn store_answer_in(tx: &mut Tx<'_>, key: &str, answered: &Answered) -> Result<(), sqlx::Error> {
    sqlx::query("insert into gateway_answer (key, request, status, body) values ($1, $2, $3, $4)")
        .bind(key)
        .bind(&answered.request)
        .bind(i32::from(answered.status))
        .bind(&answered.body)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

pub(super) struct NewAuthorization<'a> {
    pub(super) reference: &'a str,
    pub(super) key: &'a str,
    pub(super) order: &'a str,
    pub(super) customer: &'a str,
    pub(super) method: &'a str,
    pub(super) amount: Money,
}

pub(super) async fn authorize_in(tx: &mut Tx<'_>, new: &NewAuthorization<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        r#"insert into gateway_authorization (reference, key, "order", customer, method, currency, amount, held)
           values ($1, $2, $3, $4, $5, $6, $7, $7)"#,
    )
    .bind(new.reference)
    .bind(new.key)
    .bind(new.order)
    .bind(new.customer)
    .bind(new.method)
    .bind(new.amount.currency.as_str())
    .bind(new.amount.amount)
    .execute(&mut **tx)
    .await?;
    insert_movement_in(tx, new.reference, new.key, "authorized", new.amount).await
}

/// Moves `amount` of a locked authorization and enters the movement.
pub(super) async fn shift_in(
    tx: &mut Tx<'_>,
    reference: &str,
    key: &str,
    operation: Operation,
    amount: Money,
) -> Result<(), sqlx::Error> {
    let (sql, kind) = match operation {
        Operation::Capture => (
            "update gateway_authorization set held = held - $2, captured = captured + $2 where reference = $1",
            "captured",
        ),
        Operation::Void => {
            ("update gateway_authorization set held = held - $2, voided = voided + $2 where reference = $1", "voided")
        }
        Operation::Refund => {
            ("update gateway_authorization set refunded = refunded + $2 where reference = $1", "refunded")
        }
        Operation::Authorize => return Err(sqlx::Error::Protocol("an authorization is not shifted".into())),
    };
    sqlx::query(sql).bind(reference).bind(amount.amount).execute(&mut **tx).await?;
    insert_movement_in(tx, reference, key, kind, amount).await
}

async fn insert_movement_in(
    tx: &mut Tx<'_>,
    reference: &str,
    key: &str,
    kind: &str,
    amount: Money,
) -> Result<(), sqlx::Error> {
    sqlx::query("insert into gateway_movement (reference, key, kind, amount, currency) values ($1, $2, $3, $4, $5)")
        .bind(reference)
        .bind(key)
        .bind(kind)
        .bind(amount.amount)
        .bind(amount.currency.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The columns of an authorization, by name, as in payment-svc's own store.
macro_rules! authorizations {
    ($rest:literal) => {
        concat!(
            r#"select reference, "order", method, currency, amount, held, captured, voided, refunded
                 from gateway_authorization "#,
            $rest
        )
    };
}

pub(super) async fn lock_by_reference_in(
    tx: &mut Tx<'_>,
    reference: &str,
) -> Result<Option<Authorization>, sqlx::Error> {
    let row = sqlx::query(authorizations!("where reference = $1 for update"))
        .bind(reference)
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(authorization).transpose()
}

pub(super) async fn lock_by_key_in(tx: &mut Tx<'_>, key: &str) -> Result<Option<Authorization>, sqlx::Error> {
    let row = sqlx::query(authorizations!("where key = $1 for update")).bind(key).fetch_optional(&mut **tx).await?;
    row.as_ref().map(authorization).transpose()
}

/// The token of the authorization with this reference, or made under this key.
pub(super) async fn method(pool: &PgPool, reference_or_key: &str) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar("select method from gateway_authorization where reference = $1 or key = $1 limit 1")
        .bind(reference_or_key)
        .fetch_optional(pool)
        .await
}

pub(super) async fn of_order(pool: &PgPool, order: &str) -> Result<Vec<Authorization>, sqlx::Error> {
    let rows = sqlx::query(authorizations!(r#"where "order" = $1 order by created_at, reference"#))
        .bind(order)
        .fetch_all(pool)
        .await?;
    rows.iter().map(authorization).collect()
}

pub(super) async fn totals(pool: &PgPool) -> Result<Vec<Totals>, sqlx::Error> {
    let rows = sqlx::query(
        "select currency,
                coalesce(sum(amount) filter (where kind = 'authorized'), 0)::bigint as authorized,
                coalesce(sum(amount) filter (where kind = 'captured'),   0)::bigint as captured,
                coalesce(sum(amount) filter (where kind = 'voided'),     0)::bigint as voided,
                coalesce(sum(amount) filter (where kind = 'refunded'),   0)::bigint as refunded
           from gateway_movement
          group by currency
          order by currency",
    )
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let sum = |name: &str| row.try_get::<i64, _>(name);
            let (authorized, captured, voided) = (sum("authorized")?, sum("captured")?, sum("voided")?);
            Ok(Totals {
                currency: row.try_get("currency")?,
                authorized,
                held: authorized - captured - voided,
                captured,
                voided,
                refunded: sum("refunded")?,
            })
        })
        .collect()
}

fn authorization(row: &PgRow) -> Result<Authorization, sqlx::Error> {
    Ok(Authorization {
        reference: row.try_get("reference")?,
        order: row.try_get("order")?,
        method: row.try_get("method")?,
        currency: Currency::stored(row.try_get("currency")?)
            .map_err(|error: contracts::money::UnknownCurrency| sqlx::Error::Decode(error.into()))?,
        amount: row.try_get("amount")?,
        held: row.try_get("held")?,
        captured: row.try_get("captured")?,
        voided: row.try_get("voided")?,
        refunded: row.try_get("refunded")?,
    })
}

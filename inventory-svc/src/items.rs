//! SQL of items, and the event that announces each change of one, appended in the transaction that makes it.

use crate::domain::{Item, Price, Text};
use contracts::{
    inventory::ItemChanged,
    money::{Currency, Money},
    product::Sku,
    topics,
};
use saga_core::outbox::{self, NewMessage, Tx};
use sqlx::{PgPool, Row, postgres::PgRow};

/// What can go wrong with an item.
#[derive(Debug, thiserror::Error)]
pub enum ItemError {
    /// Another item has this sku.
    #[error("an item {0} exists already")]
    Exists(Sku),
    /// No item has this sku.
    #[error("there is no item {0}")]
    Unknown(Sku),
    /// The item was changed since the caller read it.
    #[error("the item is at version {current} by now")]
    Stale {
        /// The version that the item has now.
        current: i64,
    },
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    /// The event could not be written as JSON.
    #[error(transparent)]
    Event(#[from] serde_json::Error),
    /// The event could not be appended to the outbox.
    #[error("{0}")]
    Append(#[from] outbox::AppendError),
}

/// Changes of an item; `None` leaves a field as it is.
#[derive(Debug, Clone, Default)]
pub struct ItemChange {
    /// The new name; `None`: the name stays.
    pub name: Option<Text>,
    /// The new price; `None`: the price stays.
    pub unit_price: Option<Price>,
}

/// Creates an item without stock, and announces it.
pub async fn create_in(tx: &mut Tx<'_>, sku: &Sku, name: &Text, price: Price) -> Result<Item, ItemError> {
    let money = price.money();
    let created = sqlx::query(
        "with created as (
             insert into item (sku, name, unit_price, currency) values ($1, $2, $3, $4)
             on conflict do nothing
             returning sku
         )
         insert into stock (sku) select sku from created",
    )
    .bind(sku.as_str())
    .bind(name.as_str())
    .bind(money.amount)
    .bind(money.currency.as_str())
    .execute(&mut **tx)
    .await?;
    if created.rows_affected() == 0 {
        return Err(ItemError::Exists(sku.clone()));
    }
    let item = Item {
        sku: sku.clone(),
        name: name.as_str().to_owned(),
        unit_price: money,
        version: 1,
        on_hand: 0,
        reserved: 0,
    };
    announce_in(tx, &item).await?;
    Ok(item)
}

/// Changes an item if the caller has `seen` its version, and announces it. A change to the values that it has changes
/// nothing.
pub async fn change_in(
    tx: &mut Tx<'_>,
    sku: &Sku,
    change: &ItemChange,
    seen: impl Fn(i64) -> bool,
) -> Result<Item, ItemError> {
    // The row's lock comes before the append, so that events of one sku have the order of their commits.
    let row = sqlx::query(
        "select i.sku, i.name, i.unit_price, i.currency, i.version, s.on_hand, s.reserved
           from item i
           join stock s using (sku)
          where i.sku = $1
            for update of i",
    )
    .bind(sku.as_str())
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(|| ItemError::Unknown(sku.clone()))?;
    let before = item(&row)?;
    if !seen(before.version) {
        return Err(ItemError::Stale { current: before.version });
    }
    let name = change.name.as_ref().map_or(before.name.clone(), |name| name.as_str().to_owned());
    let unit_price = change.unit_price.map_or(before.unit_price, Price::money);
    if name == before.name && unit_price == before.unit_price {
        return Ok(before);
    }
    let after = Item { name, unit_price, version: before.version + 1, ..before };
    sqlx::query(
        "update item
            set name = $2, unit_price = $3, currency = $4, version = $5, changed_at = now()
          where sku = $1",
    )
    .bind(sku.as_str())
    .bind(&after.name)
    .bind(after.unit_price.amount)
    .bind(after.unit_price.currency.as_str())
    .bind(after.version)
    .execute(&mut **tx)
    .await?;
    announce_in(tx, &after).await?;
    Ok(after)
}

async fn announce_in(tx: &mut Tx<'_>, item: &Item) -> Result<(), ItemError> {
    let topic = topics::INVENTORY_ITEMS.name;
    let message = NewMessage::json(topic, item.sku.as_str(), ItemChanged::TYPE, &item.event())?;
    Ok(outbox::append_in(tx, &[message]).await?)
}

/// Finds an item by its sku; `None` if it does not exist.
pub async fn find(pool: &PgPool, sku: &Sku) -> Result<Option<Item>, sqlx::Error> {
    let row = sqlx::query(
        "select i.sku, i.name, i.unit_price, i.currency, i.version, s.on_hand, s.reserved
           from item i
           join stock s using (sku)
          where i.sku = $1",
    )
    .bind(sku.as_str())
    .fetch_optional(pool)
    .await?;
    row.as_ref().map(item).transpose()
}

/// At most `limit` items after the sku `after`, by sku.
pub async fn list(pool: &PgPool, after: Option<&Sku>, limit: i64) -> Result<Vec<Item>, sqlx::Error> {
    let rows = sqlx::query(
        "select i.sku, i.name, i.unit_price, i.currency, i.version, s.on_hand, s.reserved
           from item i
           join stock s using (sku)
          where i.sku > $1
          order by i.sku
          limit $2",
    )
    .bind(after.map_or("", Sku::as_str))
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter().map(item).collect()
}

fn item(row: &PgRow) -> Result<Item, sqlx::Error> {
    let currency = Currency::stored(row.try_get("currency")?);
    Ok(Item {
        sku: parse_sku(row)?,
        name: row.try_get("name")?,
        unit_price: Money {
            amount: row.try_get("unit_price")?,
            currency: currency.map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
        },
        version: row.try_get("version")?,
        on_hand: row.try_get("on_hand")?,
        reserved: row.try_get("reserved")?,
    })
}

pub(crate) fn parse_sku(row: &PgRow) -> Result<Sku, sqlx::Error> {
    row.try_get::<&str, _>("sku")?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

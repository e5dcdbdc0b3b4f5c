//! What can be ordered, and for how much: a copy of inventory-svc's items, and the only file that touches `catalogue`.
//!
//! ```text
//!   inventory.items ──► consumer (group order-svc.catalogue) ──► catalogue ──► prices of POST /v1/orders
//! ```
//!
//! Invariant: of one sku, the record with the highest `ce_sequence` wins, in whatever order records arrive, so repeats
//! and replays change nothing. When the process dies here, the batch is rolled back and read again.

use contracts::{inventory::ItemChanged, money::Money, product::Sku, topics::INVENTORY_ITEMS};
use saga_core::{
    consumer::{ConsumerConfig, HandleError, Handler, Message, TooOld},
    outbox::Tx,
};
use sqlx::PgExecutor;
use std::collections::{BTreeMap, HashMap};

/// The group that keeps the catalogue.
pub const GROUP: &str = "order-svc.catalogue";

/// The topic keeps an item for ever, and the last word wins whenever it comes: however old a record is, it is handled.
pub fn consumer_config(brokers: &str) -> ConsumerConfig {
    ConsumerConfig { too_old: TooOld::Handle, ..ConsumerConfig::new(brokers, GROUP, [INVENTORY_ITEMS.name]) }
}

/// Prices of those of `skus` that can be ordered.
pub async fn prices(db: impl PgExecutor<'_>, skus: &[&str]) -> Result<HashMap<Sku, Money>, sqlx::Error> {
    let rows: Vec<(String, i64, String)> =
        sqlx::query_as("select sku, unit_price, currency from catalogue where sku = any($1) and not withdrawn")
            .bind(skus)
            .fetch_all(db)
            .await?;
    // A row that does not parse cannot be sold; the consumer only writes what parsed.
    let parsed = rows.into_iter().filter_map(|(sku, amount, currency)| {
        Some((sku.parse().ok()?, Money { amount, currency: currency.parse().ok()? }))
    });
    Ok(parsed.collect())
}

/// Writes item records into the catalogue.
#[derive(Debug, Clone, Copy, Default)]
pub struct CatalogueHandler;

/// What one record says of its sku.
struct Said {
    sequence: i64,
    item: Option<ItemChanged>,
}

impl Handler for CatalogueHandler {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        // Sorted by sku, as rows are locked in one order everywhere; the last word of each sku in this batch.
        let mut latest: BTreeMap<String, Said> = BTreeMap::new();
        for message in batch {
            let (sku, said) = read(message).map_err(|error| error.of(message.envelope.id))?;
            match latest.get(&sku) {
                Some(known) if known.sequence >= said.sequence => {}
                _ => drop(latest.insert(sku, said)),
            }
        }
        Ok(write_in(tx, &latest).await?)
    }
}

fn read(message: &Message) -> Result<(String, Said), HandleError> {
    let poison = |why: String| HandleError::Poison(why);
    let kind = &message.envelope.kind;
    if kind != ItemChanged::TYPE {
        // A later build may know it.
        return Err(anyhow::anyhow!("type {kind:?} is not {:?}", ItemChanged::TYPE).into());
    }
    let sequence = message.envelope.sequence.ok_or_else(|| poison("an item record needs a ce_sequence".into()))?;
    match &message.payload {
        Some(payload) => {
            let item: ItemChanged =
                serde_json::from_slice(payload).map_err(|error| poison(format!("not an item: {error}")))?;
            if item.unit_price.amount < 0 {
                return Err(poison(format!("item {} has a negative price", item.sku)));
            }
            if item.name.contains('\0') {
                return Err(poison(format!("item {} has a NUL in its name, which no text column takes", item.sku)));
            }
            Ok((item.sku.to_string(), Said { sequence, item: Some(item) }))
        }
        // A tombstone: the item is gone. Its sku is the record's key.
        None => {
            let key = message.key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
            let sku: Sku = key
                .and_then(|key| key.parse().ok())
                .ok_or_else(|| poison("an item tombstone needs its sku as key".into()))?;
            Ok((sku.to_string(), Said { sequence, item: None }))
        }
    }
}

async fn write_in(tx: &mut Tx<'_>, latest: &BTreeMap<String, Said>) -> Result<(), sqlx::Error> {
    let items: Vec<Option<&ItemChanged>> = latest.values().map(|said| said.item.as_ref()).collect();
    sqlx::query(
        "insert into catalogue as known (sku, name, unit_price, currency, withdrawn, sequence)
         select sku, coalesce(name, ''), coalesce(unit_price, 0), coalesce(currency, 'XXX'), name is null, sequence
         from   unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[])
                    as said (sku, name, unit_price, currency, sequence)
         order  by sku
         on conflict (sku) do update
         set    name       = case when excluded.withdrawn then known.name       else excluded.name       end,
                unit_price = case when excluded.withdrawn then known.unit_price else excluded.unit_price end,
                currency   = case when excluded.withdrawn then known.currency   else excluded.currency   end,
                withdrawn  = excluded.withdrawn,
                sequence   = excluded.sequence,
                changed_at = now()
         where  known.sequence < excluded.sequence",
    )
    .bind(latest.keys().map(String::as_str).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.name.as_str())).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.unit_price.amount)).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.unit_price.currency.to_string())).collect::<Vec<_>>())
    .bind(latest.values().map(|said| said.sequence).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

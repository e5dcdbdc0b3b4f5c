//! The products that can be ordered, with their prices: a copy of inventory-svc's items, and the only module that
//! touches `catalogue`.
//!
//! ```text
//!   inventory.items ──► consumer (group order-svc.catalogue) ──► catalogue ──► prices of POST /v1/orders
//! ```
//!
//! Invariant: of one sku the last news holds. A record is news when its sequence is higher than any that was seen of
//! its sku, its source and its epoch. So repeats and replays change nothing. A source whose ids are given a second time
//! (a restore, another database) still counts. When the process dies here, the batch is rolled back and read again.
//! [`rebuild`] makes the whole copy anew.

pub mod rebuild;

use contracts::{
    inventory::ItemChanged,
    money::{Currency, Money},
    product::Sku,
    topics::INVENTORY_ITEMS,
};
use saga_core::{
    consumer::{ConsumerConfig, ConsumerHealth, HandleError, Handler, Message, TooOld, Unfit},
    envelope::SourcePosition,
    json,
    outbox::Tx,
    part::{Cause, HealthIssue, PartReport},
};
use sqlx::{PgExecutor, PgPool};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The consumer group that keeps the catalogue.
pub const GROUP: &str = "order-svc.catalogue";

/// The consumer's settings. The topic keeps an item for ever, and the last record wins whenever it comes: however old a
/// record is, it is handled.
pub fn consumer_config(brokers: &str) -> ConsumerConfig {
    ConsumerConfig { too_old: TooOld::Handle, ..ConsumerConfig::new(brokers, GROUP, [INVENTORY_ITEMS.name]) }
}

/// The prices of those of `skus` that can be ordered.
pub async fn prices(db: impl PgExecutor<'_>, skus: &[&str]) -> Result<HashMap<Sku, Money>, sqlx::Error> {
    let rows: Vec<(String, i64, String)> =
        sqlx::query_as("select sku, unit_price, currency from catalogue where sku = any($1) and not withdrawn")
            .bind(skus)
            .fetch_all(db)
            .await?;
    // A row that does not parse cannot be sold; the consumer writes only rows that parsed.
    let parsed = rows.into_iter().filter_map(|(sku, amount, currency)| {
        Some((sku.parse().ok()?, Money { amount, currency: currency.parse().ok()? }))
    });
    Ok(parsed.collect())
}

/// The state of the copy, for health: what stands in its consumer's way. The copy is red, too, if it is empty although
/// there are items, so that nothing can be ordered.
pub async fn report(pool: &PgPool, items: &ConsumerHealth) -> PartReport {
    let report = items.report();
    if report.issue.is_some() || items.ever_had_records() != Some(true) {
        return report;
    }
    match sqlx::query_scalar("select not exists (select from catalogue)").fetch_one(pool).await {
        Ok(true) => {
            PartReport::red(Cause::Empty, "the copy of the items is empty, though inventory-svc has published some")
                .with_waiting(report.waiting)
        }
        Ok(false) => report,
        Err(error) => PartReport::from(HealthIssue::from(&error)).with_waiting(report.waiting),
    }
}

/// Writes item records into the catalogue.
#[derive(Debug, Clone, Copy, Default)]
pub struct CatalogueHandler;

/// The content of one record, by its sku.
struct Said<'m> {
    sku: String,
    standing: SourcePosition<'m>,
    item: Option<ItemChanged>,
}

/// The highest sequence that was seen of each sku, by source and epoch.
#[derive(Default)]
struct Seen(HashMap<String, BTreeMap<(String, String), i64>>);

impl Handler for CatalogueHandler {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        let (mut said, mut unfit) = (Vec::with_capacity(batch.len()), Vec::new());
        for message in batch {
            match read(message) {
                Ok(one) => said.push(one),
                Err(error) => unfit.push(Unfit::poison(message.envelope.id, error)?),
            }
        }
        HandleError::unfit(unfit)?;
        Ok(take_in(tx, &said).await?)
    }
}

fn read(message: &Message) -> Result<Said<'_>, HandleError> {
    let poison = |why: String| HandleError::Poison(why);
    let kind = &message.envelope.kind;
    if kind != ItemChanged::TYPE {
        // A later build may know the type.
        return Err(anyhow::anyhow!("type {kind:?} is not {:?}", ItemChanged::TYPE).into());
    }
    let standing = message.envelope.standing();
    // An older build's dead letter does not carry where its original stood.
    if standing.sequence.is_none() && !standing.redriven {
        return Err(poison("an item record needs a ce_sequence".into()));
    }
    match &message.payload {
        Some(payload) => {
            let item: ItemChanged = json::read(payload).map_err(|why| poison(format!("not an item: {why}")))?;
            if item.unit_price.amount < 0 {
                return Err(poison(format!("item {} has a negative price", item.sku)));
            }
            if let Err(error) = item.unit_price.currency.as_str().parse::<Currency>() {
                return Err(poison(format!("item {} has a price in no currency of today: {error}", item.sku)));
            }
            if item.name.contains('\0') {
                return Err(poison(format!("item {} has a NUL in its name, which no text column takes", item.sku)));
            }
            Ok(Said { sku: item.sku.to_string(), standing, item: Some(item) })
        }
        // A tombstone means that the item is gone. Its sku is the record's key.
        None => {
            let key = message.key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
            let sku: Sku = key
                .and_then(|key| key.parse().ok())
                .ok_or_else(|| poison("an item tombstone needs its sku as key".into()))?;
            Ok(Said { sku: sku.to_string(), standing, item: None })
        }
    }
}

async fn take_in(tx: &mut Tx<'_>, said: &[Said<'_>]) -> Result<(), sqlx::Error> {
    // The lock comes before anything is read: the handler must see what a rebuild has put in place of the catalogue.
    sqlx::query("lock table catalogue in row exclusive mode").execute(&mut **tx).await?;
    let skus: BTreeSet<&str> = said.iter().map(|said| said.sku.as_str()).collect();
    let mut seen = Seen::load_in(tx, &skus).await?;
    // The last news of each sku in this batch, sorted by sku: rows are locked in one order everywhere.
    let mut news: BTreeMap<&str, &Said<'_>> = BTreeMap::new();
    for said in said {
        if seen.is_news(said) {
            news.insert(&said.sku, said);
        }
    }
    if news.is_empty() {
        return Ok(());
    }
    let news: Vec<_> = news.into_values().collect();
    write_in(tx, &news).await?;
    seen.write_in(tx, &news).await
}

impl Seen {
    async fn load_in(tx: &mut Tx<'_>, skus: &BTreeSet<&str>) -> Result<Self, sqlx::Error> {
        let rows: Vec<(String, String, String, i64)> =
            sqlx::query_as("select sku, source, epoch, sequence from catalogue_seen where sku = any($1)")
                .bind(Vec::from_iter(skus))
                .fetch_all(&mut **tx)
                .await?;
        let mut seen = Self::default();
        for (sku, source, epoch, sequence) in rows {
            seen.0.entry(sku).or_default().insert((source, epoch), sequence);
        }
        Ok(seen)
    }

    /// Whether the record is news of its sku; then it is seen from here on.
    fn is_news(&mut self, said: &Said<'_>) -> bool {
        let SourcePosition { source, epoch, sequence, redriven } = said.standing;
        let place = (source.to_owned(), epoch.to_owned());
        let seen = self.0.entry(said.sku.clone()).or_default();
        // A record that was given up once comes at any time, so it is compared only with records that it can be
        // compared with. These are those of its own epoch, and those of its source from before epochs were named. Their
        // ids went on in the first epoch that was.
        let before = |of: &(String, String), highest: i64| {
            of.0 == source && of.1.is_empty() && sequence.is_some_and(|sequence| highest < sequence)
        };
        let comparable = |(of, highest): (&(String, String), &i64)| *of == place || before(of, *highest);
        if redriven && !seen.is_empty() && (sequence.is_none() || !seen.iter().all(comparable)) {
            let sku = &said.sku;
            tracing::warn!(
                sku,
                source,
                epoch,
                sequence,
                "a record that was sent again says nothing that is certain to be news, and is \
                not taken; if the item is wrong, change it once more in inventory-svc"
            );
            return false;
        }
        let Some(sequence) = sequence else { return true };
        let news = seen.get(&place).is_none_or(|highest| *highest < sequence);
        if news {
            seen.insert(place, sequence);
        }
        news
    }

    async fn write_in(&self, tx: &mut Tx<'_>, news: &[&Said<'_>]) -> Result<(), sqlx::Error> {
        let mut rows = Vec::new();
        for said in news {
            rows.extend(self.0.get(&said.sku).into_iter().flatten().map(|seen| (said.sku.as_str(), seen)));
        }
        sqlx::query(
            "insert into catalogue_seen as known (sku, source, epoch, sequence)
             select * from unnest($1::text[], $2::text[], $3::text[], $4::bigint[])
                 on conflict (sku, source, epoch) do update
                set sequence = excluded.sequence
              where known.sequence < excluded.sequence",
        )
        .bind(rows.iter().map(|(sku, _)| *sku).collect::<Vec<_>>())
        .bind(rows.iter().map(|(_, ((source, _), _))| source.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(_, ((_, epoch), _))| epoch.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|(_, (_, sequence))| **sequence).collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}

async fn write_in(tx: &mut Tx<'_>, news: &[&Said<'_>]) -> Result<(), sqlx::Error> {
    let items: Vec<Option<&ItemChanged>> = news.iter().map(|said| said.item.as_ref()).collect();
    sqlx::query(
        "insert into catalogue as known (sku, name, unit_price, currency, withdrawn, sequence)
         select sku, coalesce(name, ''), coalesce(unit_price, 0), coalesce(currency, 'XXX'), name is null, sequence
           from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[])
                    as said (sku, name, unit_price, currency, sequence)
          order by sku
             on conflict (sku) do update
            set name       = case when excluded.withdrawn then known.name       else excluded.name       end,
                unit_price = case when excluded.withdrawn then known.unit_price else excluded.unit_price end,
                currency   = case when excluded.withdrawn then known.currency   else excluded.currency   end,
                withdrawn  = excluded.withdrawn,
                sequence   = excluded.sequence,
                changed_at = now()",
    )
    .bind(news.iter().map(|said| said.sku.as_str()).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.name.as_str())).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.unit_price.amount)).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.map(|item| item.unit_price.currency.to_string())).collect::<Vec<_>>())
    .bind(news.iter().map(|said| said.standing.sequence.unwrap_or_default()).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

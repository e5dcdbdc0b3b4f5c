//! Makes the catalogue anew from its topic, beside the consumer that keeps it.
//!
//! ```text
//!   inventory.items, from its beginning ──► tables of this session ──┐ one transaction, in which the consumer waits:
//!                                            what came meanwhile ────┴─► catalogue
//! ```
//!
//! The same handler fills the session's tables, which have the names of the real ones and so stand before them.
//! Meanwhile orders are priced from the old rows, and then from the new ones. When the process dies before its one
//! commit, nothing has changed, and the session's tables are gone with it.

use super::CatalogueHandler;
use saga_core::{
    clock,
    consumer::{HandleError, Handler, Message, Reread, Rereading, RereadingError},
    error_class,
    outbox::Tx,
    transaction::{Bound, Transaction},
};
use sqlx::{AssertSqlSafe, PgPool};
use std::time::{Duration, Instant};

/// The bound of a transaction with some hundred records.
const BATCH_BOUND: Bound = Bound::new(Duration::from_secs(30));
/// The bound of the transaction that puts the new catalogue in place, in which the consumer waits. It waits for the
/// consumer's batch itself.
const EXCHANGE_BOUND: Bound = Bound::new(Duration::from_secs(60)).with_lock(Duration::from_secs(2));
/// How often the rebuild tries to come between two batches of the consumer.
const TRIES_MAX: u32 = 30;
/// The longest time for the records since the last look at the topic's end, which are few. The server ends a
/// transaction that is silent for longer (8 s).
const LAST_MAX: Duration = Duration::from_secs(5);
/// The pause between two log lines of progress.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// The figures of a rebuild.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Records that were read.
    pub records: u64,
    /// Items that the topic has, with those that are withdrawn.
    pub items: u64,
    /// Items of which the catalogue had another row, or none.
    pub changed: u64,
    /// Items of the catalogue that the topic does not have.
    pub missing: u64,
    /// Records that are no item, which the consumer dead-letters.
    pub unreadable: u64,
}

/// What becomes of items that the topic does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// They stay as they are: the topic may have lost them.
    Stay,
    /// They cannot be ordered any more.
    Withdraw,
}

/// Why the catalogue was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The topic could not be read.
    #[error("nothing was changed: {0}")]
    Topic(#[from] RereadingError),
    /// PostgreSQL returned an error, or is not there.
    #[error("nothing was changed: {0}")]
    Database(#[from] sqlx::Error),
    /// Transactions of the consumer, or others, kept the catalogue locked.
    #[error("nothing was changed: the catalogue was in use at each of {tries} tries to exchange it; run it again", tries = TRIES_MAX)]
    InUse,
    /// Records came faster than they could be read.
    #[error(
        "nothing was changed: the last records did not come within {max:?}; run it again when fewer items change",
        max = LAST_MAX
    )]
    Late,
}

/// Reads the topic from its beginning and puts its items in place of the catalogue. `pool` has one connection, which
/// stays.
///
/// # Errors
/// [`RebuildError`]; then nothing was changed.
pub async fn rebuild(pool: &PgPool, brokers: &str, topic: &str, missing: Missing) -> Result<Rebuilt, RebuildError> {
    let real = prepare(pool).await?;
    let mut reading = Rereading::begin(brokers, topic).await?;
    let (mut done, mut logged) = (Rebuilt::default(), clock::monotonic());
    // Twice: the records that came while the first pass ran are few.
    for _ in 0..2 {
        while let Some(read) = reading.next().await? {
            let batch = async {
                let mut tx = Transaction::begin(pool, BATCH_BOUND).await?;
                let taken = take_in(&mut tx, &read).await?;
                tx.commit_quietly().await?;
                Ok::<_, sqlx::Error>(taken)
            };
            let (records, unreadable) = BATCH_BOUND.within(batch).await?;
            done.add(records, unreadable);
            tell(&reading, done, &mut logged);
        }
        reading.look_for_the_end().await?;
    }
    for _ in 0..TRIES_MAX {
        if let Some(placed) = EXCHANGE_BOUND.within(place(pool, &real, &mut reading, missing, done)).await? {
            return Ok(placed);
        }
    }
    Err(RebuildError::InUse)
}

/// Makes the session's tables; returns the schema of the real ones.
async fn prepare(pool: &PgPool) -> Result<String, sqlx::Error> {
    let mut db = pool.acquire().await?;
    sqlx::raw_sql("drop table if exists pg_temp.catalogue, pg_temp.catalogue_seen").execute(&mut *db).await?;
    let real = sqlx::query_scalar(
        "select quote_ident(nspname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
          where c.oid = 'catalogue'::regclass",
    )
    .fetch_one(&mut *db)
    .await?;
    sqlx::raw_sql(AssertSqlSafe(format!(
        "create temporary table catalogue (like {real}.catalogue including all);
         create temporary table catalogue_seen (like {real}.catalogue_seen including all)"
    )))
    .execute(&mut *db)
    .await?;
    Ok(real)
}

/// Takes records that were read; one that is no item is named and passed over. Returns how many records that were, and
/// how many were no item.
async fn take_in(tx: &mut Tx<'_>, read: &Reread) -> Result<(u64, u64), sqlx::Error> {
    let mut unreadable = 0;
    for (at, reason) in &read.unreadable {
        unreadable += 1;
        tracing::warn!(topic = at.topic, partition = at.partition, offset = at.offset, reason, "passed over");
    }
    let mut messages = read.messages.clone();
    let all = count(messages.len()) + unreadable;
    loop {
        // The handler checks the records before it touches the database, so the transaction is as it was.
        let unfit = match CatalogueHandler.handle(tx, &messages).await {
            Ok(()) => return Ok((all, unreadable)),
            Err(HandleError::Several(unfit)) => unfit.into_iter().map(|unfit| (unfit.message, unfit.reason)).collect(),
            Err(HandleError::Of { message, error }) => vec![(message, error.to_string())],
            Err(HandleError::Database(error)) => return Err(error),
            Err(other) => return Err(sqlx::Error::Protocol(other.to_string())),
        };
        let before = messages.len();
        messages.retain(|message| !is_among(&unfit, message));
        unreadable += count(before - messages.len());
    }
}

fn is_among(unfit: &[(saga_core::id::MessageId, String)], message: &Message) -> bool {
    let found = unfit.iter().find(|(id, _)| *id == message.envelope.id);
    if let Some((_, reason)) = found {
        let at = &message.at;
        tracing::warn!(topic = at.topic, partition = at.partition, offset = at.offset, reason, "passed over");
    }
    found.is_some()
}

/// Puts the session's tables in place of the real ones, with the records to the last moment. `None` when the consumer
/// did not let it in. It can be tried again only then: records that are read behind that are rolled back with
/// everything else.
async fn place(
    pool: &PgPool,
    real: &str,
    reading: &mut Rereading,
    missing: Missing,
    mut done: Rebuilt,
) -> Result<Option<Rebuilt>, RebuildError> {
    let mut tx = Transaction::begin(pool, EXCHANGE_BOUND).await?;
    let say = async |tx: &mut Tx<'_>, statement: String| {
        Ok::<_, sqlx::Error>(sqlx::query(AssertSqlSafe(statement)).execute(&mut **tx).await?.rows_affected())
    };
    // Readers of prices go on. The consumer waits, and what it has done until now is in the topic before its end.
    match say(&mut tx, format!("lock table {real}.catalogue in share row exclusive mode")).await {
        Err(error) if error_class::lock_wait(&error).is_some() => return Ok(None),
        locked => drop(locked?),
    }
    let last = async {
        reading.look_for_the_end().await?;
        while let Some(read) = reading.next().await? {
            let (records, unreadable) = take_in(&mut tx, &read).await?;
            done.add(records, unreadable);
        }
        Ok::<_, RebuildError>(())
    };
    tokio::time::timeout(LAST_MAX, last).await.map_err(|_| RebuildError::Late)??;
    done.changed = say(
        &mut tx,
        format!(
            "insert into {real}.catalogue as known (sku, name, unit_price, currency, withdrawn, sequence)
             select sku, name, unit_price, currency, withdrawn, sequence from pg_temp.catalogue order by sku
             on conflict (sku) do update
             set    name       = excluded.name,
                    unit_price = excluded.unit_price,
                    currency   = excluded.currency,
                    withdrawn  = excluded.withdrawn,
                    sequence   = excluded.sequence,
                    changed_at = now()
             where  (known.name, known.unit_price, known.currency, known.withdrawn)
                        is distinct from (excluded.name, excluded.unit_price, excluded.currency, excluded.withdrawn)"
        ),
    )
    .await?;
    say(&mut tx, format!("delete from {real}.catalogue_seen where sku in (select sku from pg_temp.catalogue)")).await?;
    say(&mut tx, format!("insert into {real}.catalogue_seen select * from pg_temp.catalogue_seen")).await?;
    let not_there = "not withdrawn and not exists (select from pg_temp.catalogue t where t.sku = known.sku)";
    done.missing = match missing {
        Missing::Withdraw => {
            let withdraw = format!("update {real}.catalogue as known set withdrawn = true, changed_at = now()");
            say(&mut tx, format!("{withdraw} where {not_there}")).await?
        }
        Missing::Stay => {
            let asked = format!("select count(*) from {real}.catalogue as known where {not_there}");
            rows(sqlx::query_scalar(AssertSqlSafe(asked)).fetch_one(&mut **tx).await?)
        }
    };
    done.items = rows(sqlx::query_scalar("select count(*) from pg_temp.catalogue").fetch_one(&mut **tx).await?);
    tx.commit_quietly().await?;
    Ok(Some(done))
}

impl Rebuilt {
    fn add(&mut self, records: u64, unreadable: u64) {
        self.records += records;
        self.unreadable += unreadable;
    }
}

fn tell(reading: &Rereading, done: Rebuilt, logged: &mut Instant) {
    if logged.elapsed() < TELL_EVERY {
        return;
    }
    *logged = clock::monotonic();
    let (read, all) = reading.progress();
    tracing::info!(records = done.records, percent = read * 100 / all.max(1), "reading the topic");
}

fn count(messages: usize) -> u64 {
    u64::try_from(messages).unwrap_or(u64::MAX)
}

fn rows(count: i64) -> u64 {
    count.unsigned_abs()
}

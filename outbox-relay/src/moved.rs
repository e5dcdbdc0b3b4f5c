//! The commands that an operator runs, once, after an outbox was moved to another PostgreSQL cluster or has got another
//! name. The relays are stopped meanwhile: each command holds the leases' table, and refuses while a lease is in use.

use crate::{position::Position, position::ReadError, record::batch_log, settings::OutboxSettings};
use saga_core::outbox::Tx;
use sqlx::{Connection as _, PgConnection, PgTransaction};
use tracing::info;

/// How transaction ids came to this cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cure {
    /// The ids were kept (`pg_upgrade`, a physical copy): the position holds here as well.
    Accept,
    /// The ids mean nothing here (a logical copy). The position separates published rows from the others, and all rows
    /// get transaction ids of this cluster.
    Rewrite,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A relay publishes the outbox.
    #[error("{holder} publishes outbox {outbox:?} at this moment; stop the relays first. Nothing was changed")]
    InUse {
        /// The outbox's name in OUTBOXES.
        outbox: String,
        /// The host and the process of the relay.
        holder: String,
    },
    /// The outbox has no position to take over.
    #[error("outbox {0:?} has no position in this database; nothing was changed")]
    NoPosition(String),
    /// The outbox has a position already.
    #[error("outbox {0:?} has a position of its own in this database; nothing was changed")]
    HasPosition(String),
    /// The position does not parse.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// PostgreSQL returned an error, or is away.
    #[error("nothing was changed: {0}")]
    Database(#[from] sqlx::Error),
}

/// Allows the outbox to be published in this cluster.
///
/// # Errors
/// [`MoveError`]; then nothing was changed.
pub async fn reanchor(outbox: &OutboxSettings, cure: Cure) -> Result<(), MoveError> {
    let mut db = PgConnection::connect_with(&outbox.database).await?;
    let mut tx = begin(&mut db, &[&outbox.name]).await?;
    let last = batch_log::last(&mut tx, &outbox.name).await?;
    let (n, at) = match (last, cure) {
        (Some(last), _) => (last.n, last.position),
        (None, Cure::Rewrite) => (0, Position::initial()),
        (None, Cure::Accept) => return Err(MoveError::NoPosition(outbox.name.clone())),
    };
    let (base, target, after) = match cure {
        Cure::Accept => (at.base.to_string(), at.target.to_string(), at.after),
        Cure::Rewrite => {
            let base = rewrite_in(&mut tx, &outbox.name, &at).await?;
            (base.clone(), base, 0)
        }
    };
    sqlx::query(
        "insert into outbox_batch (outbox, n, base, target, from_id, to_id, rows, owner, system_identifier)
         select $1, $2, $3::text::pg_snapshot, $4::text::pg_snapshot, $5, $5, 0, gen_random_uuid(), system_identifier
           from pg_control_system()",
    )
    .bind(&outbox.name)
    .bind(n + 1)
    .bind(base)
    .bind(target)
    .bind(after)
    .execute(&mut *tx)
    .await?;
    audit_in(&mut tx, &outbox.name, "reanchor", &format!("{cure:?}").to_lowercase()).await?;
    tx.commit().await?;
    info!(outbox = outbox.name, ?cure, "the position holds in this cluster; start the relays");
    Ok(())
}

/// Gives rows that are not published this transaction's id, and all others the id of a transaction that everything
/// sees. Returns the snapshot behind the latter and before the former.
async fn rewrite_in(tx: &mut Tx<'_>, outbox: &str, at: &Position) -> Result<String, sqlx::Error> {
    sqlx::query(
        "update outbox as row
            set xid = pg_current_xact_id()
          where not (pg_visible_in_snapshot(xid, $2::text::pg_snapshot)
                     or pg_visible_in_snapshot(xid, $3::text::pg_snapshot) and id <= $4)
             or exists (select
                          from outbox_pause as pause
                         where pause.outbox = $1 and pause.topic = row.topic and pause.base is not null
                           and not (pg_visible_in_snapshot(row.xid, pause.base)
                                    or pg_visible_in_snapshot(row.xid, pause.target) and row.id <= pause.after_id))",
    )
    .bind(outbox)
    .bind(at.base.to_string())
    .bind(at.target.to_string())
    .bind(at.after)
    .execute(&mut **tx)
    .await?;
    // A snapshot does not count its own transaction as running. Once a later one of the cluster has ended, it would show
    // this one's rows, too, and they would pass for published.
    let base: String = sqlx::query_scalar(
        "select case when own >= pg_snapshot_xmax(now) then now::text
                     else format('%s:%s:%s', pg_snapshot_xmin(now), pg_snapshot_xmax(now),
                                 (select string_agg(running::text, ',' order by running)
                                    from (select own as running union select pg_snapshot_xip(now)) as all_running))
                end
           from (select pg_current_snapshot() as now, pg_current_xact_id() as own) as at",
    )
    .fetch_one(&mut **tx)
    .await?;
    // PostgreSQL's first normal transaction id.
    sqlx::query(
        "update outbox
            set xid = '3'
          where xid <> pg_current_xact_id() and not pg_visible_in_snapshot(xid, $1::text::pg_snapshot)",
    )
    .bind(&base)
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "update outbox_pause
            set base = $2::text::pg_snapshot, target = $2::text::pg_snapshot, after_id = 0
          where outbox = $1 and base is not null",
    )
    .bind(outbox)
    .bind(&base)
    .execute(&mut **tx)
    .await?;
    Ok(base)
}

/// Gives an outbox's records to another name.
///
/// # Errors
/// [`MoveError`]; then nothing was changed.
pub async fn rename(outbox: &OutboxSettings, from: &str) -> Result<(), MoveError> {
    let to = &outbox.name;
    let mut db = PgConnection::connect_with(&outbox.database).await?;
    let mut tx = begin(&mut db, &[from, to]).await?;
    if batch_log::last(&mut tx, from).await?.is_none() {
        return Err(MoveError::NoPosition(from.to_owned()));
    }
    if batch_log::last(&mut tx, to).await?.is_some() {
        return Err(MoveError::HasPosition(to.clone()));
    }
    for sql in [
        "update outbox_batch set outbox = $2 where outbox = $1",
        "update outbox_parked set outbox = $2 where outbox = $1",
        "update outbox_pause set outbox = $2 where outbox = $1",
        "update outbox_audit set outbox = $2 where outbox = $1",
        "delete from outbox_lease where outbox in ($1, $2)",
    ] {
        sqlx::query(sql).bind(from).bind(to).execute(&mut *tx).await?;
    }
    audit_in(&mut tx, to, "rename", &format!("it was called {from}")).await?;
    tx.commit().await?;
    info!(
        outbox = to,
        from,
        "the outbox has its new name, which is the source of its records: add it to COMMAND_SOURCES or REPLY_SOURCES of the services \
         that read them, then start the relays"
    );
    Ok(())
}

/// Begins a transaction in which no relay takes a lease, and none has one.
async fn begin<'c>(db: &'c mut PgConnection, outboxes: &[&str]) -> Result<PgTransaction<'c>, MoveError> {
    let mut tx = db.begin().await?;
    sqlx::query("lock table outbox_lease in share row exclusive mode").execute(&mut *tx).await?;
    let used: Option<(String, String)> = sqlx::query_as(
        "select outbox, holder from outbox_lease where outbox = any ($1) and expires_at > clock_timestamp() limit 1",
    )
    .bind(outboxes)
    .fetch_optional(&mut *tx)
    .await?;
    match used {
        Some((outbox, holder)) => Err(MoveError::InUse { outbox, holder }),
        None => Ok(tx),
    }
}

async fn audit_in(tx: &mut Tx<'_>, outbox: &str, action: &str, reason: &str) -> Result<(), sqlx::Error> {
    sqlx::query("insert into outbox_audit (outbox, actor, action, reason) values ($1, 'command line', $2, $3)")
        .bind(outbox)
        .bind(action)
        .bind(reason)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

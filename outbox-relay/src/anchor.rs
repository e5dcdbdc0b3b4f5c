//! Checks whether an outbox's position may be followed here: it means something only in the cluster, and under the
//! name, that it was recorded in. If not, the relay refuses with the command that is right, and publishes nothing.

use crate::{
    epoch,
    lease::Lease,
    outbox::Outbox,
    position::{Position, ReadError},
    record::{batch_log, commit::CommitError},
    snapshot::Snapshot,
};
use sqlx::PgConnection;
use std::sync::Arc;
use tracing::info;

/// Why nothing may be published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnchorError {
    /// This database is not the one that the position was recorded in.
    #[error(
        "the position of outbox {outbox:?} was recorded in another PostgreSQL cluster (system identifier {recorded}, this one \
         is {found}). Transaction ids may mean something else here, so nothing is published, and nothing is lost. Stop the \
         relays and the outbox's writers. After pg_upgrade or a physical copy run `outbox-relay reanchor {outbox} --accept`, \
         after a logical copy (pg_dump, logical replication) `outbox-relay reanchor {outbox} --rewrite`"
    )]
    OtherCluster {
        /// The outbox's name in OUTBOXES.
        outbox: String,
        /// The system identifier in the position.
        recorded: i64,
        /// The system identifier of this cluster.
        found: i64,
    },
    /// Rows came with a copy of another cluster's outbox.
    #[error(
        "row {id} of outbox {outbox:?} was written by transaction {xid}, which this PostgreSQL cluster has not had yet: it came \
         with a logical copy of another cluster. Nothing is published, and nothing is lost. Stop the relays and the outbox's \
         writers, and run `outbox-relay reanchor {outbox} --rewrite`"
    )]
    ForeignRows {
        /// The outbox's name in OUTBOXES.
        outbox: String,
        /// The id of the first such row.
        id: i64,
        /// The transaction id that stands in the row.
        xid: String,
    },
    /// The database's rows were published under another name before, or are at this moment.
    #[error(
        "this database's outbox is published under the name {other:?}; under the name {outbox:?} all of it would be published \
         again. Nothing is published. Put the old name back into OUTBOXES; or stop the relays and run \
         `outbox-relay rename {other} {outbox}`, which takes the position over; or set PUBLISH_AGAIN=true (--publish-again) if \
         everything is to be published once more"
    )]
    OtherName {
        /// The outbox's name in OUTBOXES.
        outbox: String,
        /// The name that it was published under.
        other: String,
    },
    /// Another replica has the lease.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The position could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The database returned an error.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl AnchorError {
    /// The database's error, if the cause is the database.
    pub(crate) fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Commit(CommitError::Database(error))
            | Self::Read(ReadError::Database(error))
            | Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

/// An outbox whose position may be followed.
pub(crate) struct Anchored {
    /// The system identifier of its cluster.
    pub(crate) system_identifier: i64,
    /// The epoch that its rows' ids count in.
    pub(crate) epoch: Arc<str>,
}

/// Checks that the position may be followed, and makes the first one if there is none.
pub(crate) async fn anchor(outbox: &Outbox, lease: &Lease) -> Result<Anchored, AnchorError> {
    let checked = async |db: &mut PgConnection| {
        let system_identifier = check(db, outbox, lease).await?;
        Ok::<_, AnchorError>(Anchored { system_identifier, epoch: epoch::read(db).await? })
    };
    outbox.db.ask(checked).await
}

async fn check(db: &mut PgConnection, outbox: &Outbox, lease: &Lease) -> Result<i64, AnchorError> {
    let name = &outbox.name;
    let found = batch_log::system_identifier(db).await?;
    let last = batch_log::last(db, name).await?;
    if let Some(recorded) = last.as_ref().map(|last| last.system_identifier).filter(|recorded| *recorded != found) {
        return Err(AnchorError::OtherCluster { outbox: name.clone(), recorded, found });
    }
    if let Some((id, xid)) = foreign_row(db).await? {
        return Err(AnchorError::ForeignRows { outbox: name.clone(), id, xid });
    }
    if !outbox.publish_again
        && let Some(other) = other_name(db, name, last.is_none() && !outbox.from_now).await?
    {
        return Err(AnchorError::OtherName { outbox: name.clone(), other });
    }
    match last {
        Some(_) => {}
        None if outbox.from_now => {
            begin_now(db, outbox, lease, found).await?;
            info!(outbox = name, "first start: what was committed before now is not published (--from-now)");
        }
        None => info!(outbox = name, "first start: everything in the outbox is published"),
    }
    Ok(found)
}

/// The first row of a transaction that this cluster has not had yet: its id and transaction id.
async fn foreign_row(db: &mut PgConnection) -> Result<Option<(i64, String)>, sqlx::Error> {
    sqlx::query_as(
        "select id, xid::text
           from outbox
          where xid >= pg_snapshot_xmax(pg_current_snapshot())
          order by xid, id
          limit 1",
    )
    .fetch_optional(db)
    .await
}

/// Another name under which the outbox is being published, or, at the `first` start under this one, was published
/// before.
async fn other_name(db: &mut PgConnection, outbox: &str, first: bool) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "(select other.outbox
            from outbox_lease as other
            join outbox_lease as own on own.outbox = $1
           where other.outbox <> $1 and other.expires_at > clock_timestamp() and other.acquired_at < own.acquired_at
           limit 1)
          union all
         (select outbox from outbox_batch where $2 and outbox > $1 order by outbox limit 1)
          union all
         (select outbox from outbox_batch where $2 and outbox < $1 order by outbox desc limit 1)
          limit 1",
    )
    .bind(outbox)
    .bind(first)
    .fetch_optional(db)
    .await
}

/// Makes the first position: all that is committed now counts as published.
async fn begin_now(db: &mut PgConnection, outbox: &Outbox, lease: &Lease, cluster: i64) -> Result<(), AnchorError> {
    let now: String = sqlx::query_scalar("select pg_current_snapshot()::text").fetch_one(&mut *db).await?;
    let now: Snapshot = now.parse().map_err(ReadError::from)?;
    let Position { base, target, after } = Position::at(now);
    let entry = batch_log::BatchLogEntry { base, target, from_id: after, to_id: after, rows: 0 };
    if !batch_log::append(db, &outbox.name, lease.owner, cluster, 0, &[entry]).await? {
        return Err(CommitError::Fenced.into());
    }
    Ok(())
}

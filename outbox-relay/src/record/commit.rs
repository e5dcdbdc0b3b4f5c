//! Records progress: the batch log, and in the same transaction the fate of rows that were not published.
//!
//! One task records for all streams of an outbox, each stream's progress in its order. Everything that was complete
//! when the last commit returned goes into the next one, so the disk's pace never delays the producer. If a commit
//! writes no row, another process has the lease: the session ends, loudly.

use crate::{
    database::Database,
    position::Position,
    record::{
        batch_log::{self, BatchLogEntry},
        parking::RowToPark,
        pause::{self, CaughtUp, LeftBehind},
    },
};
use saga_core::outbox::Tx;
use sqlx::PgConnection;
use std::{sync::Arc, time::Duration};
use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;

/// How many entries one commit records at most.
const ENTRIES_MAX: usize = 256;

/// How many parked rows one transaction copies, whatever comes behind a blocked lane; its last stretch may exceed that.
/// Their bytes are bounded likewise. The transaction may take a lease's time for each such part, as its last stretch
/// may have several.
const PARKED_ROWS_MAX: usize = 5_000;

/// How many bytes of parked rows one statement copies; its last row may exceed that.
const COPIED_AT_ONCE: usize = 32 << 20;

/// The pause between two commits. Only a turn of retries and the end of a session wait for a commit. Each commit is a
/// sync of the disk that business transactions wait for too. A crash in between costs a few more repeats.
const COMMIT_EVERY: Duration = Duration::from_millis(25);

/// Something that is now true, and has to be recorded behind all that became true before it.
pub(crate) enum Recordable {
    /// Rows are dealt with.
    Rows(FinishedRows),
    /// A topic is left behind from here on.
    LeftBehind(LeftBehind),
    /// A topic that is set apart has no row up to here that is not dealt with.
    Advanced(Arc<str>, Position),
    /// A topic has caught up with the others.
    CaughtUp(CaughtUp),
    /// Nothing to record: what passed leaves no trace.
    Nothing,
    /// Asks for a signal when everything before this is recorded.
    Flush(oneshot::Sender<()>),
}

/// Rows that are dealt with: published, parked, or left behind with their topic.
pub(crate) struct FinishedRows {
    pub(crate) only_topic: Option<Arc<str>>,
    pub(crate) entry: BatchLogEntry,
    pub(crate) parked: Vec<RowToPark>,
    pub(crate) left_behind: Vec<LeftBehind>,
}

/// Why recording ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommitError {
    /// Another process has the lease: this owner has been fenced.
    #[error("fenced: progress was not recorded, because another process has the lease")]
    Fenced,
    /// PostgreSQL returned an error, or is away.
    #[error("recording progress: {0}")]
    Database(#[from] sqlx::Error),
}

/// Records progress for one lease of one outbox.
pub(crate) struct Recorder {
    pub(crate) db: Database,
    pub(crate) outbox: String,
    pub(crate) owner: Uuid,
    pub(crate) system_identifier: i64,
    /// The number of the log's last entry.
    pub(crate) n: i64,
    /// Wakes the recorder early: another task waits for what is recorded next.
    pub(crate) hurry: Arc<Notify>,
}

impl Recorder {
    /// Records progress until no more can come.
    pub(crate) async fn run(mut self, mut progress: mpsc::Receiver<Recordable>) -> Result<(), CommitError> {
        let database = self.db.clone();
        let mut db = database.connect().await?;
        let mut batch = Vec::with_capacity(ENTRIES_MAX);
        while progress.recv_many(&mut batch, ENTRIES_MAX).await > 0 {
            let mut rest = &batch[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(at_once(rest));
                database.within_times(parts(now), self.record(&mut db, now)).await?;
                rest = later;
            }
            for done in batch.drain(..) {
                if let Recordable::Flush(recorded) = done {
                    // The task that waits for it may have ended.
                    recorded.send(()).ok();
                }
            }
            tokio::select! {
                () = tokio::time::sleep(COMMIT_EVERY) => {}
                () = self.hurry.notified() => {}
            }
        }
        db.give_back();
        Ok(())
    }

    async fn record(&mut self, db: &mut PgConnection, batch: &[Recordable]) -> Result<(), CommitError> {
        let entries: Vec<BatchLogEntry> = batch
            .iter()
            .filter_map(|progress| match progress {
                Recordable::Rows(stretch) if stretch.only_topic.is_none() => Some(stretch.entry.clone()),
                _ => None,
            })
            .collect();
        let plain = |progress: &Recordable| match progress {
            Recordable::Rows(stretch) => {
                stretch.only_topic.is_none() && stretch.parked.is_empty() && stretch.left_behind.is_empty()
            }
            Recordable::Advanced(..) | Recordable::CaughtUp(_) | Recordable::LeftBehind(_) => false,
            Recordable::Flush(_) | Recordable::Nothing => true,
        };
        if batch.iter().all(plain) {
            return self.append(db, &entries).await;
        }
        let mut tx = sqlx::Connection::begin(db).await?;
        for progress in batch {
            self.record_in(&mut tx, progress).await?;
        }
        // This check is the last statement before the entry: the lease cannot be renewed from here on until the commit.
        let held: Option<(bool,)> =
            sqlx::query_as("select true from outbox_lease where outbox = $1 and owner = $2 for share")
                .bind(&self.outbox)
                .bind(self.owner)
                .fetch_optional(&mut *tx)
                .await?;
        if held.is_none() {
            return Err(CommitError::Fenced);
        }
        self.append(&mut tx, &entries).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn record_in(&self, tx: &mut Tx<'_>, progress: &Recordable) -> Result<(), sqlx::Error> {
        match progress {
            Recordable::Rows(stretch) => {
                for left in &stretch.left_behind {
                    pause::leave_in(tx, &self.outbox, left).await?;
                }
                if !stretch.parked.is_empty() {
                    park_in(tx, &self.outbox, &stretch.parked).await?;
                }
                if let Some(topic) = &stretch.only_topic {
                    let BatchLogEntry { base, target, to_id, .. } = &stretch.entry;
                    let at = Position { base: base.clone(), target: target.clone(), after: *to_id };
                    pause::advance_in(tx, &self.outbox, topic, &at).await?;
                }
            }
            Recordable::Advanced(topic, at) => pause::advance_in(tx, &self.outbox, topic, at).await?,
            Recordable::LeftBehind(left) => pause::leave_in(tx, &self.outbox, left).await?,
            Recordable::CaughtUp(caught_up) => pause::end_in(tx, &self.outbox, caught_up).await?,
            Recordable::Flush(_) | Recordable::Nothing => {}
        }
        Ok(())
    }

    async fn append(&mut self, db: &mut PgConnection, entries: &[BatchLogEntry]) -> Result<(), CommitError> {
        if entries.is_empty() {
            return Ok(());
        }
        let appended = batch_log::append(db, &self.outbox, self.owner, self.system_identifier, self.n, entries).await;
        match appended {
            Ok(false) => Err(CommitError::Fenced),
            Ok(true) => {
                self.n += 1;
                Ok(())
            }
            // Another process wrote entry n: it is the owner, or was, and knows better where the outbox stands.
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Err(CommitError::Fenced),
            Err(error) => Err(error.into()),
        }
    }
}

/// How many of the first rows one statement copies: the server bounds a statement's time.
fn copied_at_once(rows: &[RowToPark]) -> usize {
    let mut bytes = 0;
    let full = rows.iter().position(|row| {
        bytes += row.bytes;
        bytes >= COPIED_AT_ONCE
    });
    full.map_or(rows.len(), |at| at + 1)
}

/// Copies rows to the parked table, in the caller's transaction.
async fn park_in(tx: &mut Tx<'_>, outbox: &str, rows: &[RowToPark]) -> Result<(), sqlx::Error> {
    let mut rest = rows;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(copied_at_once(rest));
        copy_in(tx, outbox, now).await?;
        rest = later;
    }
    Ok(())
}

async fn copy_in(tx: &mut Tx<'_>, outbox: &str, rows: &[RowToPark]) -> Result<(), sqlx::Error> {
    let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
    let reasons: Vec<&str> = rows.iter().map(|row| row.reason.as_str()).collect();
    let blocked_by: Vec<Option<i64>> = rows.iter().map(|row| row.blocked_by).collect();
    sqlx::query(
        "insert into outbox_parked
                (outbox, id, message_id, topic, key, type, payload, headers, created_at, reason, blocked_by)
         select $1, o.id, o.message_id, o.topic, o.key, o.type, o.payload, o.headers, o.created_at,
                park.reason, park.blocked_by
           from unnest($2::bigint[], $3::text[], $4::bigint[]) as park (id, reason, blocked_by)
           join outbox o on o.id = park.id
          order by o.id
             on conflict (outbox, id) do nothing",
    )
    .bind(outbox)
    .bind(ids)
    .bind(reasons)
    .bind(blocked_by)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The bytes of the rows that `progress` parks.
fn parked_bytes(progress: &Recordable) -> usize {
    match progress {
        Recordable::Rows(stretch) => stretch.parked.iter().map(|row| row.bytes).sum(),
        _ => 0,
    }
}

/// How many times the bound of one conversation the batch may take.
fn parts(batch: &[Recordable]) -> u32 {
    let bytes: usize = batch.iter().map(parked_bytes).sum();
    u32::try_from(bytes / COPIED_AT_ONCE).unwrap_or(u32::MAX).saturating_add(1)
}

/// How many elements of the batch one transaction records.
fn at_once(batch: &[Recordable]) -> usize {
    let (mut parked, mut bytes) = (0, 0);
    let full = batch.iter().position(|progress| {
        if let Recordable::Rows(stretch) = progress {
            parked += stretch.parked.len();
            bytes += parked_bytes(progress);
        }
        parked >= PARKED_ROWS_MAX || bytes >= COPIED_AT_ONCE
    });
    full.map_or(batch.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Snapshot;

    fn stretch(parked: usize) -> Recordable {
        of_bytes(parked, 10)
    }

    fn of_bytes(parked: usize, bytes: usize) -> Recordable {
        let (base, target) = (Snapshot::initial(), Snapshot::initial());
        let park = RowToPark { id: 1, reason: String::new(), blocked_by: None, bytes };
        Recordable::Rows(FinishedRows {
            only_topic: None,
            entry: BatchLogEntry { base, target, from_id: 1, to_id: 1, rows: 1 },
            parked: vec![park; parked],
            left_behind: Vec::new(),
        })
    }

    #[test]
    fn many_parked_rows_are_recorded_in_several_transactions_and_everything_else_in_one() {
        assert_eq!(at_once(&[stretch(0), Recordable::Nothing, stretch(9)]), 3);
        let many = [stretch(0), stretch(PARKED_ROWS_MAX - 1), stretch(1), stretch(0), stretch(PARKED_ROWS_MAX)];
        assert_eq!(at_once(&many), 3);
        assert_eq!(at_once(&many[3..]), 2);
        assert_eq!(at_once(&many[4..]), 1);
    }

    #[test]
    fn many_parked_bytes_are_recorded_in_several_transactions_with_time_for_each() {
        let large = [of_bytes(2, COPIED_AT_ONCE / 4), of_bytes(2, COPIED_AT_ONCE / 4), of_bytes(8, COPIED_AT_ONCE / 2)];
        assert_eq!(at_once(&large), 2);
        assert_eq!(at_once(&large[2..]), 1);
        assert_eq!((parts(&[stretch(9)]), parts(&large[2..])), (1, 5));
    }

    #[test]
    fn one_statement_copies_rows_until_their_bytes_are_too_many_and_at_least_one() {
        let rows = |sizes: &[usize]| -> Vec<RowToPark> {
            sizes.iter().map(|&bytes| RowToPark { id: 1, reason: String::new(), blocked_by: None, bytes }).collect()
        };
        assert_eq!(copied_at_once(&rows(&[10, 20, 30])), 3);
        assert_eq!(copied_at_once(&rows(&[20 << 20, 12 << 20, 1])), 2);
        assert_eq!(copied_at_once(&rows(&[90 << 20, 1])), 1);
        assert_eq!(copied_at_once(&[]), 0);
    }
}

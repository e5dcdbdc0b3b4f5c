//! Records progress: the batch log, and in the same transaction whatever became of rows that were not published.
//!
//! One task for all streams of an outbox, each stream's progress in its order. Everything that is complete when the last commit returned goes into the next one, so the disk's
//! pace never holds the producer up. No row written means that the lease is somebody else's: the session ends, loudly.

use crate::{
    batch_log::{self, Entry},
    database::Database,
    parking::{self, Park},
    pause::{self, CaughtUp, LeftBehind},
    position::Position,
};
use sqlx::PgConnection;
use std::{sync::Arc, time::Duration};
use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;

/// Entries that one commit records at most.
const ENTRIES: usize = 256;

/// Parked rows that one transaction copies, or the few more of its last stretch: it has to end well within a lease, whatever
/// comes behind a blocked line.
const PARKED: usize = 5_000;

/// Between two commits. Only a turn of retries and the end of a session wait for them, and each is a sync of the disk that
/// business transactions wait for too; what a crash in between costs is a few more repeats.
const GATHER: Duration = Duration::from_millis(25);

/// Something that is now true, and has to be recorded behind all that became true before it.
pub(crate) enum Progress {
    /// A stretch of rows is dealt with.
    Rows(Stretch),
    /// A topic is left behind from here on.
    LeftBehind(LeftBehind),
    /// A topic that is set apart has no row up to here that is not dealt with.
    Advanced(Arc<str>, Position),
    /// A topic has caught up with the others.
    CaughtUp(CaughtUp),
    /// Something passed that leaves no trace here.
    Nothing,
    /// Tell when everything before this is recorded.
    Flush(oneshot::Sender<()>),
}

/// Rows that are dealt with: published, parked, or left behind with their topic.
pub(crate) struct Stretch {
    pub(crate) lane: Option<Arc<str>>,
    pub(crate) entry: Entry,
    pub(crate) parked: Vec<Park>,
    pub(crate) left_behind: Vec<LeftBehind>,
}

/// Why recording ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommitError {
    /// The lease is somebody else's: this owner has been fenced.
    #[error("fenced: progress was not recorded, because the lease is somebody else's")]
    Fenced,
    /// PostgreSQL said so, or is not there.
    #[error("recording progress: {0}")]
    Database(#[from] sqlx::Error),
}

/// Records for one lease of one outbox.
pub(crate) struct Recorder {
    pub(crate) db: Database,
    pub(crate) outbox: String,
    pub(crate) owner: Uuid,
    pub(crate) system_identifier: i64,
    /// The last entry of the log.
    pub(crate) n: i64,
    /// Something waits for what is recorded next.
    pub(crate) hurry: Arc<Notify>,
}

impl Recorder {
    /// Records what comes, until nothing more can come.
    pub(crate) async fn run(mut self, mut progress: mpsc::Receiver<Progress>) -> Result<(), CommitError> {
        let database = self.db.clone();
        let mut db = database.connect().await?;
        let mut batch = Vec::with_capacity(ENTRIES);
        while progress.recv_many(&mut batch, ENTRIES).await > 0 {
            let mut rest = &batch[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(at_once(rest));
                database.within(self.record(&mut db, now)).await?;
                rest = later;
            }
            for done in batch.drain(..) {
                if let Progress::Flush(recorded) = done {
                    // What waits for it may have ended.
                    recorded.send(()).ok();
                }
            }
            tokio::select! {
                () = tokio::time::sleep(GATHER) => {}
                () = self.hurry.notified() => {}
            }
        }
        db.give_back();
        Ok(())
    }

    async fn record(&mut self, db: &mut PgConnection, batch: &[Progress]) -> Result<(), CommitError> {
        let entries: Vec<Entry> = batch
            .iter()
            .filter_map(|progress| match progress {
                Progress::Rows(stretch) if stretch.lane.is_none() => Some(stretch.entry.clone()),
                _ => None,
            })
            .collect();
        let plain = |progress: &Progress| match progress {
            Progress::Rows(stretch) => {
                stretch.lane.is_none() && stretch.parked.is_empty() && stretch.left_behind.is_empty()
            }
            Progress::Advanced(..) | Progress::CaughtUp(_) | Progress::LeftBehind(_) => false,
            Progress::Flush(_) | Progress::Nothing => true,
        };
        if batch.iter().all(plain) {
            return self.append(db, &entries).await;
        }
        let mut tx = sqlx::Connection::begin(db).await?;
        let held: Option<(bool,)> =
            sqlx::query_as("select true from outbox_lease where outbox = $1 and owner = $2 for share")
                .bind(&self.outbox)
                .bind(self.owner)
                .fetch_optional(&mut *tx)
                .await?;
        if held.is_none() {
            return Err(CommitError::Fenced);
        }
        for progress in batch {
            self.record_in(&mut tx, progress).await?;
        }
        self.append(&mut tx, &entries).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn record_in(&self, tx: &mut PgConnection, progress: &Progress) -> Result<(), sqlx::Error> {
        match progress {
            Progress::Rows(stretch) => {
                for left in &stretch.left_behind {
                    pause::leave_in(tx, &self.outbox, left).await?;
                }
                if !stretch.parked.is_empty() {
                    parking::park_in(tx, &self.outbox, &stretch.parked).await?;
                }
                if let Some(topic) = &stretch.lane {
                    let Entry { base, target, to_id, .. } = &stretch.entry;
                    let at = Position { base: base.clone(), target: target.clone(), after: *to_id };
                    pause::advance_in(tx, &self.outbox, topic, &at).await?;
                }
            }
            Progress::Advanced(topic, at) => pause::advance_in(tx, &self.outbox, topic, at).await?,
            Progress::LeftBehind(left) => pause::leave_in(tx, &self.outbox, left).await?,
            Progress::CaughtUp(caught_up) => pause::end_in(tx, &self.outbox, caught_up).await?,
            Progress::Flush(_) | Progress::Nothing => {}
        }
        Ok(())
    }

    async fn append(&mut self, db: &mut PgConnection, entries: &[Entry]) -> Result<(), CommitError> {
        if entries.is_empty() {
            return Ok(());
        }
        let appended =
            batch_log::append_in(db, &self.outbox, self.owner, self.system_identifier, self.n, entries).await;
        match appended {
            Ok(false) => Err(CommitError::Fenced),
            Ok(true) => {
                self.n += 1;
                Ok(())
            }
            // Somebody else wrote entry n: he is the owner, or was, and knows better than we where the outbox stands.
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Err(CommitError::Fenced),
            Err(error) => Err(error.into()),
        }
    }
}

/// How much of it one transaction records.
fn at_once(batch: &[Progress]) -> usize {
    let mut parked = 0;
    let full = batch.iter().position(|progress| {
        if let Progress::Rows(stretch) = progress {
            parked += stretch.parked.len();
        }
        parked >= PARKED
    });
    full.map_or(batch.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Snapshot;

    fn stretch(parked: usize) -> Progress {
        let (base, target) = (Snapshot::initial(), Snapshot::initial());
        let park = Park { id: 1, reason: String::new(), blocked_by: None };
        Progress::Rows(Stretch {
            lane: None,
            entry: Entry { base, target, from_id: 1, to_id: 1, rows: 1 },
            parked: vec![park; parked],
            left_behind: Vec::new(),
        })
    }

    #[test]
    fn many_parked_rows_are_recorded_in_several_transactions_and_everything_else_in_one() {
        assert_eq!(at_once(&[stretch(0), Progress::Nothing, stretch(9)]), 3);
        let many = [stretch(0), stretch(PARKED - 1), stretch(1), stretch(0), stretch(PARKED)];
        assert_eq!(at_once(&many), 3);
        assert_eq!(at_once(&many[3..]), 2);
        assert_eq!(at_once(&many[4..]), 1);
    }
}

//! Who publishes: one owner per outbox, by a lease in the outbox's database.
//!
//! The database's clock judges; the owner itself stops by its own monotonic clock, before the lease ends. An owner is
//! identified by a UUID made anew at each acquisition: a number that is counted up can repeat after a failover of the
//! database that lost its last commits. When the process dies, the lease runs out and a stand-by takes over; a clean stop
//! gives it back at once. The lease has a connection of its own: whatever else waits for the database, renewing does not.

use crate::database::PrivateLine;
use std::time::Duration;
use tokio::{sync::watch, time::Instant};
use tracing::warn;
use uuid::Uuid;

/// The part of a lease that its owner leaves unused: it stops producing that long before the end, so that what is on its
/// way has landed when the next owner starts.
const UNUSED: u32 = 5;
/// The part of a lease that one try to renew it may take, so that a connection that falls silent leaves the time for
/// another try over a new one.
const TRY: u32 = 5;

/// A lease that this process holds.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) outbox: String,
    pub(crate) owner: Uuid,
    length: Duration,
    /// When to stop producing, unless it is renewed before.
    ends: watch::Sender<Instant>,
}

/// Why a lease is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// Somebody else has it.
    #[error("the lease was taken over by somebody else")]
    TakenOver,
    /// It could not be renewed in time.
    #[error("the lease could not be renewed before its end: {0}")]
    RanOut(String),
}

impl Lease {
    /// Takes the lease if nobody has it. An expiry further ahead than one lease counts as expired: it was written by
    /// a server whose clock was ahead of this one's (the primary before a failover). `before` is a lease that this process had and has
    /// let go of.
    pub(crate) async fn acquire(
        line: &mut PrivateLine,
        outbox: &str,
        holder: &str,
        length: Duration,
        before: Option<Uuid>,
    ) -> Result<Option<Self>, sqlx::Error> {
        let owner = Uuid::new_v4();
        let ends = Instant::from_std(saga_core::clock::monotonic()) + length - length / UNUSED;
        let statement = sqlx::query(
            "insert into outbox_lease as lease (outbox, owner, holder, acquired_at, renewed_at, expires_at)
             values ($1, $2, $3, clock_timestamp(), clock_timestamp(), clock_timestamp() + $4)
             on conflict (outbox) do update
                set owner       = excluded.owner,
                    holder      = excluded.holder,
                    acquired_at = excluded.acquired_at,
                    renewed_at  = excluded.renewed_at,
                    expires_at  = excluded.expires_at
              where lease.expires_at <= clock_timestamp()
                 or lease.expires_at > clock_timestamp() + $4
                 or lease.owner = $5",
        )
        .bind(outbox)
        .bind(owner)
        .bind(holder)
        .bind(length)
        .bind(before);
        let taken = line.execute(length, statement).await? == 1;
        Ok(taken.then(|| Self { outbox: outbox.into(), owner, length, ends: watch::channel(ends).0 }))
    }

    /// Renews the lease, at a third of its length, until it is lost.
    pub(crate) async fn keep(&self, line: &mut PrivateLine) -> LeaseError {
        let mut pause = self.length / 3;
        let mut problem = String::from("no answer from PostgreSQL");
        let mut said = false;
        loop {
            let ends = *self.ends.borrow();
            tokio::time::sleep_until((Instant::from_std(saga_core::clock::monotonic()) + pause).min(ends)).await;
            let asked = Instant::from_std(saga_core::clock::monotonic());
            if asked >= ends {
                return LeaseError::RanOut(problem);
            }
            match tokio::time::timeout_at(ends, self.renew(line)).await {
                Ok(Ok(true)) => {
                    self.ends.send_replace(asked + self.length - self.length / UNUSED);
                    pause = self.length / 3;
                    said = false;
                    continue;
                }
                Ok(Ok(false)) => return LeaseError::TakenOver,
                Ok(Err(error)) => problem = error.to_string(),
                Err(_) => {}
            }
            if !said {
                warn!(outbox = %self.outbox, error = %problem, "the lease could not be renewed, trying again");
                said = true;
            }
            pause = self.length / 20;
        }
    }

    async fn renew(&self, line: &mut PrivateLine) -> Result<bool, sqlx::Error> {
        let statement = sqlx::query(
            "update outbox_lease
                set renewed_at = clock_timestamp(),
                    expires_at = clock_timestamp() + $3
              where outbox = $1 and owner = $2",
        )
        .bind(&self.outbox)
        .bind(self.owner)
        .bind(self.length);
        Ok(line.execute(self.length / TRY, statement).await? == 1)
    }

    /// Gives it back, so that a stand-by need not wait for its end.
    pub(crate) async fn release(&self, line: &mut PrivateLine) -> Result<(), sqlx::Error> {
        let statement = sqlx::query("delete from outbox_lease where outbox = $1 and owner = $2")
            .bind(&self.outbox)
            .bind(self.owner);
        line.execute(self.length / TRY, statement).await?;
        Ok(())
    }
}

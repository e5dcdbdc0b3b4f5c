//! The lease in the outbox's database: it decides which process publishes, one owner per outbox.
//!
//! The database's clock judges; the owner itself stops by its own monotonic clock, before the lease ends. A UUID made
//! anew at each acquisition identifies the owner: a counter can repeat after a failover of the database that lost its
//! last commits. When the process dies, the lease runs out and a stand-by takes over; a clean stop gives it back at
//! once. The lease has a connection of its own, so that renewing waits for no other work.

use crate::database::Database;
use saga_core::{clock::DatabaseClock, error_class::is_outage, outage::Outage};
use sqlx::{PgConnection, postgres::PgConnectOptions};
use std::{sync::Arc, time::Duration};
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

/// The part of a lease that its owner leaves unused: it stops producing that long before the end, so that what is on
/// its way has landed when the next owner starts.
const UNUSED_PART: u32 = 5;
/// The part of a lease that one try to take or renew it may take. If its connection falls silent, time is left for
/// another try over a new one.
const TRY_PART: u32 = 5;

/// Where leases are taken: a connection that nothing else can keep busy.
#[derive(Debug)]
pub(crate) struct Leases {
    db: Database,
    /// How long a lease lasts without renewal.
    pub(crate) length: Duration,
    /// The database's clock; each look at a lease reads it.
    pub(crate) clock: Arc<DatabaseClock>,
    /// The outage of the outbox's database.
    pub(crate) outage: Arc<Outage>,
}

impl Leases {
    pub(crate) fn new(options: PgConnectOptions, length: Duration) -> Self {
        let db = Database::new(options, 1, length / TRY_PART);
        let outage = db.outage();
        Self { db, length, clock: DatabaseClock::of(outage.dependency()), outage }
    }

    async fn ask<T>(
        &self,
        conversation: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let said = self.db.ask(conversation).await;
        match &said {
            Ok(_) => self.outage.working(),
            Err(error) if is_outage(error) => self.outage.failing(&error.to_string()),
            Err(_) => {}
        }
        said
    }
}

/// A lease that this process holds.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) outbox: String,
    pub(crate) owner: Uuid,
    length: Duration,
    /// When to stop producing, unless the lease is renewed before.
    ends: watch::Sender<Instant>,
}

/// Why a lease is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// Another process has the lease.
    #[error("another process has taken the lease over")]
    TakenOver,
    /// The lease could not be renewed in time.
    #[error("the lease could not be renewed before its end: {0}")]
    RanOut(String),
}

impl Lease {
    /// Takes the lease if no process has it. An expiry further ahead than one lease counts as expired. A server whose
    /// clock was ahead of this one's wrote it (the primary before a failover). `before` is a lease that this process
    /// had and has let go of. While another process has the lease, this only reads.
    pub(crate) async fn acquire(
        leases: &Leases,
        outbox: &str,
        holder: &str,
        before: Option<Uuid>,
    ) -> Result<Option<Self>, sqlx::Error> {
        let length = leases.length;
        let asked = saga_core::clock::monotonic();
        let (now, free): (OffsetDateTime, bool) = leases
            .ask(async |db| {
                sqlx::query_as(
                    "select now, not exists (select
                                               from outbox_lease
                                              where outbox = $1 and expires_at > now and expires_at <= now + $2
                                                and owner is distinct from $3)
                       from clock_timestamp() as now",
                )
                .bind(outbox)
                .bind(length)
                .bind(before)
                .fetch_one(db)
                .await
            })
            .await?;
        leases.clock.heard(now, asked);
        if !free {
            return Ok(None);
        }
        let owner = Uuid::new_v4();
        let ends = Instant::from_std(saga_core::clock::monotonic()) + length - length / UNUSED_PART;
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
        let taken = leases.ask(async |db| statement.execute(db).await).await?.rows_affected() == 1;
        Ok(taken.then(|| Self { outbox: outbox.into(), owner, length, ends: watch::channel(ends).0 }))
    }

    /// Renews the lease, at a third of its length, until it is lost.
    pub(crate) async fn keep(&self, leases: &Leases) -> LeaseError {
        let mut pause = self.length / 3;
        let mut problem = String::from("no answer from PostgreSQL");
        loop {
            let ends = *self.ends.borrow();
            tokio::time::sleep_until((Instant::from_std(saga_core::clock::monotonic()) + pause).min(ends)).await;
            let asked = Instant::from_std(saga_core::clock::monotonic());
            if asked >= ends {
                return LeaseError::RanOut(problem);
            }
            match tokio::time::timeout_at(ends, self.renew(leases)).await {
                Ok(Ok(true)) => {
                    self.ends.send_replace(asked + self.length - self.length / UNUSED_PART);
                    pause = self.length / 3;
                    continue;
                }
                Ok(Ok(false)) => return LeaseError::TakenOver,
                Ok(Err(error)) => problem = error.to_string(),
                Err(_) => {}
            }
            pause = self.length / 20;
        }
    }

    async fn renew(&self, leases: &Leases) -> Result<bool, sqlx::Error> {
        let asked = saga_core::clock::monotonic();
        let statement = sqlx::query_scalar(
            "update outbox_lease
                set renewed_at = clock_timestamp(),
                    expires_at = clock_timestamp() + $3
              where outbox = $1 and owner = $2
             returning renewed_at",
        )
        .bind(&self.outbox)
        .bind(self.owner)
        .bind(self.length);
        let renewed: Option<OffsetDateTime> = leases.ask(async |db| statement.fetch_optional(db).await).await?;
        if let Some(now) = renewed {
            leases.clock.heard(now, asked);
        }
        Ok(renewed.is_some())
    }

    /// Gives the lease back, so that a stand-by need not wait for its end.
    pub(crate) async fn release(&self, leases: &Leases) -> Result<(), sqlx::Error> {
        let statement = sqlx::query("delete from outbox_lease where outbox = $1 and owner = $2")
            .bind(&self.outbox)
            .bind(self.owner);
        leases.ask(async |db| statement.execute(db).await).await?;
        Ok(())
    }
}

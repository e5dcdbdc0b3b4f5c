//! Liveness and readiness.
//!
//! A process is *live* while it answers at all. It is *ready* while each of its named checks passes and it is not
//! stopping. An outage turns readiness red and nothing else: the process waits, and turns green by itself. Each change
//! of a check is logged once, by [`Health::watch`], however often it is asked.

use super::{config::KafkaSettings, database, topics};
use crate::{
    clock::DatabaseClock,
    error_class::is_pool_full,
    outage::Outage,
    outbox::has_one_to_spare,
    transaction::{Bound, is_timeout, why_none},
};
use futures::future::BoxFuture;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde::Serialize;
use sqlx::PgPool;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

/// How long one check may take; a slower answer counts as none.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the check of a database waits for a connection of the pool, so that there is time to find out why there is none.
const POOL_MAX: Duration = Duration::from_secs(1);
/// How often [`Health::watch`] looks.
const WATCH_EVERY: Duration = Duration::from_secs(2);

type Check = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The registry of checks. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Health(Arc<Inner>);

struct Inner {
    stopping: CancellationToken,
    checks: Mutex<BTreeMap<&'static str, Check>>,
}

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Whether work should be sent here.
    pub ready: bool,
    /// Each check: `ok`, or why not.
    pub checks: BTreeMap<&'static str, String>,
}

impl Health {
    /// A registry without checks; from when `stopping` is cancelled, it is not ready.
    #[must_use]
    pub fn new(stopping: &CancellationToken) -> Self {
        Self(Arc::new(Inner { stopping: stopping.clone(), checks: Mutex::default() }))
    }

    /// Adds a check, or replaces the one of that name. `Err` says why not, in words.
    pub fn check<F, Fut>(&self, name: &'static str, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), String>> + Send + 'static,
    {
        let check: Check = Arc::new(move || Box::pin(check()));
        self.0.checks.lock().unwrap_or_else(PoisonError::into_inner).insert(name, check);
    }

    /// The check `database`: a query answers. The check `connections`: this process does not use all connections of its pool
    /// and want more. And the check `clock`: the host's clock and the database's are less than two minutes apart.
    pub fn database(&self, pool: &PgPool) {
        let (pool, outage, full) = (pool.clone(), Outage::of_database(pool), Outage::of_pool(pool));
        let clock = DatabaseClock::of(outage.dependency());
        let heard = Arc::clone(&clock);
        let works = Arc::clone(&full);
        self.check("database", move || {
            let (pool, outage, works) = (pool.clone(), Arc::clone(&outage), Arc::clone(&works));
            let heard = Arc::clone(&heard);
            async move {
                match hear_clock(&pool).await {
                    Ok((time, asked)) => {
                        heard.heard(time, asked);
                        outage.working();
                        works.working();
                        Ok(())
                    }
                    Err(error) if is_pool_full(&error) => {
                        outage.working();
                        Ok(())
                    }
                    Err(error) => {
                        outage.failing(&error.to_string());
                        Err(error.to_string())
                    }
                }
            }
        });
        self.check("connections", move || std::future::ready(full.check()));
        self.check("clock", move || {
            metrics::gauge!("clock_skew_seconds").set(clock.skew().unwrap_or_default().as_seconds_f64());
            std::future::ready(clock.check())
        });
    }

    /// The check `kafka`: a broker answers.
    pub fn kafka(&self, settings: &KafkaSettings) -> Result<(), rdkafka::error::KafkaError> {
        let client: BaseConsumer = topics::client(settings).create()?;
        let client = Arc::new(client);
        self.check("kafka", move || {
            let client = Arc::clone(&client);
            async move {
                // Asking for the metadata of one topic that need not exist is the cheapest question there is.
                let ask = tokio::task::spawn_blocking(move || client.fetch_metadata(Some("readyz"), CHECK_TIMEOUT));
                match ask.await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(error) => Err(error.to_string()),
                }
            }
        });
        Ok(())
    }

    /// Runs every check, side by side.
    pub async fn readiness(&self) -> Readiness {
        self.readiness_within(CHECK_TIMEOUT).await
    }

    async fn readiness_within(&self, limit: Duration) -> Readiness {
        let checks: Vec<(&'static str, Check)> = {
            let checks = self.0.checks.lock().unwrap_or_else(PoisonError::into_inner);
            checks.iter().map(|(name, check)| (*name, Arc::clone(check))).collect()
        };
        let answers = checks.into_iter().map(|(name, check)| async move {
            let answer = match tokio::time::timeout(limit, check()).await {
                Ok(Ok(())) => "ok".to_owned(),
                Ok(Err(reason)) => reason,
                Err(_) => format!("no answer within {limit:?}"),
            };
            (name, answer)
        });
        let mut checks: BTreeMap<_, _> = futures::future::join_all(answers).await.into_iter().collect();
        if self.0.stopping.is_cancelled() {
            checks.insert("process", "stopping".into());
        }
        Readiness { ready: checks.values().all(|answer| answer == "ok"), checks }
    }

    /// Logs each change of a check, until `stop`. Run it as a task of the process.
    pub async fn watch(self, stop: CancellationToken) {
        let mut before: BTreeMap<&'static str, bool> = BTreeMap::new();
        while !stop.is_cancelled() {
            for (name, answer) in self.readiness().await.checks {
                let ok = answer == "ok";
                match (before.insert(name, ok), ok) {
                    (None | Some(true), false) => tracing::warn!(check = name, reason = answer, "not ready"),
                    (Some(false), true) => tracing::info!(check = name, "ready again"),
                    (None | Some(true), true) | (Some(false), false) => {}
                }
                metrics::gauge!("ready", "check" => name).set(f64::from(u8::from(ok)));
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(WATCH_EVERY) => {}
            }
        }
    }
}

/// The database's clock; of a pool that gives no connection, why.
async fn hear_clock(pool: &PgPool) -> Result<(OffsetDateTime, Instant), sqlx::Error> {
    let heard = Bound::new(POOL_MAX).within(database::hear_clock(pool)).await;
    let none = |error: &sqlx::Error| is_pool_full(error) || is_timeout(error) && !has_one_to_spare(pool);
    if !heard.as_ref().is_err_and(none) {
        return heard;
    }
    let why = async { Err(why_none(pool, sqlx::Error::PoolTimedOut).await) };
    Bound::new(POOL_MAX / 2).within(why).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_ready_while_every_check_passes_and_says_which_does_not() {
        let stopping = CancellationToken::new();
        let health = Health::new(&stopping);
        health.check("database", || async { Ok(()) });
        assert!(health.readiness().await.ready);
        health.check("kafka", || async { Err("no broker".to_owned()) });
        let red = health.readiness().await;
        assert!(!red.ready);
        assert_eq!(red.checks["kafka"], "no broker");
        health.check("kafka", || async { Ok(()) });
        assert!(health.readiness().await.ready, "it turns green by itself");
        stopping.cancel();
        assert!(!health.readiness().await.ready, "a process that stops takes no more work");
    }

    #[tokio::test]
    async fn a_check_that_does_not_answer_is_not_ready() {
        let health = Health::new(&CancellationToken::new());
        health.check("stuck", std::future::pending);
        assert_eq!(health.readiness_within(Duration::from_millis(5)).await.checks["stuck"], "no answer within 5ms");
    }
}

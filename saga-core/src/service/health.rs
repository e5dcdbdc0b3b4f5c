//! Three answers, each true: `/livez`, `/readyz`, `/health`.
//!
//! | answer | question | asked by | what a no does |
//! |---|---|---|---|
//! | `/livez` | does the loop turn? | the supervisor | the process is restarted |
//! | `/readyz` | can it do what its callers ask of it now: its database answers, its tables are there? | the load balancer | no traffic is sent |
//! | `/health` | does all work move, part by part? | alerts, `make status` | an operator looks |
//!
//! One loop ([`Health::watch`]) asks the checks; the endpoints render what it saw last, so a request asks neither the database nor a
//! broker. What it saw too long ago says nothing, and is a no. Anybody hears the [`Cause`]; the reason in words is for
//! the log and for the roles of the admin listener. Nothing survives the process.

mod questions;
mod standing;

pub use questions::Needs;
pub(super) use standing::describe;
pub use standing::{Standing, State};

use super::{config::KafkaSettings, topics};
use crate::{
    clock::{self, DatabaseClock},
    error_class::{ErrorClass, classify, is_pool_full, renew_connections},
    outage::Outage,
    part::{Cause, Report, Trouble},
};
use futures::future::BoxFuture;
use questions::{hear_clock, missing};
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde::Serialize;
use sqlx::PgPool;
use standing::tell;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long one check may take; a slower answer counts as none.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a broker may take; less, so that no answer is known to be Kafka's.
const BROKER_TIMEOUT: Duration = Duration::from_millis(1_500);
/// How often [`Health::watch`] looks.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// What was seen so long ago says nothing of now: several looks were missed.
const TOO_OLD: Duration = Duration::from_secs(15);
/// A process whose loop has not turned for so long is not alive.
const LIVE_MAX: Duration = Duration::from_secs(60);

type Name = Cow<'static, str>;
type Ask = Arc<dyn Fn() -> BoxFuture<'static, Report> + Send + Sync>;

/// What depends on a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Concern {
    /// Whether callers are sent here, and health.
    Callers,
    /// Health alone.
    Work,
}

/// The registry of checks. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Health(Arc<Inner>);

struct Inner {
    stopping: CancellationToken,
    /// What is waited for before the process begins.
    starting: Mutex<Option<&'static str>>,
    checks: Mutex<BTreeMap<Name, (Concern, Ask)>>,
    seen: Mutex<Option<Seen>>,
    began: Instant,
    /// That the pool of connections is full.
    pool: Mutex<Option<Arc<Outage>>>,
    /// There is a new check.
    added: Notify,
}

/// What was seen at one look.
#[derive(Debug, Clone)]
struct Seen {
    at: Instant,
    parts: BTreeMap<Name, (Concern, Standing)>,
}

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Readiness {
    /// Whether callers should be sent here.
    pub ready: bool,
    /// What callers need: `ok`, or the cause.
    pub checks: BTreeMap<Name, &'static str>,
    /// How long ago that was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
}

/// The answer of `/health`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Healthiness {
    /// Whether all work moves.
    pub healthy: bool,
    /// How long ago that was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
    /// Each part.
    pub parts: BTreeMap<Name, Standing>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Health {
    /// A registry without checks; from when `stopping` is cancelled, it is not ready.
    #[must_use]
    pub fn new(stopping: &CancellationToken) -> Self {
        Self(Arc::new(Inner {
            stopping: stopping.clone(),
            starting: Mutex::default(),
            checks: Mutex::default(),
            seen: Mutex::default(),
            began: clock::monotonic(),
            pool: Mutex::default(),
            added: Notify::new(),
        }))
    }

    /// The process has not begun; it waits for this.
    pub fn starting(&self, waits_for: &'static str) {
        *lock(&self.0.starting) = Some(waits_for);
    }

    /// It has.
    pub fn started(&self) {
        *lock(&self.0.starting) = None;
        self.0.added.notify_one();
    }

    /// Adds a check of what callers need, or replaces the one of that name: while it is red, no traffic is sent here.
    pub fn callers_need<F, Fut>(&self, name: impl Into<Name>, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Report> + Send + 'static,
    {
        self.add(name.into(), Concern::Callers, check);
    }

    /// Adds a part whose work has to move, or replaces the one of that name.
    pub fn part<F, Fut>(&self, name: impl Into<Name>, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Report> + Send + 'static,
    {
        self.add(name.into(), Concern::Work, check);
    }

    fn add<F, Fut>(&self, name: Name, concern: Concern, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Report> + Send + 'static,
    {
        let ask: Ask = Arc::new(move || Box::pin(check()));
        lock(&self.0.checks).insert(name, (concern, ask));
        self.0.added.notify_one();
    }

    /// Callers need `database`: it answers, over the pool that their requests use. The part `connections`: this process does not
    /// use all connections of its pool and want more. And the part `clock`: the host's clock and the database's are less than two
    /// minutes apart.
    pub fn database(&self, pool: &PgPool) {
        let (pool, outage, full) = (pool.clone(), Outage::of_database(pool), Outage::of_pool(pool));
        let clock = DatabaseClock::of(outage.dependency());
        let heard = Arc::clone(&clock);
        let works = Arc::clone(&full);
        self.callers_need("database", move || {
            let (pool, outage, works) = (pool.clone(), Arc::clone(&outage), Arc::clone(&works));
            let heard = Arc::clone(&heard);
            async move {
                match hear_clock(&pool).await {
                    Ok((time, asked)) => {
                        heard.heard(time, asked);
                        outage.working();
                        works.working();
                        Report::fine()
                    }
                    Err(error) if is_pool_full(&error) => {
                        outage.working();
                        Report::fine()
                    }
                    Err(error) => {
                        let trouble = Trouble::from(&error);
                        outage.failing_of(trouble.cause, &trouble.reason);
                        trouble.into()
                    }
                }
            }
        });
        *lock(&self.0.pool) = Some(Arc::clone(&full));
        self.part("connections", move || std::future::ready(Report { trouble: full.trouble(), waiting: None }));
        self.part("clock", move || {
            metrics::gauge!("clock_skew_seconds").set(clock.skew().unwrap_or_default().as_seconds_f64());
            let checked = clock.check().map_err(|reason| Trouble::new(Cause::ClockSkew, reason));
            std::future::ready(checked.into())
        });
    }

    /// Callers need `tables`: these are there, with these rights, and take writes if they are to be written to.
    pub fn tables(&self, pool: &PgPool, needs: &'static [Needs]) {
        let pool = pool.clone();
        self.callers_need("tables", move || {
            let pool = pool.clone();
            async move { missing(&pool, needs).await.unwrap_or_else(|error| Trouble::from(&error).into()) }
        });
    }

    /// Callers need `name`: this question, which is like theirs, is answered over their pool. A plan that a changed table has made
    /// stale is replaced, as it is for them.
    pub fn answers<F, Fut>(&self, name: &'static str, ask: F)
    where
        F: Fn() -> Fut + Send + Sync + Clone + 'static,
        Fut: Future<Output = Result<(), sqlx::Error>> + Send + 'static,
    {
        self.callers_need(name, move || {
            let ask = ask.clone();
            async move {
                match ask().await {
                    Err(error) if classify(&error) == ErrorClass::Stale => {
                        renew_connections();
                        ask().await.into()
                    }
                    answered => answered.into(),
                }
            }
        });
    }

    /// The part `kafka`: a broker answers.
    pub fn kafka(&self, settings: &KafkaSettings) -> Result<(), rdkafka::error::KafkaError> {
        let client: BaseConsumer = topics::client(settings).create()?;
        let client = Arc::new(client);
        self.part("kafka", move || {
            let client = Arc::clone(&client);
            async move {
                // Asking for the metadata of one topic that need not exist is the cheapest question there is.
                let ask = tokio::task::spawn_blocking(move || client.fetch_metadata(Some("readyz"), BROKER_TIMEOUT));
                match ask.await {
                    Ok(Ok(_)) => Report::fine(),
                    Ok(Err(error)) => Report::red(Cause::KafkaAway, error.to_string()),
                    Err(error) => Report::red(Cause::Fault, error.to_string()),
                }
            }
        });
        Ok(())
    }

    /// Asks every check, side by side, and keeps what they say. [`Health::watch`] does it over and over.
    pub async fn look(&self) {
        self.look_within(CHECK_TIMEOUT).await;
    }

    async fn look_within(&self, limit: Duration) {
        let checks: Vec<_> = {
            let checks = lock(&self.0.checks);
            checks.iter().map(|(name, (concern, ask))| (name.clone(), *concern, Arc::clone(ask))).collect()
        };
        let answers = checks.into_iter().map(|(name, concern, ask)| async move {
            let report = tokio::time::timeout(limit, ask()).await;
            let report = report.unwrap_or_else(|_| Report::red(Cause::NoAnswer, format!("no answer within {limit:?}")));
            (name, concern, report)
        });
        let answers = futures::future::join_all(answers).await;
        let (now, before) = (clock::monotonic(), lock(&self.0.seen).clone());
        let before = before.map(|seen| seen.parts).unwrap_or_default();
        // How busy a process is says nothing of whether it can be sent requests, and takes no traffic away: `connections` tells.
        let full = lock(&self.0.pool).as_ref().is_some_and(|full| full.trouble().is_some());
        let is_busy = |report: &Report| {
            full && report.trouble.as_ref().is_some_and(|t| matches!(t.cause, Cause::NoAnswer | Cause::PoolFull))
        };
        let parts = answers.into_iter().map(|(name, concern, report)| {
            let report = if concern == Concern::Callers && is_busy(&report) { Report::fine() } else { report };
            let before = before.get(&name).map(|(_, standing)| standing);
            let standing = Standing::judged(&report, before, now);
            tell(&name, concern, before, &standing);
            (name, (concern, standing))
        });
        let parts = parts.collect();
        *lock(&self.0.seen) = Some(Seen { at: now, parts });
    }

    /// Looks, over and over, until `stop`. Run it as a task of the process.
    pub async fn watch(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.look().await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(WATCH_EVERY) => {}
                () = self.0.added.notified() => {}
            }
        }
    }

    /// Whether the loop turns.
    #[must_use]
    pub fn is_live(&self) -> bool {
        let turned = lock(&self.0.seen).as_ref().map_or(self.0.began, |seen| seen.at);
        clock::monotonic().saturating_duration_since(turned) < LIVE_MAX
    }

    /// Whether callers should be sent here, as it was last seen.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let (process, seen, age) = self.last();
        let seen = seen.map(|seen| seen.parts).unwrap_or_default();
        let needed = seen.into_iter().filter(|(_, (concern, _))| *concern == Concern::Callers);
        let process = process.map(|cause| ("process".into(), cause.as_str()));
        let checks: BTreeMap<_, _> =
            needed.map(|(name, (_, standing))| (name, standing.word())).chain(process).collect();
        Readiness { ready: checks.values().all(|word| *word == "ok"), checks, age_seconds: age }
    }

    /// Whether all work moves, as it was last seen, with the reasons in words.
    #[must_use]
    pub fn healthiness(&self) -> Healthiness {
        let (process, seen, age) = self.last();
        let seen = seen.map(|seen| seen.parts).unwrap_or_default();
        let process = process.map(|cause| {
            let reason = match cause {
                Cause::Starting => lock(&self.0.starting).unwrap_or("the first look at the parts"),
                Cause::Stopping => "it was asked to stop",
                _ => "the loop that asks the parts does not turn",
            };
            ("process".into(), Standing::of(cause, reason))
        });
        let parts: BTreeMap<_, _> =
            seen.into_iter().map(|(name, (_, standing))| (name, standing)).chain(process).collect();
        Healthiness { healthy: !parts.values().any(Standing::is_red), age_seconds: age, parts }
    }

    /// What is wrong with the process itself; what was last seen, and how long ago.
    fn last(&self) -> (Option<Cause>, Option<Seen>, Option<f64>) {
        let seen = lock(&self.0.seen).clone();
        let age = seen.as_ref().map(|seen| clock::monotonic().saturating_duration_since(seen.at));
        let cause = if self.0.stopping.is_cancelled() {
            Some(Cause::Stopping)
        } else if lock(&self.0.starting).is_some() || age.is_none() {
            Some(Cause::Starting)
        } else {
            age.filter(|age| *age >= TOO_OLD).map(|_| Cause::Unwatched)
        };
        (cause, seen, age.map(|age| (age.as_secs_f64() * 10.0).round() / 10.0))
    }

    /// For `/metrics`: how old what was last seen is.
    pub(super) fn tell_age(&self) {
        metrics::gauge!("health_age_seconds").set(self.last().2.unwrap_or(f64::NAN));
    }
}

impl Healthiness {
    /// Without what is for the admin listener's roles.
    #[must_use]
    pub fn for_anybody(mut self) -> Self {
        self.parts.values_mut().for_each(|part| part.reason = None);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn looked(health: &Health) -> Readiness {
        health.look().await;
        health.readiness()
    }

    #[tokio::test]
    async fn it_is_ready_while_what_callers_need_is_there_and_names_what_is_not() {
        let stopping = CancellationToken::new();
        let health = Health::new(&stopping);
        assert_eq!(health.readiness().checks["process"], "starting", "nobody has looked yet");
        health.callers_need("database", || async { Report::fine() });
        assert!(looked(&health).await.ready);
        health.callers_need("database", || async { Report::red(Cause::DatabaseAway, "at line 1721") });
        let red = looked(&health).await;
        assert!(!red.ready);
        assert_eq!(red.checks["database"], "database_away");
        health.callers_need("database", || async { Report::fine() });
        assert!(looked(&health).await.ready, "it turns green by itself");
        stopping.cancel();
        assert!(!health.readiness().ready, "a process that stops takes no more work");
    }

    #[tokio::test]
    async fn a_part_whose_work_stands_still_is_red_and_takes_no_traffic_away() {
        let health = Health::new(&CancellationToken::new());
        health.part("replies", || async { Report::red(Cause::KafkaAway, "no broker at 10.0.0.7") });
        health.look().await;
        assert!(health.readiness().ready && health.is_live());
        let (first, open) = (health.healthiness(), health.healthiness().for_anybody());
        assert!(!first.healthy);
        assert_eq!(first.parts["replies"].cause, Some(Cause::KafkaAway));
        assert_eq!(first.parts["replies"].reason.as_deref(), Some("no broker at 10.0.0.7"));
        assert!(!serde_json::to_string(&open).unwrap().contains("10.0.0.7"), "strangers hear the cause alone");

        health.part("replies", || async { Report::red(Cause::Stalled, "") });
        health.look().await;
        let later = health.healthiness();
        assert_eq!(later.parts["replies"].cause, Some(Cause::Stalled));
        assert_eq!(later.parts["replies"].since, first.parts["replies"].since, "it has been red all the time");
    }

    #[tokio::test]
    async fn a_check_that_does_not_answer_is_red() {
        let health = Health::new(&CancellationToken::new());
        health.callers_need("stuck", std::future::pending);
        health.look_within(Duration::from_millis(5)).await;
        assert_eq!(health.readiness().checks["stuck"], "no_answer");
    }

    #[tokio::test]
    async fn what_was_seen_too_long_ago_is_a_no_and_a_still_loop_is_not_alive() {
        let health = Health::new(&CancellationToken::new());
        health.callers_need("database", || async { Report::fine() });
        health.look().await;
        let age = |by: Duration| {
            let mut seen = lock(&health.0.seen);
            let seen = seen.as_mut().unwrap();
            seen.at = seen.at.checked_sub(by).unwrap();
        };
        age(TOO_OLD);
        assert_eq!(health.readiness().checks["process"], "unwatched");
        assert_eq!(health.healthiness().parts["process"].cause, Some(Cause::Unwatched));
        assert!(health.is_live());
        age(LIVE_MAX);
        assert!(!health.is_live());
    }
}

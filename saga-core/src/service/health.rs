//! Three answers, each true: `/livez`, `/readyz`, `/health`.
//!
//! | answer | question | asked by | what a no does |
//! |---|---|---|---|
//! | `/livez` | does the loop turn? | the supervisor | the process is restarted |
//! | `/readyz` | can it do what its callers ask of it now: its database answers, its tables are there? | the load balancer | no traffic is sent |
//! | `/health` | does all work move, part by part? | alerts, `make status` | an operator looks |
//!
//! One loop ([`Health::watch`]) asks the checks. The endpoints render what it saw last, so a request asks neither the
//! database nor a broker. A look that is too old says nothing, and is a no. Every caller gets the [`Cause`]; the reason
//! in words is for the log and for the roles of the admin listener. Nothing survives the process.

mod questions;
mod standing;

pub use questions::{Needs, missing};
pub(super) use standing::describe;
pub use standing::{PartStanding, State};

use super::config::KafkaSettings;
use crate::{
    brokers::Inquirer,
    clock::{self, DatabaseClock},
    error_class::{ErrorClass, classify, is_pool_full, renew_connections},
    outage::Outage,
    part::{Cause, HealthIssue, PartReport},
    transaction::connection,
};
use futures::future::BoxFuture;
use questions::{a_new_session_writes, hear_clock};
use rdkafka::error::KafkaError;
use serde::Serialize;
use sqlx::PgPool;
use standing::{Part, measure};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long one check may take; a check that takes longer counts as one without an answer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a broker may take. It is shorter than [`CHECK_TIMEOUT`], so that a missing answer is known to be Kafka's.
const BROKER_TIMEOUT: Duration = Duration::from_millis(1_500);
/// How often [`Health::watch`] looks.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// A look so long ago says nothing of now: several looks were missed.
const TOO_OLD: Duration = Duration::from_secs(15);
/// A process whose loop has not turned for so long is not alive.
const LIVE_MAX: Duration = Duration::from_secs(60);

type Name = Cow<'static, str>;

/// The part that is the process itself: whether it has begun, stops, is watched.
const PROCESS: Name = Cow::Borrowed("process");

type Ask = Arc<dyn Fn() -> BoxFuture<'static, PartReport> + Send + Sync>;

/// The answers that depend on a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Concern {
    /// Whether callers are sent to this process, and health.
    Callers,
    /// Health alone: readiness ignores the check.
    Work,
}

/// The registry of checks. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Health(Arc<Inner>);

struct Inner {
    stopping: CancellationToken,
    /// What the process waits for before it begins; `None`: it has begun.
    starting: Mutex<Option<&'static str>>,
    checks: Mutex<BTreeMap<Name, (Concern, Ask)>>,
    seen: Mutex<Option<Seen>>,
    began: Instant,
    /// The standing of the process itself when it was last asked.
    process: Mutex<Option<PartStanding>>,
    /// The outage of the pool: all its connections are in use.
    pool: Mutex<Option<Arc<Outage>>>,
    /// Wakes the loop: there is a new check.
    added: Notify,
}

/// The parts as one look saw them.
#[derive(Debug, Clone)]
struct Seen {
    at: Instant,
    parts: BTreeMap<Name, Part>,
}

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Readiness {
    /// Whether callers should be sent to this process.
    pub ready: bool,
    /// The parts that callers need: `ok`, or the cause.
    pub checks: BTreeMap<Name, &'static str>,
    /// How long ago the loop saw that, in seconds; absent before the first look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
}

/// The answer of `/health`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Healthiness {
    /// Whether all work moves.
    pub healthy: bool,
    /// How long ago the loop saw that, in seconds; absent before the first look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
    /// The standing of each part, by its name.
    pub parts: BTreeMap<Name, PartStanding>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Health {
    /// A registry without checks; from when `stopping` is cancelled, the process is not ready.
    #[must_use]
    pub fn new(stopping: &CancellationToken) -> Self {
        Self(Arc::new(Inner {
            stopping: stopping.clone(),
            starting: Mutex::default(),
            checks: Mutex::default(),
            seen: Mutex::default(),
            began: clock::monotonic(),
            process: Mutex::default(),
            pool: Mutex::default(),
            added: Notify::new(),
        }))
    }

    /// The process has not begun; it waits for `waits_for`.
    pub fn starting(&self, waits_for: &'static str) {
        *lock(&self.0.starting) = Some(waits_for);
    }

    /// The process has begun.
    pub fn started(&self) {
        *lock(&self.0.starting) = None;
        self.0.added.notify_one();
    }

    /// Adds a check of what callers need, or replaces the one of that name: while it is red, no traffic is sent to this
    /// process.
    pub fn callers_need<F, Fut>(&self, name: impl Into<Name>, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = PartReport> + Send + 'static,
    {
        self.add(name.into(), Concern::Callers, check);
    }

    /// Adds a part whose work has to move, or replaces the one of that name.
    pub fn part<F, Fut>(&self, name: impl Into<Name>, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = PartReport> + Send + 'static,
    {
        self.add(name.into(), Concern::Work, check);
    }

    fn add<F, Fut>(&self, name: Name, concern: Concern, check: F)
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = PartReport> + Send + 'static,
    {
        let ask: Ask = Arc::new(move || Box::pin(check()));
        lock(&self.0.checks).insert(name, (concern, ask));
        self.0.added.notify_one();
    }

    /// Adds three checks. Callers need `database`: it answers, over the pool that their requests use. The part
    /// `connections`: this process does not use all connections of its pool and want more. The part `clock`: the host's
    /// clock and the database's are less than two minutes apart.
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
                        PartReport::fine()
                    }
                    // The database answers; how long the pool may stay full is judged with the other checks.
                    Err(error) if is_pool_full(&error) => {
                        outage.working();
                        HealthIssue::from(&error).into()
                    }
                    Err(error) => {
                        let issue = HealthIssue::from(&error);
                        outage.failing_of(issue.cause, &issue.reason);
                        issue.into()
                    }
                }
            }
        });
        *lock(&self.0.pool) = Some(Arc::clone(&full));
        self.part("connections", move || std::future::ready(PartReport { issue: full.issue(), waiting: None }));
        self.part("clock", move || {
            metrics::gauge!("clock_skew_seconds").set(clock.skew().unwrap_or_default().as_seconds_f64());
            let checked = clock.check().map_err(|reason| HealthIssue::new(Cause::ClockSkew, reason));
            std::future::ready(checked.into())
        });
    }

    /// Adds a check. Callers need `tables`: these are there, with these rights, and take writes if they are to be
    /// written to. No other session locks callers out of them.
    pub fn tables(&self, pool: &PgPool, needs: &'static [Needs]) {
        let pool = pool.clone();
        self.callers_need("tables", move || {
            let pool = pool.clone();
            async move {
                let report = async { missing(&mut *connection(&pool).await?, needs).await };
                let report = report.await.unwrap_or_else(|error| HealthIssue::from(&error).into());
                let read_only = report.issue.as_ref().is_some_and(|it| it.cause == Cause::DatabaseReadOnly);
                if read_only && a_new_session_writes(&pool).await {
                    renew_connections();
                }
                report
            }
        });
    }

    /// Adds a check. Callers need `name`: the question `ask`, which is like theirs, is answered over their pool. A plan
    /// that a changed table has made stale is replaced, as it is for them.
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

    /// Adds the part `kafka`: a broker answers.
    ///
    /// # Errors
    /// librdkafka does not accept the settings.
    pub fn kafka(&self, settings: &KafkaSettings) -> Result<(), KafkaError> {
        let brokers = Arc::new(Inquirer::new(&settings.brokers, "health")?);
        self.part("kafka", move || {
            let brokers = Arc::clone(&brokers);
            async move {
                // Asking for the metadata of one topic that need not exist is the cheapest question there is.
                match brokers.ask(|client| client.fetch_metadata(Some("readyz"), BROKER_TIMEOUT)).await {
                    Ok(_) => PartReport::fine(),
                    Err(KafkaError::Canceled) => PartReport::red(Cause::Fault, "the question to the brokers panicked"),
                    Err(error) => PartReport::red(Cause::KafkaAway, error.to_string()),
                }
            }
        });
        Ok(())
    }

    /// Asks every check, side by side, and keeps the reports. [`Health::watch`] does it over and over.
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
            let report =
                report.unwrap_or_else(|_| PartReport::red(Cause::NoAnswer, format!("no answer within {limit:?}")));
            (name, concern, report)
        });
        let answers = futures::future::join_all(answers).await;
        let (now, before) = (clock::monotonic(), lock(&self.0.seen).clone());
        let before = before.map(|seen| seen.parts).unwrap_or_default();
        let full = lock(&self.0.pool).as_ref().is_some_and(|full| full.issue().is_some());
        let starting = lock(&self.0.starting).map(|_| now.saturating_duration_since(self.0.began));
        let parts = answers.into_iter().map(|(name, concern, report)| {
            let before = before.get(&name);
            let mut part = Part::seen(concern, &report, before, full, now);
            part.tell(&name, starting);
            measure(&name, concern, before.map(|before| &before.standing), &part.standing);
            (name, part)
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

    /// Whether callers should be sent to this process, as the loop last saw it.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let (process, seen, age) = self.last();
        let seen = seen.map(|seen| seen.parts).unwrap_or_default();
        let needed = seen.into_iter().filter(|(_, part)| part.concern == Concern::Callers);
        let process = process.map(|cause| (PROCESS, cause.as_str()));
        let checks: BTreeMap<_, _> = needed.map(|(name, part)| (name, part.standing.word())).chain(process).collect();
        Readiness { ready: checks.values().all(|word| *word == "ok"), checks, age_seconds: age }
    }

    /// Whether all work moves, as the loop last saw it, with the reasons in words.
    #[must_use]
    pub fn healthiness(&self) -> Healthiness {
        let (process, seen, age) = self.last();
        let seen = seen.map(|seen| seen.parts).unwrap_or_default();
        let process = Some((PROCESS, self.process(process))).filter(|(_, process)| process.is_red());
        let parts: BTreeMap<_, _> = seen.into_iter().map(|(name, part)| (name, part.standing)).chain(process).collect();
        Healthiness { healthy: !parts.values().any(PartStanding::is_red), age_seconds: age, parts }
    }

    /// The trouble of the process itself; what the loop last saw, and how long ago.
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

    /// The standing of the process itself, which remembers since when it is red.
    fn process(&self, cause: Option<Cause>) -> PartStanding {
        let reason = |cause| match cause {
            Cause::Starting => lock(&self.0.starting).unwrap_or("the first look at the parts"),
            Cause::Stopping => "it was asked to stop",
            _ => "the loop that asks the parts does not turn",
        };
        let mut before = lock(&self.0.process);
        let since = match cause {
            Some(Cause::Starting) => Some(self.0.began),
            Some(Cause::Unwatched) => lock(&self.0.seen).as_ref().map(|seen| seen.at),
            _ => None,
        };
        let issue = cause.map(|cause| HealthIssue { since, ..HealthIssue::new(cause, reason(cause)) });
        let now = PartStanding::of_process(issue, before.as_ref());
        measure(&PROCESS, Concern::Callers, before.as_ref(), &now);
        *before = Some(now.clone());
        now
    }

    /// Sets on `/metrics` how old the last look is, and how the process stands. No look can do that: a process that
    /// never looks is the one to be reported.
    pub(super) fn tell_age(&self) {
        let (cause, _, age) = self.last();
        metrics::gauge!("health_age_seconds").set(age.unwrap_or(f64::NAN));
        self.process(cause);
    }
}

impl Healthiness {
    /// Removes the reasons, which are for the admin listener's roles only.
    #[must_use]
    pub fn for_anybody(mut self) -> Self {
        self.parts.values_mut().for_each(|part| part.reason = None);
        self
    }
}

#[cfg(test)]
mod tests;

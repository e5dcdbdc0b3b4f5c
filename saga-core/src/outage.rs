//! Which dependencies are away, and since when: the one place that knows outages, for all parts of a process.
//!
//! Every part that needs a dependency reports what it saw. The first failure of an outage is logged, and so is its end,
//! once each, however many parts report and however often. An outage ends when a part worked and no part failed for two
//! seconds after: a server that starts up accepts one connection and refuses the next. Nothing survives the process; a
//! new process sees the outage itself.
//!
//! ```
//! use saga_core::outage::Outage;
//!
//! let cache = Outage::of("the price cache");
//! assert!(cache.check().is_ok());
//! cache.failing("connection refused");
//! assert!(Outage::of("the price cache").check().is_err(), "all parts share what one of them saw");
//! ```

use crate::{
    clock,
    part::{Cause, HealthIssue},
};
use sqlx::PgPool;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// If a part fails within this time after another worked, the outage goes on.
const CALM_FOR: Duration = Duration::from_secs(2);

/// How long one answer of a dependency serves further questions.
const ASKED_LATELY: Duration = Duration::from_secs(1);

/// One dependency or part of this process, and whether it is away. Metrics: `outage{dependency}` is 1 during an outage,
/// `outages_total{dependency}` counts them.
#[derive(Debug)]
pub struct Outage {
    dependency: String,
    now: Mutex<Option<Away>>,
    /// When the dependency was last asked, and whether it answered.
    asked: tokio::sync::Mutex<Option<(Instant, bool)>>,
}

#[derive(Debug, Clone)]
struct Away {
    since: Instant,
    cause: Cause,
    reason: String,
    failed: Instant,
    /// Whether a part worked after the last failure.
    worked: bool,
}

/// The kind of a dependency, for the texts of the log.
enum Kind {
    Database,
    Kafka,
    /// A part of this process.
    Part,
}

/// The outages of this process, by dependency.
static ALL: Mutex<Option<HashMap<String, Arc<Outage>>>> = Mutex::new(None);

impl Outage {
    /// The outage of `dependency`, one for all parts that name it so.
    #[must_use]
    pub fn of(dependency: &str) -> Arc<Self> {
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(Self {
                dependency: dependency.to_owned(),
                now: Mutex::default(),
                asked: tokio::sync::Mutex::default(),
            })
        };
        Arc::clone(all.get_or_insert_default().entry(dependency.to_owned()).or_insert_with(new))
    }

    /// The outage of the Kafka cluster that these brokers belong to.
    #[must_use]
    pub fn of_kafka(brokers: &str) -> Arc<Self> {
        Self::of(&format!("Kafka at {brokers}"))
    }

    /// The outage of the database that `pool` connects to.
    #[must_use]
    pub fn of_database(pool: &PgPool) -> Arc<Self> {
        let options = pool.connect_options();
        let socket = options.get_socket().map(|socket| socket.display().to_string());
        let host = socket.unwrap_or_else(|| options.get_host().to_owned());
        let name = options.get_database().unwrap_or_else(|| options.get_username());
        Self::of(&format!("database {name} at {host}:{}", options.get_port()))
    }

    /// The shortage in which this process has all connections of `pool` in use, and wants more: no outage of the
    /// database.
    #[must_use]
    pub fn of_pool(pool: &PgPool) -> Arc<Self> {
        Self::of(&format!("the pool of connections to {}", Self::of_database(pool).dependency))
    }

    /// Whether a database is known to be away.
    #[must_use]
    pub fn is_of_any_database() -> bool {
        let all: Vec<Arc<Self>> =
            ALL.lock().unwrap_or_else(PoisonError::into_inner).iter().flat_map(HashMap::values).cloned().collect();
        all.iter().any(|outage| matches!(outage.kind(), Kind::Database) && outage.check().is_err())
    }

    /// The name of the dependency or part.
    #[must_use]
    pub fn dependency(&self) -> &str {
        &self.dependency
    }

    /// Whether the dependency answers `ask`: one question serves all callers within a second.
    pub(crate) async fn answers(&self, ask: impl Future<Output = bool>) -> bool {
        let mut asked = self.asked.lock().await;
        match *asked {
            Some((at, answers)) if clock::monotonic().saturating_duration_since(at) < ASKED_LATELY => answers,
            _ => {
                let answers = ask.await;
                *asked = Some((clock::monotonic(), answers));
                answers
            }
        }
    }

    /// Reports that a part could not use the dependency, for this reason.
    pub fn failing(&self, reason: &str) {
        let cause = match self.kind() {
            Kind::Database => Cause::DatabaseAway,
            Kind::Kafka => Cause::KafkaAway,
            Kind::Part => Cause::Fault,
        };
        self.failing_of(cause, reason);
    }

    /// The same as [`Outage::failing`], with the cause.
    pub fn failing_of(&self, cause: Cause, reason: &str) {
        if self.fails(cause, reason, clock::monotonic()) {
            let dependency = &self.dependency;
            metrics::counter!("outages_total", "dependency" => dependency.clone()).increment(1);
            self.gauge(1.0);
            match self.kind() {
                Kind::Database => tracing::warn!(dependency, reason, "waiting for the database"),
                Kind::Kafka => tracing::warn!(dependency, reason, "waiting for Kafka"),
                Kind::Part => tracing::warn!(dependency, reason, "does not work; trying again until it does"),
            }
        }
    }

    /// Reports that a part could use the dependency.
    pub fn working(&self) {
        self.works(clock::monotonic());
    }

    /// Succeeds unless there is an outage.
    ///
    /// # Errors
    /// The reason in words, and since when.
    pub fn check(&self) -> Result<(), String> {
        self.issue().map_or(Ok(()), |issue| Err(issue.reason))
    }

    /// The cause, the reason and since when; `None` outside an outage.
    pub fn issue(&self) -> Option<HealthIssue> {
        let now = clock::monotonic();
        self.end_if_over(now);
        self.lock().as_ref().map(|Away { since, cause, reason, .. }| {
            let seconds = now.saturating_duration_since(*since).as_secs();
            let reason = format!("{} does not work for {seconds} s: {reason}", self.dependency);
            HealthIssue { since: Some(*since), ..HealthIssue::new(*cause, reason) }
        })
    }

    /// Records a failure; returns whether it is the first of an outage.
    fn fails(&self, cause: Cause, reason: &str, now: Instant) -> bool {
        let mut away = self.lock();
        let first = away.is_none();
        let since = away.as_ref().map_or(now, |away| away.since);
        *away = Some(Away { since, cause, reason: reason.to_owned(), failed: now, worked: false });
        first
    }

    fn works(&self, now: Instant) {
        if let Some(away) = &mut *self.lock() {
            away.worked = true;
        }
        self.end_if_over(now);
    }

    fn end_if_over(&self, now: Instant) {
        let ended = self.lock().take_if(|away| away.worked && now.saturating_duration_since(away.failed) >= CALM_FOR);
        if let Some(ended) = ended {
            let seconds = now.saturating_duration_since(ended.since).as_secs();
            self.gauge(0.0);
            let dependency = &self.dependency;
            match self.kind() {
                Kind::Database => tracing::info!(dependency, seconds, "the database is there again"),
                Kind::Kafka => tracing::info!(dependency, seconds, "Kafka is there again"),
                Kind::Part => tracing::info!(dependency, seconds, "works again"),
            }
        }
    }

    fn kind(&self) -> Kind {
        match self.dependency.split(' ').next() {
            Some("database") => Kind::Database,
            Some("Kafka") => Kind::Kafka,
            _ => Kind::Part,
        }
    }

    fn gauge(&self, value: f64) {
        metrics::gauge!("outage", "dependency" => self.dependency.clone()).set(value);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Away>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A wait that is logged when it begins and when it ends, once each, however often the task tries meanwhile. It ends at
/// the first answer, so it is for a task that goes on then, such as a start. What several parts report is an
/// [`Outage`].
///
/// ```
/// use saga_core::outage::Wait;
///
/// let wait = Wait::default();
/// assert!(!wait.ends(), "it has not begun");
/// assert!(wait.begins() && !wait.begins(), "the first failure is logged");
/// assert!(wait.goes_on() && wait.ends() && !wait.ends(), "and so is the end");
/// ```
#[derive(Debug, Default)]
pub struct Wait(AtomicBool);

impl Wait {
    /// Reports a failure; returns whether it begins the wait.
    pub fn begins(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// Reports an answer; returns whether it ends a wait.
    pub fn ends(&self) -> bool {
        self.goes_on() && self.0.swap(false, Ordering::Relaxed)
    }

    /// Whether the last report was a failure.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_begins_once_and_ends_when_all_was_calm_for_a_while() {
        let outage = Outage::of("database of this test");
        let start = clock::monotonic();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(outage.fails(Cause::DatabaseAway, "refused", at(0)), "the first failure is the beginning");
        assert!(!outage.fails(Cause::DatabaseAway, "refused", at(1)), "the next is not");
        outage.works(at(2));
        assert!(!outage.fails(Cause::DatabaseAway, "starting up", at(3)), "one answer in between is no end");
        outage.works(at(4));
        assert!(outage.lock().is_some(), "a second after a failure it is not over");
        outage.works(at(5));
        assert!(outage.lock().is_none());
        assert!(outage.fails(Cause::DatabaseAway, "refused", at(6)), "the second outage has a beginning, too");
    }

    #[test]
    fn all_parts_that_name_one_dependency_share_its_outage() {
        let (one, other) = (Outage::of("shared by this test"), Outage::of("shared by this test"));
        one.failing("refused");
        assert!(other.check().unwrap_err().contains("shared by this test does not work for 0 s: refused"));
        assert!(Outage::of("another of this test").check().is_ok());
    }
}

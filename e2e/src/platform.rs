//! Running platforms that the tests of a binary use, and the judgement over them.
//!
//! Starting a platform costs seconds, so platforms are used again; tests keep apart by orders and items of their own.
//! Tests that break nothing for others share one, and hold it shared. Judging wants it alone, because what moves looks
//! like a contradiction. A test that breaks things has one for itself for as long as it runs. Most of its time it
//! waits, for sessions, leases and claims to run out, and meanwhile another test can do the same next door. Everything
//! lives in one runtime that outlives the tests. When the binary ends, however it ends, the stack's guard ends the
//! processes.

use crate::{
    audit::{Expectations, Facts, Finding, PostAnswer, Sources, audit},
    topics::ECHO,
};
use anyhow::Result;
use saga_core::testkit::within;
use serde_json::Value;
use sqlx::{Connection as _, PgConnection, PgPool, postgres::PgPoolOptions};
use stack::{
    platform::{Stack, StackConfig},
    progress::Progress,
    service::Service,
};
use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    ops::Deref,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    runtime::Runtime,
    sync::{OnceCell, RwLock, Semaphore},
};
use uuid::Uuid;

/// How long a saga may take until it has ended, with everything that a test does to it. Retries and claims run out in
/// seconds, consumers come back in seconds, and all of it shares two cores.
pub const SETTLED_WITHIN: Duration = Duration::from_secs(90);
/// How long the rest may take after the sagas' end: the last records are published and taken, the last offsets
/// committed.
const AT_REST: Duration = Duration::from_secs(30);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be made")
});
static SHARED: OnceCell<Platform> = OnceCell::const_new();
/// The platforms for one test at a time that no test uses now.
static FREE: Mutex<Vec<Platform>> = Mutex::new(Vec::new());
/// The most platforms for one test at a time: each is two servers and five processes, which mostly wait for sessions and
/// leases of killed processes to run out. With three of them, two cores were idle for two thirds of the time.
static ROOM: Semaphore = Semaphore::const_new(4);

/// A platform under test.
pub struct Platform {
    /// The servers and processes of the platform.
    pub stack: Stack,
    /// A pool of order-svc's database.
    pub orders: PgPool,
    /// An HTTP client, with a bound on each request.
    pub http: reqwest::Client,
    expected: Mutex<Expectations>,
    /// The findings that earlier tests failed with: one finding fails one test.
    known: Mutex<BTreeSet<Finding>>,
    turn: RwLock<()>,
}

/// Runs a test on the platform that this binary's tests share, beside others.
pub fn beside_others<F: Future<Output = ()>>(test: impl FnOnce(&'static Platform) -> F) {
    RUNTIME.block_on(async {
        let platform = SHARED.get_or_init(|| Platform::start(StackConfig::for_tests())).await;
        let turn = platform.turn.read().await;
        test(platform).await;
        drop(turn);
        let _alone = platform.turn.write().await;
        platform.passes_the_audit().await;
    });
}

/// Runs a test on a platform that no other test uses meanwhile: it breaks things that others need.
pub fn alone(test: impl AsyncFnOnce(&Platform)) {
    RUNTIME.block_on(async {
        let _room = ROOM.acquire().await.expect("nobody closes it");
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let platform = match free {
            Some(platform) => platform,
            None => Platform::start(for_breaking()).await,
        };
        let platform = Taken(Some(platform));
        test(&platform).await;
        platform.passes_the_audit().await;
    });
}

/// Runs a test on a platform of this configuration, which ends with it.
pub fn alone_with(config: StackConfig, test: impl AsyncFnOnce(&Platform)) {
    RUNTIME.block_on(async {
        let _room = ROOM.acquire().await.expect("nobody closes it");
        let platform = Platform::start(config).await;
        test(&platform).await;
        platform.passes_the_audit().await;
    });
}

/// Runs a test on a platform of its own that breaks what the audit goes by: topics, tables.
pub fn unaudited(test: impl AsyncFnOnce(&Platform)) {
    RUNTIME.block_on(async {
        let _room = ROOM.acquire().await.expect("nobody closes it");
        test(&Platform::start(for_breaking()).await).await;
    });
}

/// The configuration for tests that stop processes: claims of calls that died outlive the gateway's timeout, and tests
/// wait for that.
pub fn for_breaking() -> StackConfig {
    let hasty = StackConfig::for_tests().env(Service::Payments, "GATEWAY_TIMEOUT_MS", "1000");
    hasty.env(Service::Gateway, "GATEWAY_SIM_SLOW_MS", "500")
}

/// A platform that is given back at the end of a test; not by one that fails, which may leave anything behind.
struct Taken(Option<Platform>);

impl Deref for Taken {
    type Target = Platform;

    fn deref(&self) -> &Platform {
        self.0.as_ref().expect("it is given back by drop alone")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let platform = self.0.take();
        if !std::thread::panicking() {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).extend(platform);
        }
    }
}

impl Platform {
    /// Starts a platform.
    ///
    /// # Panics
    /// When the platform does not start: nothing can be tested.
    pub async fn start(config: StackConfig) -> Self {
        // The services take messages that tests write themselves like those of the platform's own services.
        let participants = [Service::Payments, Service::Inventory].into_iter();
        let config = participants.fold(config, |config, service| config.env(service, "COMMAND_SOURCES", ECHO));
        let config = config.env(Service::Orders, "REPLY_SOURCES", ECHO);
        let stack = Stack::start(config, &Progress::Silent).await.unwrap_or_else(|e| panic!("the platform: {e}"));
        // The pool is lazy, and small: when a test kills PostgreSQL, its own pool must not be the one to report it.
        let pool = PgPoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(60));
        let orders = pool.connect_lazy(&stack.database_url("orders")).expect("the stack's own URL");
        let http = reqwest::Client::builder().timeout(Duration::from_secs(40)).build().expect("a client");
        let expected = Mutex::new(Expectations { least_accepted_percent: 60, ..Expectations::default() });
        Self { stack, orders, http, expected, known: Mutex::default(), turn: RwLock::new(()) }
    }

    /// The audit's expectations; tests add to them.
    pub fn expected(&self) -> MutexGuard<'_, Expectations> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to how often a kind of fault is to fire.
    pub fn wants_fault(&self, kind: &str, times: usize) {
        let mut expected = self.expected();
        expected.faults.entry(kind.to_owned()).or_default().wanted += times;
    }

    /// Notes that a fault fired.
    pub fn fault_fired(&self, kind: &str) {
        self.expected().faults.entry(kind.to_owned()).or_default().fired += 1;
    }

    /// The places of the facts.
    pub fn sources(&self) -> Sources {
        let url = |name| self.stack.database_url(name);
        Sources {
            orders: url("orders"),
            payments: url("payments"),
            inventory: url("inventory"),
            gateway: url("gateway"),
            brokers: self.brokers(),
        }
    }

    /// The addresses of Kafka's brokers.
    pub fn brokers(&self) -> String {
        self.stack.servers().kafka_brokers.clone()
    }

    /// A connection to one of the services' databases.
    ///
    /// # Panics
    /// When PostgreSQL does not answer.
    pub async fn database(&self, name: &str) -> PgConnection {
        PgConnection::connect(&self.stack.database_url(name)).await.expect("the stack's own database is there")
    }

    /// The value of a gauge on `/metrics`, over all its labels; 0 when it is not there.
    ///
    /// # Panics
    /// When the process does not answer.
    pub async fn gauge(&self, service: Service, name: &str) -> f64 {
        let answer = self.http.get(self.admin(service, "/metrics")).send().await.expect("the admin listener answers");
        let text = answer.text().await.expect("the metrics can be read");
        let series = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The lines that one of the processes wrote to its log after the first `skip` bytes, as far as they are JSON.
    pub fn lines(&self, service: Service, skip: usize) -> Vec<Value> {
        let text = fs::read(self.stack.service(service).process.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(skip..).unwrap_or_default()).into_owned();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// How many bytes one of the processes has written to its log by now.
    pub fn log_size(&self, service: Service) -> usize {
        let log = self.stack.service(service).process.log();
        fs::metadata(log).map_or(0, |meta| usize::try_from(meta.len()).unwrap_or_default())
    }

    /// The URL of a path on a process's admin listener.
    pub fn admin(&self, service: Service, path: &str) -> String {
        format!("{}{path}", self.stack.admin_url(service))
    }

    /// Waits until every saga has ended, or is stuck where that is expected.
    ///
    /// # Panics
    /// When that takes longer than [`SETTLED_WITHIN`]; the panic names the sagas that did not end, and their states.
    pub async fn settles(&self) {
        let settled = within(SETTLED_WITHIN, || async {
            match self.open_sagas().await {
                Ok(open) if open.is_empty() => Ok(()),
                open => Err(open),
            }
        });
        let logs = self.stack.logs().display();
        settled.await.unwrap_or_else(|open| panic!("after {SETTLED_WITHIN:?}: {open:#?} (logs: {logs})"));
    }

    async fn open_sagas(&self) -> sqlx::Result<Vec<(Uuid, String, Value)>> {
        let open: Vec<(Uuid, String, Value)> = sqlx::query_as(
            "select saga_id, status, state from saga where status not in ('completed', 'compensated') order by saga_id",
        )
        .fetch_all(&self.orders)
        .await?;
        let stuck = self.expected().stuck.clone();
        Ok(open.into_iter().filter(|(id, status, _)| !(status == "stuck" && stuck.contains(id))).collect())
    }

    /// Waits until everything is at rest, and judges.
    ///
    /// # Panics
    /// With the findings, when there are any.
    pub async fn passes_the_audit(&self) {
        self.settles().await;
        let judged = within(AT_REST, || async {
            match self.judge().await {
                Ok((_, findings)) if findings.is_empty() => Ok(()),
                judged => Err(judged),
            }
        });
        match judged.await {
            Ok(()) => {}
            Err(Ok((_, findings))) => self.fail(&findings).await,
            Err(Err(error)) => panic!("the audit could not read: {error:#}"),
        }
    }

    async fn fail(&self, findings: &[Finding]) {
        let lines: Vec<_> = findings.iter().take(40).map(ToString::to_string).collect();
        let mut stories = String::new();
        for saga in sagas_named(&lines).iter().take(2) {
            let story = self.sources().story(*saga).await.unwrap_or_else(|error| format!("{error:#}"));
            stories.push_str(&format!("\n{saga}:\n{story}\n"));
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).extend(findings.iter().cloned());
        let (n, logs) = (findings.len(), self.stack.logs().display());
        panic!("{n} findings:\n{}\n{stories}(logs: {logs})", lines.join("\n"));
    }

    /// The facts, and the findings that are new: contradictions of the invariants.
    pub async fn judge(&self) -> Result<(Facts, Vec<Finding>)> {
        let facts = self.sources().read().await?;
        let mut findings = audit(&facts, &self.expected());
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        findings.retain(|finding| !known.contains(finding));
        Ok((facts, findings))
    }

    /// How many requests were accepted so far.
    pub fn accepted(&self) -> usize {
        self.expected().requests.iter().filter(|request| matches!(request.answer, PostAnswer::Accepted(_))).count()
    }
}

/// The ids that occur in findings.
fn sagas_named(lines: &[String]) -> BTreeSet<Uuid> {
    let words = lines.iter().flat_map(|line| line.split(|c: char| !c.is_ascii_hexdigit() && c != '-'));
    words.filter(|word| word.len() == 36).filter_map(|word| word.parse().ok()).collect()
}

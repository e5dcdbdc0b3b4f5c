//! One outbox as this process sees it: the process stands by, owns it, stands by again. What happens to one outbox
//! stops no other.

use crate::{
    budget::{Areas, Budget},
    database::Database,
    gauges,
    lease::{Lease, LeaseError, Leases},
    loops::Loops,
    metric,
    owner::{self, OwnerError},
    producer::Brokers,
    progress::Progress,
    settings::{OutboxSettings, Settings},
    topics::Topics,
    upkeep::Upkeep,
};
use saga_core::{
    clock::{self, DatabaseClock},
    error_class::{in_words, is_outage, is_pool_full},
    outage::Outage,
    part::{Cause, Report, Trouble},
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

/// Connections for the recorder, control, session, retry, and a few for the topics that are set apart.
const CONNECTIONS: u32 = 7;
/// Connections for the reader, the gauges, and two for the topics that are set apart.
const READING_CONNECTIONS: u32 = 4;
/// Connections for the admin endpoints, of their own, so that waiting requests keep nothing from being published.
const ADMIN_CONNECTIONS: u32 = 4;
/// The bound of an admin statement; an answer that takes longer costs the database more than it is worth.
const ADMIN_STATEMENT: Duration = Duration::from_secs(5);
/// The bound of an admin conversation; a request may make several statements, and wait as long for a connection.
const ADMIN_PATIENCE: Duration = Duration::from_secs(8);
/// The relay holds no lock for long. A longer wait is for another client's lock, which may last for hours.
const ADMIN_LOCK: &str = "1s";
/// The pause between two looks at a lease that another process has.
const STAND_BY: Duration = Duration::from_millis(500);
/// The longest pause between two tries when something is wrong with the database.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Settings that decide how statements on the outbox are planned.
pub(crate) const PLANS: [(&str, &str); 5] = [
    // Every statement here has one index that answers it. Statistics of a table that grows this fast are always old,
    // and a plan made from them must not read the whole of it.
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    // Where rows are wanted in an index's order, the plan has to use that index.
    ("enable_sort", "off"),
    ("jit", "off"),
    // So one plan serves all parameters: making one for each poll costs more than the poll.
    ("plan_cache_mode", "force_generic_plan"),
];

/// An outbox, with what this process needs to publish it.
pub struct Outbox {
    /// The name: `ce_source` of its messages, and the key of its lease and position.
    pub name: String,
    pub(crate) db: Database,
    /// Connections for statements that may read much; their bound does not depend on the lease.
    pub(crate) reading: Database,
    pub(crate) admin: Database,
    pub(crate) leases: Leases,
    /// The outage of publishing this outbox, whatever the reason; the database's own is with the leases.
    pub(crate) outage: Arc<Outage>,
    upkeep: Upkeep,
    pub(crate) topics: Topics,
    pub(crate) brokers: String,
    pub(crate) compression: String,
    pub(crate) from_now: bool,
    pub(crate) publish_again: bool,
    pub(crate) stuck_after: Duration,
    pub(crate) set_apart_for: Duration,
    pub(crate) areas: Arc<Areas>,
    pub(crate) status: Status,
}

/// The role of this process for an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The process has not decided yet.
    Starting,
    /// Another process publishes.
    StandingBy,
    /// This process publishes.
    Owner,
    /// This process should publish, but something is wrong.
    Failing,
}

const KAFKA_AWAY: &str = "Kafka is not there";

/// What the process knows about an outbox without asking its database.
pub(crate) struct Status {
    now: Mutex<(Role, Option<Trouble>)>,
    /// The rows that wait, and the topics that are set apart.
    pub(crate) progress: Progress,
    pub(crate) brokers: Arc<Brokers>,
    /// The loops that get no further while this process publishes.
    pub(crate) loops: Arc<Loops>,
    pub(crate) clock: Arc<DatabaseClock>,
    /// Trouble with the outbox's tables, on every replica.
    upkeep: Arc<Outage>,
}

impl Status {
    fn set(&self, role: Role, trouble: Option<Trouble>) {
        *self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = (role, trouble);
    }

    /// The role, and why the process does not publish although it should.
    pub(crate) fn get(&self) -> (Role, Option<Trouble>) {
        let (role, trouble) = self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let away = || self.brokers.are_away().then(|| Trouble::new(Cause::KafkaAway, KAFKA_AWAY));
        (role, trouble.or_else(|| away().filter(|_| role == Role::Owner)))
    }

    /// The role, and the trouble of publishing, with that of loops that get no further.
    fn trouble(&self) -> (Role, Option<Trouble>) {
        let (role, trouble) = self.get();
        let stalled = || self.loops.trouble(&self.clock).filter(|_| role == Role::Owner);
        (role, trouble.or_else(stalled))
    }

    /// The role, and all trouble in words, with that of the outbox's tables.
    pub(crate) fn all(&self) -> (Role, Option<String>) {
        let (role, trouble) = self.trouble();
        let troubles: Vec<String> =
            [trouble, self.upkeep.trouble()].into_iter().flatten().map(|trouble| trouble.reason).collect();
        (role, (!troubles.is_empty()).then(|| troubles.join("; ")))
    }

    /// What health shows of the outbox.
    pub(crate) fn report(&self) -> Report {
        let (set_apart, waiting) = self.progress.get();
        let trouble = match self.trouble() {
            (Role::Starting, None) => Some(Trouble::new(Cause::Starting, "which process publishes is not decided yet")),
            (_, trouble) => trouble.or(set_apart),
        };
        Report { trouble, waiting }
    }

    /// What health shows of its tables.
    pub(crate) fn upkeep(&self) -> Report {
        Report { trouble: self.upkeep.trouble(), waiting: None }
    }

    /// Records that no broker answers.
    pub(crate) fn kafka_is_away(&self) {
        self.set(Role::Owner, Some(Trouble::new(Cause::KafkaAway, KAFKA_AWAY)));
    }

    /// Records that a fault in the relay itself ended the outbox.
    pub(crate) fn fault(&self, panic: String) {
        self.set(Role::Failing, Some(Trouble::new(Cause::Fault, panic)));
    }

    pub(crate) fn publishing(&self) {
        self.set(Role::Owner, None);
    }
}

impl Outbox {
    pub(crate) fn new(
        settings: &Settings,
        outbox: &OutboxSettings,
        budget: &Arc<Budget>,
    ) -> Result<Self, rdkafka::error::KafkaError> {
        let idle = (settings.lease.as_millis() * 3 / 4).to_string();
        let options = outbox.database.clone().application_name("outbox-relay").options(PLANS).options([
            // What is recorded as published must survive a crash of the server, or the relay publishes it twice.
            ("synchronous_commit", "on"),
            // An owner that is stopped inside a transaction holds the lease's row, but no longer than the lease.
            ("idle_in_transaction_session_timeout", &idle),
        ]);
        let place = format!("outbox {} in database {}", outbox.name, options.get_database().unwrap_or_default());
        let upkeep = Upkeep::new(&place, &outbox.name, options.clone(), settings.reading, settings.resolved_kept);
        let leases = Leases::new(options.clone(), settings.lease);
        let status = Status {
            now: Mutex::new((Role::Starting, None)),
            progress: Progress::default(),
            clock: leases.clock.clone(),
            brokers: Arc::default(),
            loops: Arc::new(Loops::new(place)),
            upkeep: upkeep.outage.clone(),
        };
        Ok(Self {
            name: outbox.name.clone(),
            db: Database::new(options.clone(), CONNECTIONS, settings.lease),
            reading: Database::new(options.clone(), READING_CONNECTIONS, settings.reading),
            admin: Database::with_statements(
                options.clone().options([("lock_timeout", ADMIN_LOCK)]),
                ADMIN_CONNECTIONS,
                ADMIN_PATIENCE,
                ADMIN_STATEMENT,
            ),
            upkeep,
            outage: Outage::of(&format!("outbox {}", outbox.name)),
            leases,
            topics: Topics::new(&settings.kafka_brokers)?,
            brokers: settings.kafka_brokers.clone(),
            compression: settings.compression.clone(),
            from_now: settings.from_now,
            publish_again: settings.publish_again,
            stuck_after: settings.stuck_after,
            set_apart_for: settings.set_apart_for,
            areas: Arc::new(Areas::new(budget)),
            status,
        })
    }

    /// Stands by, publishes, and stands by again, until `stop`.
    pub(crate) async fn run(&self, stop: &CancellationToken) {
        tokio::select! {
            () = self.take_turns(stop) => {}
            () = gauges::run(self) => {}
            () = self.upkeep.run() => {}
        }
    }

    async fn take_turns(&self, stop: &CancellationToken) {
        let mut before = None;
        let mut tries = Tries::default();
        while !stop.is_cancelled() {
            let began = clock::monotonic();
            let pause = match self.run_once(&mut before, stop).await {
                Ok(Stood::By) => {
                    tries.over();
                    STAND_BY.min(self.leases.length / 4)
                }
                Ok(Stood::Owner) => {
                    tries.over();
                    Duration::ZERO
                }
                Err(error) => {
                    self.status.set(Role::Failing, Some(error.trouble()));
                    tries.report(self, &error, began.elapsed())
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn run_once(&self, before: &mut Option<Uuid>, stop: &CancellationToken) -> Result<Stood, OwnerError> {
        let holder = holder();
        let taken = tokio::select! {
            () = stop.cancelled() => return Ok(Stood::By),
            taken = Lease::acquire(&self.leases, &self.name, &holder, *before) => taken?,
        };
        let Some(lease) = taken else {
            self.status.set(Role::StandingBy, None);
            metric::owner(&self.name, false);
            return Ok(Stood::By);
        };
        *before = Some(lease.owner);
        info!(outbox = self.name, owner = %lease.owner, "took the lease");
        self.status.publishing();
        metric::owner(&self.name, true);
        let ended = owner::own(self, &lease, stop).await;
        metric::owner(&self.name, false);
        match &ended {
            Err(OwnerError::Lease(LeaseError::TakenOver)) => {}
            _ => match lease.release(&self.leases).await {
                Ok(()) => info!(outbox = self.name, owner = %lease.owner, "gave the lease back"),
                // The lease then runs out.
                Err(error) => warn!(outbox = self.name, %error, "the lease could not be given back"),
            },
        }
        ended.map(|()| Stood::Owner)
    }
}

enum Stood {
    By,
    Owner,
}

/// The tries to publish: it reports an outage of this outbox, and decides how long to wait before the next try.
#[derive(Default)]
struct Tries {
    pause: Duration,
}

impl Tries {
    /// Reports why publishing ended, after so long; returns the pause before the next try.
    fn report(&mut self, outbox: &Outbox, problem: &OwnerError, after: Duration) -> Duration {
        let database = problem.database();
        let missing = database.and_then(|error| error.as_database_error()?.code()).is_some_and(|code| code == "42P01");
        match database {
            Some(error) if is_outage(error) => outbox.leases.outage.failing(&problem.to_string()),
            Some(error) if is_pool_full(error) => outbox.outage.failing(&in_words(error)),
            _ if missing => outbox
                .outage
                .failing("its tables are not there: start the service that makes them, or run `outbox-relay migrate`"),
            _ => outbox.outage.failing(&problem.to_string()),
        }
        if after > LONGEST_PAUSE {
            self.over();
        }
        self.pause = (self.pause * 2).clamp(Duration::from_millis(100), LONGEST_PAUSE);
        self.pause
    }

    fn over(&mut self) {
        self.pause = Duration::ZERO;
    }
}

/// The name of this process in the lease, for people: host and process id.
fn holder() -> String {
    let host = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/etc/hostname").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty());
    format!("{}/{}", host.as_deref().unwrap_or("localhost"), std::process::id())
}

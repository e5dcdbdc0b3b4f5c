//! One outbox as this process sees it: its connections and settings, and what the process knows of it. The process dies
//! with all of it; what counts is in the outbox's database.

use crate::{
    brokers::Brokers,
    budget::{Areas, Budget},
    database::Database,
    lease::Leases,
    loops::Loops,
    progress::OutboxProgress,
    settings::{OutboxSettings, RelaySettings},
    topics::Topics,
    upkeep::Upkeep,
};
use saga_core::{
    clock::DatabaseClock,
    outage::Outage,
    part::{Cause, HealthIssue, PartReport},
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// Connections for the recorder, control, session, retry, and a few for the topics that are set apart.
const OWNER_CONNECTIONS: u32 = 7;
/// Connections for the reader, the gauges, and two for the topics that are set apart.
const READING_CONNECTIONS: u32 = 4;
/// Connections for the admin endpoints, of their own, so that waiting requests keep nothing from being published.
const ADMIN_CONNECTIONS: u32 = 4;
/// The bound of an admin statement; an answer that takes longer costs the database more than it is worth.
const ADMIN_STATEMENT_MAX: Duration = Duration::from_secs(5);
/// The bound of an admin conversation; a request may make several statements, and wait as long for a connection.
const ADMIN_CONNECTION_MAX: Duration = Duration::from_secs(8);
/// The relay holds no lock for long. A longer wait is for another client's lock, which may last for hours.
const ADMIN_LOCK: &str = "1s";
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
    pub(crate) upkeep: Upkeep,
    pub(crate) topics: Topics,
    pub(crate) brokers: String,
    pub(crate) compression: String,
    pub(crate) from_now: bool,
    pub(crate) publish_again: bool,
    pub(crate) stuck_after: Duration,
    pub(crate) set_apart_for: Duration,
    pub(crate) areas: Arc<Areas>,
    pub(crate) status: OutboxStatus,
}

/// The role of this process for an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Role)]
pub enum OutboxRole {
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
pub(crate) struct OutboxStatus {
    now: Mutex<(OutboxRole, Option<HealthIssue>)>,
    /// The rows that wait, and the topics that are set apart.
    pub(crate) progress: OutboxProgress,
    pub(crate) brokers: Arc<Brokers>,
    /// The loops that get no further while this process publishes.
    pub(crate) loops: Arc<Loops>,
    pub(crate) clock: Arc<DatabaseClock>,
    /// Trouble with the outbox's tables, on every replica.
    upkeep: Arc<Outage>,
}

impl OutboxStatus {
    pub(crate) fn set(&self, role: OutboxRole, issue: Option<HealthIssue>) {
        *self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = (role, issue);
    }

    /// The role, and why the process does not publish although it should.
    pub(crate) fn get(&self) -> (OutboxRole, Option<HealthIssue>) {
        let (role, issue) = self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let away = || self.brokers.are_away().then(|| HealthIssue::new(Cause::KafkaAway, KAFKA_AWAY));
        (role, issue.or_else(|| away().filter(|_| role == OutboxRole::Owner)))
    }

    /// The role, and the trouble of publishing, with that of loops that get no further.
    fn issue(&self) -> (OutboxRole, Option<HealthIssue>) {
        let (role, issue) = self.get();
        let stalled = || self.loops.issue(&self.clock).filter(|_| role == OutboxRole::Owner);
        (role, issue.or_else(stalled))
    }

    /// The role, and all trouble in words, with that of the outbox's tables.
    pub(crate) fn all(&self) -> (OutboxRole, Option<String>) {
        let (role, issue) = self.issue();
        let issues: Vec<String> =
            [issue, self.upkeep.issue()].into_iter().flatten().map(|issue| issue.reason).collect();
        (role, (!issues.is_empty()).then(|| issues.join("; ")))
    }

    /// What health shows of the outbox.
    pub(crate) fn report(&self) -> PartReport {
        let (set_apart, waiting) = self.progress.get();
        let issue = match self.issue() {
            (OutboxRole::Starting, None) => {
                Some(HealthIssue::new(Cause::Starting, "which process publishes is not decided yet"))
            }
            (_, issue) => issue.or(set_apart),
        };
        PartReport { issue, waiting }
    }

    /// What health shows of its tables.
    pub(crate) fn upkeep(&self) -> PartReport {
        PartReport { issue: self.upkeep.issue(), waiting: None }
    }

    /// Records that no broker answers.
    pub(crate) fn kafka_is_away(&self) {
        self.set(OutboxRole::Owner, Some(HealthIssue::new(Cause::KafkaAway, KAFKA_AWAY)));
    }

    /// Records that a fault in the relay itself ended the outbox.
    pub(crate) fn fault(&self, panic: String) {
        self.set(OutboxRole::Failing, Some(HealthIssue::new(Cause::Fault, panic)));
    }

    pub(crate) fn publishing(&self) {
        self.set(OutboxRole::Owner, None);
    }
}

impl Outbox {
    pub(crate) fn new(
        settings: &RelaySettings,
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
        let status = OutboxStatus {
            now: Mutex::new((OutboxRole::Starting, None)),
            progress: OutboxProgress::default(),
            clock: leases.clock.clone(),
            brokers: Arc::default(),
            loops: Arc::new(Loops::new(place)),
            upkeep: upkeep.outage.clone(),
        };
        Ok(Self {
            name: outbox.name.clone(),
            db: Database::new(options.clone(), OWNER_CONNECTIONS, settings.lease),
            reading: Database::new(options.clone(), READING_CONNECTIONS, settings.reading),
            admin: Database::with_statements(
                options.clone().options([("lock_timeout", ADMIN_LOCK)]),
                ADMIN_CONNECTIONS,
                ADMIN_CONNECTION_MAX,
                ADMIN_STATEMENT_MAX,
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
}

//! The audit: the invariants that hold after everything has settled, whatever happened before.
//!
//! [`Facts`] are read from every database and every topic. Each invariant is a pure function over them that returns
//! what contradicts it. The audit trusts no part of the system. The services' answers are evidence to be checked, a
//! check here repeats the databases' constraints, and the relay's own books do not count.
//!
//! | file | invariants |
//! |---|---|
//! | [`requests`] | I1 every accepted request has one order, I10 faults fired and most requests succeeded |
//! | [`messages`] | I2 committed outbox ids = ids in topics + parked + discarded, I5 first occurrences in order |
//! | [`effects`] | I3 effects once, at the gateway too; I6 a saga's end and the effects agree |
//! | [`waiting`] | I4 nothing waits that no process will wake |
//! | [`books`] | I7 money and stock add up |
//! | [`histories`] | I8 histories are paths of the declared graphs, I9 one audit row per operator action |

pub mod books;
pub mod effects;
mod facts;
pub mod histories;
pub mod messages;
mod read;
pub mod requests;
pub mod waiting;

pub use facts::*;
pub use read::Sources;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};
use uuid::Uuid;

/// The invariants, by their numbers in the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the numbers are explained once, in this module's table")]
pub enum Invariant {
    I1,
    I2,
    I3,
    I4,
    I5,
    I6,
    I7,
    I8,
    I9,
    I10,
}

/// A contradiction of an invariant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The invariant that is contradicted.
    pub invariant: Invariant,
    /// The contradiction, with the ids to look for.
    pub what: String,
}

impl Finding {
    fn new(invariant: Invariant, what: impl Into<String>) -> Self {
        Self { invariant, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.invariant, self.what)
    }
}

/// The test's own actions, and what it expects of them: everything else is a finding.
#[derive(Debug, Clone, Default)]
pub struct Expectations {
    /// The clients' requests, and the answers to them.
    pub requests: Vec<Request>,
    /// The sagas that may be stuck at the end.
    pub stuck: BTreeSet<Uuid>,
    /// Sources (`ce_source`) of records that a test wrote into the topics itself.
    pub foreign_sources: BTreeSet<String>,
    /// How often each kind of fault was to be injected, and how often it fired.
    pub faults: BTreeMap<String, Fired>,
    /// Operator actions that were answered with success, by kind.
    pub operator_actions: BTreeMap<String, usize>,
    /// The least share of all requests that must have been accepted, in percent.
    pub least_accepted_percent: usize,
}

/// The counts of one kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fired {
    /// The least number of times that it was meant to fire.
    pub wanted: usize,
    /// The number of times that it fired.
    pub fired: usize,
}

/// All findings of the audit; empty when all is well.
pub fn audit(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let mut findings = [
        requests::accepted_requests_have_one_order(facts, expected),
        requests::faults_fired_and_requests_succeeded(expected),
        messages::outboxes_and_topics_agree(facts, expected),
        messages::first_occurrences_are_in_order(facts, expected),
        effects::effects_happened_once(facts),
        effects::sagas_end_as_their_effects_say(facts, expected),
        waiting::nothing_waits_unwatched(facts, expected),
        books::money_adds_up(facts),
        books::stock_adds_up(facts),
        histories::orders_walk_their_graph(facts),
        histories::sagas_have_a_whole_log(facts),
        histories::operators_are_on_record(facts, expected),
    ]
    .concat();
    findings.sort();
    findings
}

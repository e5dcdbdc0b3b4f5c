//! The audit: what must be true after everything has settled, whatever happened before.
//!
//! [`Facts`] are read from every database and every topic; each invariant is a pure function over them that returns what
//! contradicts it. It trusts nobody: not the services' answers (they are evidence to be checked), not the constraints of
//! the databases (a check here repeats them), not the relay's own books.
//!
//! | file | invariants |
//! |---|---|
//! | [`requests`] | I1 every accepted request has one order, I10 faults fired and most requests succeeded |
//! | [`messages`] | I2 committed outbox ids = ids in topics + parked + discarded, I5 first occurrences in order |
//! | [`effects`] | I3 effects once, at the gateway too; I6 a saga's end and the effects agree |
//! | [`waiting`] | I4 nothing waits that nobody will wake |
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

/// What must hold.
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

/// Something that contradicts an invariant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Which.
    pub invariant: Invariant,
    /// How, with the ids to look for.
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

/// What the test did and what it therefore expects: everything else is a finding.
#[derive(Debug, Clone, Default)]
pub struct Expectations {
    /// What clients asked for, and what they were told.
    pub requests: Vec<Request>,
    /// Sagas that may be stuck at the end.
    pub stuck: BTreeSet<Uuid>,
    /// Sources (`ce_source`) of records that a test wrote into the topics itself.
    pub foreign_sources: BTreeSet<String>,
    /// How often each kind of fault was to be injected, and how often it fired.
    pub faults: BTreeMap<String, Fired>,
    /// Operator actions that were answered with success, by kind.
    pub operator_actions: BTreeMap<String, usize>,
    /// Of all requests, how many percent must have been accepted.
    pub least_accepted_percent: usize,
}

/// A kind of fault: how often it was meant to fire at least, and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fired {
    /// At least.
    pub wanted: usize,
    /// In fact.
    pub fired: usize,
}

/// Everything that contradicts an invariant; empty when all is well.
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

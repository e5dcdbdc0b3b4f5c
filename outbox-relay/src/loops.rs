//! Which loops of an outbox get no further: what health shows, and metrics.

use saga_core::outage::Outage;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The main stream, among the loops.
pub(crate) const MAIN: &str = "the main stream";

/// The loops of one outbox that have failed and not got further since. Metric: `outage{dependency}`.
#[derive(Debug)]
pub(crate) struct Loops {
    /// The outbox and its database: another process may have an outbox of the same name.
    outbox: String,
    failing: Mutex<BTreeMap<String, Arc<Outage>>>,
}

impl Loops {
    pub(crate) fn new(outbox: String) -> Self {
        Self { outbox, failing: Mutex::default() }
    }

    fn failing_loops(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Outage>>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop got no further, for this reason.
    pub(crate) fn failing(&self, name: &str, reason: &str) {
        let mut loops = self.failing_loops();
        let outage = loops
            .entry(name.to_owned())
            .or_insert_with(|| Outage::of(&format!("publishing of {name} of {}", self.outbox)));
        outage.failing(reason);
    }

    /// The loop got further.
    pub(crate) fn working(&self, name: &str) {
        if let Some(outage) = self.failing_loops().get(name) {
            outage.working();
        }
    }

    /// The loop has ended; what was wrong with it is recorded elsewhere.
    pub(crate) fn ended(&self, name: &str) {
        if let Some(outage) = self.failing_loops().remove(name) {
            outage.working();
        }
    }

    /// What is wrong now, loop by loop.
    pub(crate) fn problem(&self) -> Option<String> {
        let problems: Vec<String> = self.failing_loops().values().filter_map(|outage| outage.check().err()).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

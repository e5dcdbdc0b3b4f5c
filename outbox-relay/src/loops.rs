//! Which loops of an outbox get no further: what health shows, and metrics.

use saga_core::outage::Outage;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The main stream, among the loops.
pub(crate) const MAIN: &str = "the main stream";
/// Trying parked rows again, among the loops.
pub(crate) const RETRIES: &str = "parked rows that are tried again";

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

    /// All loops begin anew, with nothing against them: what was wrong when this process published last says nothing now.
    pub(crate) fn clear(&self) {
        for outage in std::mem::take(&mut *self.failing_loops()).into_values() {
            outage.working();
        }
    }

    /// What is wrong now, loop by loop.
    pub(crate) fn problem(&self) -> Option<String> {
        let problems: Vec<String> = self.failing_loops().values().filter_map(|outage| outage.check().err()).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_wrong_is_no_problem_any_more_when_all_begin_anew() {
        let loops = Loops::new("what_was_wrong".into());
        loops.failing(MAIN, "no broker");
        loops.failing("t", "no leader");
        assert!(loops.problem().is_some_and(|problem| problem.contains("no broker") && problem.contains("no leader")));
        loops.clear();
        assert_eq!(loops.problem(), None);
    }
}

//! Which loops of an outbox get no further: what health shows, and metrics.

use crate::pause::{Cause, Paused};
use saga_core::outage::Outage;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The main stream, among the loops.
pub(crate) const MAIN: &str = "the main stream";
/// Trying parked rows again, among the loops.
pub(crate) const RETRIES: &str = "parked rows that are tried again";
/// Looking up what operators want, among the loops.
pub(crate) const WANTED: &str = "what operators want";

/// Topics that wait and are named; more of them say no more.
const NAMED: usize = 8;

/// The loops of one outbox that have failed and not got further since. Metric: `outage{dependency}`.
#[derive(Debug)]
pub(crate) struct Loops {
    /// The outbox and its database: another process may have an outbox of the same name.
    outbox: String,
    failing: Mutex<BTreeMap<String, Arc<Outage>>>,
    /// Topics whose rows wait, and why.
    waiting: Mutex<Vec<String>>,
}

impl Loops {
    pub(crate) fn new(outbox: String) -> Self {
        Self { outbox, failing: Mutex::default(), waiting: Mutex::default() }
    }

    fn failing_loops(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Outage>>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop got no further, for this reason.
    pub(crate) fn failing(&self, name: &str, reason: &str) {
        let mut loops = self.failing_loops();
        let outage =
            loops.entry(name.to_owned()).or_insert_with(|| Outage::of(&format!("loop {name:?} of {}", self.outbox)));
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
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<String>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Topics that are set apart and whose rows wait, not by an operator's wish.
    pub(crate) fn wait(&self, paused: &HashMap<String, Paused>) {
        // Whether brokers take the rows of a topic again shows only when it is back.
        let waits = |paused: &&Paused| match paused.cause {
            Cause::Operator | Cause::Refusing => false,
            Cause::Missing | Cause::Forbidden => !paused.resuming,
            Cause::Leaderless => true,
        };
        let said = |paused: &Paused| format!("rows of topic {:?} wait: {}", paused.topic, paused.reason);
        let mut waiting: Vec<String> = paused.values().filter(waits).map(said).collect();
        waiting.sort_unstable();
        *self.waiting() = waiting;
    }

    /// What is wrong now, loop by loop.
    pub(crate) fn problem(&self) -> Option<String> {
        let mut problems: Vec<String> =
            self.failing_loops().values().filter_map(|outage| outage.check().err()).collect();
        problems.extend(self.waiting().iter().take(NAMED).cloned());
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

//! The loops of an outbox that get no further, for health and metrics.

use crate::record::pause::{PauseCause, Paused};
use saga_core::{
    clock::DatabaseClock,
    outage::Outage,
    part::{Cause, HealthIssue},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The main stream's name among the loops.
pub(crate) const MAIN: &str = "the main stream";
/// The name of the retries of parked rows among the loops.
pub(crate) const RETRIES: &str = "parked rows that are tried again";
/// The name of the look-up of operators' wishes among the loops.
pub(crate) const WANTED: &str = "what operators want";

/// How many waiting topics a reason names; more of them would add nothing.
const NAMED_MAX: usize = 8;

/// The loops of one outbox that have failed and not got further since. Metric: `outage{dependency}`.
#[derive(Debug)]
pub(crate) struct Loops {
    /// The outbox and its database: another process may have an outbox of the same name.
    outbox: String,
    failing: Mutex<BTreeMap<String, Arc<Outage>>>,
    /// Topics whose rows wait, and why.
    waiting: Mutex<Vec<Paused>>,
}

impl Loops {
    pub(crate) fn new(outbox: String) -> Self {
        Self { outbox, failing: Mutex::default(), waiting: Mutex::default() }
    }

    fn failing_loops(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Outage>>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the loop got no further, for this reason.
    pub(crate) fn failing(&self, name: &str, cause: Cause, reason: &str) {
        let mut loops = self.failing_loops();
        let outage =
            loops.entry(name.to_owned()).or_insert_with(|| Outage::of(&format!("loop {name:?} of {}", self.outbox)));
        outage.failing_of(cause, reason);
    }

    /// Records that the loop got further.
    pub(crate) fn working(&self, name: &str) {
        if let Some(outage) = self.failing_loops().get(name) {
            outage.working();
        }
    }

    /// Forgets a loop that has ended; its trouble is recorded elsewhere.
    pub(crate) fn ended(&self, name: &str) {
        if let Some(outage) = self.failing_loops().remove(name) {
            outage.working();
        }
    }

    /// Lets all loops begin anew: what was wrong when this process published last does not matter now.
    pub(crate) fn clear(&self) {
        for outage in std::mem::take(&mut *self.failing_loops()).into_values() {
            outage.working();
        }
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Paused>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the topics that are set apart and whose rows wait, except those that an operator wants to wait.
    pub(crate) fn wait(&self, paused: &HashMap<String, Paused>) {
        // Whether brokers take the rows of a topic again shows only when it is back.
        let waits = |paused: &&Paused| match paused.cause {
            PauseCause::Operator | PauseCause::Refusing => false,
            PauseCause::Missing | PauseCause::Forbidden => !paused.resuming,
            PauseCause::Leaderless => true,
        };
        let mut waiting: Vec<Paused> = paused.values().filter(waits).cloned().collect();
        waiting.sort_unstable_by(|one, other| one.topic.cmp(&other.topic));
        *self.waiting() = waiting;
    }

    /// The trouble now: loops first, then the topics whose rows wait.
    pub(crate) fn issue(&self, clock: &DatabaseClock) -> Option<HealthIssue> {
        let failing: Vec<HealthIssue> = self.failing_loops().values().filter_map(|outage| outage.issue()).collect();
        let waiting = self.waiting().iter().take(NAMED_MAX).map(|paused| paused.issue(clock)).collect::<Vec<_>>();
        HealthIssue::all(failing.into_iter().chain(waiting))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_wrong_is_no_problem_any_more_when_all_begin_anew() {
        let loops = Loops::new("what_was_wrong".into());
        loops.failing(MAIN, Cause::KafkaAway, "no broker");
        loops.failing("t", Cause::Refused, "no leader");
        let clock = DatabaseClock::of("what_was_wrong");
        let issue = loops.issue(&clock).expect("there is one");
        assert!(issue.reason.contains("no broker") && issue.reason.contains("no leader"), "{issue:?}");
        assert!(issue.since.is_some(), "{issue:?}");
        loops.clear();
        assert_eq!(loops.issue(&clock), None);
    }

    #[test]
    fn a_topic_whose_rows_wait_is_a_problem_with_its_cause_unless_an_operator_wants_it() {
        let (loops, clock) = (Loops::new("a_topic_whose_rows_wait".into()), DatabaseClock::of("rows_wait"));
        let paused = |topic: &str, cause, resuming| {
            let (reason, paused_at) = (String::from("so it is"), saga_core::clock::now());
            let paused = Paused { topic: topic.into(), cause, reason, paused_at, resuming, position: None };
            (topic.to_owned(), paused)
        };
        loops.wait(&HashMap::from([
            paused("wanted", PauseCause::Operator, false),
            paused("here-again", PauseCause::Missing, true),
            paused("a-leaderless", PauseCause::Leaderless, true),
            paused("gone", PauseCause::Missing, false),
        ]));
        let issue = loops.issue(&clock).expect("two of them wait");
        assert_eq!(issue.cause, Cause::Leaderless);
        assert!(issue.since.is_some(), "{issue:?}");
        assert_eq!(
            issue.reason,
            "rows of topic \"a-leaderless\" wait: so it is; rows of topic \"gone\" wait: so it is"
        );
        loops.wait(&HashMap::new());
        assert_eq!(loops.issue(&clock), None);
    }
}

//! The engine's metrics. Never an id as a label.
//!
//! Counters are told when a transaction has been decided, a moment before it commits: one that is repeated counts twice.
//! Gauges are read from the database.

use super::{
    case::Case,
    state::{Status, StuckWhy, Told},
};
use crate::envelope::Op;
use metrics::{counter, gauge, histogram};

/// What a transaction did to a saga.
pub(super) fn decided(case: &Case<'_>) {
    let saga = || case.definition().name().to_owned();
    for (open, now) in &case.settled {
        let step = case.definition().steps()[open.step].name.clone();
        let seconds = (*now - open.since).as_seconds_f64();
        histogram!("saga_step_duration_seconds", "saga" => saga(), "step" => step, "op" => open.op.as_str())
            .record(seconds);
    }
    for why in case.ignored() {
        counter!("saga_replies_ignored_total", "saga" => saga(), "reason" => why.as_str()).increment(1);
    }
    for told in case.entries().iter().flat_map(|entry| &entry.then) {
        if let Told::Stuck(why) = told {
            let open = case.state().open();
            let undoing = open.is_some_and(|open| open.op == Op::Undo);
            let step = open.and_then(|open| case.definition().steps().get(open.step)).map(|step| step.name.as_str());
            tracing::error!(saga = %case.saga(), definition = case.definition().name(), step, undoing, ?why,
                "a saga is stuck; GET /v1/sagas/{{id}} says why, POST /v1/sagas/{{id}}/retry starts it again");
            if undoing || *why == StuckWhy::NotUndone {
                counter!("saga_compensation_failures_total", "saga" => saga()).increment(1);
            }
        }
    }
    match case.state().status {
        Status::Completed | Status::Compensated if !case.was_finished() => {
            finished(&saga(), case.state().status.as_str());
        }
        _ => {}
    }
}

/// A saga has ended.
pub(super) fn finished(saga: &str, outcome: &'static str) {
    counter!("saga_finished_total", "saga" => saga.to_owned(), "outcome" => outcome).increment(1);
}

/// A reply came for a saga that does not exist.
pub(super) fn unknown_saga() {
    counter!("saga_replies_ignored_total", "saga" => "", "reason" => "unknown_saga").increment(1);
}

/// What the database says of all sagas: by definition and status, those that have not ended.
pub(super) fn active(counts: &[(String, String, i64)], definitions: impl Iterator<Item = String>, undecided: i64) {
    for definition in definitions {
        let of = |status: &str| {
            counts.iter().filter(|(d, s, _)| *d == definition && s == status).map(|(_, _, n)| *n).sum::<i64>()
        };
        for status in ["running", "compensating", "stuck"] {
            gauge!("saga_active", "saga" => definition.clone(), "state" => status).set(as_f64(of(status)));
        }
        gauge!("saga_stuck", "saga" => definition.clone()).set(as_f64(of("stuck")));
    }
    gauge!("saga_replies_undecided").set(as_f64(undecided));
}

/// Counts of rows are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn as_f64(count: i64) -> f64 {
    count as f64
}

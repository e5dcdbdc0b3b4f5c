//! The engine's metrics; [`describe`] says what each of them is. No metric has an id as a label.
//!
//! The engine counts when a transaction has been decided, a moment before it commits: a repeated transaction counts
//! twice. Gauges are read from the database.

use super::{
    due::SagaCounts,
    engine::Unread,
    loaded_saga::LoadedSaga,
    state::{Status, TimelineEntry},
};
use crate::command::Op;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Records what a transaction did to a saga.
pub(super) fn decided(loaded: &LoadedSaga<'_>) {
    let saga = || loaded.definition().name().to_owned();
    for (open, now) in &loaded.settled {
        let step = loaded.definition().steps()[open.step].name.clone();
        let seconds = (*now - open.since).as_seconds_f64().max(0.0);
        histogram!("saga_step_duration_seconds", "saga" => saga(), "step" => step, "op" => open.op.as_str())
            .record(seconds);
    }
    for why in &loaded.ignored {
        counter!("saga_replies_ignored_total", "saga" => saga(), "reason" => why.as_str()).increment(1);
    }
    for line in loaded.entries().iter().flat_map(|entry| &entry.then) {
        if let TimelineEntry::Stuck(why) = line {
            let open = loaded.state().open();
            let undoing = open.is_some_and(|open| open.op == Op::Undo);
            let step = open.and_then(|open| loaded.definition().steps().get(open.step)).map(|step| step.name.as_str());
            // The line repeats the span's ids: with `RUST_LOG=warn` there are no spans.
            loaded.span().in_scope(|| {
                tracing::error!(
                    saga = %loaded.saga(),
                    saga_type = loaded.definition().name(),
                    step,
                    undoing,
                    ?why,
                    "a saga is stuck; GET /v1/sagas/{{id}} says why, POST /v1/sagas/{{id}}/retry starts it again"
                );
            });
            if undoing {
                counter!("saga_compensation_failures_total", "saga" => saga()).increment(1);
            }
        }
    }
    match loaded.state().status {
        Status::Completed | Status::Compensated if !loaded.was_finished() => {
            finished(&saga(), loaded.state().status.as_str());
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

/// Logs and counts a saga whose row this replica cannot read although it has the saga's definition, each time. A saga
/// whose definition it does not have belongs to another replica, which is in order.
pub(super) fn unread(unread: &Unread, consequence: &str) {
    let Unread { locked, flaw: Some(flaw) } = unread else { return };
    tracing::error!(
        saga = %locked.saga,
        saga_type = locked.definition,
        flaw,
        "this build cannot read a saga's row: {consequence}; another build wrote it, which can go on with it, or it is damaged"
    );
    counter!("saga_unreadable_total", "saga" => locked.definition.clone()).increment(1);
}

/// Sets the gauges from the database. A saga whose definition this replica does not know is in no gauge by its name.
pub(super) fn counted(counts: &SagaCounts, definitions: &[String]) {
    for definition in definitions {
        let of = |status: &str| {
            counts.active.iter().filter(|(d, s, _)| d == definition && s == status).map(|(_, _, n)| *n).sum::<i64>()
        };
        for status in ["running", "compensating", "stuck"] {
            gauge!("saga_active", "saga" => definition.clone(), "state" => status).set(as_f64(of(status)));
        }
        gauge!("saga_stuck", "saga" => definition.clone()).set(as_f64(of("stuck")));
    }
    gauge!("saga_overdue_unknown").set(as_f64(counts.overdue));
    gauge!("saga_replies_undecided").set(as_f64(counts.undecided));
}

/// Describes each metric for `/metrics`.
pub(super) fn describe() {
    describe_gauge!("saga_active", "Sagas that have not ended, by definition and status");
    describe_gauge!("saga_stuck", "Sagas that do nothing until an operator retries them, by definition");
    describe_gauge!(
        "saga_overdue_unknown",
        "Sagas that are due and of a definition, version or shape that this replica does not have; for a moment during a \
         rollout, for longer if no replica has it: GET /v1/sagas/{id} says `definition_known`"
    );
    describe_gauge!("saga_replies_undecided", "Replies that wait for a replica that has their saga's definition");
    describe_counter!(
        "saga_timers_not_waiting_total",
        "Times that the timers of a partition's sagas went on though its replies were not read for minutes"
    );
    describe_counter!("saga_finished_total", "Sagas that have ended, by definition and outcome");
    describe_counter!("saga_replies_ignored_total", "Replies that answered no open command, by reason");
    describe_counter!(
        "saga_unreadable_total",
        "How often a saga's row could not be read by this build, and was put off: GET /v1/sagas/{id} says `readable`"
    );
    describe_counter!("saga_compensation_failures_total", "Sagas that became stuck with an undo open, by definition");
    describe_histogram!("saga_step_duration_seconds", Unit::Seconds, "From a step's first command to its answer");
}

/// Counts of rows are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn as_f64(count: i64) -> f64 {
    count as f64
}

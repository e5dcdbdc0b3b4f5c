//! I4: nothing waits that no process will wake.

use super::{Expectations, Facts, Finding, Invariant, Messaging, RecordFact};
use std::collections::BTreeSet;
use time::{Duration, OffsetDateTime};

/// How overdue a time may be: each process that wakes work looks at least this often, on a busy machine.
const OVERDUE_MAX: Duration = Duration::seconds(30);

/// I4: for everything that has not ended there is a process that takes it up again, and soon.
pub fn nothing_waits_unwatched(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let overdue = |at: OffsetDateTime| facts.now.is_some_and(|now| at + OVERDUE_MAX < now);
    let mut wrong = sagas(facts, &overdue);
    for (name, database) in &facts.databases {
        wrong.extend(messaging(facts, database, &overdue).into_iter().map(|what| format!("{name}: {what}")));
    }
    let lag = facts.lag.iter().filter(|(.., records)| *records > 0);
    wrong.extend(
        lag.map(|(group, topic, partition, n)| format!("{group} has not taken {n} records of {topic}/{partition}")),
    );
    let dead = facts.records.iter().filter(|record| record.topic.ends_with(".dlt"));
    let dead = dead.filter(|record| !is_foreign(record, expected));
    wrong.extend(dead.map(|record| format!("{} was given up: {:?}", record.coordinates(), record.headers)));
    wrong.into_iter().map(|what| Finding::new(Invariant::I4, what)).collect()
}

/// Whether a test wrote the record.
fn is_foreign(record: &RecordFact, expected: &Expectations) -> bool {
    record.header("ce_source").is_some_and(|source| expected.foreign_sources.contains(source))
}

fn sagas(facts: &Facts, overdue: &impl Fn(OffsetDateTime) -> bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (id, saga) in &facts.sagas {
        let finished = matches!(saga.status.as_str(), "completed" | "compensated");
        match facts.due.get(id) {
            Some(_) if finished => wrong.push(format!("saga {id} is {} and yet known to the timers", saga.status)),
            None if !finished => wrong.push(format!("saga {id} is {} and the timers do not know it", saga.status)),
            Some(None) if saga.status != "stuck" => wrong.push(format!("saga {id} is {} and has no time", saga.status)),
            Some(Some(at)) if overdue(*at) => wrong.push(format!("saga {id} was due at {at}")),
            _ => {}
        }
    }
    wrong
        .extend(facts.due.keys().filter(|id| !facts.sagas.contains_key(id)).map(|id| format!("timer of no saga {id}")));
    wrong.extend(facts.undecided.iter().map(|id| format!("a reply to saga {id} is undecided")));
    wrong
}

fn messaging(facts: &Facts, database: &Messaging, overdue: &impl Fn(OffsetDateTime) -> bool) -> Vec<String> {
    let ended = |id| facts.sagas.get(id).is_none_or(|s| matches!(s.status.as_str(), "completed" | "compensated"));
    let mut wrong = Vec::new();
    for intent in &database.intents {
        let what = format!("{} of {} of saga {} is {}", intent.op, intent.step, intent.saga, intent.state);
        match intent.state.as_str() {
            "open" | "ready" if overdue(intent.due_at) => wrong.push(format!("{what}, due at {}", intent.due_at)),
            _ if ended(&intent.saga) => wrong.push(format!("{what}, and the saga has ended")),
            _ => {}
        }
    }
    let fences = database.open_fences.iter().filter(|(saga, ..)| ended(saga));
    wrong.extend(fences.map(|(saga, step, run, undo)| {
        format!("the fence of {step} of saga {saga} is {run}/{undo}, and the saga has ended")
    }));
    let woken: BTreeSet<_> = database
        .parked_records
        .iter()
        .filter(|r| r.next_attempt_at.is_some())
        .map(|r| (&r.consumer, &r.line))
        .collect();
    for record in &database.parked_records {
        let (topic, partition, _) = &record.line;
        let at = format!("{topic}/{partition}@{}", record.offset);
        match record.next_attempt_at {
            Some(next) if overdue(next) => wrong.push(format!("{} parked {at} and forgot it", record.consumer)),
            None if !woken.contains(&(&record.consumer, &record.line)) => {
                wrong.push(format!("{} parked {at} behind nothing", record.consumer));
            }
            _ => {}
        }
    }
    let parked = database.parked.iter().filter(|(_, status)| *status == "parked");
    wrong.extend(parked.map(|(id, _)| format!("row {id} of the outbox is parked")));
    wrong.extend(database.paused.iter().map(|(topic, cause)| format!("topic {topic} is paused: {cause}")));
    wrong
}

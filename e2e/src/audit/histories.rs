//! I8 and I9: histories are paths of the declared graphs, and operators leave a trace.

use super::{Expectations, Facts, Finding, Invariant, OrderFact};
use order_svc::domain::OrderStatus;
use std::collections::BTreeMap;

/// I8: an order's history begins with `pending`, has no gaps, walks the declared graph, and ends where the order is.
pub fn orders_walk_their_graph(facts: &Facts) -> Vec<Finding> {
    let wrong = facts.orders.iter().filter_map(|(id, order)| Some(format!("order {id}: {}", strays(order)?)));
    wrong.map(|what| Finding::new(Invariant::I8, what)).collect()
}

fn strays(order: &OrderFact) -> Option<String> {
    let allowed = |from: &str, to: &str| OrderStatus::GRAPH.iter().any(|(f, t)| (f.as_str(), t.as_str()) == (from, to));
    let mut at: Option<&str> = None;
    for (n, (sequence, previous, status)) in (1..).zip(&order.history) {
        if *sequence != n {
            return Some(format!("change {n} has the sequence {sequence}"));
        }
        if previous.as_deref() != at {
            return Some(format!("change {n} comes from {previous:?}, and it was {at:?}"));
        }
        if !at.map_or(status == "pending", |from| allowed(from, status)) {
            return Some(format!("went from {at:?} to {status}"));
        }
        at = Some(status);
    }
    let steps = i64::try_from(order.history.len()).unwrap_or(i64::MAX);
    if at != Some(order.status.as_str()) || order.version != steps {
        return Some(format!("is {} at version {}, its history ends {at:?} at {steps}", order.status, order.version));
    }
    None
}

/// I8: a saga's log begins with its start and has no gaps.
pub fn sagas_have_a_whole_log(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, saga) in &facts.sagas {
        let numbers = saga.log.iter().map(|(revision, _)| *revision);
        let whole = numbers.eq(1..=saga.revision);
        if !whole || saga.log.first().is_none_or(|(_, kind)| kind != "started") {
            let what = format!("saga {id} is at revision {}, its log is {:?}", saga.revision, saga.log);
            findings.push(Finding::new(Invariant::I8, what));
        }
    }
    findings
}

/// I9: there are as many rows of operator actions as actions were answered with success.
pub fn operators_are_on_record(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let mut recorded: BTreeMap<&str, usize> = BTreeMap::new();
    for (action, count) in facts.databases.values().flat_map(|database| &database.operator_actions) {
        *recorded.entry(action).or_default() += count;
    }
    let retries = facts.sagas.values().flat_map(|saga| &saga.log).filter(|(_, kind)| kind == "retry").count();
    if retries > 0 {
        recorded.insert("retry-saga", retries);
    }
    let declared: BTreeMap<&str, usize> = expected.operator_actions.iter().map(|(a, n)| (a.as_str(), *n)).collect();
    if recorded == declared {
        return Vec::new();
    }
    vec![Finding::new(Invariant::I9, format!("operators did {declared:?}, on record is {recorded:?}"))]
}

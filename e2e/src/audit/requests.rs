//! I1 and I10: the answers to clients agree with the database, and the run was worth judging.

use super::{Expectations, Facts, Finding, Invariant, PostAnswer};
use std::collections::{BTreeMap, BTreeSet};

/// I1: every accepted request has exactly one order, no two requests share one, and no order came from nowhere.
pub fn accepted_requests_have_one_order(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let finding = |what: String| Finding::new(Invariant::I1, what);
    let mut findings = Vec::new();
    for request in &expected.requests {
        let PostAnswer::Accepted(order) = request.answer else { continue };
        if !facts.orders.contains_key(&order) {
            findings.push(finding(format!("key {} was answered with order {order}, which is not there", request.key)));
        }
        if facts.keys.get(&request.key) != Some(&order) {
            let kept = facts.keys.get(&request.key);
            findings.push(finding(format!("key {} was answered with {order}, the record says {kept:?}", request.key)));
        }
    }
    let mut made = BTreeMap::new();
    for (key, order) in &facts.keys {
        if let Some(other) = made.insert(order, key) {
            findings.push(finding(format!("order {order} belongs to the keys {other} and {key}")));
        }
        if !facts.orders.contains_key(order) {
            findings.push(finding(format!("key {key} has made order {order}, which is not there")));
        }
    }
    let from_nowhere = facts.orders.keys().filter(|order| !made.contains_key(order));
    findings.extend(from_nowhere.map(|order| finding(format!("order {order} belongs to no request"))));
    let asked: BTreeSet<_> = expected.requests.iter().map(|request| &request.key).collect();
    if !asked.is_empty() {
        let unasked = facts.keys.keys().filter(|key| !asked.contains(key));
        findings.extend(unasked.map(|key| finding(format!("nobody asked under key {key}"))));
    }
    findings
}

/// I10: the faults really fired, and most requests succeeded: an idle system violates nothing.
pub fn faults_fired_and_requests_succeeded(expected: &Expectations) -> Vec<Finding> {
    let lazy = expected.faults.iter().filter(|(_, fault)| fault.fired < fault.wanted);
    let lazy = lazy.map(|(kind, fault)| format!("{kind} fired {} times, not {}", fault.fired, fault.wanted));
    let mut findings: Vec<_> = lazy.map(|what| Finding::new(Invariant::I10, what)).collect();
    let accepted = expected.requests.iter().filter(|request| matches!(request.answer, PostAnswer::Accepted(_))).count();
    if accepted * 100 < expected.least_accepted_percent * expected.requests.len() {
        let of = expected.requests.len();
        findings.push(Finding::new(Invariant::I10, format!("only {accepted} of {of} requests were accepted")));
    }
    findings
}

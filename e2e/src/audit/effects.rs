//! I3 and I6: each effect happened once, and agrees with the saga's end.

use super::{Balance, Expectations, Facts, Finding, Invariant, LedgerEntry, OrderFact};
use std::collections::BTreeMap;
use uuid::Uuid;

/// I3: effects once, at the gateway too.
pub fn effects_happened_once(facts: &Facts) -> Vec<Finding> {
    let finding = |what: String| Finding::new(Invariant::I3, what);
    let mut findings = Vec::new();
    let at_gateway = facts.authorizations.iter().map(|authorization| authorization.order.clone());
    let times = |counts: BTreeMap<String, usize>| counts.into_iter().filter(|(_, count)| *count > 1);
    for (order, count) in times(count(at_gateway)) {
        findings.push(finding(format!("order {order} has {count} authorizations at the gateway")));
    }
    // No order is charged or given back in parts, so each kind of movement happens once.
    let gateway = facts.movements.iter().map(|m| format!("{} of authorization {} at the gateway", m.kind, m.reference));
    let payments = facts.payments.iter().filter_map(|entry| {
        let (kind, _) = entry.moved()?;
        Some(format!("{kind} of order {} in payments", entry.order))
    });
    let stock = facts.stock_movements.iter().filter_map(|m| {
        let reservation = m.reservation?;
        Some(format!("{} of {} for reservation {reservation}", m.kind, m.sku))
    });
    let reservations = facts.reservations.iter().map(|r| format!("a reservation of order {}", r.order));
    let placed = facts.records.iter().filter(|record| record.topic == contracts::topics::ORDERS_EVENTS.name);
    let announced =
        placed.filter_map(|record| Some((record.header("ce_id")?, record.header("ce_type")?, record.key.as_ref()?)));
    // The same message twice is a repeat; two messages of one kind about one order are two decisions.
    let announced: std::collections::BTreeSet<_> = announced.collect();
    let announced = announced.into_iter().map(|(_, kind, order)| format!("{kind} of order {order}"));
    let all = gateway.chain(payments).chain(stock).chain(reservations).chain(announced);
    findings.extend(times(count(all)).map(|(what, count)| finding(format!("{count} times: {what}"))));
    findings
}

fn count(all: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    all.for_each(|one| *counts.entry(one).or_default() += 1);
    counts
}

/// I6: every saga is completed with all of its effects, or compensated with none, or stuck where that was expected.
pub fn sagas_end_as_their_effects_say(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let finding = |what: String| Finding::new(Invariant::I6, what);
    let mut findings = Vec::new();
    for (id, saga) in &facts.sagas {
        let Some(order) = facts.orders.get(id) else {
            findings.push(finding(format!("saga {id} has no order")));
            continue;
        };
        let wrong = match saga.status.as_str() {
            "completed" => completed(facts, *id, order),
            "compensated" => compensated(facts, *id, order),
            "stuck" if expected.stuck.contains(id) => Vec::new(),
            other => vec![format!("is {other}")],
        };
        findings.extend(wrong.into_iter().map(|what| finding(format!("saga {id} ({}) {what}", saga.status))));
    }
    let without = facts.orders.keys().filter(|order| !facts.sagas.contains_key(order));
    findings.extend(without.map(|order| finding(format!("order {order} has no saga"))));
    findings
}

fn completed(facts: &Facts, id: Uuid, order: &OrderFact) -> Vec<String> {
    let mut wrong = Vec::new();
    if order.status != "confirmed" {
        wrong.push(format!("has an order that is {}", order.status));
    }
    let whole = Balance { authorized: order.total, captured: order.total, ..Balance::default() };
    wrong.extend(money(facts, id).into_iter().filter(|(_, balance)| *balance != whole).map(|(whose, balance)| {
        format!("should have taken {} {} once, {whose} has {balance:?}", order.total, order.currency)
    }));
    let shipped: Vec<_> = facts.reservations.iter().filter(|r| r.order == id && r.status == "committed").collect();
    match shipped.as_slice() {
        [one] if one.lines == order.lines => {}
        other => wrong.push(format!("should have shipped {:?}, did {other:?}", order.lines)),
    }
    let open = facts.reservations.iter().filter(|r| r.order == id && r.status == "reserved").count();
    if open > 0 {
        wrong.push("still has stock put aside".to_owned());
    }
    wrong
}

fn compensated(facts: &Facts, id: Uuid, order: &OrderFact) -> Vec<String> {
    let mut wrong = Vec::new();
    if order.status != "cancelled" {
        wrong.push(format!("has an order that is {}", order.status));
    }
    let spent = |balance: &Balance| balance.held() != 0 || balance.captured != balance.refunded;
    let left = money(facts, id).into_iter().filter(|(_, balance)| spent(balance));
    wrong.extend(left.map(|(whose, balance)| format!("should have no effect, {whose} has {balance:?}")));
    let kept = facts.reservations.iter().filter(|r| r.order == id && r.status != "released");
    wrong.extend(kept.map(|r| format!("should have no effect, reservation {} is {}", r.id, r.status)));
    wrong
}

/// The order's money, by payment-svc's books and by the gateway's.
fn money(facts: &Facts, order: Uuid) -> [(&'static str, Balance); 2] {
    let mut payments = Balance::default();
    let moved = facts.payments.iter().filter(|entry| entry.order == order).filter_map(LedgerEntry::moved);
    moved.for_each(|(kind, amount)| payments.add(kind, amount));
    let mut gateway = Balance::default();
    let name = order.to_string();
    for authorization in facts.authorizations.iter().filter(|a| a.order == name) {
        let movements = facts.movements.iter().filter(|m| m.reference == authorization.reference);
        movements.for_each(|m| gateway.add(&m.kind, m.amount));
    }
    [("payment-svc", payments), ("the gateway", gateway)]
}

//! I7: money and stock add up, in each service's own books and between them.

use super::{Balance, Facts, Finding, Invariant, Stock};
use std::collections::BTreeMap;
use uuid::Uuid;

/// I7: captured - refunded = confirmed totals; payment-svc's ledger explains its balances and is the gateway's.
pub fn money_adds_up(facts: &Facts) -> Vec<Finding> {
    let mut wrong = Vec::new();
    let mut taken: BTreeMap<&str, i64> = BTreeMap::new();
    let mut ledger: BTreeMap<Uuid, Balance> = BTreeMap::new();
    let mut rest: BTreeMap<Uuid, i64> = BTreeMap::new();
    for entry in &facts.payments {
        *rest.entry(entry.order).or_default() += entry.amount;
        if entry.account == "merchant" {
            *taken.entry(&entry.currency).or_default() += entry.amount;
        }
        if let Some((kind, amount)) = entry.moved() {
            ledger.entry(entry.order).or_default().add(kind, amount);
        }
    }
    let lopsided = rest.into_iter().filter(|(_, rest)| *rest != 0);
    wrong.extend(lopsided.map(|(order, rest)| format!("the ledger of order {order} is off by {rest}")));
    let mut confirmed: BTreeMap<&str, i64> = BTreeMap::new();
    for (id, order) in &facts.orders {
        if order.sum_of_lines != order.total {
            wrong.push(format!("the lines of order {id} come to {}, its total is {}", order.sum_of_lines, order.total));
        }
        let total = if order.status == "confirmed" { order.total } else { 0 };
        *confirmed.entry(&order.currency).or_default() += total;
    }
    taken.retain(|_, amount| *amount != 0);
    confirmed.retain(|_, amount| *amount != 0);
    if taken != confirmed {
        wrong.push(format!("captured - refunded is {taken:?}, confirmed orders come to {confirmed:?}"));
    }
    for (order, balance) in &facts.balances {
        let entries = ledger.get(order).copied().unwrap_or_default();
        let explained = [entries.held(), entries.captured, entries.refunded];
        if *balance != explained {
            wrong.push(format!("the balance of order {order} is {balance:?}, its ledger says {explained:?}"));
        }
    }
    wrong.extend(gateway(facts, &ledger));
    wrong.into_iter().map(|what| Finding::new(Invariant::I7, what)).collect()
}

/// Compares the gateway's balances, its movements, and payment-svc's ledger.
fn gateway(facts: &Facts, ledger: &BTreeMap<Uuid, Balance>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut moved: BTreeMap<&str, Balance> = BTreeMap::new();
    for movement in &facts.movements {
        moved.entry(&movement.reference).or_default().add(&movement.kind, movement.amount);
    }
    let mut theirs: BTreeMap<String, Balance> = BTreeMap::new();
    for authorization in &facts.authorizations {
        let explained = moved.get(authorization.reference.as_str()).copied().unwrap_or_default();
        let (name, balance) = (&authorization.reference, authorization.balance);
        if balance != explained || authorization.held != explained.held() {
            wrong.push(format!("the gateway's {name} is {balance:?}, its movements say {explained:?}"));
        }
        let order = theirs.entry(authorization.order.clone()).or_default();
        order.authorized += explained.authorized;
        order.voided += explained.voided;
        order.captured += explained.captured;
        order.refunded += explained.refunded;
    }
    let ours = ledger.iter().map(|(order, balance)| (order.to_string(), *balance));
    let ours: BTreeMap<_, _> = ours.filter(|(_, balance)| *balance != Balance::default()).collect();
    for order in ours.keys().chain(theirs.keys().filter(|order| !ours.contains_key(*order))) {
        let (mine, other) =
            (ours.get(order).copied().unwrap_or_default(), theirs.get(order).copied().unwrap_or_default());
        // An authorization that was in doubt and then voided may be known to the gateway alone: nothing is left of it.
        let unseen = |b: &Balance| (b.held(), b.captured, b.refunded);
        if unseen(&mine) != unseen(&other) {
            wrong.push(format!("order {order}: payment-svc has {mine:?}, the gateway {other:?}"));
        }
    }
    wrong
}

/// I7: on hand + reserved = initial - shipped, by item; movements explain balances, reservations what is put aside.
pub fn stock_adds_up(facts: &Facts) -> Vec<Finding> {
    let mut wrong = Vec::new();
    let mut explained: BTreeMap<&str, Stock> = BTreeMap::new();
    let mut initial: BTreeMap<&str, i64> = BTreeMap::new();
    for movement in &facts.stock_movements {
        let stock = explained.entry(&movement.sku).or_default();
        stock.on_hand += movement.on_hand;
        stock.reserved += movement.reserved;
        if movement.kind == "adjusted" {
            *initial.entry(&movement.sku).or_default() += movement.on_hand;
        }
    }
    let pieces = |status: &str| {
        let mut by_sku: BTreeMap<&str, i64> = BTreeMap::new();
        for (sku, n) in facts.reservations.iter().filter(|r| r.status == status).flat_map(|r| &r.lines) {
            *by_sku.entry(sku).or_default() += n;
        }
        by_sku
    };
    let (open, shipped) = (pieces("reserved"), pieces("committed"));
    for (sku, stock) in &facts.stock {
        let of = |by_sku: &BTreeMap<&str, i64>| by_sku.get(sku.as_str()).copied().unwrap_or_default();
        let Stock { on_hand, reserved } = *stock;
        if explained.get(sku.as_str()).copied().unwrap_or_default() != *stock {
            wrong.push(format!("{sku}: {stock:?}, its movements say {:?}", explained.get(sku.as_str())));
        }
        if on_hand + reserved != of(&initial) - of(&shipped) {
            let (initial, shipped) = (of(&initial), of(&shipped));
            wrong.push(format!("{sku}: {on_hand} on hand + {reserved} reserved is not {initial} - {shipped} shipped"));
        }
        if reserved != of(&open) {
            wrong.push(format!("{sku}: {reserved} reserved, open reservations hold {}", of(&open)));
        }
        if on_hand < 0 || reserved < 0 {
            wrong.push(format!("{sku}: less than nothing: {stock:?}"));
        }
    }
    // An order that is confirmed was shipped as ordered. I6 compares each saga's pieces, this the sums.
    let mut ordered: BTreeMap<&str, i64> = BTreeMap::new();
    for (id, order) in &facts.orders {
        if facts.sagas.get(id).is_some_and(|saga| saga.status == "completed") {
            order.lines.iter().for_each(|(sku, n)| *ordered.entry(sku).or_default() += n);
        }
    }
    if facts.sagas.values().all(|s| s.status != "stuck") && ordered != shipped {
        wrong.push(format!("shipped {shipped:?}, completed orders come to {ordered:?}"));
    }
    wrong.into_iter().map(|what| Finding::new(Invariant::I7, what)).collect()
}

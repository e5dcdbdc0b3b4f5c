//! Stock and money, before and after, and whether they add up: the shelves, payment-svc's ledger, and the provider's
//! own.

use super::{
    client::Client,
    report::{cents_text, table},
    scenes::Played,
    totals::Totals,
};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The pieces of an item.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pieces {
    on_hand: i64,
    reserved: i64,
}

/// The books of all services and of the provider at a moment.
#[derive(Debug)]
pub(crate) struct Books {
    stock: BTreeMap<String, Pieces>,
    ours: Totals,
    provider: Totals,
}

impl Books {
    /// Reads the books of all.
    pub(crate) async fn read(client: &Client) -> anyhow::Result<Self> {
        let items = client.items().await?;
        let stock = items["items"].as_array().with_context(|| format!("no list of items: {items}"))?;
        let stock = stock.iter().map(pieces).collect::<anyhow::Result<_>>()?;
        let (ours, provider) = (client.our_books().await?, client.providers_books().await?);
        Ok(Self { stock, ours, provider })
    }
}

fn pieces(item: &Value) -> anyhow::Result<(String, Pieces)> {
    let number = |name: &str| item[name].as_i64().with_context(|| format!("an item without {name}: {item}"));
    let sku = item["sku"].as_str().with_context(|| format!("an item without a sku: {item}"))?;
    Ok((sku.to_owned(), Pieces { on_hand: number("on_hand")?, reserved: number("reserved")? }))
}

/// Shows both, and the part of the difference that the confirmed orders explain; an error when that is not all.
pub(crate) fn print_and_check(before: &Books, after: &Books, played: &[Played]) -> anyhow::Result<()> {
    let confirmed: Vec<&Value> = played.iter().map(|p| &p.ended).filter(|o| o["status"] == "confirmed").collect();
    let sold = sold(&confirmed);
    let mut wrong = Vec::new();
    print_stock(before, after, &sold, &mut wrong);
    let earned: i64 = confirmed.iter().filter_map(|order| order["total"]["amount"].as_i64()).sum();
    print_money(before, after, earned, &mut wrong);
    ensure!(wrong.is_empty(), "the books do not add up:\n  {}", wrong.join("\n  "));
    println!("They add up: every piece and every cent is where a confirmed order put it, or where it was.");
    Ok(())
}

/// The pieces per item in confirmed orders.
fn sold(confirmed: &[&Value]) -> BTreeMap<String, i64> {
    let mut sold = BTreeMap::new();
    for item in confirmed.iter().filter_map(|order| order["items"].as_array()).flatten() {
        *sold.entry(item["sku"].as_str().unwrap_or("?").to_owned()).or_default() +=
            item["quantity"].as_i64().unwrap_or(0);
    }
    sold
}

fn print_stock(before: &Books, after: &Books, sold: &BTreeMap<String, i64>, wrong: &mut Vec<String>) {
    let mut rows = table(&["item", "before", "sold", "on hand", "reserved", ""]);
    let skus: BTreeSet<&String> = before.stock.keys().chain(after.stock.keys()).chain(sold.keys()).collect();
    for sku in skus {
        let (was, is) = (before.stock.get(sku).copied(), after.stock.get(sku).copied());
        let (was, is) = (was.unwrap_or_default(), is.unwrap_or_default());
        let gone = sold.get(sku).copied().unwrap_or(0);
        let right = was.on_hand + was.reserved == gone + is.on_hand && is.reserved == 0;
        if !right {
            wrong.push(format!("{sku}: {was:?} before, {gone} sold, {is:?} now"));
        }
        let numbers = [was.on_hand + was.reserved, gone, is.on_hand, is.reserved].map(|n| n.to_string());
        rows.add_row([&[sku.clone()][..], &numbers, &[mark(right)]].concat());
    }
    println!("\nStock\n{rows}");
}

fn print_money(before: &Books, after: &Books, earned: i64, wrong: &mut Vec<String>) {
    let mut rows =
        table(&["EUR", "authorized", "captured", "voided", "refunded", "still held", "orders confirmed", ""]);
    for (whose, was, is) in
        [("payment-svc's ledger", before.ours, after.ours), ("the provider's ledger", before.provider, after.provider)]
    {
        let moved = Totals {
            authorized: is.authorized - was.authorized,
            captured: is.captured - was.captured,
            voided: is.voided - was.voided,
            refunded: is.refunded - was.refunded,
        };
        let right = moved.captured - moved.refunded == earned && moved.held() == 0;
        if !right {
            wrong.push(format!("{whose}: {moved:?}, but confirmed orders are worth {}", cents_text(earned)));
        }
        let moved = [moved.authorized, moved.captured, moved.voided, moved.refunded, moved.held(), earned];
        rows.add_row([&[whose.to_owned()][..], &moved.map(cents_text), &[mark(right)]].concat());
    }
    if after.ours != after.provider {
        wrong.push(format!("the ledgers differ: {:?} here, {:?} there", after.ours, after.provider));
    }
    println!("\nMoney\n{rows}");
}

fn mark(right: bool) -> String {
    if right { "adds up" } else { "WRONG" }.to_owned()
}

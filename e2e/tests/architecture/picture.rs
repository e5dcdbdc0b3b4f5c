//! The modules of each crate as a picture: a module stands above all that it uses.
//!
//! The pictures are files of the tree, so that they can be looked at without running anything. A test compares them with
//! the sources; `make picture` draws them again.

use crate::order::Uses;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

/// The crates that have a picture.
pub(crate) const CRATES: [&str; 6] =
    ["saga-core", "outbox-relay", "order-svc", "payment-svc", "inventory-svc", "contracts"];

const BOX_HEIGHT: usize = 26;
const LETTER_WIDTH: usize = 8;
const ROW_HEIGHT: usize = 74;
const GAP_WIDTH: usize = 40;
const MARGIN: usize = 12;

/// Where a module's box is: its left edge, its upper edge, its width.
type Place = (usize, usize, usize);

/// The direct uses, without those that follow from others.
fn needed(uses: &Uses) -> BTreeMap<&str, BTreeSet<&str>> {
    let direct = |module: &str| uses.get(module).into_iter().flat_map(BTreeMap::keys).map(String::as_str);
    let mut reached: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for module in uses.keys() {
        let (mut all, mut open) = (BTreeSet::new(), direct(module).collect::<Vec<_>>());
        while let Some(next) = open.pop() {
            if all.insert(next) {
                open.extend(direct(next));
            }
        }
        reached.insert(module, all);
    }
    let follows = |module: &str, used: &str| {
        direct(module).any(|other| other != used && reached.get(other).is_some_and(|all| all.contains(used)))
    };
    let kept = |module: &str| direct(module).filter(|used| !follows(module, used)).collect();
    uses.keys()
        .map(|module| (module.as_str(), direct(module).next().map(|_| kept(module)).unwrap_or_default()))
        .collect()
}

/// The modules by rows, the lowest first: a module is one row above the highest that it uses.
fn rows<'u>(needed: &BTreeMap<&'u str, BTreeSet<&'u str>>) -> Vec<Vec<&'u str>> {
    let mut row: BTreeMap<&str, usize> = BTreeMap::new();
    while row.len() < needed.len() {
        let before = row.len();
        for (module, used) in needed {
            let below: Option<Vec<usize>> = used.iter().map(|used| row.get(used).copied()).collect();
            if let Some(below) = below {
                row.entry(module).or_insert_with(|| below.iter().max().map_or(0, |highest| highest + 1));
            }
        }
        assert!(row.len() > before, "no module needs itself through others: another test says so");
    }
    let mut rows = vec![Vec::new(); row.values().max().map_or(0, |highest| highest + 1)];
    row.into_iter().for_each(|(module, at)| rows[at].push(module));
    rows
}

/// Orders each row by where the modules below are that its modules use, so that fewer lines cross.
fn places<'u>(rows: &[Vec<&'u str>], needed: &BTreeMap<&'u str, BTreeSet<&'u str>>) -> BTreeMap<&'u str, Place> {
    let width = |module: &str| module.len() * LETTER_WIDTH + 2 * MARGIN;
    let row_width = |row: &[&str]| row.iter().map(|module| width(module) + GAP_WIDTH).sum::<usize>();
    let widest = rows.iter().map(|row| row_width(row)).max().unwrap_or_default();
    let mut places: BTreeMap<&str, Place> = BTreeMap::new();
    for (at, row) in rows.iter().enumerate() {
        let middle = |module: &str| {
            let below: Vec<usize> = needed[module].iter().map(|used| places[used].0 + places[used].2 / 2).collect();
            below.iter().sum::<usize>().checked_div(below.len()).unwrap_or_default()
        };
        let mut ordered = row.clone();
        ordered.sort_by_key(|module| middle(module));
        let mut left = MARGIN + (widest - row_width(row)) / 2;
        for module in ordered {
            places.insert(module, (left, MARGIN + (rows.len() - 1 - at) * ROW_HEIGHT, width(module)));
            left += width(module) + GAP_WIDTH;
        }
    }
    places
}

/// The picture of a crate, as SVG.
pub(crate) fn of(uses: &Uses) -> String {
    let needed = needed(uses);
    let rows = rows(&needed);
    let places = places(&rows, &needed);
    let right = places.values().map(|(left, _, width)| left + width).max().unwrap_or_default() + MARGIN;
    let bottom = rows.len() * ROW_HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {right} {bottom}\" width=\"{right}\" height=\"{bottom}\" \
         font-family=\"ui-monospace, monospace\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for (module, used) in &needed {
        let (left, top, width) = places[module];
        for (to_left, to_top, to_width) in used.iter().map(|used| places[used]) {
            let (from, to) = (left + width / 2, to_left + to_width / 2);
            writeln!(svg, "<path d=\"M{from} {} L{to} {to_top}\" stroke=\"#8a94a6\" fill=\"none\"/>", top + BOX_HEIGHT)
                .expect("a text takes all");
        }
    }
    for (module, (left, top, width)) in &places {
        writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{BOX_HEIGHT}\" rx=\"4\" fill=\"#f3f6fb\" \
             stroke=\"#3b5b92\"/><text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#14233c\">{module}</text>",
            left + width / 2,
            top + BOX_HEIGHT - 9,
        )
        .expect("a text takes all");
    }
    svg + "</svg>\n"
}

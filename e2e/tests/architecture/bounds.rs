//! Transactions have a bound: only `saga_core::transaction` begins one, and it cannot begin without a bound. The
//! relay's connections (`outbox-relay/src/database.rs`) cannot be made without a bound, so each transaction on them has
//! it.
//!
//! `_in` says of a function that it works in its caller's transaction, and of no other function.

use crate::{
    Violation,
    source::{Tree, block_end, code, without_tests},
};

/// The files in which a transaction may begin in another way, and why.
const ALLOWED: [(&str, &str); 7] = [
    ("saga-core/src/service/database.rs", "the services' pool: statements outside of transactions have a bound, too"),
    ("outbox-relay/src/read/nudges.rs", "one connection that listens; each of its statements has a bound"),
    ("outbox-relay/src/database.rs", "the relay's pools: each connection has its bound"),
    ("saga-core/src/transaction.rs", "it is the one place"),
    ("saga-core/src/consumer/transaction.rs", "begins the next with the last commit, under the same bound"),
    ("saga-core/src/saga/starts.rs", "keeps its connection to tell the relay, under the same bound"),
    ("saga-core/src/service/migrate.rs", "a migration takes as long as it takes"),
];

/// The ways in which a top-level transaction begins; `tx.begin()` is a savepoint.
const BEGINS: [&str; 6] =
    ["pool.begin(", "pool().begin(", "connection.begin(", "begin_with(", "try_begin(", "PgPoolOptions::new("];

pub(crate) fn only_one_place_begins(tree: &Tree) -> Vec<Violation> {
    let product = ["saga-core/src/", "outbox-relay/src/", "order-svc/src/", "payment-svc/src/", "inventory-svc/src/"];
    let sources = tree.0.iter().filter(|(path, _)| {
        path.ends_with(".rs")
            && product.iter().any(|folder| path.starts_with(folder))
            && !path.contains("/testkit")
            && ALLOWED.iter().all(|(allowed, _)| path != allowed)
    });
    let found = sources.flat_map(|(path, text)| {
        let code = without_tests(&code(text));
        let lines: Vec<_> = code.lines().map(str::to_owned).collect();
        lines.into_iter().filter_map(move |line| {
            let begin = BEGINS.iter().find(|begin| line.contains(**begin))?;
            Some(format!("{path}: `{begin}…)`: begin with `Transaction::begin`, which has a bound"))
        })
    });
    found.collect()
}

/// The types of a transaction that has begun.
const TRANSACTIONS: [&str; 3] = ["Tx", "Transaction", "PgTransaction"];

/// A trait names its methods by what they are for, and the test kit's helpers are read in tests alone.
pub(crate) fn names_say_whose_transaction(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, code) in tree.sources().filter(|(path, _)| !path.contains("/testkit")) {
        for after in without_traits(&code).split("fn ").skip(1) {
            let name = &after[..after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len())];
            let takes = parameters(&after[name.len()..]).iter().any(|parameter| is_transaction(parameter));
            if takes && !name.ends_with("_in") {
                violations.push(format!("{path}: `{name}` takes its caller's transaction: its name ends in `_in`"));
            } else if !takes && name.ends_with("_in") {
                violations.push(format!("{path}: `{name}` takes no transaction: its name does not end in `_in`"));
            }
        }
    }
    violations
}

/// The code without traits and what implements them.
fn without_traits(code: &str) -> String {
    let (mut kept, mut rest) = (String::new(), code);
    while let Some(line) = rest.split_inclusive('\n').next() {
        let header = &rest[..rest.find('{').unwrap_or(rest.len())];
        let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
        let first = words.next().unwrap_or_default();
        let implements = first.starts_with("impl") && header.split_whitespace().any(|word| word == "for");
        let end = if first == "trait" || implements { block_end(rest, header.len()) } else { line.len() };
        if end == line.len() {
            kept.push_str(line);
        }
        rest = &rest[end..];
    }
    kept
}

/// The parameters of a function; `signature` begins behind its name.
fn parameters(signature: &str) -> Vec<&str> {
    let (mut found, mut depth, mut start, mut before) = (Vec::new(), 0_usize, None, ' ');
    for (at, c) in signature.char_indices() {
        match (c, start) {
            ('(', None) if depth == 0 => start = Some(at + 1),
            ('(' | '[' | '<', _) => depth += 1,
            (')' | ',', Some(from)) if depth == 0 => {
                found.push(&signature[from..at]);
                if c == ')' {
                    break;
                }
                start = Some(at + 1);
            }
            ('>', _) if before == '-' => {}
            (')' | ']' | '>', _) => depth = depth.saturating_sub(1),
            _ => {}
        }
        before = c;
    }
    found
}

/// Whether the parameter is a transaction of the caller's, as in `tx: &mut Tx<'_>`.
fn is_transaction(parameter: &str) -> bool {
    let of = parameter.split_once(": &").and_then(|(_, of)| of.split_once("mut "));
    of.is_some_and(|(lifetime, of)| {
        let path = of.split('<').next().unwrap_or(of);
        !lifetime.contains('(') && TRANSACTIONS.contains(&path.rsplit("::").next().unwrap_or(path).trim())
    })
}

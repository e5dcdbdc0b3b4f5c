//! Transactions have a bound: only `saga_core::transaction` begins one, and it cannot begin without a bound. The
//! relay's connections (`outbox-relay/src/database.rs`) cannot be made without a bound, so each transaction on them has
//! it.

use crate::{
    Violation,
    source::{Tree, code, without_tests},
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

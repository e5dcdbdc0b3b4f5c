//! The modules that do no I/O, and the modules that alone may do a thing.

use crate::{
    Violation,
    source::{Tree, paths},
};
use std::collections::{BTreeMap, BTreeSet};

/// The crates that mean I/O.
const IO: [&str; 8] = ["sqlx", "rdkafka", "axum", "tokio", "tokio_util", "reqwest", "hyper", "refinery"];

/// Whether purity begins in this file; it spreads to whatever these files use of our own.
fn is_pure(path: &str) -> bool {
    let core = ["saga/definition.rs", "saga/decide.rs", "envelope.rs", "command.rs", "topic.rs", "id.rs"];
    core.iter().any(|file| path == format!("saga-core/src/{file}"))
        || path.starts_with("contracts/src/")
        || path.ends_with("/src/domain.rs")
        || path.contains("/src/domain/")
}

/// Every pure file, and every file that a pure file reaches by a path, uses no crate that does I/O, and no clock.
pub(crate) fn no_io(tree: &Tree) -> Vec<Violation> {
    let sources: BTreeMap<&str, String> = tree.sources().collect();
    let mut reached: BTreeMap<String, String> = BTreeMap::new();
    let roots = sources.keys().filter(|path| is_pure(path));
    let mut open: Vec<(String, String)> = roots.map(|path| ((*path).to_owned(), "pure by itself".to_owned())).collect();
    while let Some((path, why)) = open.pop() {
        let Some(code) = sources.get(path.as_str()).filter(|_| !reached.contains_key(&path)) else { continue };
        // A crate's root is a map of modules: what it re-exports is not what it uses.
        let children = if path.ends_with("/lib.rs") { Vec::new() } else { submodules(code, &path) };
        let used = paths(code).into_iter().filter_map(|name| file_of(&sources, &path, &name));
        open.extend(used.chain(children).map(|next| (next, format!("reached from {path}"))));
        reached.insert(path, why);
    }
    let mut violations = Vec::new();
    for (path, why) in &reached {
        let names: BTreeSet<String> =
            paths(&sources[path.as_str()]).iter().map(|name| first(name).to_owned()).collect();
        let io = IO.iter().filter(|name| names.contains(**name));
        violations.extend(io.map(|name| format!("{path} ({why}) must not use {name}")));
        if path == "saga-core/src/clock.rs" {
            violations.push(format!("{path} ({why}): pure code takes `now` as a parameter"));
        }
    }
    violations
}

fn first(path: &str) -> &str {
    path.split("::").next().unwrap_or(path)
}

/// The files of each `mod x;` in the file at `path`.
fn submodules(code: &str, path: &str) -> Vec<String> {
    let folder = folder_of(path);
    let names = code.lines().filter_map(|line| {
        let line = line.trim().trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
        line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';')
    });
    names.flat_map(|name| [format!("{folder}/{name}.rs"), format!("{folder}/{name}/mod.rs")]).collect()
}

/// The folder of a module's children.
fn folder_of(path: &str) -> String {
    match path.rsplit_once('/') {
        Some((folder, "lib.rs" | "main.rs" | "mod.rs")) => folder.to_owned(),
        _ => path.trim_end_matches(".rs").to_owned(),
    }
}

/// The file that a path of our own names, seen from the file `from`; `None` for another crate.
pub(crate) fn file_of(sources: &BTreeMap<&str, String>, from: &str, path: &str) -> Option<String> {
    let package = from.split('/').next()?;
    let mut segments = path.split("::");
    let mut folder = match segments.next()? {
        "crate" => format!("{package}/src"),
        "self" => folder_of(from),
        "super" => folder_of(from).rsplit_once('/')?.0.to_owned(),
        "saga_core" => "saga-core/src".to_owned(),
        "contracts" => "contracts/src".to_owned(),
        _ => return None,
    };
    let mut found = None;
    for segment in segments {
        if segment == "super" {
            folder = folder.rsplit_once('/')?.0.to_owned();
            continue;
        }
        folder = format!("{folder}/{segment}");
        let candidates = [format!("{folder}.rs"), format!("{folder}/mod.rs")];
        match candidates.into_iter().find(|file| sources.contains_key(file.as_str())) {
            Some(file) => found = Some(file),
            None if sources.keys().any(|file| file.starts_with(&format!("{folder}/"))) => {}
            None => break,
        }
    }
    found
}

/// Checks that one file alone uses `backoff`, which is unmaintained, and can replace it.
pub(crate) fn backoff(tree: &Tree) -> Vec<Violation> {
    let used = |code: &str| paths(code).iter().any(|path| path == "backoff" || path.starts_with("backoff::"));
    let others = tree.sources().filter(|(path, code)| *path != "saga-core/src/retry.rs" && used(code));
    others.map(|(path, _)| format!("{path} must not use backoff; saga_core::retry does")).collect()
}

/// Checks that production code asks one place for the time. Tools and tests that drive the system measure time as they
/// like.
pub(crate) fn clock(tree: &Tree) -> Vec<Violation> {
    let exempt = |path: &str| {
        path == "saga-core/src/clock.rs"
            || path.starts_with("saga-core/src/testkit")
            || ["stack/", "e2e/", "bench/"].iter().any(|driver| path.starts_with(driver))
    };
    let reads = ["OffsetDateTime::now_utc", "OffsetDateTime::now_local", "SystemTime::now", "Instant::now"];
    let sources = tree.sources().filter(|(path, _)| !exempt(path));
    sources
        .flat_map(|(path, code)| {
            let used: BTreeSet<_> = paths(&code)
                .iter()
                .filter_map(|name| reads.iter().find(|read| name == *read || name.ends_with(&format!("::{read}"))))
                .copied()
                .collect();
            used.into_iter()
                .map(|read| format!("{path} must not call {read}; saga_core::clock does"))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Checks that the library knows no orders: it serves other platforms, too.
pub(crate) fn engine_knows_no_orders(tree: &Tree) -> Vec<Violation> {
    let words = ["OrderId", "order_id", "payment", "Payment", "inventory", "Inventory", "sku", "Sku"];
    let core = tree.sources().filter(|(path, _)| path.starts_with("saga-core/src/"));
    core.flat_map(|(path, code)| {
        let idents: BTreeSet<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let known = words.iter().filter(|word| idents.contains(**word));
        known.map(|word| format!("{path} must not know of {word}")).collect::<Vec<_>>()
    })
    .collect()
}

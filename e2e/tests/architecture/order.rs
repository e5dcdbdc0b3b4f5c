//! The order in which modules are read: each uses only those before it.

use crate::{
    Violation,
    purity::file_of,
    source::{Tree, paths},
};
use std::collections::{BTreeMap, BTreeSet};

/// The modules of saga-core, as `lib.rs` and ARCHITECTURE.md name them. Modules that only tests use are not among them.
const SAGA_CORE: [&str; 24] = [
    "reason",
    "card",
    "clock",
    "topic",
    "command",
    "id",
    "envelope",
    "trace",
    "error_class",
    "brokers",
    "part",
    "outage",
    "retry",
    "gather",
    "panics",
    "json",
    "outbox",
    "transaction",
    "inbox",
    "consumer",
    "participant",
    "saga",
    "http",
    "service",
];
const OF_TESTS: [&str; 2] = ["testkit", "fail_point"];

/// The crates whose modules may not need each other in a circle: all but saga-core, whose order says more.
pub(crate) const WITHOUT_CIRCLES: [&str; 8] =
    ["contracts", "outbox-relay", "order-svc", "payment-svc", "inventory-svc", "stack", "e2e", "bench"];

/// The sources by their paths, as [`Tree::sources`] reads them.
type Sources<'t> = BTreeMap<&'t str, String>;

/// The modules that each module of a folder uses, each with a file that does.
pub(crate) type Uses = BTreeMap<String, BTreeMap<String, String>>;

/// The reading order of saga-core.
pub(crate) fn saga_core(tree: &Tree) -> Vec<Violation> {
    let place = |module: &str| SAGA_CORE.iter().position(|name| *name == module);
    let mut violations = Vec::new();
    for (module, others) in uses(&tree.sources().collect(), "saga-core/src") {
        let Some(at) = place(&module) else {
            violations.push(format!("saga-core: the module {module} has no place in the reading order"));
            continue;
        };
        let later = others.iter().filter(|(other, _)| place(other).is_some_and(|other| other > at));
        violations
            .extend(later.map(|(other, file)| format!("{file} must not use {other}, which is read after {module}")));
    }
    violations
}

/// The modules of a crate and what they use.
pub(crate) fn modules(tree: &Tree, package: &str) -> Uses {
    uses(&tree.sources().collect(), &format!("{package}/src"))
}

/// Finds a module that needs itself through others beside it, at the root or in a folder, in the crates that have no such
/// circle.
pub(crate) fn circles(tree: &Tree) -> Vec<Violation> {
    let sources = tree.sources().collect();
    let mut violations = Vec::new();
    for folder in WITHOUT_CIRCLES.into_iter().flat_map(|package| folders(&sources, package)) {
        let uses = uses(&sources, folder);
        let (mut reached, mut open) = (BTreeSet::new(), Vec::new());
        for module in uses.keys() {
            reached.clear();
            open.extend(uses[module].keys());
            while let Some(next) = open.pop() {
                if reached.insert(next) {
                    open.extend(uses.get(next).into_iter().flat_map(BTreeMap::keys));
                }
            }
            if reached.contains(module) {
                violations.push(format!("{folder}: the module {module} needs itself through others"));
            }
        }
    }
    violations
}

/// The folders with sources of a crate, `src` among them.
fn folders<'s>(sources: &Sources<'s>, package: &str) -> BTreeSet<&'s str> {
    let sources =
        sources.keys().filter(|path| path.strip_prefix(package).is_some_and(|path| path.starts_with("/src/")));
    let folders = sources.flat_map(|path| path.match_indices('/').map(move |(end, _)| &path[..end]));
    folders.filter(|folder| folder.len() > package.len()).collect()
}

fn uses(sources: &Sources<'_>, folder: &str) -> Uses {
    let mut uses = Uses::new();
    for (path, code) in sources {
        let Some(module) = module_of(path, folder) else { continue };
        let others = uses.entry(module.to_owned()).or_default();
        for used in paths(code).iter().filter_map(|name| file_of(sources, path, name)) {
            let other = module_of(&used, folder).filter(|other| *other != module);
            others.extend(other.map(|other| (other.to_owned(), (*path).to_owned())));
        }
    }
    uses
}

/// The module of a folder that a file belongs to; `None` for the folder's own module, files elsewhere, and modules that
/// only tests use.
fn module_of<'p>(path: &'p str, folder: &str) -> Option<&'p str> {
    let inside = path.strip_prefix(folder)?.strip_prefix('/')?;
    let module = inside.split('/').next()?.trim_end_matches(".rs");
    (!["lib", "main", "mod"].contains(&module) && !OF_TESTS.contains(&module)).then_some(module)
}

//! Sizes of files, and migrations that are really embedded.

use crate::{
    Violation,
    source::{Tree, code, without_tests},
};
use std::collections::{BTreeMap, BTreeSet};

/// The most lines of a `main.rs`: configuration, telemetry, run.
const MAIN: usize = 40;
/// The most lines of a file without its tests and blank lines: one sitting.
const FILE: usize = 420;
/// The binaries that run in production.
const BINARIES: [&str; 4] = ["outbox-relay", "order-svc", "inventory-svc", "payment-svc"];

pub(crate) fn mains(tree: &Tree) -> Vec<Violation> {
    let mains = BINARIES.iter().map(|package| format!("{package}/src/main.rs"));
    let long = mains.filter_map(|path| {
        let lines = tree.0.get(&path)?.lines().count();
        (lines > MAIN).then(|| format!("{path} has {lines} lines; {MAIN} are what a main may have"))
    });
    long.collect()
}

pub(crate) fn lengths(tree: &Tree) -> Vec<Violation> {
    // Comments count, and strings count (SQL is code): only what `code` blanks inside a line is left out.
    let sources = tree.0.iter().filter(|(path, _)| path.ends_with(".rs"));
    sources
        .filter_map(|(path, text)| {
            let test = path.contains("/tests/");
            let kept = if test { text.clone() } else { body(text) };
            let lines = kept.lines().filter(|line| !line.trim().is_empty()).count();
            (lines > FILE).then(|| format!("{path} has {lines} lines; {FILE} is one sitting"))
        })
        .collect()
}

/// A module with modules of its own is `x.rs` beside the folder `x`, so that no two files of a list have one name.
pub(crate) fn module_files(tree: &Tree) -> Vec<Violation> {
    let sources = tree.0.keys().filter(|path| path.contains("/src/") && path.ends_with("/mod.rs"));
    sources.map(|path| format!("{path}: a module with a folder is the file beside it, not a mod.rs in it")).collect()
}

/// A file without its test modules; comments and strings as they stand.
fn body(text: &str) -> String {
    let blanked = code(text);
    let kept = without_tests(&blanked).lines().count();
    let removed = blanked.lines().count().saturating_sub(kept);
    text.lines().take(text.lines().count() - removed).collect::<Vec<_>>().join("\n")
}

pub(crate) fn module_docs(tree: &Tree) -> Vec<Violation> {
    let sources = tree.0.iter().filter(|(path, _)| path.ends_with(".rs") && path.contains("/src/"));
    let silent = sources.filter(|(_, text)| !text.starts_with("//!"));
    silent.map(|(path, _)| format!("{path} does not begin by saying what it is for (`//!`)")).collect()
}

/// Each public module of the library shows an example, which is a test of its documentation.
pub(crate) fn examples(tree: &Tree) -> Vec<Violation> {
    let modules = tree.0.get("saga-core/src/lib.rs").map_or("", String::as_str).lines();
    let modules = modules.filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let shows = |module: &str| {
        let (file, folder) = (format!("saga-core/src/{module}.rs"), format!("saga-core/src/{module}/"));
        tree.0.iter().any(|(path, text)| {
            let lines = text.lines().map(str::trim_start);
            let mut opened = lines.filter(|line| line.starts_with("//! ```") || line.starts_with("/// ```"));
            (*path == file || path.starts_with(&folder)) && opened.any(|line| matches!(&line[4..], "```" | "```no_run"))
        })
    };
    modules.filter(|module| !shows(module)).map(|module| format!("saga-core: {module} shows no example")).collect()
}

/// A constant that is a time or a count says what it bounds: one word alone does not.
pub(crate) fn constants(tree: &Tree) -> Vec<Violation> {
    const COUNTED: [&str; 6] = ["Duration", "usize", "u32", "u64", "i64", "f64"];
    let mut violations = Vec::new();
    for (path, text) in tree.0.iter().filter(|(path, _)| path.ends_with(".rs") && path.contains("/src/")) {
        for line in without_tests(&code(text)).lines() {
            let Some((_, constant)) = line.split_once("const ") else { continue };
            let Some((name, of)) = constant.split_once(": ") else { continue };
            let of = of.split_once(" =").map_or(of, |(of, _)| of);
            let is_name = name.chars().all(|c| c.is_ascii_uppercase());
            // One of a trait or a type is qualified by its name.
            if is_name && COUNTED.contains(&of) && !line.starts_with(' ') {
                violations.push(format!("{path}: the constant {name} does not say what it bounds"));
            }
        }
    }
    violations
}

/// refinery embeds the files that its macro finds when the crate is built, and ignores a name that it does not
/// understand. Each file has such a name and a version of its own. Each folder is embedded by a crate, which is built
/// again when a file is added.
pub(crate) fn migrations(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut folders: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    for path in tree.0.keys().filter(|path| path.ends_with(".sql") && path.starts_with("migrations/")) {
        match path.split('/').collect::<Vec<_>>().as_slice() {
            ["migrations", owner, name] => match version(name) {
                None => violations.push(format!("{path} is ignored by refinery: a name is V<number>__<what>.sql")),
                Some(version) if !folders.entry(owner).or_default().insert(version) => {
                    violations.push(format!("{path}: version {version} is there twice"));
                }
                Some(_) => {}
            },
            _ => violations.push(format!("{path} is not in the folder of an owner")),
        }
    }
    for owner in folders.keys() {
        let macro_call = format!("embed_migrations!(\"../migrations/{owner}\")");
        let mut embedding = tree.0.iter().filter(|(path, text)| path.contains("/src/") && text.contains(&macro_call));
        let Some((path, _)) = embedding.next() else {
            violations.push(format!("migrations/{owner} is embedded in no binary"));
            continue;
        };
        let package = path.split('/').next().unwrap_or_default();
        let build = tree.0.get(&format!("{package}/build.rs")).map_or("", String::as_str);
        if !build.contains(&format!("rerun-if-changed=../migrations/{owner}")) {
            violations
                .push(format!("{package}/build.rs does not watch migrations/{owner}: a new file is not embedded"));
        }
    }
    violations
}

/// The version of a migration's file name, as refinery reads it.
fn version(name: &str) -> Option<u32> {
    let (version, what) = name.strip_suffix(".sql")?.strip_prefix('V')?.split_once("__")?;
    let legal = !what.is_empty() && what.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    legal.then(|| version.parse().ok()).flatten()
}

/// Each line of `e2e/edges.txt` that is no comment is a topic and the name of a test.
pub(crate) fn edges(tree: &Tree, list: &str) -> Vec<Violation> {
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let name = line.split_once(' ').filter(|(topic, _)| topic.parse::<u8>().is_ok()).map(|(_, name)| name);
            let test = name.is_some_and(|name| tree.0.values().any(|text| text.contains(&format!("fn {name}("))));
            (!test).then(|| format!("e2e/edges.txt: `{line}` is not a topic and a test"))
        })
        .collect()
}

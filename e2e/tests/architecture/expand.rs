//! Migrations only expand within a release: the build before must be able to read and write under every one of them.
//! Both builds run at once during an upgrade, and the old one alone after it is rolled back.

use crate::{Violation, source::Tree};

/// The last migration of the last release, per owner: those after it are judged.
const RELEASED: [(&str, u32); 6] =
    [("messaging", 7), ("saga", 2), ("order", 1), ("inventory", 2), ("payment", 1), ("gateway", 1)];

/// The statements that an older build cannot live with, each with what to do instead.
const CONTRACTS: [(&str, &str); 12] = [
    ("drop table", "drop it a release later"),
    ("drop column", "drop it a release later"),
    ("drop function", "keep it for a release"),
    ("drop view", "keep it for a release"),
    (
        "drop constraint",
        "an older build may name it; use `not valid` constraints beside it, and drop it a release later",
    ),
    ("rename", "add the new name beside the old one"),
    ("set not null", "an older build writes null; use a default, and a check a release later"),
    ("drop default", "an older build relies on it"),
    ("add foreign key", "an older build may write what it forbids"),
    ("add unique", "an older build may write what it forbids"),
    ("add primary key", "an older build may write what it forbids"),
    ("truncate", "an older build still reads it"),
];

/// Statements that would be violations, each with the reason why an older build lives with it.
const ALLOWED: [(&str, &str); 2] = [
    // It binds only rows that a newer build has claimed, and of these only a discard, which the older build repeats.
    ("V11__parked_lines.sql", "alter table outbox_parked add constraint outbox_parked_claimed"),
    // An older build calls the function as the owner or as a superuser. Another role's call could do nothing.
    ("V16__rights_of_a_relay.sql", "revoke execute on function outbox_add_partition bigint from public"),
];

pub(crate) fn only(tree: &Tree) -> Vec<Violation> {
    let judged = tree.0.iter().filter(|(path, _)| is_unreleased(path));
    judged.flat_map(|(path, text)| judge(path, text).into_iter().map(move |why| format!("{path}: {why}"))).collect()
}

fn is_unreleased(path: &str) -> bool {
    let Some(rest) = path.strip_prefix("migrations/").filter(|rest| rest.ends_with(".sql")) else { return false };
    let Some((owner, name)) = rest.split_once('/') else { return false };
    let version = name.strip_prefix('V').and_then(|name| name.split("__").next()).and_then(|n| n.parse::<u32>().ok());
    let released = RELEASED.iter().find(|(known, _)| *known == owner).map_or(0, |(_, version)| *version);
    version.is_none_or(|version| version > released)
}

fn judge(path: &str, text: &str) -> Vec<String> {
    let is_allowed =
        |statement: &str| ALLOWED.iter().any(|(file, allowed)| path.ends_with(file) && statement.starts_with(allowed));
    let mut found = Vec::new();
    for statement in statements(text).into_iter().filter(|statement| !is_allowed(statement)) {
        let words = format!(" {statement} ");
        // A table or an index that this migration makes, or one that only lives within it, binds no older build.
        let alters = words.contains(" alter ") || words.starts_with(" drop ") || words.starts_with(" truncate ");
        for (what, instead) in CONTRACTS.iter().filter(|_| alters) {
            let shrinks = words.contains(&format!(" {what} "));
            // A function or a constraint that comes back under its name in the same migration is replaced, not dropped.
            let replaced = what.starts_with("drop ") && comes_back(text, what, &statement);
            if shrinks && !replaced {
                found.push(format!("`{statement}` is not an expansion: {instead}"));
            }
        }
        if words.contains(" alter column ") && words.contains(" type ") {
            found.push(format!("`{statement}` is not an expansion: add a column of the new type beside the old one"));
        }
        let binds = ["create trigger", "create or replace trigger", "create constraint trigger", "revoke"];
        let adds = words.contains(" add constraint ") && !was_there(text, &statement);
        if adds || binds.iter().any(|what| words.starts_with(&format!(" {what} "))) {
            found.push(format!("`{statement}` is not an expansion: an older build may write what it forbids"));
        }
        let column = words.contains(" add column ") && words.contains(" not null ") && !words.contains(" default ");
        if column && !words.contains(" generated ") {
            found.push(format!(
                "`{statement}` is not an expansion: an older build does not write it; give it a default"
            ));
        }
        if words.starts_with(" create unique index ") {
            found.push(format!("`{statement}` is not an expansion: an older build may write what it forbids"));
        }
    }
    found
}

/// Whether the constraint that the statement adds takes the place of one of its name, or its table is new.
fn was_there(text: &str, statement: &str) -> bool {
    let after = |word: &str| statement.split(word).nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let (table, name, text) = (after("alter table "), after("add constraint "), text.to_lowercase());
    text.contains(&format!("drop constraint {name};")) || text.contains(&format!("create table {table} "))
}

fn comes_back(text: &str, what: &str, statement: &str) -> bool {
    let Some(name) = statement.split(&format!("{what} ")).nth(1) else { return false };
    let name = name.trim_start_matches("if exists ").split([' ', '(', ',', ';']).next().unwrap_or_default();
    let (kind, text) = (what.trim_start_matches("drop "), text.to_lowercase());
    let again =
        [format!("create {kind} {name}"), format!("create or replace {kind} {name}"), format!("add {kind} {name}")];
    !name.is_empty() && again.iter().any(|again| text.contains(again))
}

/// The statements without comments, in lower case, each on one line. A function's body is one statement with the text
/// before it, up to its first semicolon. What it does when it is called is not judged here; a `do` block runs at once.
fn statements(text: &str) -> Vec<String> {
    let text: String =
        text.lines().map(|line| line.split("--").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut outside = String::new();
    for (n, part) in text.split("$$").enumerate() {
        let runs = outside.trim_end().ends_with("do");
        match (n % 2, runs) {
            (0, _) => outside.push_str(part),
            (_, true) => outside.push_str(&part.replacen("begin", "begin;", 1)),
            (_, false) => outside.push_str(" body "),
        }
    }
    let all = outside.split(';').map(|statement| {
        statement.to_lowercase().replace(['(', ')', ','], " ").split_whitespace().collect::<Vec<_>>().join(" ")
    });
    all.filter(|statement| !statement.is_empty()).collect()
}

//! The language of what people read of a program: its log lines, errors, answers and help.

use crate::{
    Violation,
    source::{Tree, strings},
};

/// Words that are used of people alone. A component has a name, and a reader at night wants it.
const OF_PEOPLE: [&str; 9] =
    ["who", "whoever", "whom", "somebody", "someone", "nobody", "anybody", "told", "looked at"];
/// Likewise where people are spoken of, too.
pub(crate) const OF_PEOPLE_ALONE: [&str; 6] = ["whoever", "somebody", "someone", "nobody", "told", "looked at"];
/// A sentence of more words is read twice.
pub(crate) const WORDS_MAX: usize = 25;

/// Checks the strings of each program. SQL is left out, by its first word, and so are strings that are no text: names
/// and lists.
pub(crate) fn of_programs(tree: &Tree) -> Vec<Violation> {
    let programs = tree.0.iter().filter(|(path, _)| is_product(path));
    let said = programs.flat_map(|(path, text)| strings(text).into_iter().map(move |(line, said)| (path, line, said)));
    let mut violations = Vec::new();
    for (path, line, said) in said.filter(|(_, _, said)| is_text(said)) {
        let words = words(&said);
        let found = OF_PEOPLE.iter().find(|phrase| format!(" {words} ").contains(&format!(" {phrase} ")));
        violations.extend(found.map(|word| format!("{path}:{line}: {word:?} is said of people: {said}")));
        if let Some(long) = sentences(&said).find(|sentence| sentence.split_whitespace().count() > WORDS_MAX) {
            violations.push(format!("{path}:{line}: a sentence of more than {WORDS_MAX} words: {long}"));
        }
    }
    violations
}

/// What comments and documentation of code say. An operator or a reader may be a `who`.
pub(crate) fn of_comments(tree: &Tree) -> Vec<Violation> {
    let sources =
        tree.0.iter().filter(|(path, _)| path.ends_with(".rs") && !path.starts_with("e2e/tests/architecture/"));
    let lines = sources
        .flat_map(|(path, text)| text.lines().enumerate().map(move |(line, text)| (path, line + 1, text.trim())));
    let comments = lines.filter(|(_, _, text)| text.starts_with("//"));
    let mut before = (0, "");
    let spoken = comments.filter_map(|(path, line, text)| {
        // What is said over the end of a line is found, too.
        let last = if before.0 + 1 == line { before.1 } else { "" };
        before = (line, text.rsplit(' ').next().unwrap_or_default());
        let said = format!(" {} ", words(&without_code(&format!("{last} {text}"))));
        let word = OF_PEOPLE_ALONE.iter().find(|word| said.contains(&format!(" {word} ")))?;
        Some(format!("{path}:{line}: {word:?} is said of people: {text}"))
    });
    spoken.collect()
}

fn is_product(path: &str) -> bool {
    let crates = ["saga-core", "outbox-relay", "order-svc", "inventory-svc", "payment-svc", "contracts", "stack"];
    crates.iter().any(|name| path.starts_with(&format!("{name}/src/")))
        && path.ends_with(".rs")
        && !path.contains("/testkit")
        && !path.ends_with("/tests.rs")
}

fn is_text(said: &str) -> bool {
    let first = said.trim_start_matches(['"', 'r', '#']).split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
    let of_sql = [
        "select", "insert", "update", "delete", "with", "create", "alter", "begin", "commit", "set", "notify", "lock",
        "do", "grant", "explain", "from", "where", "and", "id",
    ];
    let marks = ["$", "_", " = ", " from ", " into ", " table", " where ", "::", "select ", "{", " role"];
    let is_sql = of_sql.contains(&first) && marks.iter().any(|mark| said.contains(mark));
    said.trim_matches('"').contains(' ') && said.contains(char::is_lowercase) && !is_sql
}

/// Words in lower case, one space apart.
pub(crate) fn words(said: &str) -> String {
    let words = said.split(|c: char| !c.is_alphabetic() && c != '\'').filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}

pub(crate) fn sentences(said: &str) -> impl Iterator<Item = &str> {
    said.split(". ").flat_map(|part| part.split([';', ':', '?', '!', '\n']))
}

/// Each piece of code is one word.
pub(crate) fn without_code(line: &str) -> String {
    line.split('`').enumerate().map(|(n, part)| if n % 2 == 0 { part } else { "code" }).collect()
}

//! The documents: their links lead somewhere, and their language is that of a stranger.

use crate::{
    Violation,
    source::Tree,
    words::{OF_PEOPLE_ALONE, WORDS_MAX, sentences, without_code, words},
};
use std::collections::BTreeSet;

/// The text of a document between its code blocks, each line with its number.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut in_code = false;
    let lines = text.lines().enumerate().filter(|(_, line)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        !in_code && !fence
    });
    lines.map(|(number, line)| (number + 1, line)).collect()
}

fn documents(tree: &Tree) -> impl Iterator<Item = (&str, &str)> {
    let documents = tree.0.iter().filter(|(path, _)| path.ends_with(".md"));
    documents.map(|(path, text)| (path.as_str(), text.as_str()))
}

/// Every relative link of a document leads to a file or folder, and every anchor to a heading. `exists` answers for paths from the
/// workspace's root.
pub(crate) fn links(tree: &Tree, exists: impl Fn(&str) -> bool) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in documents(tree) {
        for (number, line) in prose(text) {
            for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                if target.starts_with("http://") || target.starts_with("https://") {
                    continue;
                }
                let (file, anchor) =
                    target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)));
                let to = if file.is_empty() { Some(path.to_owned()) } else { resolve(path, file) };
                let Some(to) = to.filter(|to| file.is_empty() || exists(to)) else {
                    violations.push(format!("{path}:{number}: the link to {target} leads nowhere"));
                    continue;
                };
                let heading = |anchor: &str| tree.0.get(&to).is_none_or(|text| headings(text).contains(anchor));
                if anchor.is_some_and(|anchor| to.ends_with(".md") && !heading(anchor)) {
                    violations
                        .push(format!("{path}:{number}: {to} has no heading for #{}", anchor.unwrap_or_default()));
                }
            }
        }
    }
    violations
}

/// The summary of the book names every document: a page that it does not name is not in the book.
pub(crate) fn summary(tree: &Tree) -> Vec<Violation> {
    const SUMMARY: &str = "docs/SUMMARY.md";
    let Some(summary) = tree.0.get(SUMMARY) else { return vec![format!("there is no {SUMMARY}")] };
    let targets = summary.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let pages: BTreeSet<String> = targets.filter_map(|target| resolve(SUMMARY, target)).collect();
    let missing = documents(tree).filter(|(path, _)| *path != SUMMARY && !pages.contains(*path));
    missing.map(|(path, _)| format!("{SUMMARY} does not name {path}")).collect()
}

/// Code that a document shows is code of the tree: each line of a block of Rust stands in a source or in its documentation.
pub(crate) fn code(tree: &Tree) -> Vec<Violation> {
    let sources = tree.0.iter().filter(|(path, _)| path.ends_with(".rs"));
    let lines = sources.flat_map(|(_, text)| text.lines());
    let known: BTreeSet<&str> = lines.map(|line| line.trim().trim_start_matches("/// ").trim()).collect();
    let mut violations = Vec::new();
    for (path, text) in documents(tree) {
        let mut in_rust = false;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.starts_with("```") {
                in_rust = line == "```rust";
            } else if in_rust && !known.contains(line) {
                violations.push(format!("{path}:{}: no source has this line: {line}", number + 1));
            }
        }
    }
    violations
}

/// `link`, as it stands in the document at `from`, from the workspace's root; `None` if it leads out of that.
fn resolve(from: &str, link: &str) -> Option<String> {
    let mut folder: Vec<&str> = from.split('/').collect();
    folder.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(folder.pop()?),
            part => folder.push(part),
        }
    }
    Some(folder.join("/"))
}

/// The anchors that GitHub makes of a document's headings.
fn headings(text: &str) -> BTreeSet<String> {
    let headings = prose(text).into_iter().filter(|(_, line)| line.starts_with('#'));
    let slug = |line: &str| -> String {
        let kept = line.trim_start_matches('#').trim().chars().filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || matches!(c, '-' | '_') => Some(c),
            _ => None,
        });
        kept.flat_map(char::to_lowercase).collect()
    };
    headings.map(|(_, line)| slug(line)).collect()
}

/// Sentences of documents are short, and speak of components as of components.
pub(crate) fn language(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in documents(tree) {
        for (number, paragraph) in paragraphs(text) {
            let said = words(&paragraph);
            let found = OF_PEOPLE_ALONE.iter().find(|phrase| format!(" {said} ").contains(&format!(" {phrase} ")));
            violations.extend(found.map(|word| format!("{path}:{number}: {word:?} is said of people")));
            let long = |sentence: &&str| sentence.split_whitespace().count() > WORDS_MAX;
            if let Some(long) = sentences(&paragraph).find(long) {
                violations.push(format!("{path}:{number}: a sentence of more than {WORDS_MAX} words: {}", long.trim()));
            }
        }
    }
    violations
}

/// Paragraphs and list items, joined; without tables, headings, code and where links lead.
fn paragraphs(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    for (number, line) in prose(text) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', '|']) {
            open = false;
            continue;
        }
        let begins =
            !open || line.starts_with("- ") || line.split_once(". ").is_some_and(|(n, _)| n.parse::<u8>().is_ok());
        let text = without_code(&without_targets(line)).replace('*', "");
        match found.last_mut() {
            Some((_, paragraph)) if !begins => {
                paragraph.push(' ');
                paragraph.push_str(&text);
            }
            _ => found.push((number, text)),
        }
        open = true;
    }
    found
}

/// Without what stands in `](…)`.
fn without_targets(line: &str) -> String {
    let mut parts = line.split("](");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once(')').map_or(part, |(_, rest)| rest))
}

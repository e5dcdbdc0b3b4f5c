//! The workspace's text files, and as much of Rust's syntax as the checks need.

use std::{collections::BTreeMap, fs, path::Path};

/// Files by their path from the workspace's root, with `/`.
#[derive(Default)]
pub(crate) struct Tree(pub(crate) BTreeMap<String, String>);

/// Folders that are no source of ours.
const SKIPPED: [&str; 4] = ["target", ".git", ".stack", "node_modules"];

impl Tree {
    pub(crate) fn of_this_workspace() -> Self {
        let mut tree = Self::default();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        tree.read(&root, "");
        assert!(tree.0.len() > 50, "the workspace was not found at {}", root.display());
        tree
    }

    /// A tree of a test's own.
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        Self(files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect())
    }

    fn read(&mut self, folder: &Path, prefix: &str) {
        for entry in fs::read_dir(folder).expect("the workspace can be read").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{prefix}{name}");
            if entry.path().is_dir() {
                if !SKIPPED.contains(&name.as_str()) {
                    self.read(&entry.path(), &format!("{path}/"));
                }
            } else if [".rs", ".sql", ".toml", ".md"].iter().any(|kind| name.ends_with(kind)) {
                self.0.insert(path, fs::read_to_string(entry.path()).expect("sources are UTF-8"));
            }
        }
    }

    /// The Rust sources under `src` of every crate: path and text without comments, strings and test modules.
    pub(crate) fn sources(&self) -> impl Iterator<Item = (&str, String)> {
        let sources = self.0.iter().filter(|(path, _)| path.ends_with(".rs") && path.contains("/src/"));
        sources.map(|(path, text)| (path.as_str(), without_tests(&code(text))))
    }
}

/// `text` with comments, strings and characters blanked; lines stay lines.
pub(crate) fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    let blank = |out: &mut String, from: usize, to: usize| {
        out.extend(chars[from..to.min(chars.len())].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
    };
    while at < chars.len() {
        let end = text_end(&chars, at);
        if end > at {
            blank(&mut out, at, end);
            at = end;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out
}

/// The strings that a program's text outside of its test module has, each with its line. An escaped line break joins
/// two lines.
pub(crate) fn strings(text: &str) -> Vec<(usize, String)> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    let chars: Vec<char> = text.chars().collect();
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < chars.len() {
        let end = text_end(&chars, at).clamp(at + 1, chars.len());
        let piece: String = chars[at..end].iter().collect();
        if piece.len() > 1 && piece.starts_with(['"', 'r']) {
            found.push((line, joined(&piece)));
        }
        line += piece.matches('\n').count();
        at = end;
    }
    found
}

fn joined(text: &str) -> String {
    let mut parts = text.split("\\\n");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |joined, part| joined + part.trim_start())
}

/// The end of the comment, string or character that begins at `at`; `at` itself where there is none.
fn text_end(chars: &[char], at: usize) -> usize {
    match (chars[at], chars.get(at + 1)) {
        ('/', Some('/')) => find(chars, at, |rest| rest[0] == '\n').unwrap_or(chars.len()),
        ('/', Some('*')) => find(chars, at + 2, |rest| rest.starts_with(&['*', '/'])).map_or(chars.len(), |n| n + 2),
        ('"', _) => string_end(chars, at + 1),
        ('r', Some('"' | '#')) if at == 0 || !word(chars[at - 1]) || chars[at - 1] == 'b' => raw_end(chars, at),
        ('\'', Some('\\')) => find(chars, at + 3, |rest| rest[0] == '\'').map_or(chars.len(), |n| n + 1),
        ('\'', Some(_)) if chars.get(at + 2) == Some(&'\'') => at + 3,
        _ => at,
    }
}

fn find(chars: &[char], from: usize, is: impl Fn(&[char]) -> bool) -> Option<usize> {
    (from..chars.len()).find(|at| is(&chars[*at..]))
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The end of a raw string that begins at `at`; `at` itself where there is none (a raw identifier).
fn raw_end(chars: &[char], at: usize) -> usize {
    let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(at + 1 + hashes) != Some(&'"') {
        return at;
    }
    let mut close = vec!['"'];
    close.extend(std::iter::repeat_n('#', hashes));
    find(chars, at + 2 + hashes, |rest| rest.starts_with(&close)).map_or(chars.len(), |n| n + close.len())
}

/// The code without `#[cfg(test)] mod … { … }`.
pub(crate) fn without_tests(code: &str) -> String {
    let mut rest = code;
    let mut out = String::with_capacity(code.len());
    while let Some(at) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..at]);
        let after = &rest[at..];
        let end = match (after.find('{'), after.find(';')) {
            (Some(open), semicolon) if semicolon.is_none_or(|semicolon| open < semicolon) => block_end(after, open),
            (_, Some(semicolon)) => semicolon + 1,
            (_, None) => after.len(),
        };
        rest = &after[end..];
    }
    out + rest
}

/// The end of the block that opens at `open`.
pub(crate) fn block_end(text: &str, open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, c) in text[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return open + at + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

fn word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every path that `code` names, `use` trees flattened: `crate::outbox::Tx`, `sqlx::query`, …
pub(crate) fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let (mut rest, mut before) = (code, ' ');
    while let Some(start) = rest.find(|c: char| c.is_alphabetic() || c == '_') {
        before = rest[..start].chars().last().unwrap_or(before);
        let text = &rest[start..];
        let end = text.find(|c| !word(c)).unwrap_or(text.len());
        let ident = &text[..end];
        if ident == "use" && !word(before) {
            let stop = text.find(';').unwrap_or(text.len());
            flatten("", text[end..stop].trim(), &mut found);
            rest = &text[stop..];
        } else if text[end..].starts_with("::") && before != ':' {
            let stop = text.find(|c| !word(c) && c != ':').unwrap_or(text.len());
            found.push(text[..stop].trim_end_matches(':').to_owned());
            rest = &text[stop..];
        } else {
            rest = &text[end..];
        }
        before = ' ';
    }
    found
}

fn flatten(prefix: &str, tree: &str, found: &mut Vec<String>) {
    let tree = tree.trim().trim_start_matches("::");
    match tree.find('{') {
        Some(open) if !tree[..open].contains(',') => {
            let inner = &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())];
            let prefix = format!("{prefix}{}", tree[..open].trim());
            let (mut depth, mut start) = (0_i32, 0);
            for (at, c) in inner.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        flatten(&prefix, &inner[start..at], found);
                        start = at + 1;
                    }
                    _ => {}
                }
            }
            flatten(&prefix, &inner[start..], found);
        }
        _ if tree.is_empty() => {}
        _ => {
            let name = tree.split(" as ").next().unwrap_or(tree).trim();
            found.push(format!("{prefix}{name}").trim_end_matches("::self").trim_end_matches("::*").to_owned());
        }
    }
}

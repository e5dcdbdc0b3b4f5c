//! Texts about why something failed. Pure.
//!
//! A handler, an effect, a panic or another service wrote them, so they may hold anything and be of any length. This
//! module cleans them where they enter. PostgreSQL's text and jsonb cannot hold a NUL, and one such text would fail its
//! whole transaction, again and again.

/// Longest reason that is kept, in characters.
const REASON_MAX: usize = 1_000;

/// `text` without control characters (line breaks and tabs stay), without places in source code, and cut to 1,000
/// characters.
pub(crate) fn reason(text: &str) -> String {
    let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    let text: String = text.chars().take(REASON_MAX).map(shown).collect();
    without_places(&text)
}

/// The texts of an error and its causes, from the outermost. A cause that an error repeats at its end is left out:
/// errors that only wrap another have its text.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The words that a place in a text begins with.
const AT: &str = " at line ";

/// Whether `text` may name a place, which [`without_places`] removes.
pub(crate) fn may_name_a_place(text: &str) -> bool {
    text.contains(AT)
}

/// Removes ` at line 1721`, which sqlx adds (the line of PostgreSQL's own source that raised the error). Removes ` at
/// line 1 column 7`, which serde_json adds (of a text that the reader does not have).
pub(crate) fn without_places(text: &str) -> String {
    let number = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (mut kept, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find(AT) {
        let line = &rest[at + AT.len()..];
        let digits = number(line);
        if digits == 0 {
            kept.push_str(&rest[..at + AT.len()]);
            rest = line;
            continue;
        }
        kept.push_str(&rest[..at]);
        rest = &line[digits..];
        if let Some(column) = rest.strip_prefix(" column ") {
            rest = &column[number(column)..];
        }
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_only_wraps_another_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Wraps(#[source] std::io::Error);
        let wraps = || anyhow::Error::from(Wraps(std::io::Error::other("the disk is full")));
        assert_eq!(chain(&wraps()), "the disk is full");
        assert_eq!(chain(&wraps().context("no stock")), "no stock: the disk is full");
    }

    #[test]
    fn a_reason_names_no_line_of_somebodys_source() {
        for (text, kept) in [
            (r#"relation "orders" does not exist at line 1721"#, r#"relation "orders" does not exist"#),
            (
                "could not read the stock: no at line 7: again at line 1 column 23",
                "could not read the stock: no: again",
            ),
            ("they meet at line end", "they meet at line end"),
        ] {
            assert_eq!(reason(text), kept);
        }
    }

    #[test]
    fn a_reason_has_no_nul_and_an_end() {
        assert_eq!(reason("no\0 such\u{1b}[31m thing\n\tat all"), "no\u{fffd} such\u{fffd}[31m thing\n\tat all");
        assert_eq!(reason(&"ä".repeat(5_000)), "ä".repeat(REASON_MAX));
    }
}

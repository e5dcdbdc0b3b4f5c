//! Texts that say why something failed. Pure.
//!
//! A handler, an effect, a panic or another service wrote them, so they may hold anything and be of any length. They are
//! cleaned where they enter: PostgreSQL's text and jsonb cannot hold a NUL, and one such text would fail its whole
//! transaction, again and again.

/// Longest reason that is kept, in characters.
const REASON_MAX: usize = 1_000;

/// `text` without control characters (line breaks and tabs stay), and with an end.
pub(crate) fn reason(text: &str) -> String {
    let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    text.chars().take(REASON_MAX).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_no_nul_and_an_end() {
        assert_eq!(reason("no\0 such\u{1b}[31m thing\n\tat all"), "no\u{fffd} such\u{fffd}[31m thing\n\tat all");
        assert_eq!(reason(&"ä".repeat(5_000)), "ä".repeat(REASON_MAX));
    }
}

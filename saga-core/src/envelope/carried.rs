//! The trace context of another program, as far as it is carried on: in the headers of a request, or of a record. Pure.
//!
//! It goes on into each message that the request or the record causes, and into what those cause, so it has an end.

use super::header;

/// The length of a `traceparent` of the version that is written today; of a later one so much is read.
const PARENT_LENGTH: usize = 55;
/// The longest `tracestate` that is carried on, in bytes, and its members: what W3C asks to keep, and no more.
const STATE_MAX: usize = 512;
const MEMBERS_MAX: usize = 32;

/// The part of a header of trace context that is carried on: nothing of one that is not valid, or longer than it may
/// be. Without its `tracestate` a trace goes on. No other such header is carried on: `baggage` is not.
#[must_use]
pub fn carried<'a>(name: &str, value: &'a str) -> Option<&'a str> {
    match name {
        header::TRACEPARENT => parent(value),
        header::TRACESTATE => {
            let printable = value.bytes().all(|byte| matches!(byte, b' '..=b'~'));
            let short = (1..=STATE_MAX).contains(&value.len()) && value.split(',').count() <= MEMBERS_MAX;
            (short && printable).then_some(value)
        }
        _ => None,
    }
}

/// `00-<trace id>-<span id>-<flags>`. A later version may have more behind it, which is left out.
fn parent(value: &str) -> Option<&str> {
    let (known, rest) = (value.get(..PARENT_LENGTH)?, value.get(PARENT_LENGTH..)?);
    let mut fields = known.split('-');
    let mut hex = |length: usize| {
        let field = fields.next().filter(|field| field.len() == length)?;
        field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then_some(field)
    };
    let (version, trace, span, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let ends = rest.is_empty() || version != "00" && rest.starts_with('-');
    let names = version != "ff" && [trace, span].iter().all(|id| id.bytes().any(|digit| digit != b'0'));
    (ends && names).then_some(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn of_a_traceparent_only_a_valid_one_is_carried_on() {
        assert_eq!(carried("traceparent", TRACE), Some(TRACE));
        let later = TRACE.replace("00-4", "01-4");
        assert_eq!(carried("traceparent", &format!("{later}-more")), Some(&*later));
        for wrong in [
            "".to_owned(),
            "00-garbage".to_owned(),
            format!("{TRACE}-more"),
            format!("{later}more"),
            format!("{TRACE}{}", "0".repeat(320_000)),
            TRACE.to_uppercase(),
            TRACE.replace("00-4", "ff-4"),
            TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            TRACE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            TRACE.replace("00f067aa0ba902b7", "00f067aa0ba902ä"),
        ] {
            assert_eq!(carried("traceparent", &wrong), None, "{wrong:.80}");
        }
    }

    #[test]
    fn a_tracestate_is_carried_on_up_to_512_bytes_and_32_members() {
        let members = |n: usize| (0..n).map(|n| format!("k{n}=v")).collect::<Vec<_>>().join(",");
        for good in ["a=b".to_owned(), members(32), format!("a={}", "x".repeat(510))] {
            assert_eq!(carried("tracestate", &good), Some(&*good));
        }
        for bad in ["".to_owned(), members(33), format!("a={}", "x".repeat(511)), "a=\nb".to_owned(), "a=ä".to_owned()]
        {
            assert_eq!(carried("tracestate", &bad), None, "{bad:.80}");
        }
        assert_eq!(carried("baggage", "user=ada"), None);
    }
}

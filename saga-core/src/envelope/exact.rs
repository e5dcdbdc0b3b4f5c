//! Headers that do not fit into an object of texts. Their bytes are no text, or they have no value or an empty name, or
//! there are several of a name.
//!
//! A [`Headers`] map, and the `headers` column of the outbox, have one text for each name. A header that does not fit
//! goes under the one name that no other header can have there, [`EXACT`], as a JSON text. The text holds pairs of name
//! and value in their order, where a value is a text, `null`, or `{"base64": "…"}`. So a reader that knows such a map
//! only as it was still reads it.

use super::Headers;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, collections::BTreeMap};

/// The name under which the headers stand that do not fit into the map itself.
pub const EXACT: &str = "";

/// A header as a record has it: a name and any bytes, or none.
pub type Exact<'a> = (Cow<'a, str>, Option<Cow<'a, [u8]>>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Said<'a> {
    Text(Cow<'a, str>),
    Binary { base64: String },
}

/// Stores the headers of a record, so that [`to_record`] gives each of them back as it was.
pub fn from_record<'a>(headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>) -> Headers {
    beside(headers, &[])
}

/// Stores the headers of a record to which headers of the names `ours` will be added: its own of these names are kept
/// apart.
pub fn beside<'a>(headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>, ours: &[&str]) -> Headers {
    let headers: Vec<_> = headers.into_iter().collect();
    // Of a name that comes twice the last counts, for readers of the map alone.
    let last: BTreeMap<&str, usize> = headers.iter().enumerate().map(|(at, (name, _))| (*name, at)).collect();
    let (mut plain, mut exact) = (Headers::new(), Vec::new());
    for (at, (name, value)) in headers.into_iter().enumerate() {
        let text = value.and_then(|value| std::str::from_utf8(value).ok());
        let fits = text.filter(|text| !text.contains('\0') && last[name] == at);
        match fits.filter(|_| !name.is_empty() && !name.contains('\0') && !ours.contains(&name)) {
            Some(text) => drop(plain.insert(name.to_owned().into(), text.to_owned())),
            None => exact.push((name, value)),
        }
    }
    let said = |value: &'a [u8]| match std::str::from_utf8(value) {
        Ok(text) => Said::Text(text.into()),
        Err(_) => Said::Binary { base64: BASE64.encode(value) },
    };
    let pairs: Vec<_> = exact.into_iter().map(|(name, value)| (name, value.map(said))).collect();
    if let (false, Ok(text)) = (pairs.is_empty(), serde_json::to_string(&pairs)) {
        plain.insert(EXACT.into(), text);
    }
    plain
}

/// Reads the text that stands under [`EXACT`]; `None` when it was not written here.
pub fn read(text: &str) -> Option<Vec<Exact<'static>>> {
    let pairs: Vec<(String, Option<Said<'_>>)> = serde_json::from_str(text).ok()?;
    pairs.into_iter().map(|(name, said)| Some((Cow::Owned(name), said.map_or(Some(None), Said::bytes)?))).collect()
}

impl Said<'_> {
    /// The value's bytes, `None` if it has none; the outer `None` when its base64 cannot be read.
    fn bytes(self) -> Option<Option<Cow<'static, [u8]>>> {
        let bytes = match self {
            Said::Text(text) => text.into_owned().into_bytes(),
            Said::Binary { base64 } => BASE64.decode(base64).ok()?,
        };
        Some(Some(Cow::Owned(bytes)))
    }
}

/// All headers of a map, each as a record has it. Those that do not fit into the map come first, in their order.
pub fn to_record(headers: &Headers) -> Vec<Exact<'_>> {
    let exact = headers.get(EXACT).and_then(|text| read(text));
    let rest = headers.iter().filter(|(name, _)| exact.is_none() || *name != EXACT);
    let rest: Vec<Exact<'_>> =
        rest.map(|(name, value)| (Cow::Borrowed(&**name), Some(Cow::Borrowed(value.as_bytes())))).collect();
    exact.into_iter().flatten().chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Owned = Vec<(String, Option<Vec<u8>>)>;

    fn owned(headers: &Headers) -> Owned {
        to_record(headers).into_iter().map(|(name, value)| (name.into_owned(), value.map(Cow::into_owned))).collect()
    }

    proptest! {
        #[test]
        fn every_header_of_a_record_comes_back_as_it_was(
            record in proptest::collection::vec(("[ab\u{0}é]{0,2}", proptest::option::of(any::<Vec<u8>>())), 0..8),
        ) {
            let headers = from_record(record.iter().map(|(name, value)| (name.as_str(), value.as_deref())));
            let of = |all: &Owned, name: &String| -> Vec<_> {
                all.iter().filter(|(of, _)| of == name).map(|(_, value)| value.clone()).collect()
            };
            let back = owned(&headers);
            prop_assert_eq!(back.len(), record.len());
            for (name, _) in &record {
                prop_assert_eq!(of(&back, name), of(&record, name), "the headers of one name, in their order");
            }
            // PostgreSQL takes the map: no NUL anywhere but under the name that hides it.
            prop_assert!(!serde_json::to_string(&headers).unwrap().replace(r"\\u0000", "").contains(r"\u0000"));
        }
    }

    #[test]
    fn what_fits_stays_an_object_of_texts_and_only_what_does_not_is_apart() {
        let record: [(&str, Option<&[u8]>); 6] = [
            ("ce_id", Some(b"1")),
            ("bin", Some(&[0xff, 0])),
            ("twice", Some(b"a")),
            ("none", None),
            ("twice", Some(b"b")),
            ("", Some(b"x")),
        ];
        let headers = from_record(record);
        let expected = r#"[["bin",{"base64":"/wA="}],["twice","a"],["none",null],["","x"]]"#;
        assert_eq!(
            headers.iter().map(|(name, value)| (&**name, value.as_str())).collect::<Vec<_>>(),
            [("", expected), ("ce_id", "1"), ("twice", "b")]
        );
        assert_eq!(from_record([("a", Some(&b"1"[..]))]).len(), 1, "an ordinary record has nothing apart");
    }

    #[test]
    fn a_text_under_the_name_that_others_wrote_is_a_header_like_any() {
        let headers = Headers::from([("".into(), "not ours".into()), ("a".into(), "1".into())]);
        assert_eq!(owned(&headers), [("".into(), Some(b"not ours".to_vec())), ("a".into(), Some(b"1".to_vec()))]);
        for other in ["7", r#"[["a"]]"#, r#"[["a",{"base64":"?"}]]"#, r#"[["a",[1]]]"#] {
            assert!(read(other).is_none(), "{other}");
        }
    }
}

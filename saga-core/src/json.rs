//! Limits of JSON from outside, so that everything that is taken can also be stored and read again. Pure.
//!
//! `serde_json` reads 127 levels of arrays and objects. This crate wraps what it stores in a few levels of its own (a
//! saga's state, an inspection's answer). A reply of 126 levels was stored, and then no build could read its saga. So
//! each input, reply, command and stored answer is held to `DEPTH_MAX` where it comes in.
//!
//! ```
//! #[derive(Debug, PartialEq, serde::Deserialize)]
//! struct Line { sku: String, quantity: u32 }
//!
//! let line = saga_core::json::read::<Line>(br#"{"sku": "WIDGET-1", "quantity": 2}"#);
//! assert_eq!(line, Ok(Line { sku: "WIDGET-1".into(), quantity: 2 }));
//! assert!(saga_core::json::read::<Line>(br#"["WIDGET-1", 2]"#).is_err(), "fields by their places are refused");
//! ```

mod named;

pub(crate) use named::Named;

use crate::reason::reason;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The most levels of arrays and objects. The rest of the 127 is for the levels in which they are stored and shown.
pub(crate) const DEPTH_MAX: usize = 100;

/// Reads one JSON value that came from outside: structs from objects alone, and no deeper than can be stored.
///
/// # Errors
/// The flaw, in words, which quote no more of `text` than a short piece.
pub fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    if let Some(flaw) = flaw_of_text(text) {
        return Err(flaw);
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = T::deserialize(Named(&mut json)).and_then(|value| json.end().map(|()| value));
    value.map_err(|error| reason(&error.to_string()))
}

/// The flaw for which `text`, which is JSON, cannot be stored; `None`: it can.
pub(crate) fn flaw_of_text(text: &[u8]) -> Option<String> {
    let (mut depth, mut deepest, mut in_text, mut escaped) = (0_usize, 0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    (deepest > DEPTH_MAX).then(too_deep)
}

/// The flaw for which `value` cannot be stored as `jsonb`, which has no place for a NUL; `None`: it can.
pub(crate) fn flaw(value: &Value) -> Option<String> {
    flaw_below(value, DEPTH_MAX)
}

fn flaw_below(value: &Value, levels: usize) -> Option<String> {
    let nul = |text: &str| text.contains('\0').then(|| "it contains NUL".to_owned());
    match value {
        Value::String(text) => nul(text),
        Value::Array(_) | Value::Object(_) if levels == 0 => Some(too_deep()),
        Value::Array(values) => values.iter().find_map(|value| flaw_below(value, levels - 1)),
        Value::Object(fields) => {
            fields.iter().find_map(|(name, value)| nul(name).or_else(|| flaw_below(value, levels - 1)))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn too_deep() -> String {
    format!("it nests deeper than {DEPTH_MAX} levels")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nested(levels: usize) -> String {
        format!("{}1{}", "[".repeat(levels), "]".repeat(levels))
    }

    #[test]
    fn the_depth_of_a_text_and_of_its_value_is_the_same() {
        for levels in [0, 1, DEPTH_MAX - 1, DEPTH_MAX, DEPTH_MAX + 1, 126] {
            let text = nested(levels);
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(flaw_of_text(text.as_bytes()).is_some(), levels > DEPTH_MAX, "{levels}");
            assert_eq!(flaw(&value).is_some(), levels > DEPTH_MAX, "{levels}");
        }
        assert!(flaw_of_text(nested(100_000).as_bytes()).is_some());
    }

    #[test]
    fn brackets_within_a_text_are_no_levels() {
        let value = json!({ "a": "[".repeat(200), "\"{": format!("\\\"{}", "{".repeat(200)) });
        assert_eq!(flaw_of_text(value.to_string().as_bytes()), None);
    }

    #[test]
    fn a_nul_is_found_in_a_name_and_at_any_level() {
        for value in [json!("a\0"), json!({ "a\0": 1 }), json!([[{ "b": ["\0"] }]])] {
            assert!(flaw(&value).unwrap().contains("NUL"), "{value}");
        }
        assert_eq!(flaw(&json!({ "a": ["b", 1, null, true] })), None);
    }
}

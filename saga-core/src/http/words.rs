//! The parsing libraries' messages about a wrong value, in words for people. Pure.
//!
//! The libraries name types of Rust (`expected i64`) and of this program (`expected struct PlaceOrderRequest`), which
//! mean nothing outside it. Messages of our own types (`is not a sku`) are passed on.

/// Turns a parser's `message` into one for a person.
pub(super) fn for_people(message: &str) -> String {
    let message = message.trim();
    if let Some(rest) = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: ")) {
        let (found, expected) = rest.rsplit_once(", expected ").unwrap_or((rest, ""));
        return of_a_value(found, expected);
    }
    if message.starts_with("missing field") {
        return "is required".into();
    }
    if message.starts_with("duplicate field") {
        return "is there twice".into();
    }
    if let Some((_, known)) = message.strip_prefix("unknown field").and_then(|rest| rest.split_once(", expected ")) {
        return format!("is not known; known are {}", known.trim_start_matches("one of ").replace('`', ""));
    }
    if message.starts_with("unknown field") {
        return "is not known".into();
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let known = rest.split_once(", expected ").map_or("", |(_, known)| known);
        return format!("is none of {}", known.trim_start_matches("one of ").replace('`', "").replace(" or ", ", "));
    }
    if message.starts_with("invalid length") {
        return "has another number of entries than it has to".into();
    }
    if let Some(kind) = integer_error(message) {
        return kind.into();
    }
    if message.starts_with("UUID parsing failed")
        || message.starts_with("invalid character: expected an optional prefix")
    {
        return "is not a UUID".into();
    }
    message.to_owned()
}

fn of_a_value(found: &str, expected: &str) -> String {
    let range = integers(expected);
    // A number stands where a number belongs: it is too large, too small, or has a fraction.
    if let (Some((low, high)), true) = (range, found.starts_with("integer") || found.starts_with("floating point")) {
        return format!("is a whole number from {low} to {high}");
    }
    match (expected, range) {
        (_, Some(_)) => "has to be a whole number".into(),
        ("f32" | "f64", _) => "has to be a number".into(),
        ("a boolean", _) => "has to be true or false".into(),
        ("a string" | "a borrowed string" | "string or map", _) => "has to be a text".into(),
        ("a sequence", _) => "has to be a list".into(),
        ("unit" | "null", _) => "has to be null".into(),
        (expected, _) if expected.starts_with("struct ") || expected == "a map" || expected.starts_with("map") => {
            "has to be an object".into()
        }
        (expected, _) if expected.starts_with("a formatted UUID") || expected.contains("UUID") => {
            "is not a UUID".into()
        }
        (expected, _) if expected.starts_with("tuple") || expected.starts_with("variant") => {
            "is not of the right shape".into()
        }
        ("", _) => "is not valid".into(),
        (expected, _) => format!("has to be {expected}"),
    }
}

/// The smallest and the largest number of one of Rust's integer types; `None` for another type.
fn integers(expected: &str) -> Option<(i128, i128)> {
    Some(match expected {
        "i8" => (i8::MIN.into(), i8::MAX.into()),
        "i16" => (i16::MIN.into(), i16::MAX.into()),
        "i32" => (i32::MIN.into(), i32::MAX.into()),
        "i64" => (i64::MIN.into(), i64::MAX.into()),
        "u8" => (0, u8::MAX.into()),
        "u16" => (0, u16::MAX.into()),
        "u32" => (0, u32::MAX.into()),
        "u64" | "usize" => (0, u64::MAX.into()),
        "a nonzero u32" => (1, u32::MAX.into()),
        "a nonzero u64" => (1, u64::MAX.into()),
        _ => return None,
    })
}

/// The words for what `str::parse` returns for a bad number.
fn integer_error(message: &str) -> Option<&'static str> {
    match message {
        "invalid digit found in string" | "cannot parse integer from empty string" => Some("has to be a whole number"),
        "number too large to fit in target type" => Some("is too large"),
        "number too small to fit in target type" => Some("is too small"),
        "provided string was not `true` or `false`" => Some("has to be true or false"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_parser_says_is_said_without_the_names_of_its_types() {
        for (said, words) in [
            (r#"invalid type: string "x", expected i64"#, "has to be a whole number"),
            ("invalid value: integer `300`, expected u8", "is a whole number from 0 to 255"),
            ("invalid value: integer `-1`, expected u8", "is a whole number from 0 to 255"),
            ("invalid type: floating point `1.5`, expected u8", "is a whole number from 0 to 255"),
            ("invalid type: null, expected a string", "has to be a text"),
            (r#"invalid type: string ", expected x", expected a sequence"#, "has to be a list"),
            ("invalid type: sequence, expected struct PlaceOrderRequest", "has to be an object"),
            ("missing field `customer_id`", "is required"),
            ("duplicate field `items`", "is there twice"),
            ("unknown field `qty`, expected one of `sku`, `quantity`", "is not known; known are sku, quantity"),
            ("unknown field `x`, there are no fields", "is not known"),
            ("unknown variant `x`, expected `a` or `b`", "is none of a, b"),
            ("invalid digit found in string", "has to be a whole number"),
            ("is not a sku", "is not a sku"),
        ] {
            assert_eq!(for_people(said), words, "{said}");
        }
    }
}

//! Checks of a provider's answer. Pure.
//!
//! The provider is another company's system. So each field that is used is checked here, where it comes in. What is
//! kept, logged, sent or put into a path later is then short and clean. An answer that cannot be believed is doubt,
//! never a refusal. An answer that says no is a refusal, however strange its words. Whether the amount is the one that
//! was asked for is judged where that is known ([`crate::effects`]).

use super::{Doubt, GatewayAnswer, Request};
use contracts::money::{Currency, Money};
use http::{HeaderMap, StatusCode, header};
use saga_core::json;
use serde::Deserialize;

/// The longest answer that is read, in bytes. The provider's have some hundred; a refusal is still one with an endless
/// code.
pub(super) const BODY_MAX: usize = 4 * 1024 * 1024;

/// The longest reference, in bytes: it stands in a path, and an index entry has an end.
const REFERENCE_MAX: usize = 128;

/// The longest code of a refusal that is kept, in characters.
const CODE_MAX: usize = 100;

#[derive(Deserialize)]
struct DoneBody {
    reference: Option<String>,
    amount: Option<Money>,
}

#[derive(Deserialize)]
struct RefusedBody {
    refused: RefusedCode,
}

#[derive(Deserialize)]
struct RefusedCode {
    code: String,
}

/// The meaning of an answer to `request`. Only an answer that says so in the provider's own words is a refusal: a 404
/// or 403 may be a proxy's. A 401 says nothing of the payment: the provider lets in no request of ours. A 403 may be
/// about this payment alone.
pub(super) fn read(
    request: &Request,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<GatewayAnswer, Doubt> {
    match status {
        StatusCode::OK | StatusCode::CREATED => {
            is_json(headers).and_then(|()| done(request, body)).map_err(Doubt::Unreadable)
        }
        StatusCode::PAYMENT_REQUIRED | StatusCode::CONFLICT => {
            let refused = is_json(headers).and_then(|()| json::read::<RefusedBody>(body));
            match refused {
                Ok(RefusedBody { refused }) => Ok(GatewayAnswer::Refused { code: code(&refused.code) }),
                Err(_) => Err(Doubt::Status { status: status.as_u16() }),
            }
        }
        StatusCode::UNAUTHORIZED => Err(Doubt::NotLetIn),
        other => Err(Doubt::Status { status: other.as_u16() }),
    }
}

fn is_json(headers: &HeaderMap) -> Result<(), String> {
    let said = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let essence = said.as_deref().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(format!("its content type is not JSON's but {:?}", essence.chars().take(CODE_MAX).collect::<String>()))
}

/// Reads what was done. Only a void may have found nothing: then it names no amount, and no reference either where
/// there was nothing at all.
fn done(request: &Request, body: &[u8]) -> Result<GatewayAnswer, String> {
    let DoneBody { reference, amount } = json::read(body)?;
    let may_be_nothing = matches!(request, Request::Void { .. });
    match (&reference, amount) {
        (Some(text), _) => check_reference(text)?,
        (None, None) if may_be_nothing => {}
        (None, _) => return Err("it has no reference".into()),
    }
    match amount {
        Some(Money { amount: ..=0, .. }) => return Err("its amount is not positive".into()),
        Some(Money { currency, .. }) if !is_currency(request, currency) => {
            return Err(format!("its currency {currency} is none"));
        }
        None if !may_be_nothing => return Err("it has no amount".into()),
        Some(_) | None => {}
    }
    Ok(GatewayAnswer::Done { reference, amount })
}

/// Whether money can be of this currency: it is an active code, or the one that was asked for.
fn is_currency(request: &Request, currency: Currency) -> bool {
    let asked = match request {
        Request::Authorize { amount, .. } | Request::Capture { amount, .. } | Request::Refund { amount, .. } => {
            Some(amount.currency)
        }
        Request::Void { .. } => None,
    };
    asked == Some(currency) || currency.as_str().parse::<Currency>().is_ok()
}

/// Checks that a reference is short, and fits into a path.
pub(super) fn check_reference(text: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':' | b'~' | b'+' | b'=');
    let sane = (1..=REFERENCE_MAX).contains(&text.len()) && text.bytes().all(allowed);
    // As segments of a path these two are no names.
    if sane && !matches!(text, "." | "..") {
        return Ok(());
    }
    Err(format!(
        "its reference is not 1 to {REFERENCE_MAX} letters, digits, '-', '_', '.', ':', '~', '+' and '=': {:?}",
        text.chars().take(CODE_MAX).collect::<String>()
    ))
}

/// A refusal's code for people: without control characters, and with an end.
fn code(text: &str) -> String {
    let clean: String = text.chars().take(CODE_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if clean.trim().is_empty() { "unspecified".into() } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use saga_core::id::CommandId;
    use serde_json::json;
    use uuid::Uuid;

    fn euros(amount: i64) -> Money {
        Money { amount, currency: "EUR".parse().unwrap() }
    }

    fn capture() -> Request {
        Request::Capture { authorization: "a".into(), amount: euros(100) }
    }

    fn void() -> Request {
        Request::Void { authorization_key: CommandId(Uuid::nil()) }
    }

    fn of_type(kind: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))])
    }

    fn interpret(request: &Request, status: u16, body: &[u8]) -> Result<GatewayAnswer, Doubt> {
        read(request, StatusCode::from_u16(status).unwrap(), &of_type("application/json; charset=utf-8"), body)
    }

    fn unreadable(request: &Request, body: &[u8]) -> bool {
        matches!(interpret(request, 200, body), Err(Doubt::Unreadable(_)))
    }

    #[test]
    fn only_the_providers_own_refusal_is_certain() {
        let refused = br#"{"refused":{"code":"insufficient_funds","message":"-"}}"#;
        for status in [402, 409] {
            let answer = interpret(&capture(), status, refused).unwrap();
            assert_eq!(answer, GatewayAnswer::Refused { code: "insufficient_funds".into() });
            for other in [&b"<html>proxy</html>"[..], br#"[["insufficient_funds"]]"#, br#"{"refused":["x"]}"#] {
                assert!(matches!(interpret(&capture(), status, other), Err(Doubt::Status { .. })));
            }
            let status = StatusCode::from_u16(status).unwrap();
            assert!(read(&capture(), status, &of_type("text/html"), refused).is_err(), "a proxy's page");
        }
        assert!(matches!(interpret(&capture(), 401, refused), Err(Doubt::NotLetIn)));
        for status in [400, 403, 404, 408, 422, 425, 429, 500, 502, 503, 504, 302] {
            assert!(matches!(interpret(&capture(), status, refused), Err(Doubt::Status { .. })), "{status}");
        }
    }

    #[test]
    fn a_refusals_code_is_cleaned_and_cut_and_stays_a_refusal() {
        let of = |code: &str| interpret(&capture(), 409, json!({ "refused": { "code": code } }).to_string().as_bytes());
        let refused = |code: &str| GatewayAnswer::Refused { code: code.into() };
        assert_eq!(of("a\0b\u{1b}[31m\nc").unwrap(), refused("a\u{fffd}b\u{fffd}[31m\u{fffd}c"));
        assert_eq!(of(&"ä".repeat(2_000_000)).unwrap(), refused(&"ä".repeat(CODE_MAX)));
        assert_eq!(of(" ").unwrap(), refused("unspecified"));
    }

    #[test]
    fn a_reference_is_short_and_fits_into_a_path() {
        let of = |reference: &str| json!({ "reference": reference, "amount": euros(100) }).to_string();
        for good in ["auth_0198", "pi_3MtwBwLkdIwHu7ix28a3tqPa", "8816178914065", "a.b:c~d+e=", &"x".repeat(128)] {
            assert!(interpret(&capture(), 200, of(good).as_bytes()).is_ok(), "{good}");
            assert!(interpret(&void(), 200, of(good).as_bytes()).is_ok(), "{good}");
        }
        for bad in ["", " ", ".", "..", "a/b", "../voids", "a b", "a\0b", "a?b", "a%2Fb", "ä", &"x".repeat(129)] {
            assert!(unreadable(&capture(), of(bad).as_bytes()), "{bad:?}");
            assert!(unreadable(&void(), of(bad).as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn what_is_done_says_what_and_how_much() {
        let (money, nothing) = (json!({ "amount": 100, "currency": "EUR" }), json!(null));
        for (reference, amount) in
            [(&json!("r"), &nothing), (&nothing, &money), (&nothing, &nothing), (&json!("r"), &json!(100))]
        {
            let body = json!({ "reference": reference, "amount": amount }).to_string();
            assert!(unreadable(&capture(), body.as_bytes()), "{body}");
        }
        for amount in [json!({ "amount": 0, "currency": "EUR" }), json!({ "amount": -1, "currency": "EUR" })] {
            let body = json!({ "reference": "r", "amount": amount }).to_string();
            assert!(unreadable(&capture(), body.as_bytes()) && unreadable(&void(), body.as_bytes()), "{body}");
        }
        let of_void = |reference: serde_json::Value, amount: &serde_json::Value| {
            interpret(&void(), 200, json!({ "reference": reference, "amount": amount }).to_string().as_bytes())
        };
        assert_eq!(of_void(json!(null), &nothing).unwrap(), GatewayAnswer::Done { reference: None, amount: None });
        assert!(of_void(json!("r"), &nothing).is_ok(), "it was let go before");
        assert!(of_void(json!(null), &money).is_err(), "an amount of no authorization");
    }

    #[test]
    fn what_is_no_json_too_deep_or_positional_cannot_be_read() {
        let deep = format!(
            r#"{{"reference":"r","amount":{{"amount":1,"currency":"EUR"}},"x":{}1{}}}"#,
            "[".repeat(101),
            "]".repeat(101)
        );
        for body in [
            "",
            "{",
            "null",
            r#"["r",{"amount":1,"currency":"EUR"}]"#,
            r#"{"reference":"r","amount":[1,"EUR"]}"#,
            &deep,
        ] {
            assert!(unreadable(&capture(), body.as_bytes()), "{body}");
        }
        let good = br#"{"reference":"r","amount":{"amount":1,"currency":"EUR","digits":2},"more":[1]}"#;
        assert!(interpret(&capture(), 200, good).is_ok(), "fields of a later version are ignored");
        for kind in ["text/html", "application/xml", ""] {
            assert!(read(&capture(), StatusCode::OK, &of_type(kind), good).is_err(), "{kind}");
        }
        assert!(read(&capture(), StatusCode::OK, &HeaderMap::new(), good).is_err());
    }
}

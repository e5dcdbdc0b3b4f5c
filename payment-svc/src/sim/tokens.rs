//! Test tokens: what the simulated provider does with the money of each means of payment.

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Authorize,
    Capture,
    Void,
    Refund,
}

/// How a request is answered other than well and at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quirk {
    /// Refused, with this code.
    Refuse(&'static str),
    /// Answered late.
    Slow,
    /// Performed; the first time, the connection is dropped instead of an answer.
    LoseFirstAnswer,
    /// The first time 503, before anything is done.
    ErrorOnce,
    /// Always 503, before anything is done.
    ErrorAlways,
}

struct Token {
    name: &'static str,
    /// `None`: all operations.
    operation: Option<Operation>,
    quirk: Option<Quirk>,
    meaning: &'static str,
}

const fn token(name: &'static str, operation: Option<Operation>, quirk: Option<Quirk>, meaning: &'static str) -> Token {
    Token { name, operation, quirk, meaning }
}

use Operation::{Authorize, Capture, Refund, Void};
use Quirk::{ErrorAlways, ErrorOnce, LoseFirstAnswer, Refuse, Slow};

const TOKENS: &[Token] = &[
    token("tok_visa", None, None, "everything works"),
    token("tok_declined", Some(Authorize), Some(Refuse("declined")), "authorization refused: declined"),
    token(
        "tok_insufficient_funds",
        Some(Authorize),
        Some(Refuse("insufficient_funds")),
        "authorization refused: insufficient_funds",
    ),
    token("tok_expired_card", Some(Authorize), Some(Refuse("expired_card")), "authorization refused: expired_card"),
    token("tok_slow", None, Some(Slow), "every answer comes after --gateway-sim-slow-ms"),
    token("tok_lost_answer", Some(Authorize), Some(LoseFirstAnswer), "authorizes, drops the connection the first time"),
    token("tok_error_once", Some(Authorize), Some(ErrorOnce), "authorization answers 503 the first time"),
    token("tok_error", Some(Authorize), Some(ErrorAlways), "authorization always answers 503"),
    token(
        "tok_capture_refused",
        Some(Capture),
        Some(Refuse("authorization_expired")),
        "authorizes; capture refused: authorization_expired",
    ),
    token(
        "tok_capture_lost_answer",
        Some(Capture),
        Some(LoseFirstAnswer),
        "captures, drops the connection the first time",
    ),
    token("tok_capture_error_once", Some(Capture), Some(ErrorOnce), "capture answers 503 the first time"),
    token("tok_capture_error", Some(Capture), Some(ErrorAlways), "capture always answers 503"),
    token("tok_void_lost_answer", Some(Void), Some(LoseFirstAnswer), "voids, drops the connection the first time"),
    token("tok_void_error_once", Some(Void), Some(ErrorOnce), "void answers 503 the first time"),
    token("tok_void_error", Some(Void), Some(ErrorAlways), "void always answers 503"),
    token("tok_refund_refused", Some(Refund), Some(Refuse("refund_window_closed")), "refund refused"),
    token(
        "tok_refund_lost_answer",
        Some(Refund),
        Some(LoseFirstAnswer),
        "refunds, drops the connection the first time",
    ),
];

/// What `method` does to `operation`; a token that nobody knows is refused.
pub(super) fn quirk(method: &str, operation: Operation) -> Option<Quirk> {
    match TOKENS.iter().find(|token| token.name == method) {
        Some(token) if token.operation.is_none_or(|only| only == operation) => token.quirk,
        Some(_) => None,
        None => Some(Refuse("invalid_payment_method")),
    }
}

/// For `--help`.
pub(super) fn help() -> String {
    let lines = TOKENS.iter().map(|token| format!("  {:<26}{}\n", token.name, token.meaning));
    format!(
        "Payment methods (tokens) and what they do:\n{}  {:<26}authorization refused: invalid_payment_method\n",
        lines.collect::<String>(),
        "anything else"
    )
}

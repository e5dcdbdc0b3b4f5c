//! Test tokens: what the simulated provider does with the money of each means of payment.

/// The operations of the simulated provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Authorize,
    Capture,
    Void,
    Refund,
}

/// The ways in which a request is answered other than well and at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quirk {
    /// The request is refused, with this code.
    Refuse(&'static str),
    /// The request is answered late.
    Slow,
    /// The request is performed; the first time, the connection is dropped instead of an answer.
    LoseFirstAnswer,
    /// The request is answered 503 the first time, before anything is done.
    ErrorOnce,
    /// The request is always answered 503, before anything is done.
    ErrorAlways,
    /// The request is performed, and the answer is one that a provider must not give.
    Answers(Strange),
}

/// An answer that a provider must not give. `tok_<operation>_answers_<name>` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strange {
    /// The provider moves one minor unit less, and answers so.
    OtherAmount,
    /// The answer has another currency; an authorization is in it.
    OtherCurrency,
    NoAmount,
    EmptyReference,
    PathReference,
    LongReference,
    Html,
    Positional,
    Deep,
    /// The answer has 500 MB.
    Huge,
    /// The answer comes a byte now and then, without an end.
    Trickle,
    /// The answer is 500 for this payment, and the provider is well.
    Broken,
    /// The answer is a refusal before anything is done, whose code holds NUL and control characters.
    DirtyCode,
    /// The answer is a refusal before anything is done, whose code has 2 MB.
    LongCode,
}

impl Strange {
    const ALL: [(&'static str, Self, &'static str); 14] = [
        ("other_amount", Self::OtherAmount, "moves one minor unit less, and says so"),
        ("other_currency", Self::OtherCurrency, "names another currency; an authorization is in it"),
        ("no_amount", Self::NoAmount, "performs, and names no amount"),
        ("empty_reference", Self::EmptyReference, "performs; the reference is empty"),
        ("path_reference", Self::PathReference, "performs; the reference is \"../../voids\""),
        ("long_reference", Self::LongReference, "performs; the reference has 10,000 characters"),
        ("html", Self::Html, "performs, and answers a page of HTML"),
        ("positional", Self::Positional, "performs, and answers an array"),
        ("deep", Self::Deep, "performs; the answer nests 10,000 levels"),
        ("huge", Self::Huge, "performs; the answer has 500 MB"),
        ("trickle", Self::Trickle, "performs; the answer never ends"),
        ("500", Self::Broken, "performs, and always answers 500"),
        ("dirty_code", Self::DirtyCode, "refuses; the code holds NUL and control characters"),
        ("long_code", Self::LongCode, "refuses; the code has 2 MB"),
    ];

    /// Whether the answer is a refusal, and nothing is done.
    pub(super) fn refuses(self) -> bool {
        matches!(self, Self::DirtyCode | Self::LongCode)
    }
}

struct Token {
    name: &'static str,
    /// The operation that has the quirk; `None`: all operations.
    operation: Option<Operation>,
    quirk: Option<Quirk>,
    meaning: &'static str,
}

const fn token(name: &'static str, operation: Option<Operation>, quirk: Option<Quirk>, meaning: &'static str) -> Token {
    Token { name, operation, quirk, meaning }
}

use Operation::{Authorize, Capture, Refund, Void};
use Quirk::{Answers, ErrorAlways, ErrorOnce, LoseFirstAnswer, Refuse, Slow};

/// The operations by the names that stand in tokens.
const NAMED: [(&str, Operation); 4] =
    [("authorize", Authorize), ("capture", Capture), ("void", Void), ("refund", Refund)];

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

/// What `method` does to `operation`; an unknown token is refused.
pub(super) fn quirk(method: &str, operation: Operation) -> Option<Quirk> {
    if let Some((only, strange)) = strange(method) {
        return (only == operation).then_some(Answers(strange));
    }
    match TOKENS.iter().find(|token| token.name == method) {
        Some(token) if token.operation.is_none_or(|only| only == operation) => token.quirk,
        Some(_) => None,
        None => Some(Refuse("invalid_payment_method")),
    }
}

/// The operation and its answer, of a token that is made of both names.
fn strange(method: &str) -> Option<(Operation, Strange)> {
    let (operation, strange) = method.strip_prefix("tok_")?.split_once("_answers_")?;
    let (_, operation) = NAMED.into_iter().find(|(name, _)| *name == operation)?;
    let (_, strange, _) = Strange::ALL.into_iter().find(|(name, ..)| *name == strange)?;
    Some((operation, strange))
}

/// The list of tokens and their meanings, for `--help`.
pub(super) fn help() -> String {
    let known = TOKENS.iter().map(|token| format!("  {:<26}{}\n", token.name, token.meaning));
    let strange = Strange::ALL.map(|(name, _, meaning)| format!("    {name:<24}{meaning}\n"));
    format!(
        "Payment methods (tokens) and what they do:\n{}  {:<26}authorization refused: invalid_payment_method\n\n\
         tok_OPERATION_answers_NAME, where OPERATION is authorize, capture, void or refund:\n{}",
        known.collect::<String>(),
        "anything else",
        strange.concat()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strange_answer_is_that_of_one_operation_and_an_unknown_one_of_none() {
        assert_eq!(quirk("tok_capture_answers_500", Capture), Some(Answers(Strange::Broken)));
        assert_eq!(quirk("tok_capture_answers_500", Authorize), None);
        for unknown in ["tok_capture_answers_nothing", "tok_pay_answers_500", "tok_answers_500"] {
            assert_eq!(quirk(unknown, Authorize), Some(Refuse("invalid_payment_method")), "{unknown}");
        }
    }
}

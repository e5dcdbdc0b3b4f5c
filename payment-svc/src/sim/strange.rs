//! Answers that a provider must not give: its books hold what was done as ever, only its answer is strange.

use super::tokens::{Operation, Strange};
use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use contracts::money::Money;
use futures::stream::{self, Stream, StreamExt};
use http::{StatusCode, header};
use serde_json::{Value, json};
use std::{convert::Infallible, time::Duration};

/// The pause between two pieces of an answer that trickles.
const TRICKLE_PAUSE: Duration = Duration::from_millis(50);

/// An answer of 500 MB, in pieces.
const HUGE_PIECES: usize = 500;
const PIECE_BYTES: usize = 1_000_000;

/// The amount that is moved where `asked` was asked for. An amount of one stays, as nothing cannot be moved.
pub(super) fn moved(strange: Option<Strange>, operation: Operation, asked: Money) -> Money {
    match strange {
        Some(Strange::OtherAmount) => Money { amount: (asked.amount - 1).max(asked.amount.min(1)), ..asked },
        Some(Strange::OtherCurrency) if operation == Operation::Authorize => other_currency(asked),
        _ => asked,
    }
}

fn other_currency(money: Money) -> Money {
    let other = if money.currency.as_str() == "USD" { "EUR" } else { "USD" };
    Money { currency: other.parse().unwrap_or(money.currency), ..money }
}

/// Answers with `body`, which is what happened, in the provider's strange form.
pub(super) fn answer(strange: Strange, status: StatusCode, mut body: Value) -> Response {
    match strange {
        Strange::OtherCurrency if status == StatusCode::OK => {
            let other = serde_json::from_value(body["amount"].clone()).map(other_currency);
            other.into_iter().for_each(|other| body["amount"] = json!(other));
        }
        // The money moved so; an authorization (201) is in the other currency already.
        Strange::OtherAmount | Strange::OtherCurrency => {}
        Strange::NoAmount => body["amount"] = Value::Null,
        Strange::EmptyReference => body["reference"] = json!(""),
        Strange::PathReference => body["reference"] = json!("../../voids"),
        Strange::LongReference => body["reference"] = json!("r".repeat(10_000)),
        Strange::Positional => body = json!([body["reference"], body["amount"]]),
        Strange::DirtyCode => body["refused"]["code"] = json!("do\u{0}not\u{1b}[31m honour"),
        Strange::LongCode => body["refused"]["code"] = json!("x".repeat(2_000_000)),
        Strange::Html => {
            return (status, [(header::CONTENT_TYPE, "text/html")], "<html>Welcome</html>").into_response();
        }
        Strange::Deep => return text(status, "[".repeat(10_000) + &"]".repeat(10_000)),
        Strange::Broken => return (StatusCode::INTERNAL_SERVER_ERROR, "It is broken.").into_response(),
        Strange::Huge => {
            return pieces(status, stream::iter(0..HUGE_PIECES).map(|_| Bytes::from(vec![b' '; PIECE_BYTES])));
        }
        Strange::Trickle => {
            return pieces(
                status,
                stream::repeat(()).then(|()| async {
                    tokio::time::sleep(TRICKLE_PAUSE).await;
                    Bytes::from_static(b" ")
                }),
            );
        }
    }
    (status, axum::Json(body)).into_response()
}

fn text(status: StatusCode, text: String) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

fn pieces(status: StatusCode, pieces: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let body = Body::from_stream(pieces.map(Ok::<_, Infallible>));
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

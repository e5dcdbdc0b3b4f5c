//! The provider over HTTP.

use super::{Answer, Doubt, PaymentGateway, Request};
use async_trait::async_trait;
use contracts::money::Money;
use reqwest::{Client, Response, StatusCode, Url};
use saga_core::id::CommandId;
use serde::Deserialize;
use serde_json::json;
use std::time::Duration;

/// Longest answer that is read, in bytes. The provider's have some hundred.
const BODY_MAX: usize = 64 * 1024;

/// The provider's REST API.
#[derive(Debug, Clone)]
pub struct HttpGateway {
    client: Client,
    base: Url,
}

/// A gateway that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The HTTP client.
    #[error("the gateway's client cannot be built: {0}")]
    Client(#[from] reqwest::Error),
    /// The URL.
    #[error("{0:?} cannot be a base URL")]
    Base(String),
}

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

impl HttpGateway {
    /// The provider at `base`; each request, from connect to the last byte, may take `timeout`.
    pub fn new(base: &Url, timeout: Duration) -> Result<Self, SetupError> {
        if base.cannot_be_a_base() {
            return Err(SetupError::Base(base.to_string()));
        }
        // A redirect would be followed with the body dropped or repeated elsewhere: it is an answer that cannot be read.
        let client = Client::builder()
            .timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            // Sooner than servers hang up on idle connections: a request that is sent at that moment is in doubt.
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        Ok(Self { client, base: base.clone() })
    }

    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    fn request(&self, request: &Request) -> (Url, serde_json::Value) {
        match request {
            Request::Authorize { order, customer, amount, method } => (
                self.url(&["v1", "authorizations"]),
                json!({ "order": order, "customer": customer, "amount": amount, "method": method }),
            ),
            Request::Void { authorization_key } => {
                (self.url(&["v1", "voids"]), json!({ "authorization_key": authorization_key }))
            }
            Request::Capture { authorization, amount } => {
                (self.url(&["v1", "authorizations", authorization, "capture"]), json!({ "amount": amount }))
            }
            Request::Refund { authorization, amount } => {
                (self.url(&["v1", "authorizations", authorization, "refunds"]), json!({ "amount": amount }))
            }
        }
    }
}

#[async_trait]
impl PaymentGateway for HttpGateway {
    async fn perform(&self, key: CommandId, request: &Request) -> Result<Answer, Doubt> {
        let (url, body) = self.request(request);
        let sent = self.client.post(url).header("idempotency-key", key.to_string()).json(&body).send().await;
        let response = sent.map_err(doubt)?;
        let status = response.status();
        interpret(status, &read(response).await?)
    }
}

/// Only what says so in the provider's own words is a refusal: a 404 or 403 may be a proxy's.
fn interpret(status: StatusCode, body: &[u8]) -> Result<Answer, Doubt> {
    match status {
        StatusCode::OK | StatusCode::CREATED => {
            let done: DoneBody = serde_json::from_slice(body).map_err(|e| Doubt::Unreadable(e.to_string()))?;
            if done.reference.as_ref().is_some_and(|reference| reference.contains('\0')) {
                return Err(Doubt::Unreadable("the reference contains NUL".into()));
            }
            Ok(Answer::Done { reference: done.reference, amount: done.amount })
        }
        StatusCode::PAYMENT_REQUIRED | StatusCode::CONFLICT => match serde_json::from_slice::<RefusedBody>(body) {
            Ok(body) => Ok(Answer::Refused { code: body.refused.code.replace(char::is_control, "\u{fffd}") }),
            Err(_) => Err(Doubt::Status { status: status.as_u16() }),
        },
        other => Err(Doubt::Status { status: other.as_u16() }),
    }
}

/// The body, as long as it is no longer than any answer of the provider's API.
async fn read(mut response: Response) -> Result<Vec<u8>, Doubt> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(doubt)? {
        body.extend_from_slice(&chunk);
        if body.len() > BODY_MAX {
            return Err(Doubt::Unreadable(format!("the answer is longer than {BODY_MAX} bytes")));
        }
    }
    Ok(body)
}

fn doubt(error: reqwest::Error) -> Doubt {
    if error.is_timeout() { Doubt::Timeout } else { Doubt::Connection(error.without_url().to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_providers_own_refusal_is_certain() {
        let refused = br#"{"refused":{"code":"insufficient_funds","message":"-"}}"#;
        for status in [StatusCode::PAYMENT_REQUIRED, StatusCode::CONFLICT] {
            let answer = interpret(status, refused).unwrap();
            assert_eq!(answer, Answer::Refused { code: "insufficient_funds".into() });
            assert!(interpret(status, b"<html>proxy</html>").is_err());
        }
        for status in [400, 401, 403, 404, 408, 422, 425, 429, 500, 502, 503, 504, 302] {
            let status = StatusCode::from_u16(status).unwrap();
            assert!(matches!(interpret(status, refused), Err(Doubt::Status { .. })), "{status}");
        }
        assert!(matches!(interpret(StatusCode::OK, b"{"), Err(Doubt::Unreadable(_))));
        // Neither can be stored: a code is for people to read, a reference for the provider.
        let nul = interpret(StatusCode::CONFLICT, br#"{"refused":{"code":"a\u0000b"}}"#).unwrap();
        assert_eq!(nul, Answer::Refused { code: "a\u{fffd}b".into() });
        assert!(matches!(interpret(StatusCode::OK, br#"{"reference":"a\u0000b"}"#), Err(Doubt::Unreadable(_))));
    }

    #[test]
    fn a_reference_cannot_leave_its_place_in_the_path() {
        let gateway = HttpGateway::new(&"http://h/base/".parse().unwrap(), Duration::from_secs(1)).unwrap();
        assert_eq!(gateway.url(&["v1", "a/../b?c"]).as_str(), "http://h/base/v1/a%2F..%2Fb%3Fc");
    }
}

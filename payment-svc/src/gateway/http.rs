//! The provider over HTTP.

use super::{
    Doubt, GatewayAnswer, PaymentGateway, Request,
    answer::{self, BODY_MAX},
};
use async_trait::async_trait;
use http::{HeaderValue, header};
use reqwest::{Client, Response, Url};
use saga_core::{id::CommandId, service::config::Secret};
use serde_json::json;
use std::time::Duration;

/// The provider's REST API.
#[derive(Debug, Clone)]
pub struct HttpGateway {
    client: Client,
    base: Url,
    /// The bearer token's header. It is marked as sensitive: `Debug` does not show it.
    authorization: Option<HeaderValue>,
}

/// A gateway that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The HTTP client could not be built.
    #[error("the gateway's client cannot be built: {0}")]
    Client(#[from] reqwest::Error),
    /// The URL cannot be a base URL.
    #[error("the gateway's URL cannot be a base URL")]
    Base,
    /// The token does not fit into a header.
    #[error("the gateway's token has characters that a header cannot carry")]
    Token,
}

impl HttpGateway {
    /// Makes a client of the provider at `base`; each request, from connect to the last byte, may take `timeout`.
    pub fn new(base: &Url, timeout: Duration) -> Result<Self, SetupError> {
        if base.cannot_be_a_base() {
            return Err(SetupError::Base);
        }
        // A redirect would be followed with the body dropped or repeated elsewhere: it is an answer that cannot be
        // read.
        let client = Client::builder()
            .timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            // A proxy of the environment would get the token, and payments with it; `http_proxy` is set for other
            // programs.
            .no_proxy()
            // The client closes idle connections sooner than servers do: a request that is sent at that moment is in
            // doubt.
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        Ok(Self { client, base: base.clone(), authorization: None })
    }

    /// Adds a bearer token to each request.
    pub fn with_token(self, token: &Secret) -> Result<Self, SetupError> {
        let header = HeaderValue::from_str(&format!("Bearer {}", token.reveal()));
        let mut header = header.map_err(|_| SetupError::Token)?;
        header.set_sensitive(true);
        Ok(Self { authorization: Some(header), ..self })
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
    async fn perform(&self, key: CommandId, request: &Request) -> Result<GatewayAnswer, Doubt> {
        if let Request::Capture { authorization, .. } | Request::Refund { authorization, .. } = request {
            // An older build kept any text that the provider called a reference.
            answer::check_reference(authorization).map_err(Doubt::Unreadable)?;
        }
        let (url, body) = self.request(request);
        let mut call = self.client.post(url).header("idempotency-key", key.to_string()).json(&body);
        if let Some(authorization) = &self.authorization {
            call = call.header(header::AUTHORIZATION, authorization.clone());
        }
        let response = call.send().await.map_err(doubt)?;
        let (status, headers) = (response.status(), response.headers().clone());
        answer::read(request, status, &headers, &read(response).await?)
    }
}

/// Reads the body, as long as it is no longer than any answer that is believed.
async fn read(mut response: Response) -> Result<Vec<u8>, Doubt> {
    let too_long = || Doubt::Unreadable(format!("it is longer than {BODY_MAX} bytes"));
    if response.content_length().is_some_and(|length| length > BODY_MAX as u64) {
        return Err(too_long());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(doubt)? {
        if body.len() + chunk.len() > BODY_MAX {
            return Err(too_long());
        }
        body.extend_from_slice(&chunk);
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
    fn a_reference_cannot_leave_its_place_in_the_path() {
        let gateway = HttpGateway::new(&"http://h/base/".parse().unwrap(), Duration::from_secs(1)).unwrap();
        assert_eq!(gateway.url(&["v1", "a/../b?c"]).as_str(), "http://h/base/v1/a%2F..%2Fb%3Fc");
    }

    #[test]
    fn the_token_is_not_shown_with_the_gateway() {
        let gateway = HttpGateway::new(&"http://h/".parse().unwrap(), Duration::from_secs(1)).unwrap();
        let gateway = gateway.with_token(&"hunter2-hunter2-hunter2".into()).unwrap();
        assert_eq!(gateway.authorization.as_ref().unwrap(), "Bearer hunter2-hunter2-hunter2");
        assert!(!format!("{gateway:?} {gateway:#?}").contains("hunter2"));
    }
}

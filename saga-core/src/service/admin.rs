//! The admin listener: `/livez`, `/readyz`, `/health` and `/metrics` for any caller that reaches it; everything else by
//! role. None of the four asks the database or a broker, or shows their answers: `/v1/health` gives the reasons in
//! words, by role.
//!
//! A viewer looks (GET, HEAD), an operator acts. The listener decides that here, by method, so that no route can forget
//! it. The configuration refuses to listen off loopback without an operator's token. On loopback without one, any
//! caller on the machine is the operator.
//!
//! An address has few guesses at the tokens (`wrong_tokens`). `http_refused_total{reason="token"}` counts the wrong
//! ones.

use super::{
    health::{self, Health},
    wrong_tokens::WrongTokens,
};
use crate::{
    clock,
    http::{Connection, Problem, Role, count_refused},
};
use axum::{
    Json, Router,
    extract::{Request, State},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use sha2::{Digest, Sha256};
use std::{fmt, sync::Arc};
use subtle::ConstantTimeEq;

/// The tokens that the admin listener lets in. It holds digests: a token is compared in constant time, whatever its
/// length.
#[derive(Clone)]
pub struct AdminAuth {
    operator: Option<[u8; 32]>,
    viewer: Option<[u8; 32]>,
    wrong: Arc<WrongTokens>,
}

impl fmt::Debug for AdminAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |token: &Option<_>| if token.is_some() { "set" } else { "not set" };
        f.debug_struct("AdminAuth").field("operator", &set(&self.operator)).field("viewer", &set(&self.viewer)).finish()
    }
}

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotLetIn {
    /// The request shows no token, or a wrong one.
    Unknown,
    /// Too many wrong tokens came from the request's address: its own was not compared.
    TooMany,
}

impl AdminAuth {
    /// Takes the tokens of the two roles. Without any, every caller is the operator (loopback only; see
    /// [`super::AdminArgs::read`]).
    #[must_use]
    pub fn new(operator: Option<String>, viewer: Option<String>) -> Self {
        let digest = |token: String| Sha256::digest(token.as_bytes()).into();
        Self { operator: operator.map(digest), viewer: viewer.map(digest), wrong: Arc::default() }
    }

    /// Whether a caller has to show a token.
    fn asks(&self) -> bool {
        self.operator.is_some() || self.viewer.is_some()
    }

    /// The role of a request by the bearer token that it shows. Wrong tokens are counted, by address.
    ///
    /// # Errors
    /// Why the request has no role.
    pub fn admit(&self, request: &Request) -> Result<Role, NotLetIn> {
        let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
        });
        let peer = request.extensions().get().map(Connection::peer);
        if let (Some(peer), true) = (peer, token.is_some() && self.asks())
            && !self.wrong.lets_try(peer, clock::monotonic())
        {
            count_refused("token");
            return Err(NotLetIn::TooMany);
        }
        let role = self.role(token);
        if role.is_none() && token.is_some() {
            count_refused("token");
            if peer.is_some_and(|peer| self.wrong.wrong(peer, clock::monotonic())) {
                tracing::warn!(peer = ?peer, "a listener was shown a wrong token");
            }
        }
        role.ok_or(NotLetIn::Unknown)
    }

    /// The role of a caller that shows `token`; `None`: it has none.
    #[must_use]
    pub fn role(&self, token: Option<&str>) -> Option<Role> {
        if !self.asks() {
            return Some(Role::Operator);
        }
        let shown: [u8; 32] = Sha256::digest(token?.as_bytes()).into();
        let is = |known: &Option<[u8; 32]>| known.is_some_and(|known| bool::from(known.ct_eq(&shown)));
        // Both tokens are compared, always: the time says nothing about which role a token comes close to.
        let (operator, viewer) = (is(&self.operator), is(&self.viewer));
        match (operator, viewer) {
            (true, _) => Some(Role::Operator),
            (false, true) => Some(Role::Viewer),
            (false, false) => None,
        }
    }
}

/// The routes of the admin listener: health and metrics, and `guarded` behind the roles.
pub fn admin_router(health: Health, metrics: PrometheusHandle, auth: AdminAuth, guarded: Router) -> Router {
    health::describe();
    let open = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(healthy))
        .route("/metrics", get(move |State(health): State<Health>| std::future::ready(render(&health, &metrics))))
        .with_state(health.clone());
    let details = Router::new().route("/v1/health", get(details)).with_state(health);
    guarded.merge(details).layer(middleware::from_fn_with_state(auth, authorize)).merge(open)
}

fn yes_or_no(yes: bool) -> StatusCode {
    if yes { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn livez(State(health): State<Health>) -> Response {
    let live = health.is_live();
    (yes_or_no(live), if live { "live\n" } else { "the loop does not turn\n" }).into_response()
}

async fn readyz(State(health): State<Health>) -> Response {
    let readiness = health.readiness();
    (yes_or_no(readiness.ready), Json(readiness)).into_response()
}

async fn healthy(State(health): State<Health>) -> Response {
    let health = health.healthiness().for_anybody();
    (yes_or_no(health.healthy), Json(health)).into_response()
}

async fn details(State(health): State<Health>) -> Response {
    let health = health.healthiness();
    (yes_or_no(health.healthy), Json(health)).into_response()
}

fn render(health: &Health, metrics: &PrometheusHandle) -> Response {
    health.tell_age();
    metrics.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}

async fn authorize(State(auth): State<AdminAuth>, mut request: Request, next: Next) -> Response {
    let looks = matches!(*request.method(), Method::GET | Method::HEAD);
    match auth.admit(&request) {
        Err(NotLetIn::TooMany) => too_many_wrong().into_response(),
        Err(NotLetIn::Unknown) => {
            let problem = Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", "A bearer token is needed");
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer realm=\"admin\"")];
            (challenge, problem.detail("Send `Authorization: Bearer <token>` with a valid token.")).into_response()
        }
        Ok(Role::Viewer) if !looks => Problem::new(StatusCode::FORBIDDEN, "forbidden", "An operator's token is needed")
            .detail("This token may only look.")
            .into_response(),
        Ok(role) => {
            request.extensions_mut().insert(role);
            next.run(request).await
        }
    }
}

fn too_many_wrong() -> Problem {
    Problem::new(StatusCode::TOO_MANY_REQUESTS, "too-many-tokens", "Too many wrong tokens came from this address")
        .detail("No token from this address is compared for a second.")
        .retry_after(1)
}

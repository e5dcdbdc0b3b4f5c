//! The simulated provider's REST interface.
//!
//! Each request that moves money carries an `Idempotency-Key`. Its answer is stored in the transaction that moves the
//! money, and given again. A refusal is `{"refused": {"code", "message"}}` with 402 or 409: that, and nothing else,
//! means that certainly no money moved.

#![allow(unused_qualifications, reason = "utoipa writes the path of a query extractor out")]

use super::{
    Sim,
    store::{self, Answered, Authorization, NewAuthorization, Totals},
    strange,
    tokens::{Operation, Quirk, Strange, quirk},
};
use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use contracts::money::{self, Money};
use http::StatusCode;
use saga_core::{
    card::{self, holds_a_card_number},
    http::{Json, Path, Problem, Query, REQUEST_MAX, idempotency::IdempotencyKey},
    transaction::Transaction,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// Hold money.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthorizeRequest {
    order: String,
    customer: String,
    #[serde(deserialize_with = "money::strictly")]
    amount: Money,
    method: String,
}

/// Take or give back money.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AmountRequest {
    #[serde(deserialize_with = "money::strictly")]
    amount: Money,
}

/// Let go of what was, or will ever be, authorized under a key.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VoidRequest {
    authorization_key: String,
}

/// Which order's authorizations.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OfOrder {
    order: String,
}

/// What a key was answered.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StoredAnswer {
    status: u16,
    body: Value,
}

/// No money moved, and why.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Refusal {
    refused: Refused,
}

/// Why no money moved.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Refused {
    code: String,
    message: String,
}

/// POST /v1/authorizations
#[utoipa::path(post, path = "/v1/authorizations", request_body = AuthorizeRequest,
    params(("Idempotency-Key" = String, Header)),
    responses((status = 201, description = "Held"), (status = 402, description = "Refused", body = Refusal),
              (status = 422, description = "Not valid, or the key was used for another request")))]
pub(super) async fn authorize(
    State(sim): State<Sim>,
    key: IdempotencyKey,
    Json(body): Json<AuthorizeRequest>,
) -> Result<Response, Problem> {
    if body.amount.amount <= 0 {
        return Err(Problem::field("amount.amount", "is a positive number of minor units"));
    }
    let mut call = sim.enter(&key, Operation::Authorize, &body.method, &body).await?;
    if let Some(stored) = call.stored().await? {
        return Ok(stored);
    }
    let refusal = match quirk(&body.method, Operation::Authorize) {
        Some(Quirk::Refuse(code)) => Some(code),
        Some(Quirk::Answers(strange)) if strange.refuses() => Some("strange"),
        _ if !sim.chance(sim.behaviour.success_rate) => Some("declined"),
        _ => None,
    };
    if let Some(code) = refusal {
        return call.refuse(StatusCode::PAYMENT_REQUIRED, code).await;
    }
    let reference = format!("auth_{}", Uuid::now_v7().simple());
    let amount = strange::moved(call.strange, Operation::Authorize, body.amount);
    let new = NewAuthorization {
        reference: &reference,
        key: key.as_str(),
        order: &body.order,
        customer: &body.customer,
        method: &body.method,
        amount,
    };
    store::authorize_in(&mut call.tx, &new).await?;
    call.done(StatusCode::CREATED, json!({ "reference": reference, "amount": amount })).await
}

/// POST /v1/authorizations/{reference}/capture
#[utoipa::path(post, path = "/v1/authorizations/{reference}/capture", request_body = AmountRequest,
    params(("reference" = String, Path), ("Idempotency-Key" = String, Header)),
    responses((status = 200, description = "Taken"), (status = 409, description = "Refused", body = Refusal)))]
pub(super) async fn capture(
    State(sim): State<Sim>,
    key: IdempotencyKey,
    Path(reference): Path<String>,
    Json(body): Json<AmountRequest>,
) -> Result<Response, Problem> {
    move_money(&sim, &key, &reference, Operation::Capture, &body).await
}

/// POST /v1/authorizations/{reference}/refunds
#[utoipa::path(post, path = "/v1/authorizations/{reference}/refunds", request_body = AmountRequest,
    params(("reference" = String, Path), ("Idempotency-Key" = String, Header)),
    responses((status = 200, description = "Given back"), (status = 409, description = "Refused", body = Refusal)))]
pub(super) async fn refund(
    State(sim): State<Sim>,
    key: IdempotencyKey,
    Path(reference): Path<String>,
    Json(body): Json<AmountRequest>,
) -> Result<Response, Problem> {
    move_money(&sim, &key, &reference, Operation::Refund, &body).await
}

async fn move_money(
    sim: &Sim,
    key: &IdempotencyKey,
    reference: &str,
    operation: Operation,
    body: &AmountRequest,
) -> Result<Response, Problem> {
    if body.amount.amount <= 0 {
        return Err(Problem::field("amount.amount", "is a positive number of minor units"));
    }
    let method = store::method(&sim.pool, reference).await?.unwrap_or_else(|| "tok_visa".into());
    let mut call = sim.enter(key, operation, &method, &json!({ "reference": reference, "body": body })).await?;
    if let Some(stored) = call.stored().await? {
        return Ok(stored);
    }
    match quirk(&method, operation) {
        Some(Quirk::Refuse(code)) => return call.refuse(StatusCode::CONFLICT, code).await,
        Some(Quirk::Answers(strange)) if strange.refuses() => {
            return call.refuse(StatusCode::CONFLICT, "strange").await;
        }
        _ => {}
    }
    let authorization = store::lock_by_reference_in(&mut call.tx, reference).await?;
    if let Some(code) = objection(authorization.as_ref(), operation, body.amount) {
        return call.refuse(StatusCode::CONFLICT, code).await;
    }
    let amount = strange::moved(call.strange, operation, body.amount);
    store::shift_in(&mut call.tx, reference, key.as_str(), operation, amount).await?;
    let prefix = if operation == Operation::Capture { "cap" } else { "ref" };
    let reference = format!("{prefix}_{}", Uuid::now_v7().simple());
    call.done(StatusCode::OK, json!({ "reference": reference, "amount": amount })).await
}

fn objection(authorization: Option<&Authorization>, operation: Operation, amount: Money) -> Option<&'static str> {
    let Some(known) = authorization else { return Some("unknown_authorization") };
    let available = if operation == Operation::Capture { known.held } else { known.captured - known.refunded };
    match () {
        () if known.currency != amount.currency => Some("currency_differs"),
        () if known.voided > 0 => Some("voided"),
        () if amount.amount > available => Some("amount_too_large"),
        () => None,
    }
}

/// POST /v1/authorizations/{reference}/void
#[utoipa::path(post, path = "/v1/authorizations/{reference}/void",
    params(("reference" = String, Path), ("Idempotency-Key" = String, Header)),
    responses((status = 200, description = "Nothing is held"), (status = 409, description = "Refused", body = Refusal)))]
pub(super) async fn void(
    State(sim): State<Sim>,
    key: IdempotencyKey,
    Path(reference): Path<String>,
) -> Result<Response, Problem> {
    let method = store::method(&sim.pool, &reference).await?.unwrap_or_else(|| "tok_visa".into());
    let mut call = sim.enter(&key, Operation::Void, &method, &json!({ "reference": reference })).await?;
    if let Some(stored) = call.stored().await? {
        return Ok(stored);
    }
    match store::lock_by_reference_in(&mut call.tx, &reference).await? {
        Some(known) => let_go(call, key.as_str(), &known).await,
        None => call.refuse(StatusCode::CONFLICT, "unknown_authorization").await,
    }
}

/// POST /v1/voids: for a caller that does not know whether the authorization under a key ever came. One that comes
/// later is refused.
#[utoipa::path(post, path = "/v1/voids", request_body = VoidRequest, params(("Idempotency-Key" = String, Header)),
    responses((status = 200, description = "Nothing is held, and nothing will be"),
              (status = 409, description = "Refused: it was captured", body = Refusal)))]
pub(super) async fn void_by_key(
    State(sim): State<Sim>,
    key: IdempotencyKey,
    Json(body): Json<VoidRequest>,
) -> Result<Response, Problem> {
    let method = store::method(&sim.pool, &body.authorization_key).await?.unwrap_or_else(|| "tok_visa".into());
    let mut call = sim.enter(&key, Operation::Void, &method, &body).await?;
    if let Some(stored) = call.stored().await? {
        return Ok(stored);
    }
    // This lock always comes after the void's own key, and an authorization locks only its own: no cycle.
    store::lock_key_in(&mut call.tx, &body.authorization_key).await?;
    if let Some(known) = store::lock_by_key_in(&mut call.tx, &body.authorization_key).await? {
        return let_go(call, key.as_str(), &known).await;
    }
    if store::answer(&mut **call.tx, &body.authorization_key).await?.is_none() {
        let tombstone =
            Answered { request: None, status: 402, body: refused("voided", "It was voided before it came.") };
        store::store_answer_in(&mut call.tx, &body.authorization_key, &tombstone).await?;
    }
    call.done(StatusCode::OK, json!({ "reference": null, "amount": null })).await
}

async fn let_go(mut call: Call, key: &str, known: &Authorization) -> Result<Response, Problem> {
    if call.strange.is_some_and(Strange::refuses) {
        return call.refuse(StatusCode::CONFLICT, "strange").await;
    }
    if known.captured > 0 {
        return call.refuse(StatusCode::CONFLICT, "already_captured").await;
    }
    let held = Money { amount: known.held, currency: known.currency };
    let released = strange::moved(call.strange, Operation::Void, held);
    if released.amount > 0 {
        store::shift_in(&mut call.tx, &known.reference, key, Operation::Void, released).await?;
    }
    let amount = (released.amount > 0).then_some(released);
    call.done(StatusCode::OK, json!({ "reference": known.reference, "amount": amount })).await
}

/// GET /v1/requests/{key}
#[utoipa::path(get, path = "/v1/requests/{key}", params(("key" = String, Path)),
    responses((status = 200, body = StoredAnswer), (status = 404, description = "No such request was answered")))]
pub(super) async fn request(State(sim): State<Sim>, Path(key): Path<String>) -> Result<Json<StoredAnswer>, Problem> {
    match store::answer(&sim.pool, &key).await? {
        Some(answered) => Ok(Json(StoredAnswer { status: answered.status, body: answered.body })),
        None => Err(Problem::not_found("No request with this Idempotency-Key was answered.")),
    }
}

/// GET /v1/authorizations?order=
#[utoipa::path(get, path = "/v1/authorizations", params(OfOrder), responses((status = 200, body = Vec<Authorization>)))]
pub(super) async fn of_order(
    State(sim): State<Sim>,
    Query(of): Query<OfOrder>,
) -> Result<Json<Vec<Authorization>>, Problem> {
    Ok(Json(store::of_order(&sim.pool, &of.order).await?))
}

/// GET /v1/ledger: the sum of all movements, per currency.
#[utoipa::path(get, path = "/v1/ledger", responses((status = 200, body = Vec<Totals>)))]
pub(super) async fn ledger(State(sim): State<Sim>) -> Result<Json<Vec<Totals>>, Problem> {
    Ok(Json(store::totals(&sim.pool).await?))
}

/// A request that moves money, in its transaction, with its key locked.
struct Call {
    tx: Transaction,
    key: String,
    request: Value,
    /// Whether the request is performed, and the connection then dropped.
    lose_answer: bool,
    /// The answer that is given once the request is performed, if it is a strange one.
    strange: Option<Strange>,
}

impl Sim {
    /// Refuses what must not be stored, unless it is the repetition of a request that was answered. Counts the arrival,
    /// misbehaves as its settings and the token say, and takes the key.
    async fn enter(
        &self,
        key: &IdempotencyKey,
        operation: Operation,
        method: &str,
        request: &impl Serialize,
    ) -> Result<Call, Problem> {
        let request = serde_json::to_value(request)?;
        // The request may have been answered by a build that took such a number: what happened then still stands.
        if let Some(field) = with_a_card_number(&request)
            && store::answer(&self.pool, key.as_str()).await?.is_none()
        {
            return Err(Problem::field(field, card::REFUSED));
        }
        let first = store::count_arrival(&self.pool, key.as_str()).await? == 1;
        let quirk = quirk(method, operation);
        let slow = if quirk == Some(Quirk::Slow) { self.behaviour.slow } else { self.behaviour.latency };
        tokio::time::sleep(slow).await;
        let error = match quirk {
            Some(Quirk::ErrorAlways) => true,
            Some(Quirk::ErrorOnce) => first,
            _ => self.chance(self.behaviour.error_rate),
        };
        if error {
            return Err(Problem::unavailable().detail("Simulated: nothing was done."));
        }
        let lose_answer = match quirk {
            Some(Quirk::LoseFirstAnswer) => first,
            _ => self.chance(self.behaviour.lost_answer_rate),
        };
        let strange = match quirk {
            Some(Quirk::Answers(strange)) => Some(strange),
            _ => None,
        };
        let mut tx = Transaction::begin(&self.pool, REQUEST_MAX).await?;
        store::lock_key_in(&mut tx, key.as_str()).await?;
        Ok(Call { tx, key: key.as_str().to_owned(), request, lose_answer, strange })
    }

    /// Returns true with this probability.
    fn chance(&self, rate: f64) -> bool {
        // 32 random bits of a fresh id; both ends are exact: 0 never, 1 always.
        let bits = Uuid::new_v4().as_u128() as u32;
        f64::from(bits) / 4_294_967_296.0 < rate
    }
}

impl Call {
    /// The answer that this key got before, if there is one.
    async fn stored(&mut self) -> Result<Option<Response>, Problem> {
        let Some(stored) = store::answer(&mut **self.tx, &self.key).await? else { return Ok(None) };
        if stored.request.is_some_and(|request| request != self.request) {
            return Err(Problem::field("Idempotency-Key", "was used for another request"));
        }
        let status = StatusCode::from_u16(stored.status).unwrap_or(StatusCode::OK);
        Ok(Some(self.respond(status, stored.body)))
    }

    async fn done(self, status: StatusCode, body: Value) -> Result<Response, Problem> {
        self.answer(status, body).await
    }

    async fn refuse(self, status: StatusCode, code: &str) -> Result<Response, Problem> {
        self.answer(status, refused(code, "The provider refuses.")).await
    }

    async fn answer(mut self, status: StatusCode, body: Value) -> Result<Response, Problem> {
        let answered = Answered { request: Some(self.request.clone()), status: status.as_u16(), body: body.clone() };
        store::store_answer_in(&mut self.tx, &self.key, &answered).await?;
        let response = self.respond(status, body);
        self.tx.commit_quietly().await?;
        Ok(response)
    }

    fn respond(&self, status: StatusCode, body: Value) -> Response {
        if self.lose_answer {
            // A body that breaks off makes hyper drop the connection.
            let lost = futures::stream::once(async { Err::<Vec<u8>, _>(std::io::Error::other("simulated loss")) });
            return (status, Body::from_stream(lost)).into_response();
        }
        match self.strange {
            Some(strange) => strange::answer(strange, status, body),
            None => (status, axum::Json(body)).into_response(),
        }
    }
}

/// The first field of a request that holds a card number. Below its own fields a request has no free text.
fn with_a_card_number(request: &Value) -> Option<&str> {
    let mut fields = request.as_object().into_iter().flatten();
    let found = fields.find(|(_, value)| value.as_str().is_some_and(holds_a_card_number));
    found.map(|(name, _)| name.as_str())
}

fn refused(code: &str, message: &str) -> Value {
    json!(Refusal { refused: Refused { code: code.into(), message: message.into() } })
}

//! `Idempotency-Key`: a POST that is repeated under one key has one effect and one answer.
//!
//! The answer is stored in the transaction of its effect, so there is no moment in which one exists without the other.
//! A process that dies before the commit leaves neither, and the client's repetition does the work. One that dies after
//! it leaves both, and the repetition gets the stored answer. How a handler uses it:
//!
//! ```
//! # use axum::{extract::State, response::{IntoResponse, Response}};
//! # use http::StatusCode;
//! # use saga_core::http::{Json, Problem, idempotency::{self, IdempotentAnswer, IdempotencyKey}};
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct Body { name: String }
//! async fn post(
//!     State(pool): State<sqlx::PgPool>,
//!     key: IdempotencyKey,
//!     Json(body): Json<Body>,
//! ) -> Result<Response, Problem> {
//!     let name = body.name.clone();
//!     let done = idempotency::once(&pool, "POST /v1/things", &key, &body, move |tx| {
//!         Box::pin(async move {
//!             // The effect, in this transaction; a refusal returns its Problem here, and is not remembered.
//!             sqlx::query("insert into things (name) values ($1)").bind(&name).execute(&mut **tx).await?;
//!             Ok((IdempotentAnswer::json(StatusCode::CREATED, &name)?.location(format!("/v1/things/{name}")), ()))
//!         })
//!     });
//!     Ok(done.await?.into_response())
//! }
//! # let _routes: axum::Router<sqlx::PgPool> = axum::Router::new().route("/v1/things", axum::routing::post(post));
//! ```
//!
//! (Boxed, because axum wants to know that the future is `Send`, which the compiler cannot tell of an async closure's.)
//!
//! Keys are never forgotten yet; `idempotency_answer.created_at` is what a retention will go by.

use super::{REQUEST_MAX, problem::Problem};
use crate::{outbox::Tx, transaction::Transaction};
use axum::{
    extract::FromRequestParts,
    response::{IntoResponse, Response},
};
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::{PgPool, Row};

/// The name of the request header that holds the key.
pub const HEADER: &str = "idempotency-key";
/// The response header that marks an answer as given before.
pub const REPLAYED: &str = "idempotency-replayed";

/// The request's `Idempotency-Key`: 1 to 200 visible ASCII characters. As an extractor it makes the header required;
/// its absence is a 400.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The key as text, 1 to 200 visible ASCII characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut values = headers.get_all(HEADER).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(refused("is required, once"));
        };
        match value.to_str() {
            Ok(key) if (1..=200).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Ok(Self(key.to_owned()))
            }
            _ => Err(refused("is 1 to 200 visible ASCII characters")),
        }
    }
}

fn refused(message: &str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "idempotency-key", "An Idempotency-Key is needed")
        .detail("Send a new one (a UUID, say) with each new request, and the same one when you repeat it.")
        .with_field("Idempotency-Key", message)
}

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::read(&parts.headers)
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Once<T> {
    /// The work was done now, and is committed. With the answer comes what the work returned beside it.
    Now(IdempotentAnswer, T),
    /// The work was done before; its answer is given again.
    Before(IdempotentAnswer),
}

impl<T> IntoResponse for Once<T> {
    fn into_response(self) -> Response {
        let (Self::Now(answer, _) | Self::Before(answer)) = self;
        answer.into_response()
    }
}

/// An answer as it is stored and sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotentAnswer {
    status: StatusCode,
    location: Option<String>,
    etag: Option<String>,
    body: Vec<u8>,
    replayed: bool,
}

impl IdempotentAnswer {
    /// Makes an answer with a JSON body.
    ///
    /// # Errors
    /// The body cannot be written as JSON.
    pub fn json<T: Serialize>(status: StatusCode, body: &T) -> Result<Self, serde_json::Error> {
        Ok(Self { status, location: None, etag: None, body: serde_json::to_vec(body)?, replayed: false })
    }

    /// Sets the path of the new resource.
    #[must_use]
    pub fn location(self, location: impl Into<String>) -> Self {
        Self { location: Some(location.into()), ..self }
    }

    /// Sets the version of the resource, quotes included.
    #[must_use]
    pub fn etag(self, etag: impl Into<String>) -> Self {
        Self { etag: Some(etag.into()), ..self }
    }
}

impl IntoResponse for IdempotentAnswer {
    fn into_response(self) -> Response {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let optional = [(header::LOCATION, self.location), (header::ETAG, self.etag)];
        for (name, value) in optional {
            if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
                headers.insert(name, value);
            }
        }
        if self.replayed {
            headers.insert(HeaderName::from_static(REPLAYED), HeaderValue::from_static("true"));
        }
        (self.status, headers, self.body).into_response()
    }
}

/// Does `work` once under `key`, in a transaction of its own that is committed with its answer. It is bounded by
/// [`REQUEST_MAX`].
///
/// `scope` keeps keys apart: the operation, and its caller (`"POST /v1/orders alice"`); keys of different customers
/// never meet. `request` is everything that decides the effect: the parsed body, and path parameters if there are any.
///
/// # Errors
/// The same key with another request is 422; while the first is still at work, 409. The [`Problem`] of `work` is given
/// as it is, nothing is written, and the same request may succeed later. When the connection is lost during the commit,
/// 503: the work may be done, and a repetition under the key finds out.
pub async fn once<T>(
    pool: &PgPool,
    scope: &str,
    key: &IdempotencyKey,
    request: &impl Serialize,
    work: impl for<'t> FnOnce(&'t mut Tx<'static>) -> BoxFuture<'t, Result<(IdempotentAnswer, T), Problem>>,
) -> Result<Once<T>, Problem> {
    let fingerprint = Sha256::digest(serde_json::to_vec(request)?).to_vec();
    let mut tx = Transaction::begin(pool, REQUEST_MAX).await?;
    let done = async {
        if let Some(answer) = find_in(&mut tx, scope, key, &fingerprint).await? {
            return Ok(Once::Before(answer));
        }
        let (answer, beside) = work(&mut tx).await?;
        store_in(&mut tx, scope, key, &fingerprint, &answer).await?;
        Ok(Once::Now(answer, beside))
    };
    let done = REQUEST_MAX.within(done).await;
    if let Ok(Once::Now(..)) = done {
        tx.commit().await?;
    } else {
        // The rollback comes before the answer. A transaction that is merely dropped ends a moment after it, and the
        // client's next request would find its key in flight.
        tx.rollback().await.ok();
    }
    done
}

/// Takes hold of `key` until the transaction ends, and returns the answer that it has already, if any.
async fn find_in(
    tx: &mut Tx<'_>,
    scope: &str,
    key: &IdempotencyKey,
    fingerprint: &[u8],
) -> Result<Option<IdempotentAnswer>, Problem> {
    // An insert would wait for a concurrent one to end; the lock shows at once that there is one.
    let free: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtextextended($1, 7305))")
        .bind(format!("{scope}\n{}", key.0))
        .fetch_one(&mut **tx)
        .await?;
    if !free {
        return Err(Problem::conflict("in-flight", "A request with this Idempotency-Key is being worked on")
            .retry_after(1)
            .with_field("Idempotency-Key", "is in use"));
    }
    let row = sqlx::query(
        "select fingerprint, status, location, etag, body
           from idempotency_answer
          where scope = $1 and key = $2",
    )
    .bind(scope)
    .bind(&key.0)
    .fetch_optional(&mut **tx)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get::<Vec<u8>, _>("fingerprint")? != fingerprint {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency-key-reused",
            "This Idempotency-Key was used for another request",
        )
        .with_field("Idempotency-Key", "use a new one for a new request"));
    }
    let status = u16::try_from(row.try_get::<i16, _>("status")?).ok().and_then(|code| StatusCode::from_u16(code).ok());
    Ok(Some(IdempotentAnswer {
        status: status.unwrap_or(StatusCode::OK),
        location: row.try_get("location")?,
        etag: row.try_get("etag")?,
        body: row.try_get("body")?,
        replayed: true,
    }))
}

async fn store_in(
    tx: &mut Tx<'_>,
    scope: &str,
    key: &IdempotencyKey,
    fingerprint: &[u8],
    answer: &IdempotentAnswer,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into idempotency_answer (scope, key, fingerprint, status, location, etag, body)
         values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(scope)
    .bind(&key.0)
    .bind(fingerprint)
    .bind(i16::try_from(answer.status.as_u16()).unwrap_or(200))
    .bind(&answer.location)
    .bind(&answer.etag)
    .bind(&answer.body)
    .execute(&mut **tx)
    .await
    .map(drop)
}

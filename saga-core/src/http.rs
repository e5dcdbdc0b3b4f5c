//! HTTP: problem details, extractors that name the field, paging, idempotency keys, and what surrounds every API.
//!
//! | module | what it is |
//! |---|---|
//! | [`problem`] | RFC 9457 problem details: the only shape an error has |
//! | [`extract`] | `Json`, `Query`, `Path` whose rejections are problems that name the field |
//! | [`if_match`] | `If-Match`: only what the client has seen is changed |
//! | [`openapi`] | what every operation may answer, put into its document |
//! | [`paging`] | `limit` and an opaque `cursor` |
//! | [`idempotency`] | `Idempotency-Key`: the answer is stored in the transaction of its effect |
//! | [`sagas`] | inspection of sagas, for the admin listener |
//! | [`hosts`] | pages of other sites are refused: `Host`, `Origin`, forms |
//! | `connections` | a bound on open connections; one that waits for its client makes room |
//! | `admission` | a body of its own time, then a slot; handlers that a hang-up cannot cancel |
//! | [`api`] | limits, timeouts, request ids, traces, panics around every API |
//!
//! ```
//! use axum::{Router, body::Body, http::Request, routing::post};
//! use saga_core::http::{Api, Json, Problem};
//! use tower::ServiceExt;
//!
//! #[derive(serde::Deserialize)]
//! struct Wish { quantity: u32 }
//!
//! async fn place(Json(wish): Json<Wish>) -> Result<&'static str, Problem> {
//!     match wish.quantity {
//!         0 => Err(Problem::field("quantity", "must be at least 1")),
//!         _ => Ok("accepted"),
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let api = Api::new(Router::new().route("/v1/orders", post(place))).into_router();
//!
//! let request = Request::post("/v1/orders").header("host", "localhost").header("content-type", "application/json");
//! let answer = api.oneshot(request.body(Body::from(r#"{"quantity": 0}"#)).unwrap()).await.unwrap();
//! assert_eq!(answer.status(), 422);
//! assert_eq!(answer.headers()["content-type"], "application/problem+json");
//! # }
//! ```

mod admission;
pub mod api;
pub(crate) mod connections;
pub mod extract;
pub mod hosts;
pub mod idempotency;
pub mod if_match;
pub mod openapi;
pub mod paging;
pub mod problem;
mod role;
pub mod sagas;
mod words;

pub use admission::count_refused;
pub use api::{Api, Limits, REQUEST_MAX};
pub use connections::{Connection, Held};
pub use extract::{Json, Path, Query};
pub use hosts::Hosts;
pub use if_match::IfMatch;
pub use paging::{Cursor, Limit, List, TimeKey};
pub use problem::{FieldError, Problem};
pub use role::Role;
pub use sagas::{saga_openapi, saga_routes};

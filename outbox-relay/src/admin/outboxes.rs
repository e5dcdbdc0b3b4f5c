//! The list of outboxes: each with its owner, its position and how far behind it is.

#![allow(unused_qualifications, reason = "utoipa's path macro repeats the extractors' types with theirs")]

use crate::{
    Relay,
    outbox::{Outbox, OutboxRole},
    pending,
    position::{Position, ReadError},
    record::{batch_log, pause},
};
use axum::extract::State;
use saga_core::{clock::DatabaseClock, http::Json};
use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

/// An outbox of this relay, as it is now.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OutboxView {
    /// The name of the outbox.
    name: String,
    /// What the process that answers does with the outbox.
    role: OutboxRole,
    /// What is wrong, in words; `null` when nothing is.
    problem: Option<String>,
    /// What the outbox's database holds; `null` while it cannot be asked.
    #[serde(flatten)]
    known: Option<OutboxFacts>,
}

/// What an outbox's database holds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Known)]
struct OutboxFacts {
    /// The process that publishes the outbox; `null` before the first.
    owner: Option<Owner>,
    /// The position up to which rows are published.
    position: PositionView,
    /// How far publishing is behind.
    lag: Lag,
    /// Whether an operator has paused the whole outbox: nothing is published.
    paused: bool,
    /// Topics that are paused, or catching up.
    paused_topics: Vec<PausedTopic>,
    /// The number of parked rows.
    parked: i64,
}

/// The lease, as it stands in the database.
#[derive(Debug, Serialize, ToSchema)]
struct Owner {
    /// The lease's id, made anew at each acquisition.
    id: Uuid,
    /// The host and process that have the lease.
    holder: String,
    /// When the process acquired the lease.
    #[serde(with = "time::serde::rfc3339")]
    acquired_at: OffsetDateTime,
    /// When the lease runs out, unless it is renewed.
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
    /// The lease ran out, and no process has taken it.
    expired: bool,
}

/// The last entry of the batch log.
#[derive(Debug, Serialize, ToSchema)]
struct PositionView {
    /// The number of the entry; 0 before the first.
    n: i64,
    /// The snapshot whose visible rows are all published.
    base: String,
    /// The snapshot up to which rows are being published: those visible in it and not in `base`.
    target: String,
    /// The id up to which those rows are published.
    to_id: i64,
}

/// How far publishing is behind, in rows and in seconds.
#[derive(Debug, Serialize, ToSchema)]
struct Lag {
    /// Committed rows that are not published.
    rows: i64,
    /// Whether `rows` is a count; many are estimated.
    exact: bool,
    /// The age of the oldest of those rows.
    seconds: f64,
}

/// A topic that is paused, or catching up.
#[derive(Debug, Serialize, ToSchema)]
struct PausedTopic {
    topic: String,
    /// `operator`, `missing`, `forbidden`, `leaderless` (no broker takes its rows) or `refusing` (Kafka refused rows of it).
    cause: &'static str,
    /// Why the topic is paused, in words.
    reason: String,
    #[serde(with = "time::serde::rfc3339")]
    paused_at: OffsetDateTime,
    /// Whether the topic's rows are being published again, from where they were left.
    catching_up: bool,
}

/// Every outbox of this relay, whichever process owns it.
#[utoipa::path(
    get, path = "/v1/outboxes", tag = "outboxes", operation_id = "listOutboxes",
    responses((status = 200, body = [OutboxView]))
)]
pub(super) async fn list(State(relay): State<Relay>) -> Json<Vec<OutboxView>> {
    let views = relay.outboxes().iter().map(|outbox| view(outbox));
    Json(futures::future::join_all(views).await)
}

async fn view(outbox: &Outbox) -> OutboxView {
    let (role, problem) = outbox.status.all();
    let (known, error) = match outbox.admin.ask(async |db| known(db, &outbox.name, &outbox.leases.clock).await).await {
        Ok(known) => (Some(known), None),
        Err(error) => {
            tracing::warn!(outbox = outbox.name, %error, "looking at an outbox");
            (None, Some(String::from("its database cannot be asked; the log says why")))
        }
    };
    OutboxView { name: outbox.name.clone(), role, problem: problem.or(error), known }
}

type LeaseColumns = (Uuid, String, OffsetDateTime, OffsetDateTime, bool);

async fn known(db: &mut PgConnection, outbox: &str, clock: &DatabaseClock) -> Result<OutboxFacts, ReadError> {
    let lease: Option<LeaseColumns> = sqlx::query_as(
        "select owner, holder, acquired_at, expires_at, expires_at <= clock_timestamp()
           from outbox_lease
          where outbox = $1",
    )
    .bind(outbox)
    .fetch_optional(&mut *db)
    .await?;
    let last = batch_log::last(db, outbox).await?;
    let (n, at) = last.map_or_else(|| (0, Position::initial()), |last| (last.n, last.position));
    let pending = pending::of(db, outbox).await?;
    let paused = pause::load(db, outbox).await?;
    let age = pending.oldest.map_or(0.0, |oldest| clock.since(oldest));
    Ok(OutboxFacts {
        owner: lease.map(|(id, holder, acquired_at, expires_at, expired)| Owner {
            id,
            holder,
            acquired_at,
            expires_at,
            expired,
        }),
        position: PositionView { n, base: at.base.to_string(), target: at.target.to_string(), to_id: at.after },
        lag: Lag { rows: pending.rows, exact: pending.exact, seconds: age },
        paused: paused.iter().any(|paused| paused.topic == pause::WHOLE),
        paused_topics: paused
            .into_iter()
            .filter(|paused| paused.topic != pause::WHOLE)
            .map(|paused| PausedTopic {
                topic: paused.topic,
                cause: paused.cause.as_str(),
                reason: paused.reason,
                paused_at: paused.paused_at,
                catching_up: paused.resuming,
            })
            .collect(),
        parked: pending.parked,
    })
}

//! `GET /v1/orders/{id}/events`: an order's way as server-sent events.
//!
//! An event's id is its sequence in the order's history. A client that lost its connection sends the last one it saw.
//! It gets the rest from the database, whichever replica it asks; the service keeps nothing per client. A stream ends
//! after a terminal status, when the process stops, and when it is the oldest of too many. A client that comes back
//! after the end gets 204, which keeps an `EventSource` away.

use super::{ApiState, read::no_such_order, view::StatusView};
use crate::{
    live::{Purpose, TooMany, Watch},
    store::{self, HistoryEntry},
};
use axum::{
    Extension,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use contracts::OrderId;
use futures::{Stream, stream};
use http::{HeaderMap, StatusCode};
use saga_core::http::{Connection, Held, Path, Problem, count_refused};
use sqlx::PgPool;
use std::{collections::VecDeque, convert::Infallible, time::Duration};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often a stream sends a comment: proxies close connections that are silent for a minute or so.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(15);
/// How soon a client that lost its connection comes back.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Follow an order
///
/// Server-sent events of type `status`, one for each status that the order reached, the past ones first. The event's id
/// is the status's sequence: send the last one seen as `Last-Event-ID` to get what came after. The stream ends with the
/// order's end; then, 204.
#[utoipa::path(
    get,
    path = "/v1/orders/{id}/events",
    tag = "orders",
    operation_id = "followOrder",
    params(
        ("id" = Uuid, Path, description = "The order's id"),
        ("Last-Event-ID" = Option<i64>, Header, description = "The id of the last event seen"),
    ),
    responses(
        (status = 200, description = "Events whose data is a status", body = StatusView, content_type = "text/event-stream"),
        (status = 204, description = "The order has come to its end, and the client has seen it"),
        (status = 400, description = "The id, or Last-Event-ID, is not one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such order", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "Too many requests wait for this order at the moment", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub async fn order_events(
    State(state): State<ApiState>,
    Path(id): Path<Uuid>,
    connection: Option<Extension<Connection>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let order = store::find(&state.orders.pool, OrderId(id)).await?.ok_or_else(|| no_such_order(id))?;
    let seen = last_event_id(&headers, order.version)?;
    if order.status.name().is_terminal() && seen == order.version {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let versions = state.orders.live.watch(order.id, order.version, Purpose::Stream).map_err(too_many)?;
    let follower = Follower {
        pool: state.orders.pool.clone(),
        order: order.id,
        seen,
        unsent: VecDeque::new(),
        ended: false,
        versions,
        _held: connection.map(|Extension(connection)| connection.streaming()),
        shutdown: state.shutdown.clone(),
    };
    let heartbeat = KeepAlive::new().interval(HEARTBEAT_EVERY).text("heartbeat");
    Ok(Sse::new(follower.into_stream()).keep_alive(heartbeat).into_response())
}

fn too_many(too_many: TooMany) -> Problem {
    tracing::debug!(reason = %too_many, "a client that would follow an order was turned away");
    count_refused("stream");
    match too_many {
        TooMany::InAll => Problem::busy(),
        TooMany::OfOne => Problem::busy().detail(format!("{too_many}. Close one, or ask again in a moment.")),
    }
}

fn last_event_id(headers: &HeaderMap, newest: i64) -> Result<i64, Problem> {
    let Some(value) = headers.get("last-event-id").filter(|value| !value.is_empty()) else { return Ok(0) };
    let id = value.to_str().ok().and_then(|text| text.parse().ok());
    id.filter(|id| (0..=newest).contains(id)).ok_or_else(|| {
        Problem::malformed("There is no event of this order with that id.")
            .with_field("Last-Event-ID", "is the id of an event that this order had")
    })
}

/// The place of one client in one order's history.
struct Follower {
    pool: PgPool,
    order: OrderId,
    seen: i64,
    unsent: VecDeque<HistoryEntry>,
    ended: bool,
    versions: Watch,
    /// While this is kept, the connection makes room for another only when none waits for its client.
    _held: Option<Held>,
    shutdown: CancellationToken,
}

impl Follower {
    fn into_stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut follower| async move {
            let entry = follower.next().await?;
            let event = follower.event(entry)?;
            Some((Ok(event), follower))
        })
    }

    /// The next row of the history; `None` when there will be none, or none from this process.
    async fn next(&mut self) -> Option<HistoryEntry> {
        loop {
            if let Some(entry) = self.unsent.pop_front() {
                self.seen = entry.sequence;
                self.ended = entry.status.name().is_terminal();
                return Some(entry);
            }
            if self.ended || self.shutdown.is_cancelled() {
                return None;
            }
            match store::history_after(&self.pool, self.order, self.seen).await {
                Ok(entries) => self.unsent.extend(entries),
                // The client comes back with the last id it saw; readiness reports the outage itself.
                Err(error) => {
                    tracing::debug!(order = %self.order, %error, "an event stream ends early");
                    return None;
                }
            }
            if self.unsent.is_empty() {
                tokio::select! {
                    changed = self.versions.changed() => changed?,
                    () = self.shutdown.cancelled() => return None,
                }
            }
        }
    }

    fn event(&self, entry: HistoryEntry) -> Option<Event> {
        let (id, view) = (entry.sequence.to_string(), StatusView::new(self.order, entry));
        Event::default().event("status").id(id).retry(RECONNECT_AFTER).json_data(view).ok()
    }
}

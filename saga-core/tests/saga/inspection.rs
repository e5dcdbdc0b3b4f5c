//! The inspection of sagas as an operator sees it, and the first thing that an operator can do.

use crate::support::*;
use axum::{Extension, Router, body::Body};
use http::{Request, StatusCode};
use saga_core::{
    http::Role,
    http::saga_routes,
    saga::view::{Payloads, SagaView},
};
use serde_json::{Value, json};
use tower::ServiceExt;

async fn call(routes: &Router, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let response = routes.clone().oneshot(request.body(body).unwrap()).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap())
}

fn words_of(view: &SagaView) -> Vec<String> {
    let line = |line: &saga_core::saga::view::TimelineLine| {
        let words = [Some(line.what), line.op, line.step.as_deref(), line.outcome];
        words.into_iter().flatten().collect::<Vec<_>>().join(" ")
    };
    view.timeline.iter().map(line).collect()
}

#[tokio::test]
async fn the_timeline_tells_every_command_and_reply_and_payloads_are_not_in_it() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    world.deliver(&[rejected(&world.last(saga).await)]).await;
    let view = world.engine.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
    assert_eq!(
        words_of(&view),
        [
            "started",
            "ran do open order",
            "sent do authorize",
            "reply do authorize succeeded",
            "sent do reserve",
            "reply do reserve rejected",
            "compensating",
            "sent undo authorize",
        ]
    );
    assert_eq!(
        (view.remaining.len(), view.undo_path.as_slice()),
        (0, &["authorize", "open order"].map(Into::into)[..])
    );
    let states: Vec<_> = view.steps.iter().map(|step| step.state).collect();
    assert_eq!(states, ["done", "done", "not_done", "waiting", "waiting", "waiting"]);
    assert!(view.waits.unwrap().why.contains("the undo of `authorize`"));
    assert_eq!((view.input, view.failure.unwrap().rejection), (None, None));
    let shown = world.engine.inspect(saga, Payloads::Shown).await.unwrap().unwrap();
    assert_eq!(shown.input, Some(json!({ "order": 1 })));
    assert_eq!(shown.failure.unwrap().rejection, Some(json!({ "why": "no" })));
    assert_eq!(shown.steps[1].reply, Some(json!({ "reference": "authorize 1" })));
}

#[tokio::test]
async fn a_running_saga_shows_what_remains_and_the_way_back_until_the_pivot() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let view = world.engine.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
    assert_eq!(view.remaining, ["authorize", "reserve", "capture", "confirm order", "ship"]);
    assert_eq!(view.undo_path, ["authorize", "open order"]);
    assert_eq!(view.summary.step.as_deref(), Some("authorize"));
    assert!(view.waits.unwrap().until.is_some());
    world.succeed(saga).await;
    world.succeed(saga).await;
    let view = world.engine.inspect(saga, Payloads::Redacted).await.unwrap().unwrap();
    assert_eq!((view.remaining.len(), view.undo_path.len()), (3, 0));
}

#[tokio::test]
async fn lists_are_filtered_and_paged_without_gaps() {
    let world = World::new().await;
    let mut sagas = Vec::new();
    for number in 0..7 {
        sagas.push(world.start(number).await);
    }
    world.cancel(sagas[3]).await;
    let routes = saga_routes(world.engine.clone());
    let (status, list) = call(&routes, "GET", "/v1/sagas?status=compensating&type=order", None).await;
    assert_eq!((status, &list["items"][0]["id"]), (StatusCode::OK, &json!(sagas[3])));
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    let (_, list) = call(&routes, "GET", "/v1/sagas?business_key=5", None).await;
    assert_eq!(list["items"][0]["id"], json!(sagas[5]));
    let (mut seen, mut path) = (Vec::new(), "/v1/sagas?limit=3".to_owned());
    loop {
        let (_, page) = call(&routes, "GET", &path, None).await;
        seen.extend(page["items"].as_array().unwrap().iter().map(|saga| saga["id"].clone()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/sagas?limit=3&cursor={cursor}");
    }
    sagas.reverse();
    assert_eq!(json!(seen), json!(sagas));
    for wrong in ["/v1/sagas?cursor=x", "/v1/sagas?status=odd", "/v1/sagas?limit=0", "/v1/sagas?what=1", "/v1/sagas/7"]
    {
        let (status, problem) = call(&routes, "GET", wrong, None).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{wrong}: {problem}");
    }
}

#[tokio::test]
async fn a_stuck_saga_says_why_and_retry_wants_a_reason_and_the_revision_that_was_seen() {
    let world = World::new().await;
    let saga = world.start(1).await;
    world.succeed(saga).await;
    world.succeed(saga).await;
    world.time_out().await;
    let routes = saga_routes(world.engine.clone());
    let retry = format!("/v1/sagas/{saga}/retry");
    let seen = world.revision(saga).await;
    let (status, problem) =
        call(&routes, "POST", &retry, Some(json!({ "reason": "x", "expected_revision": seen }))).await;
    assert_eq!((status, &problem["type"]), (StatusCode::CONFLICT, &json!("/problems/not-stuck")));
    world.time_out().await;
    let (_, stuck) = call(&routes, "GET", "/v1/sagas?status=stuck", None).await;
    let seen = stuck["items"][0]["revision"].as_i64().unwrap();
    let (_, view) = call(&routes, "GET", &format!("/v1/sagas/{saga}"), None).await;
    assert!(view["waits"]["why"].as_str().unwrap().contains("pivot `capture`"), "{view}");
    assert!(view["waits"]["unblocked_by"].as_str().unwrap().contains("retry"));
    for (wrong, expected) in [
        (json!({ "reason": " ", "expected_revision": seen }), StatusCode::UNPROCESSABLE_ENTITY),
        (json!({ "reason": "card 4111 1111 1111 1111", "expected_revision": seen }), StatusCode::UNPROCESSABLE_ENTITY),
        (json!({ "expected_revision": seen }), StatusCode::UNPROCESSABLE_ENTITY),
        (json!({ "reason": "x", "expected_revision": seen - 1 }), StatusCode::CONFLICT),
    ] {
        assert_eq!(call(&routes, "POST", &retry, Some(wrong)).await.0, expected);
    }
    let right = json!({ "reason": "the gateway is back", "expected_revision": seen });
    let (status, view) = call(&routes, "POST", &retry, Some(right)).await;
    assert_eq!((status, &view["status"]), (StatusCode::OK, &json!("running")));
    assert_eq!(world.trail(saga).await.last().unwrap(), "capture #3");
    let (status, _) = call(&routes, "GET", &format!("/v1/sagas/{}", uuid::Uuid::nil()), None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn payloads_are_shown_to_operators_only() {
    let world = World::new().await;
    let saga = world.start(1).await;
    let routes = saga_routes(world.engine.clone());
    let path = format!("/v1/sagas/{saga}?payloads=true");
    let (viewer, operator) =
        (routes.clone().layer(Extension(Role::Viewer)), routes.clone().layer(Extension(Role::Operator)));
    assert_eq!(call(&routes, "GET", &path, None).await.0, StatusCode::FORBIDDEN);
    assert_eq!(call(&viewer, "GET", &path, None).await.0, StatusCode::FORBIDDEN);
    let (status, view) = call(&operator, "GET", &path, None).await;
    assert_eq!((status, &view["input"]["order"]), (StatusCode::OK, &json!(1)));
}

//! The surroundings of every API, over a real listener.

use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::StatusCode;
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::trace::TracerProvider;
use reqwest::Method;
use saga_core::{
    envelope::Headers,
    http::{
        Api, Json, Limits, Path, Problem, Query, Role,
        idempotency::{IdempotencyKey, IdempotentAnswer, once},
    },
    outbox::NewMessage,
    part::{Cause, PartReport},
    service::{AdminAuth, Health, admin_router, messaging_migrations, serve},
    testkit::{TestDatabase, eventually},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, sync::Notify};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing_subscriber::layer::SubscriberExt;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    n: u8,
    #[serde(default)]
    text: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    #[serde(default)]
    #[allow(dead_code)]
    limit: u8,
}

/// Serves `api` for the length of a test; returns the base URL.
async fn start(api: impl Into<Api> + Send + 'static) -> (String, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let token = CancellationToken::new();
    tokio::spawn(serve(listener, api, token.clone()));
    (url, token)
}

fn echo() -> Router {
    Router::new()
        .route("/echo", post(|Json(body): Json<Body>| async move { Json(body) }))
        .route("/n/{n}", get(|Path(n): Path<u8>, Query(_): Query<Filter>| async move { n.to_string() }))
        .route("/panic", get(|| async { panic!("secret") as String }))
        .route("/slow", get(std::future::pending::<String>))
}

/// Status, problem type, and the first field that is named; asserts that it is a problem.
async fn problem(response: reqwest::Response) -> (u16, String, String) {
    let status = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    assert!(response.headers().contains_key("x-request-id"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["status"], status);
    assert!(!body["title"].as_str().unwrap().is_empty());
    let field = body["errors"][0]["field"].as_str().unwrap_or_default().to_owned();
    (status, body["type"].as_str().unwrap().to_owned(), field)
}

#[tokio::test]
async fn each_wrong_request_is_a_problem_that_names_what_is_wrong() {
    let limits = Limits { body_bytes: 1000, timeout: Duration::from_millis(200), ..Limits::default() };
    let (url, _stop) = start(Api::with_limits(echo(), limits)).await;
    let client = reqwest::Client::new();
    let post = |body: &str| {
        let request = client.post(format!("{url}/echo")).header("content-type", "application/json");
        request.body(body.to_owned()).send()
    };
    let get = |path: &str| client.get(format!("{url}{path}")).send();
    let is = |status: u16, kind: &str, field: &str| (status, format!("/problems/{kind}"), field.to_owned());

    assert_eq!(problem(post("{").await.unwrap()).await, is(400, "malformed", ""));
    assert_eq!(problem(post(r#"{"n":1,"m":2}"#).await.unwrap()).await, is(422, "validation", "m"));
    assert_eq!(problem(post(r#"{"n":-1}"#).await.unwrap()).await, is(422, "validation", "n"));
    assert_eq!(problem(post(r#"{"n":1,"text":"\u0000"}"#).await.unwrap()).await, is(422, "validation", "text"));
    let large = format!(r#"{{"n":1,"text":"{}"}}"#, "x".repeat(1000));
    assert_eq!(problem(post(&large).await.unwrap()).await, is(413, "too-large", ""));
    let chunked = reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>(large)]));
    let request = client.post(format!("{url}/echo")).header("content-type", "application/json").body(chunked);
    assert_eq!(problem(request.send().await.unwrap()).await, is(413, "too-large", ""));
    let form = client.post(format!("{url}/echo")).header("x-requested-with", "me").body("n=1").send();
    assert_eq!(problem(form.await.unwrap()).await, is(415, "content-type", ""));

    assert_eq!(problem(get("/nowhere").await.unwrap()).await, is(404, "not-found", ""));
    assert_eq!(problem(get("/echo").await.unwrap()).await, is(405, "method", ""));
    assert_eq!(problem(get("/n/300").await.unwrap()).await.0, 400);
    assert_eq!(problem(get("/n/1?limit=x").await.unwrap()).await, is(400, "malformed", "limit"));
    assert_eq!(problem(get("/n/1?page=2").await.unwrap()).await, is(400, "malformed", "page"));
    assert_eq!(problem(get("/n/%00").await.unwrap()).await, is(400, "malformed", ""));
    assert_eq!(problem(get("/panic").await.unwrap()).await, is(500, "internal", ""));
    assert_eq!(problem(get("/slow").await.unwrap()).await, is(503, "timeout", ""));

    let good = post(r#"{"n":1}"#).await.unwrap();
    assert_eq!(good.status(), 200);
}

#[tokio::test]
async fn a_404_points_to_no_document_that_is_not_there() {
    let (url, _stop) = start(echo()).await;
    for path in ["/nowhere", "/openapi.json"] {
        let answer = reqwest::get(format!("{url}{path}")).await.unwrap();
        assert_eq!(answer.status(), 404, "{path}");
        let said: Value = answer.json().await.unwrap();
        assert_eq!(said["detail"], "There is no such route.", "{path}: {said}");
    }
}

/// The headers of a message that a request with these headers causes.
async fn caused_by(headers: &[(&str, &str)]) -> Headers {
    let cause = || async { Json(NewMessage::tombstone("topic", "key", "type.v1").headers) };
    let router = Api::new(Router::new().route("/", get(cause))).into_router();
    let request = headers.iter().fold(http::Request::get("/").header("host", "localhost"), |request, (name, value)| {
        request.header(*name, *value)
    });
    let answer = router.oneshot(request.body(axum::body::Body::empty()).unwrap()).await.unwrap();
    let body = axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[tokio::test]
async fn of_a_callers_trace_context_only_what_is_valid_and_short_goes_on() {
    let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
    let subscriber = tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
    // With one subscriber alone, tracing would keep the first thread's interest for all threads.
    let _another = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    let _heard = tracing::subscriber::set_default(subscriber);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let carried = caused_by(&[("traceparent", &parent), ("tracestate", "shop=1")]).await;
    assert!(carried["traceparent"].contains(trace), "{carried:?}");
    assert_eq!(carried["tracestate"], "shop=1");

    let endless = format!("shop={}", "x".repeat(320_000));
    let carried = caused_by(&[("traceparent", &parent), ("tracestate", &endless), ("baggage", &endless)]).await;
    assert!(carried["traceparent"].contains(trace), "{:?}", carried.keys());
    assert_eq!(carried.keys().map(AsRef::as_ref).collect::<Vec<&str>>(), ["correlation-id", "traceparent"]);

    let forged = format!("{parent}{}", "0".repeat(320_000));
    let carried = caused_by(&[("traceparent", &forged), ("tracestate", "shop=1")]).await;
    assert!(!carried["traceparent"].contains(trace) && carried["traceparent"].len() == 55, "a trace of our own");
    assert!(!carried.contains_key("tracestate"), "it was of the trace that is no trace");
}

#[tokio::test]
async fn a_head_without_an_end_is_answered_431() {
    let (url, _stop) = start(echo()).await;
    let endless =
        reqwest::Client::new().get(format!("{url}/n/1")).header("tracestate", "x".repeat(1 << 20)).send().await;
    assert_eq!(endless.unwrap().status(), 431);
}

#[tokio::test]
async fn a_request_keeps_its_id() {
    let (url, _stop) = start(echo()).await;
    let client = reqwest::Client::new();
    let asked = client.get(format!("{url}/n/1")).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(asked.headers()["x-request-id"], "mine-1");
    let given = client.get(format!("{url}/n/1")).send().await.unwrap();
    assert_eq!(given.headers()["x-request-id"].len(), 36);
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_nothing_and_shutdown_waits_for_the_handler() {
    let (begun, go, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let router = Router::new().route("/work", {
        let (begun, go, done) = (begun.clone(), go.clone(), done.clone());
        post(move || {
            let (begun, go, done) = (begun.clone(), go.clone(), done.clone());
            async move {
                begun.notify_one();
                go.notified().await;
                done.fetch_add(1, Ordering::SeqCst);
                "done"
            }
        })
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/work", listener.local_addr().unwrap());
    let token = CancellationToken::new();
    let serving = tokio::spawn(serve(listener, Api::new(router), token.clone()));

    let client = tokio::spawn(async move { reqwest::Client::new().post(url).json(&json!({})).send().await });
    begun.notified().await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    token.cancel();
    go.notify_one();
    serving.await.unwrap().unwrap();
    assert_eq!(done.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn health_and_metrics_are_open_and_the_rest_is_by_role() {
    let token = CancellationToken::new();
    let health = Health::new(&token);
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    let auth = AdminAuth::new(Some("operator-operator".into()), Some("viewer-viewer-viewer".into()));
    let who = |axum::Extension(role): axum::Extension<Role>| async move { role.as_str() };
    let guarded = Router::new().route("/v1/thing", get(who).post(who));
    let (url, _stop) = start(admin_router(health.clone(), metrics, auth, guarded)).await;
    let client = reqwest::Client::new();
    let ask = |method: Method, path: &str, token: Option<&str>| {
        let request = client.request(method, format!("{url}{path}")).header("x-requested-with", "a test");
        let request = match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        async move { request.send().await.unwrap() }
    };
    assert_eq!(ask(Method::GET, "/readyz", None).await.status(), 503, "nobody has looked yet");
    health.look().await;
    for path in ["/livez", "/readyz", "/health", "/metrics"] {
        let answer = ask(Method::GET, path, None).await;
        assert_eq!(answer.status(), 200, "{path}");
        for (name, value) in [("x-content-type-options", "nosniff"), ("cache-control", "no-store")] {
            assert_eq!(answer.headers()[name], value, "{path}");
        }
        assert!(answer.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    }
    health.part("kafka", || async { PartReport::red(Cause::KafkaAway, "no broker at 10.0.0.7") });
    health.callers_need("database", || async { PartReport::red(Cause::DatabaseAway, "refused by 10.0.0.8") });
    health.look().await;
    let viewer = Some("viewer-viewer-viewer");
    for (path, token, status, says) in [
        ("/livez", None, 200, "live"),
        ("/readyz", None, 503, r#""checks":{"database":"database_away"}"#),
        ("/health", None, 503, r#""kafka":{"state":"red","cause":"kafka_away","since":"#),
        ("/v1/health", None, 401, "/problems/unauthorized"),
        ("/v1/health", viewer, 503, r#""reason":"no broker at 10.0.0.7""#),
    ] {
        let answer = ask(Method::GET, path, token).await;
        let (code, text) = (answer.status().as_u16(), answer.text().await.unwrap());
        assert!(code == status && text.contains(says), "{path} {code}: {text}");
        assert!(token.is_some() || !text.contains("10.0.0."), "{path} tells strangers: {text}");
    }

    for wrong in [None, Some(""), Some("operator"), Some("operator-operator2")] {
        assert_eq!(problem(ask(Method::GET, "/v1/thing", wrong).await).await.0, 401, "{wrong:?}");
    }
    assert_eq!(ask(Method::GET, "/v1/thing", viewer).await.text().await.unwrap(), "viewer");
    assert_eq!(problem(ask(Method::POST, "/v1/thing", viewer).await).await.0, 403);
    let operator = Some("operator-operator");
    assert_eq!(ask(Method::POST, "/v1/thing", operator).await.text().await.unwrap(), "operator");
    assert_eq!(ask(Method::GET, "/v1/nothing", operator).await.status(), 404);
}

#[derive(Clone)]
struct Counting {
    pool: PgPool,
    hold: Arc<Notify>,
    held: Arc<Notify>,
}

async fn count(
    State(state): State<Counting>,
    key: IdempotencyKey,
    Json(body): Json<Body>,
) -> Result<Response, Problem> {
    let Counting { pool, hold, held } = state;
    let text = body.text.clone();
    let done = once(&pool, "POST /count", &key, &body, move |tx| {
        Box::pin(async move {
            if text == "hold" {
                held.notify_one();
                hold.notified().await;
            }
            let n: i32 =
                sqlx::query_scalar("insert into counted default values returning n").fetch_one(&mut **tx).await?;
            if text == "refuse" {
                return Err(Problem::conflict("no", "No"));
            }
            Ok((IdempotentAnswer::json(StatusCode::CREATED, &json!({"n": n}))?.location(format!("/counted/{n}")), ()))
        })
    });
    Ok(done.await?.into_response())
}

#[tokio::test]
async fn one_key_has_one_effect_and_one_answer() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    sqlx::query("create table counted (n int generated always as identity)").execute(&database.pool).await.unwrap();
    let state = Counting { pool: database.pool.clone(), hold: Arc::default(), held: Arc::default() };
    let (url, _stop) = start(Router::new().route("/count", post(count)).with_state(state.clone())).await;
    let client = reqwest::Client::new();
    let send = |key: &str, text: &str| {
        let request = client.post(format!("{url}/count")).header("idempotency-key", key);
        request.json(&json!({"n": 1, "text": text})).send()
    };

    let first = send("a", "x").await.unwrap();
    let again = send("a", "x").await.unwrap();
    assert_eq!((first.status().as_u16(), again.status().as_u16()), (201, 201));
    assert_eq!(first.headers()["location"], again.headers()["location"]);
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(first.bytes().await.unwrap(), again.bytes().await.unwrap());

    assert_eq!(problem(send("a", "y").await.unwrap()).await.1, "/problems/idempotency-key-reused");
    let missing = client.post(format!("{url}/count")).json(&json!({"n": 1})).send().await.unwrap();
    assert_eq!(problem(missing).await, (400, "/problems/idempotency-key".into(), "Idempotency-Key".into()));

    // Of keys that are mere numbers, some look like a card's by chance: they are taken.
    assert_eq!(send("4111111111111111", "x").await.unwrap().status(), 201);

    let slow = tokio::spawn(send("b", "hold"));
    state.held.notified().await;
    assert_eq!(problem(send("b", "hold").await.unwrap()).await.1, "/problems/in-flight");
    state.hold.notify_one();
    assert_eq!(slow.await.unwrap().unwrap().status(), 201);
    assert_eq!(send("b", "hold").await.unwrap().status(), 201, "the stored answer");

    // A refusal is not remembered: the same request may succeed later.
    assert_eq!(problem(send("c", "refuse").await.unwrap()).await.1, "/problems/no");
    assert_eq!(problem(send("c", "refuse").await.unwrap()).await.1, "/problems/no");

    let effects: i64 = sqlx::query_scalar("select count(*) from counted").fetch_one(&database.pool).await.unwrap();
    assert_eq!(effects, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_hang_up_lose_nothing_that_was_acknowledged() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    sqlx::query("create table counted (n int generated always as identity)").execute(&database.pool).await.unwrap();
    let state = Counting { pool: database.pool.clone(), hold: Arc::default(), held: Arc::default() };
    let (url, _stop) = start(Router::new().route("/count", post(count)).with_state(state)).await;
    let client = reqwest::Client::new();
    let mut acknowledged = 0;
    for n in 0..1000_u64 {
        let request =
            client.post(format!("{url}/count")).header("idempotency-key", format!("k{n}")).json(&json!({"n": 1}));
        let answer = tokio::time::timeout(Duration::from_micros(n * 7 % 3000), request.send()).await;
        acknowledged += i64::from(matches!(answer, Ok(Ok(response)) if response.status() == 201));
    }
    let settled = eventually(Duration::from_secs(20), || async {
        // One transaction writes effects and stored answers, so they agree at every moment.
        let (effects, answers): (i64, i64) =
            sqlx::query_as("select (select count(*) from counted), (select count(*) from idempotency_answer)")
                .fetch_one(&database.pool)
                .await
                .unwrap();
        assert_eq!(effects, answers);
        let open: i64 = sqlx::query_scalar(
            "select count(*)
               from pg_stat_activity
              where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'",
        )
        .fetch_one(&database.pool)
        .await
        .unwrap();
        (open == 0 && effects >= acknowledged).then_some(effects)
    })
    .await;
    assert!(settled >= acknowledged, "{settled} effects, {acknowledged} acknowledged");
}

//! Slow and hostile callers, over a real listener: no other caller waits for what they hold.

use axum::{
    Router,
    routing::{get, post},
};
use reqwest::{Client, Method};
use saga_core::{
    http::{Api, Json, Limits},
    service::{AdminAuth, Health, admin_router, serve},
    testkit::eventually,
};
use serde_json::{Value, json};
use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);
/// So long that a test which waits for it fails.
const NEVER: Duration = Duration::from_secs(3_600);
/// The head of a POST whose body never comes whole.
const HALF: &str =
    "POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";

/// A test's means: the listener's address, a signal for each request to `/work`, and the permission to answer it.
struct Served {
    address: SocketAddr,
    begun: Arc<Semaphore>,
    go: Arc<Notify>,
    client: Client,
    _stop: tokio_util::sync::DropGuard,
}

async fn served(limits: Limits) -> Served {
    let (begun, go) = (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()));
    let work = {
        let (begun, go) = (Arc::clone(&begun), Arc::clone(&go));
        move || async move {
            begun.add_permits(1);
            go.notified().await;
            "done"
        }
    };
    let router = Router::new()
        .route("/quick", get(|| async { "here" }))
        .route("/echo", post(|Json(body): Json<Value>| async move { Json(body) }))
        .route("/work", get(work));
    let (address, stop) = listen(Api::with_limits(router, limits)).await;
    let client = Client::builder().timeout(PATIENCE).build().unwrap();
    Served { address, begun, go, client, _stop: stop.drop_guard() }
}

async fn listen(api: Api) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    tokio::spawn(serve(listener, api, stop.clone()));
    (address, stop)
}

impl Served {
    fn ask(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address))
    }

    async fn connection(&self, says: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(says.as_bytes()).await.unwrap();
        stream
    }

    async fn quick(&self) -> u16 {
        self.ask(Method::GET, "/quick").send().await.unwrap().status().as_u16()
    }
}

/// The server's answer until it closes the connection.
async fn heard(mut stream: TcpStream) -> String {
    let mut heard = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut heard)).await.expect("the connection is closed");
    // A connection that is closed with something unread is reset.
    assert!(read.is_ok() || heard.is_empty(), "{read:?}");
    String::from_utf8(heard).unwrap()
}

#[tokio::test]
async fn bodies_that_never_come_whole_keep_nobody_waiting() {
    let limits = Limits { concurrency: 2, body_within: NEVER, slot_within: NEVER, ..Limits::default() };
    let served = served(limits).await;
    let mut half = Vec::new();
    for _ in 0..64 {
        half.push(served.connection(HALF).await);
    }
    let whole = served.ask(Method::POST, "/echo").json(&json!({ "n": 1 })).send().await.unwrap();
    assert_eq!((whole.status().as_u16(), served.quick().await), (200, 200));
    // The slow clients are still there, and each may still send the rest.
    let mut last = half.pop().unwrap();
    last.write_all(format!("{:>98}}}", "").as_bytes()).await.unwrap();
    let mut answer = [0; 15];
    timeout(PATIENCE, last.read_exact(&mut answer)).await.expect("an answer").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_is_answered_408_and_its_connection_closed() {
    let served = served(Limits { body_within: Duration::from_millis(100), ..Limits::default() }).await;
    let heard = heard(served.connection(HALF).await).await;
    assert!(heard.starts_with("HTTP/1.1 408 ") && heard.contains("/problems/slow"), "{heard}");
}

#[tokio::test]
async fn a_request_that_finds_no_slot_is_shed_and_asked_to_come_again() {
    let limits = Limits { concurrency: 1, slot_within: Duration::from_millis(100), ..Limits::default() };
    let served = served(limits).await;
    let working = tokio::spawn(served.ask(Method::GET, "/work").send());
    served.begun.acquire().await.unwrap().forget();
    let shed = served.ask(Method::GET, "/quick").send().await.unwrap();
    assert_eq!((shed.status().as_u16(), &shed.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(shed.json::<Value>().await.unwrap()["type"], "/problems/busy");
    served.go.notify_one();
    assert_eq!(working.await.unwrap().unwrap().status(), 200);
    assert_eq!(served.quick().await, 200, "there is room again");
}

#[tokio::test]
async fn connections_that_send_nothing_or_half_make_room_and_those_at_work_stay() {
    let served = served(Limits { connections: 4, body_within: NEVER, ..Limits::default() }).await;
    let working = tokio::spawn(served.ask(Method::GET, "/work").send());
    served.begun.acquire().await.unwrap().forget();
    let mut silent = Vec::new();
    for says in ["", "GET /quick HTT", HALF].into_iter().cycle().take(12) {
        silent.push(served.connection(says).await);
    }
    // A new client is served at once, though all places are taken.
    assert_eq!(served.quick().await, 200);
    for oldest in silent.drain(..8) {
        assert_eq!(heard(oldest).await, "");
    }
    served.go.notify_one();
    assert_eq!(working.await.unwrap().unwrap().text().await.unwrap(), "done");
}

#[tokio::test]
async fn a_client_is_told_to_come_again_when_all_connections_are_at_work() {
    let served = served(Limits { connections: 2, ..Limits::default() }).await;
    let working: Vec<_> = (0..2).map(|_| tokio::spawn(served.ask(Method::GET, "/work").send())).collect();
    served.begun.acquire_many(2).await.unwrap().forget();
    let heard = heard(TcpStream::connect(served.address).await.unwrap()).await;
    assert!(heard.starts_with("HTTP/1.1 503 ") && heard.contains("retry-after: 1\r\n"), "{heard}");
    served.go.notify_waiters();
    for answer in working {
        assert_eq!(answer.await.unwrap().unwrap().status(), 200);
    }
    // There is room again.
    let there =
        || async { served.ask(Method::GET, "/quick").send().await.is_ok_and(|a| a.status() == 200).then_some(()) };
    eventually(PATIENCE, there).await;
}

#[tokio::test]
async fn a_head_beyond_its_bound_is_answered_431_or_its_connection_closed() {
    let served = served(Limits::default()).await;
    for (bytes, served_it) in [(30_000, true), (100_000, false), (320_000, false)] {
        let filler = "x".repeat(bytes);
        let head =
            format!("GET /quick HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntracestate: {filler}\r\n\r\n");
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        let mut answer = String::new();
        let asked = async {
            // The server may answer and close before it has read all, and the unread rest resets the connection.
            stream.write_all(head.as_bytes()).await?;
            stream.read_to_string(&mut answer).await
        };
        let asked = timeout(PATIENCE, asked).await.expect("the connection is closed");
        assert_eq!(asked.is_ok() && answer.starts_with("HTTP/1.1 200 "), served_it, "{bytes}: {answer}");
        assert!(served_it || answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{bytes}: {answer}");
    }
}

#[tokio::test]
async fn an_address_that_guesses_tokens_is_stopped_before_its_tokens_are_compared() {
    let (right, wrong) = ("operator-operator", "operator-operatoR");
    let health = Health::new(&CancellationToken::new());
    // Of the tests in this process, only this one shows wrong tokens.
    let metrics = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder().unwrap();
    let guarded = Router::new().route("/v1/thing", get(|| async { "here" }));
    let auth = AdminAuth::new(Some(right.into()), None);
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let (port, stop) = (listener.local_addr().unwrap().port(), CancellationToken::new());
    tokio::spawn(serve(listener, Api::new(admin_router(health, metrics, auth, guarded)), stop.clone()));
    // The clients have two addresses of the loopback network.
    let of =
        |address: [u8; 4]| Client::builder().timeout(PATIENCE).local_address(IpAddr::from(address)).build().unwrap();
    let (guesser, operator) = (of([127, 0, 0, 2]), of([127, 0, 0, 3]));
    let refusals = AtomicUsize::new(0);
    let ask = async |client: &Client, token: &str| {
        let answer = client.get(format!("http://127.0.0.1:{port}/v1/thing")).bearer_auth(token).send().await.unwrap();
        let status = answer.status().as_u16();
        refusals.fetch_add(usize::from(status != 200), Ordering::Relaxed);
        status
    };
    // One guess is forgiven a second, so how many it takes depends on how fast this machine is.
    let refused = eventually(PATIENCE, async || (ask(&guesser, wrong).await == 429).then_some(()));
    refused.await;
    // A right token reveals nothing to the guesser now. (Once a second one is compared: it guesses on until then.)
    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push((ask(&guesser, wrong).await, ask(&guesser, right).await));
    }
    assert!(answers.contains(&(429, 429)), "{answers:?}");
    assert_eq!(ask(&operator, right).await, 200, "another address is not held up");
    // An operator sees the guesses, also those that were not compared.
    let shown = operator.get(format!("http://127.0.0.1:{port}/metrics")).send().await.unwrap().text().await.unwrap();
    let counted = shown.lines().find_map(|line| line.strip_prefix("http_refused_total{reason=\"token\"} "));
    assert_eq!(counted, Some(refusals.into_inner().to_string().as_str()), "{shown}");
    stop.cancel();
}

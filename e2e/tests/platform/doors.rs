//! Every listener of the running platform keeps pages of other sites out, and serves its callers while clients hold all
//! they can.
//!
//! The effect of each bound by itself is shown in `saga-core/tests/doors.rs` and `order-svc/tests/it/live.rs`.

use e2e::{
    orders::Wish,
    platform::{Platform, beside_others, unaudited},
};
use futures::future::join_all;
use reqwest::{Method, StatusCode};
use saga_core::{service, testkit::eventually};
use serde_json::Value;
use stack::service::Service::{self, Gateway, Inventory, Orders, Payments, Relay};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use uuid::Uuid;

/// More requests than a listener works on at once.
const MANY: usize = 1_030;
/// More connections than a listener has room for.
const TOO_MANY: usize = 2_100;
/// How long a listener may take to answer while other clients hold what they can. On an idle machine it takes
/// milliseconds.
const SOON: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);

/// A listener, and a request of each kind that it answers.
struct Listener {
    name: String,
    url: String,
    /// A path that is answered 200 without a token.
    get: &'static str,
    /// A route for POST.
    post: &'static str,
}

const CANCEL: &str = "/v1/orders/00000000-0000-0000-0000-000000000000/cancel";
const RETRY: &str = "/v1/sagas/00000000-0000-0000-0000-000000000000/retry";

fn listeners(platform: &Platform) -> Vec<Listener> {
    let api = |service: Service, get, post| (service, platform.stack.url(service), "API", get, post);
    let admin = |service: Service, post| (service, platform.stack.admin_url(service), "admin", "/livez", post);
    let all = [
        api(Orders, "/v1/orders", CANCEL),
        api(Payments, "/v1/payments", "/v1/payments"),
        api(Inventory, "/v1/items", "/v1/items"),
        api(Gateway, "/openapi.json", "/v1/authorizations"),
        admin(Orders, RETRY),
        admin(Payments, "/v1/nothing"),
        admin(Inventory, "/v1/nothing"),
        admin(Gateway, "/v1/nothing"),
        admin(Relay, "/v1/outboxes/orders/pause"),
    ];
    let all =
        all.map(|(service, url, kind, get, post)| Listener { name: format!("{service:?}, {kind}"), url, get, post });
    all.into()
}

impl Listener {
    async fn status(&self, platform: &Platform, method: Method, headers: &[(&str, &str)]) -> (u16, String) {
        let path = if method == Method::POST { self.post } else { self.get };
        let mut request = platform.http.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let status = answer.status().as_u16();
        let problem = answer.json::<Value>().await.unwrap_or_default();
        (status, problem["type"].as_str().unwrap_or_default().to_owned())
    }

    /// Opens connections that have sent a part of a request, and wait.
    async fn held_by(&self, clients: usize, part: &str) -> Vec<TcpStream> {
        let one = || async {
            let mut stream = self.connect().await;
            stream.write_all(part.as_bytes()).await.expect("a connection takes what it is sent");
            stream
        };
        join_all((0..clients).map(|_| one())).await
    }

    async fn connect(&self) -> TcpStream {
        let address = self.url.strip_prefix("http://").expect("a listener's URL");
        TcpStream::connect(address).await.expect("a connection is accepted")
    }

    /// The first line of the answer to what is sent; empty when the connection is closed instead.
    async fn first_line(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        // The listener may close before it has read all.
        stream.write_all(request.as_bytes()).await.ok();
        let mut answer = [0; 64];
        let read = stream.read(&mut answer).await.unwrap_or_default();
        String::from_utf8_lossy(&answer[..read]).lines().next().unwrap_or_default().to_owned()
    }

    async fn serves(&self, platform: &Platform) {
        let began = Instant::now();
        let (status, _) = self.status(platform, Method::GET, &[]).await;
        assert!(status == 200 && began.elapsed() < SOON, "{}: {status} {:?}", self.name, began.elapsed());
    }
}

#[test]
fn no_listener_answers_a_page_of_another_site() {
    beside_others(async |platform| {
        for listener in listeners(platform) {
            let own = listener.url.replace("127.0.0.1", "localhost");
            for (method, headers, status, kind) in [
                (Method::GET, &[("host", "evil.example")][..], 421, "/problems/misdirected"),
                (Method::GET, &[("host", "127.0.0.1.evil.example:8080")], 421, "/problems/misdirected"),
                (Method::GET, &[("host", "order-svc")], 421, "/problems/misdirected"),
                (Method::GET, &[("origin", "http://evil.example")], 421, "/problems/foreign-origin"),
                (Method::GET, &[("origin", "null")], 421, "/problems/foreign-origin"),
                (Method::POST, &[("origin", "http://evil.example"), ("content-type", "application/json")], 421, ""),
                (Method::POST, &[], 415, "/problems/content-type"),
                (Method::POST, &[("content-type", "text/plain")], 415, "/problems/content-type"),
                (Method::POST, &[("content-type", "application/x-www-form-urlencoded")], 415, "/problems/content-type"),
                (Method::GET, &[("host", "localhost")], 200, ""),
                (Method::GET, &[("host", own.trim_start_matches("http://")), ("origin", &own)], 200, ""),
            ] {
                let (is, said) = listener.status(platform, method, headers).await;
                assert!(is == status && said.starts_with(kind), "{}: {headers:?}: {is} {said}", listener.name);
            }
        }
    });
}

#[test]
fn every_listener_serves_while_a_thousand_clients_send_half_a_request() {
    service::open_files();
    beside_others(async |platform| {
        for listener in listeners(platform) {
            let head =
                format!("POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n", listener.post);
            for part in [head.clone(), format!("{head}content-length: 100\r\n\r\n{{")] {
                let held = listener.held_by(MANY, &part).await;
                listener.serves(platform).await;
                drop(held);
            }
        }
    });
}

#[test]
fn every_listener_bears_long_heads_and_more_clients_than_it_has_room_for() {
    service::open_files();
    beside_others(async |platform| {
        for listener in listeners(platform) {
            let endless = "a".repeat(1_000_000);
            let request = format!("GET {} HTTP/1.1\r\nhost: localhost\r\nx-long: {endless}\r\n\r\n", listener.get);
            let line = listener.first_line(&request).await;
            assert!(line.is_empty() || line.contains(" 431 "), "{}: {line}", listener.name);
            let held = listener.held_by(TOO_MANY, "").await;
            listener.serves(platform).await;
            drop(held);
        }
    });
}

#[test]
fn a_thousand_requests_that_wait_for_an_order_keep_nobody_else_waiting() {
    service::open_files();
    unaudited(async |platform| {
        let body = Wish::of(&platform.item("waited-for", 100, 2_000).await, 1).body();
        // No payment is made, so no order comes to its end.
        platform.stack.service(Payments).process.kill();
        let client = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client");
        let url = format!("{}/v1/orders", platform.stack.url(Orders));
        let place = async |answered_at_once: &AtomicUsize| {
            let key = Uuid::new_v4().to_string();
            let request = client.post(&url).header("idempotency-key", key).header("prefer", "wait=30").json(&body);
            loop {
                let answer = request.try_clone().expect("its body is text").send().await.expect("an answer");
                match (answer.status(), answer.headers().contains_key("preference-applied")) {
                    (StatusCode::ACCEPTED, true) => return true,
                    (StatusCode::ACCEPTED, false) => {
                        answered_at_once.fetch_add(1, Ordering::Relaxed);
                        return false;
                    }
                    // The request is shed, on a machine that places few orders a second.
                    (status, _) => {
                        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
                        assert!(answer.headers().contains_key("retry-after"));
                        if answered_at_once.load(Ordering::Relaxed) > 0 {
                            return false;
                        }
                    }
                }
            }
        };
        let answered_at_once = AtomicUsize::new(0);
        let waiting = join_all((0..MANY).map(|_| place(&answered_at_once)));
        // Requests beyond the cap are answered at once, so some are answered while others wait.
        let read = || async {
            let began = Instant::now();
            let answer = client.get(&url).send().await.ok()?;
            let placed = answer.json::<Value>().await.ok()?["items"].as_array()?.len();
            (placed > 0 && began.elapsed() < SOON).then_some(())
        };
        let (waited, ()) = tokio::join!(waiting, eventually(PATIENCE, read));
        let waited = waited.into_iter().filter(|waited| *waited).count();
        let answered_at_once = answered_at_once.into_inner();
        assert!(waited > 0 && answered_at_once > 0, "{waited} waited, {answered_at_once} were answered at once");
    });
}

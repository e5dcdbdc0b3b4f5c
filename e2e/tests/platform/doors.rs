//! Every listener of the running platform keeps pages of other sites out, reads no body beyond its bound, slows guesses
//! at its token down, and serves its callers while clients hold all they can.
//!
//! The effect of each bound by itself is shown in `saga-core/tests/doors.rs` and `order-svc/tests/it/live.rs`.

use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone, beside_others, unaudited},
};
use futures::future::join_all;
use order_svc::live::MAX_OF_ONE;
use reqwest::{Method, Response, StatusCode};
use saga_core::{service, testkit::eventually};
use serde_json::Value;
use stack::service::Service::{self, Gateway, Inventory, Orders, Payments, Relay};
use std::{
    net::IpAddr,
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
/// The longest body, in bytes, of any listener.
const BODY_MAX: usize = 64 * 1024;
/// The streams of one order that are opened beyond the cap.
const TOO_MANY_STREAMS: usize = 8;
/// The tokens of the admin listeners, and of the provider.
const TOKENS: &[(&str, &str)] = &[("ADMIN_TOKEN", "the-operators-own-token"), ("GATEWAY_TOKEN", "the-shops-own-token")];
/// More guesses than an address has, with those that it gets back meanwhile on a busy machine.
const GUESSES: usize = 300;

/// A listener, and a request of each kind that it answers.
struct Listener {
    service: Service,
    name: String,
    url: String,
    /// A path that is answered 200 without a token.
    get: &'static str,
    /// A route for POST.
    post: &'static str,
    /// What is behind a token, if anything is.
    guarded: Option<Guarded>,
}

/// What a listener with a token answers.
#[derive(Clone, Copy)]
struct Guarded {
    path: &'static str,
    token: &'static str,
    /// The status for a token that is not compared, because too many wrong ones came from its address.
    too_many: u16,
}

const CANCEL: &str = "/v1/orders/00000000-0000-0000-0000-000000000000/cancel";
const RETRY: &str = "/v1/sagas/00000000-0000-0000-0000-000000000000/retry";

fn listeners(platform: &Platform) -> Vec<Listener> {
    let [(_, operator), (_, shop)] = *TOKENS else { panic!("two kinds of tokens") };
    let of_admin = Some(Guarded { path: "/v1/health", token: operator, too_many: 429 });
    // A caller of the provider goes by the status: what a wrong token is answered bars it.
    let of_provider = Some(Guarded { path: "/v1/ledger", token: shop, too_many: 401 });
    let api = |service: Service, get, post, guarded| (service, platform.stack.url(service), "API", get, post, guarded);
    let admin =
        |service: Service, post| (service, platform.stack.admin_url(service), "admin", "/livez", post, of_admin);
    let all = [
        api(Orders, "/v1/orders", CANCEL, None),
        api(Payments, "/v1/payments", "/v1/payments", None),
        api(Inventory, "/v1/items", "/v1/items", None),
        api(Gateway, "/openapi.json", "/v1/authorizations", of_provider),
        admin(Orders, RETRY),
        admin(Payments, "/v1/nothing"),
        admin(Inventory, "/v1/nothing"),
        admin(Gateway, "/v1/nothing"),
        admin(Relay, "/v1/outboxes/orders/pause"),
    ];
    let all = all.map(|(service, url, kind, get, post, guarded)| {
        let name = format!("{service:?}, {kind}");
        Listener { service, name, url, get, post, guarded }
    });
    all.into()
}

/// How many requests and connections a process has turned away for this reason.
async fn refused(platform: &Platform, service: Service, reason: &str) -> usize {
    let metrics = platform.http.get(platform.admin(service, "/metrics")).send().await.expect("the listener answers");
    let metrics = metrics.text().await.expect("the metrics can be read");
    let series = format!("http_refused_total{{reason=\"{reason}\"}} ");
    let counted = metrics.lines().find_map(|line| line.strip_prefix(&series));
    counted.map_or(0, |counted| counted.parse().expect("a counter counts"))
}

impl Listener {
    async fn status(&self, platform: &Platform, method: Method, headers: &[(&str, &str)]) -> (u16, String) {
        let path = if method == Method::POST { self.post } else { self.get };
        let mut request = platform.http.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.is_data(&answer);
        let status = answer.status().as_u16();
        let problem = answer.json::<Value>().await.unwrap_or_default();
        (status, problem["type"].as_str().unwrap_or_default().to_owned())
    }

    /// Asserts that no browser takes the answer for a page, and no cache keeps it.
    fn is_data(&self, answer: &Response) {
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cache-control", "no-store"),
        ] {
            let is = answer.headers().get(name).and_then(|is| is.to_str().ok());
            assert_eq!(is, Some(value), "{}: {name} of {}, {}", self.name, answer.url(), answer.status());
        }
    }

    /// Asks for what is behind the token, with this one.
    async fn shown(&self, client: &reqwest::Client, guarded: Guarded, token: Option<&str>) -> Response {
        let request = client.get(format!("{}{}", self.url, guarded.path));
        let request = token.into_iter().fold(request, |request, token| request.bearer_auth(token));
        let answer = request.send().await.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.is_data(&answer);
        answer
    }

    /// Guesses until the listener compares no more tokens from this address; returns how often.
    async fn guessed_at(&self, platform: &Platform, guarded: Guarded) -> usize {
        for guesses in 1..GUESSES {
            let guess = format!("{}{guesses}", guarded.token);
            let answer = self.shown(&platform.http, guarded, Some(&guess)).await;
            let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
            assert_eq!(headers["content-type"], "application/problem+json", "{}", self.name);
            let problem: Value = answer.json().await.expect("a problem");
            if headers.contains_key("retry-after") {
                assert_eq!((status, &problem["status"]), (guarded.too_many, &status.into()), "{}", self.name);
                return guesses;
            }
            assert_eq!((status, &problem["type"]), (401, &"/problems/unauthorized".into()), "{}", self.name);
            assert!(headers.contains_key("www-authenticate"), "{}", self.name);
        }
        panic!("{}: {GUESSES} guesses, and each was compared", self.name);
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
            // The page that shows an API runs its own scripts, and is shown within no other.
            let page = platform.http.get(format!("{}/docs/", listener.url)).send().await.expect("an answer");
            if page.status() == 404 {
                assert!(listener.name.ends_with("admin"), "{} shows no page", listener.name);
                continue;
            }
            assert_eq!(page.status(), 200, "{}", listener.name);
            assert_eq!(page.headers()["x-content-type-options"], "nosniff", "{}", listener.name);
            let policy = page.headers()["content-security-policy"].to_str().expect("text");
            assert!(policy.starts_with("default-src 'self'") && policy.ends_with("frame-ancestors 'none'"), "{policy}");
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
            let head = format!("POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json", listener.post);
            let beyond = BODY_MAX + 1;
            let announced = format!("{head}\r\ncontent-length: {beyond}\r\n\r\n{{");
            // More would follow: the listener does not wait for it.
            let endless =
                format!("{head}\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{}", 2 * beyond, "x".repeat(beyond));
            for request in [announced, endless] {
                let line = listener.first_line(&request).await;
                assert!(line.contains(" 413 "), "{}: {line}", listener.name);
            }
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
                        let seconds = answer.headers()["retry-after"].to_str().expect("a number").parse();
                        if answered_at_once.load(Ordering::Relaxed) > 0 {
                            return false;
                        }
                        tokio::time::sleep(Duration::from_secs(seconds.expect("a number"))).await;
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

#[test]
fn guesses_at_a_listeners_token_are_slowed_down_and_keep_no_other_address_out() {
    alone(async |platform| {
        let processes = Service::ALL.map(|service| platform.stack.service(service));
        join_all(processes.map(async |running| {
            running.process.stop().await;
            running.process.start_again_with(TOKENS).expect("the program is there");
            running.ready().await.expect("it begins with its tokens");
        }))
        .await;
        let elsewhere =
            reqwest::Client::builder().local_address(IpAddr::from([127, 0, 0, 2])).timeout(PATIENCE).build();
        let elsewhere = elsewhere.expect("a client");
        for listener in listeners(platform) {
            let Some(guarded) = listener.guarded else { continue };
            let counted = async || refused(platform, listener.service, "token").await;
            let before = counted().await;
            // A caller that shows nothing guesses at nothing.
            assert_eq!(listener.shown(&platform.http, guarded, None).await.status(), 401, "{}", listener.name);
            assert_eq!(counted().await, before, "{}", listener.name);
            let guesses = listener.guessed_at(platform, guarded).await;
            assert!(guesses > 32, "{}: {guesses} guesses", listener.name);
            assert_eq!(counted().await, before + guesses, "{}", listener.name);
            let began = Instant::now();
            let status = listener.shown(&elsewhere, guarded, Some(guarded.token)).await.status();
            assert!(status == 200 && began.elapsed() < SOON, "{}: {status} {:?}", listener.name, began.elapsed());
            listener.serves(platform).await;
        }
        join_all(processes.map(async |running| running.restart().await.expect("it starts as it was"))).await;
    });
}

#[test]
fn the_oldest_of_too_many_streams_of_an_order_end_and_the_others_see_its_end() {
    alone(async |platform| {
        let sku = platform.item("followed", 100, 100).await;
        // The order waits for its payment.
        let gateway = platform.stack.service(Gateway);
        gateway.process.kill();
        let order = platform.place(&Wish::of(&sku, 1)).await;
        let client = reqwest::Client::builder().timeout(SETTLED_WITHIN).build().expect("a client");
        let before = refused(platform, Orders, "old_stream").await;
        let mut streams = Vec::new();
        for n in 0..MAX_OF_ONE + TOO_MANY_STREAMS {
            let url = format!("{}/v1/orders/{order}/events", platform.stack.url(Orders));
            let stream = client.get(url).send().await.expect("an answer");
            assert_eq!(stream.status(), StatusCode::OK, "{n}");
            assert_eq!(stream.headers()["content-type"], "text/event-stream", "{n}");
            streams.push(stream);
        }
        for oldest in streams.drain(..TOO_MANY_STREAMS) {
            let said = oldest.text().await.expect("an end that is no error");
            assert!(said.contains("\"pending\"") && !said.contains("\"confirmed\""), "{said}");
        }
        assert_eq!(refused(platform, Orders, "old_stream").await, before + TOO_MANY_STREAMS);
        for listener in listeners(platform).into_iter().filter(|listener| listener.service == Orders) {
            listener.serves(platform).await;
        }
        gateway.start_again().await.expect("it comes back");
        for said in join_all(streams.into_iter().map(Response::text)).await {
            let said = said.expect("an end that is no error");
            assert!(said.contains("\"confirmed\""), "{said}");
        }
    });
}

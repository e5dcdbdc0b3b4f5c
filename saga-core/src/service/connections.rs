//! HTTP connections: accepted until the process is asked to stop, and closed when no request comes.
//!
//! `http::Limits` bounds in size and time what a client sends once its request's head is there. Before that nothing of
//! axum's sees it. A client that connects and sends nothing, or a header line a minute, would hold a file descriptor
//! for ever. A head has a bound in time and in bytes, and connections have a bound in number. When it is reached, the
//! one that has waited longest for its client is closed.

use crate::http::{Api, connections::Connections, count_refused};
use axum::{Router, serve::Listener};
use http::Request;
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// How long the head of a request may take, the first of a connection or the next. It is also how long an idle
/// connection is kept, and proxies keep theirs for 60 s. The client has to be the side that hangs up, because a request
/// that it sends at that moment is lost.
const HEAD_MAX: Duration = Duration::from_secs(75);
/// How much of a head is read before it is refused, in bytes: the read that goes beyond it may double that. Proxies and
/// browsers send a few KiB.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// How long connections may take to end when the process is asked to stop. Half a head, or an answer that no client
/// reads, must not take the whole of [`GRACE_PERIOD`](super::supervisor::GRACE_PERIOD). The process waits anyway for the requests
/// that were understood.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(10);
const _: () = assert!(LAST_ANSWERS_MAX.as_secs() < super::supervisor::GRACE_PERIOD.as_secs());

/// Serves HTTP/1.1 on `listener` until `token` is cancelled. Then finishes the requests in flight, also those whose
/// client hung up.
///
/// # Errors
/// None today: an error of one connection ends that connection.
pub async fn serve(listener: TcpListener, api: impl Into<Api>, token: CancellationToken) -> Result<(), std::io::Error> {
    serve_within(HEAD_MAX, LAST_ANSWERS_MAX, listener, api.into(), token).await;
    Ok(())
}

async fn serve_within(
    head_max: Duration,
    last_answers_max: Duration,
    listener: TcpListener,
    api: Api,
    token: CancellationToken,
) {
    let open = Connections::new(connections(api.limits.connections));
    let loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    let (router, in_flight) = api.surrounded(loopback);
    let connections = accept(listener, router, head_max, &open, token).await;
    if timeout(last_answers_max, connections.shutdown()).await.is_err() {
        tracing::info!("stopping without the clients that send half a request, or do not read their answer");
    }
    in_flight.close();
    in_flight.wait().await;
}

/// The open files that the process asks the system for, which gives a process 1,024, or 256 in many shells. They are
/// enough for two listeners, a pool and Kafka. macOS gives no more than this, whatever limit it reports.
const OPEN_FILES: u64 = 10_240;

/// Asks the system for as many open files as this crate needs, and returns how many it gives.
pub fn open_files() -> u64 {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard.min(OPEN_FILES) => {
            let wanted = hard.min(OPEN_FILES);
            setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_or(soft, |()| wanted)
        }
        Ok((soft, _)) => soft,
        Err(_) => 1024,
    }
}

/// As many connections as wanted, or a quarter of the files that the process may open.
fn connections(wanted: usize) -> usize {
    let files = open_files();
    let most = wanted.min(usize::try_from(files / 4).unwrap_or(usize::MAX));
    if most < wanted {
        tracing::warn!(
            files,
            connections = most,
            "fewer connections than usual: the process may open few files (ulimit -n)"
        );
    }
    most
}

/// Accepts connections until `token` is cancelled; returns those that there are then.
async fn accept(
    mut listener: TcpListener,
    router: Router,
    head_max: Duration,
    open: &Arc<Connections>,
    token: CancellationToken,
) -> GracefulShutdown {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_max).max_buf_size(HEAD_BYTES_MAX);
    // The router's routes are made ready once, not for each request.
    let router = router.with_state(());
    let connections = GracefulShutdown::new();
    // axum's listener takes care of errors of accepting: it waits when there are no file descriptors left.
    while let Some((stream, peer)) = token.run_until_cancelled(Listener::accept(&mut listener)).await {
        let Some(entered) = open.enter(peer.ip()) else {
            turn_away(&stream);
            continue;
        };
        let came_on = entered.connection.clone();
        let service = router.clone().map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(came_on.clone());
            request
        });
        let service = TowerToHyperService::new(service);
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            tokio::select! {
                // This branch comes first: the connection must not take up a request whose answer would go nowhere.
                biased;
                () = entered.must_close() => tracing::debug!("a connection made room for a new one"),
                // The client ended it: it hung up, kept silent, or does not speak HTTP.
                ended = connection => ended.unwrap_or_else(|error| tracing::debug!(%error, "a connection ended")),
            }
        });
    }
    connections
}

/// Each connection is worked for, so the answer asks the client to come again.
fn turn_away(stream: &TcpStream) {
    count_refused("connection");
    let answer =
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    // The kernel has room for this much of a new connection, or the client hears nothing.
    stream.try_write(answer).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        sync::mpsc,
        task::JoinHandle,
    };

    /// A time in which everything that is meant to end by itself has ended.
    const SOON: Duration = Duration::from_secs(20);
    const NEVER: Duration = Duration::from_secs(3_600);
    const REQUEST: &str = "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";

    struct Served {
        address: std::net::SocketAddr,
        token: CancellationToken,
        serving: JoinHandle<()>,
        begun: mpsc::Receiver<()>,
    }

    /// A service that takes `work` to answer, and waits at most `last_answers_max` for connections to end when it is
    /// stopped.
    async fn served(head_max: Duration, last_answers_max: Duration, work: Duration) -> Served {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let token = CancellationToken::new();
        let (begin, begun) = mpsc::channel(8);
        let handler = async move || {
            begin.send(()).await.unwrap();
            tokio::time::sleep(work).await;
            "here"
        };
        let router = Router::new().route("/", get(handler));
        let serving = serve_within(head_max, last_answers_max, listener, router.into(), token.clone());
        Served { address, token, serving: tokio::spawn(serving), begun }
    }

    /// The answer that a client gets that sends `said`, until the service hangs up.
    async fn heard(client: &mut TcpStream, said: &str) -> String {
        client.write_all(said.as_bytes()).await.unwrap();
        let mut heard = String::new();
        timeout(SOON, client.read_to_string(&mut heard)).await.expect("it is hung up on").unwrap();
        heard
    }

    #[tokio::test]
    async fn a_client_that_sends_no_request_is_hung_up_on_and_one_that_waits_for_its_answer_is_not() {
        let served = served(Duration::from_millis(100), NEVER, Duration::from_millis(300)).await;
        for (said, answers) in [
            ("", 0),
            ("GET / HTTP/1.1\r\nhost: localhost\r\nx-slow", 0),
            // The bytes that HTTP/2 begins with.
            ("PRI * HT", 0),
            (REQUEST, 1),
            // Two requests on one connection, and then nothing more.
            (&REQUEST.repeat(2), 2),
        ] {
            let mut client = TcpStream::connect(served.address).await.unwrap();
            let heard = heard(&mut client, said).await;
            assert_eq!(heard.matches("\r\n\r\nhere").count(), answers, "{said:?}: {heard:?}");
        }
    }

    #[tokio::test]
    async fn a_stop_waits_for_the_answers_that_are_under_way_and_hangs_up_on_who_sends_nothing() {
        let mut served = served(NEVER, NEVER, Duration::from_millis(300)).await;
        let mut silent = TcpStream::connect(served.address).await.unwrap();
        let mut client = TcpStream::connect(served.address).await.unwrap();
        client.write_all(REQUEST.as_bytes()).await.unwrap();
        timeout(SOON, served.begun.recv()).await.expect("its handler is called").unwrap();
        served.token.cancel();
        timeout(SOON, served.serving).await.expect("it stops").unwrap();
        assert!(heard(&mut client, "").await.ends_with("here"));
        assert_eq!(heard(&mut silent, "").await, "");
    }

    #[tokio::test]
    async fn a_stop_does_not_wait_for_the_other_half_of_a_head() {
        let served = served(NEVER, Duration::from_millis(300), Duration::ZERO).await;
        let mut half = TcpStream::connect(served.address).await.unwrap();
        half.write_all(b"GET / HT").await.unwrap();
        // The half request was read when another client, which came later, gets its answer.
        let mut other = TcpStream::connect(served.address).await.unwrap();
        other.write_all(REQUEST.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"here") {
            timeout(SOON, other.read_buf(&mut answer)).await.expect("it answers").unwrap();
        }
        let stopped = std::time::Instant::now();
        served.token.cancel();
        timeout(SOON, served.serving).await.expect("it stops").unwrap();
        assert!(stopped.elapsed() >= Duration::from_millis(300), "as long as for an answer, and no longer");
    }
}

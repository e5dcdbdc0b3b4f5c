//! HTTP connections: accepted until the process is asked to stop, and closed when their client keeps silent.
//!
//! What a client sends is bounded in size and time by `http::Limits` once its request's head is there. Before that nothing
//! of axum's sees it: a client that connects and says nothing, or a header line a minute, would hold a file descriptor for
//! ever, and some thousand of them the whole service.

use crate::http::Api;
use axum::{Router, serve::Listener};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Within this the head of a request has to be there, the first of a connection or the next: more than any network needs. A
/// client that wants to use a connection again after longer connects anew.
const HEAD_MAX: Duration = Duration::from_secs(30);

/// Serves HTTP/1.1 on `listener` until `token` is cancelled, then finishes the requests in flight, also those whose client
/// hung up.
pub async fn serve(listener: TcpListener, api: impl Into<Api>, token: CancellationToken) -> Result<(), std::io::Error> {
    let Api { router, in_flight } = api.into();
    accept(listener, router, HEAD_MAX, token).await;
    in_flight.close();
    in_flight.wait().await;
    Ok(())
}

async fn accept(mut listener: TcpListener, router: Router, head_max: Duration, token: CancellationToken) {
    // Not told apart from HTTP/2 by the first bytes, which could be waited for without an end.
    let mut http = auto::Builder::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(head_max);
    let service = TowerToHyperService::new(router);
    let connections = GracefulShutdown::new();
    // Errors of accepting are seen to by axum's listener: it waits when there are no file descriptors left.
    while let Some((stream, _)) = token.run_until_cancelled(Listener::accept(&mut listener)).await {
        let connection = http.serve_connection(TokioIo::new(stream), service.clone()).into_owned();
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // The client's doing: it hung up, kept silent, or does not speak HTTP.
            connection.await.unwrap_or_else(|error| tracing::debug!(error, "a connection ended"));
        });
    }
    drop(listener);
    connections.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    #[tokio::test]
    async fn a_client_that_says_nothing_or_half_a_head_or_nothing_more_is_hung_up_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let token = CancellationToken::new();
        let router = Router::new().route("/", get(|| async { "here" }));
        let serving = tokio::spawn(accept(listener, router, Duration::from_millis(100), token.clone()));
        for (said, answered) in [
            ("", ""),
            ("GET / HTTP/1.1\r\nhost: x\r\nx-slow", ""),
            ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", "here"),
            // What HTTP/2 begins with.
            ("PRI * HT", ""),
        ] {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(said.as_bytes()).await.unwrap();
            let mut heard = String::new();
            client.read_to_string(&mut heard).await.unwrap();
            assert!(heard.ends_with(answered) && heard.is_empty() == answered.is_empty(), "{said:?}: {heard:?}");
        }
        token.cancel();
        serving.await.unwrap();
    }
}

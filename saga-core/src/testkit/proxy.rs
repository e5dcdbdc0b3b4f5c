//! A proxy whose connections fall silent, as when a server's host vanishes without closing them; or that is down for a
//! while.

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// Passes TCP connections on until they are frozen. From then on nothing comes through and nothing is closed, while
/// later connections work. While the proxy is shut, it closes existing and new connections. It ends when it is dropped.
#[derive(Debug)]
pub struct FreezingProxy {
    address: SocketAddr,
    frozen: watch::Sender<u64>,
    shut: watch::Sender<bool>,
    refused: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl FreezingProxy {
    /// A proxy, on a port of its own, for what listens at `server` (`host:port`).
    pub async fn new(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (frozen, freezes) = watch::channel(0);
        let (shut, shuts) = watch::channel(false);
        let (server, refused) = (server.to_owned(), Arc::new(AtomicUsize::new(0)));
        let refusals = Arc::clone(&refused);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (passed, mut shuts) = (pass(client, server.clone(), freezes.clone()), shuts.clone());
                if *shuts.borrow_and_update() {
                    refusals.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                connections.spawn(async move {
                    tokio::select! {
                        _ = shuts.changed() => {}
                        () = passed => {}
                    }
                });
            }
        });
        Self { address, frozen, shut, refused, _task: AbortOnDropHandle::new(task) }
    }

    /// A proxy for the server of a database, and the database's URL through the proxy.
    pub async fn of_database(url: &str) -> (Self, String) {
        let options: PgConnectOptions = url.parse().expect("a database's URL");
        let proxy = Self::new(&format!("{}:{}", options.get_host(), options.get_port())).await;
        let through = options.host(&proxy.address.ip().to_string()).port(proxy.address.port());
        (proxy, through.to_url_lossy().to_string())
    }

    /// Freezes every connection that exists now, for good.
    pub fn freeze(&self) {
        self.frozen.send_modify(|frozen| *frozen += 1);
    }

    /// Takes the server down, until [`FreezingProxy::open`].
    pub fn shut(&self) {
        self.shut.send_replace(true);
    }

    /// Brings the server up again.
    pub fn open(&self) {
        self.shut.send_replace(false);
    }

    /// How many connections the proxy has refused so far.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }
}

async fn pass(client: TcpStream, server: String, mut freezes: watch::Receiver<u64>) {
    freezes.mark_unchanged();
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let both = async {
        tokio::select! {
            () = copy(&mut from_client, &mut to_server) => {}
            () = copy(&mut from_server, &mut to_client) => {}
        }
    };
    tokio::select! {
        biased;
        // This future holds the sockets open.
        Ok(()) = freezes.changed() => std::future::pending().await,
        () = both => {}
    }
}

async fn copy(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin)) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

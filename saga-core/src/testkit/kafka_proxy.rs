//! A proxy for a Kafka broker, which can say that the cluster has no brokers.
//!
//! That is what the only broker of a cluster answers just after it stood still for long. The formats are those of
//! Kafka's protocol guide: requests 3 (metadata) from version 9 on, which all supported clients use.

use std::{
    collections::HashSet,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// The number of the request for metadata.
const METADATA_KEY: i16 = 3;
/// The first version of it whose answer is read here.
const METADATA_VERSION_MIN: i16 = 9;

/// Passes connections to a broker on, and names itself in place of the brokers. It ends when it is dropped.
#[derive(Debug)]
pub struct KafkaProxy {
    address: SocketAddr,
    said: Arc<Said>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Said {
    port: i32,
    has_brokers: AtomicBool,
}

impl KafkaProxy {
    /// A proxy, on a port of its own, for the broker at `server` (`host:port`).
    pub async fn new(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let said = Arc::new(Said { port: address.port().into(), has_brokers: AtomicBool::new(true) });
        let (server, saying) = (server.to_owned(), Arc::clone(&said));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                connections.spawn(pass(client, server, Arc::clone(&saying)));
            }
        });
        Self { address, said, _task: AbortOnDropHandle::new(task) }
    }

    /// The value for `bootstrap.servers`.
    pub fn brokers(&self) -> String {
        self.address.to_string()
    }

    /// From now on the answers name no broker, or they do again.
    pub fn has_brokers(&self, has_brokers: bool) {
        self.said.has_brokers.store(has_brokers, Ordering::SeqCst);
    }
}

/// The ids of the requests for metadata that are under way.
type Asked = Mutex<HashSet<i32>>;

async fn pass(client: TcpStream, server: TcpStream, said: Arc<Said>) {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let asked = Asked::default();
    tokio::select! {
        _ = pass_requests(from_client, to_server, &asked) => {}
        _ = pass_answers(from_server, to_client, &asked, &said) => {}
    }
}

async fn pass_requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, asked: &Asked) -> io::Result<()> {
    loop {
        let frame = frame(&mut from).await?;
        if let [k0, k1, v0, v1, c0, c1, c2, c3, ..] = frame[..]
            && i16::from_be_bytes([k0, k1]) == METADATA_KEY
            && i16::from_be_bytes([v0, v1]) >= METADATA_VERSION_MIN
        {
            let id = i32::from_be_bytes([c0, c1, c2, c3]);
            asked.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        }
        write(&mut to, &frame).await?;
    }
}

async fn pass_answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, asked: &Asked, said: &Said) -> io::Result<()> {
    loop {
        let mut frame = frame(&mut from).await?;
        let id = frame.first_chunk().copied().map(i32::from_be_bytes).unwrap_or_default();
        if asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id) {
            let has_brokers = said.has_brokers.load(Ordering::SeqCst);
            frame = with_brokers(&frame, has_brokers.then_some(said.port));
        }
        write(&mut to, &frame).await?;
    }
}

async fn frame(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let length = usize::try_from(from.read_i32().await?).map_err(io::Error::other)?;
    let mut frame = vec![0; length];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

async fn write(to: &mut OwnedWriteHalf, frame: &[u8]) -> io::Result<()> {
    let length = i32::try_from(frame.len()).map_err(io::Error::other)?;
    to.write_all(&[&length.to_be_bytes(), frame].concat()).await
}

/// The answer with all brokers at `port` of this host, or with none.
fn with_brokers(answer: &[u8], port: Option<i32>) -> Vec<u8> {
    // The request's id (4), its tagged fields (none: 1), the throttle time (4).
    let (head, mut rest) = answer.split_at(9);
    let count = number(&mut rest).saturating_sub(1);
    let mut brokers = Vec::new();
    for _ in 0..count {
        let id = take(&mut rest, 4);
        text(&mut rest);
        take(&mut rest, 4);
        let before_rack = rest;
        text(&mut rest);
        assert_eq!(number(&mut rest), 0, "no broker has tagged fields");
        let rack = &before_rack[..before_rack.len() - rest.len()];
        brokers.push([id, b"\x0a127.0.0.1", &port.unwrap_or_default().to_be_bytes(), rack].concat());
    }
    let (count, brokers) = if port.is_some() { (brokers.len() + 1, brokers.concat()) } else { (1, Vec::new()) };
    let count = u8::try_from(count).ok().filter(|count| *count < 0x80).expect("a test's cluster has few brokers");
    [head, &[count], &brokers, rest].concat()
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> &'a [u8] {
    let (taken, left) = rest.split_at(bytes);
    *rest = left;
    taken
}

/// An unsigned number in groups of seven bits, the lowest first.
fn number(rest: &mut &[u8]) -> usize {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = take(rest, 1)[0];
        value |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

/// A text, whose length is one less than the number before it; 0 is no text.
fn text(rest: &mut &[u8]) {
    let length = number(rest).saturating_sub(1);
    take(rest, length);
}

//! The orchestrator, and the clients that start its sagas: a fixed number in flight, each that ends followed by the
//! next.
//!
//! A client asks for each start by itself, as a request would. Starts of one moment share a transaction, as everything
//! does. For the bench a saga has ended when the transaction that ended it is committed. Its latency counts from before
//! the transaction that starts it.

use crate::contract::{LAST_STEP, Layout, Nothing, REPLIES};
use anyhow::Context as _;
use saga_core::{
    consumer::{Consumer, ConsumerConfig, HandleError, Handler, Message},
    id::SagaId,
    outbox::Tx,
    saga::{Engine, Saga},
    service::{DatabaseSettings, database},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// The record of a saga that ended.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ended {
    /// When it ended, in microseconds since 1970.
    pub at: u64,
    /// How long it took, in microseconds.
    pub took: u64,
}

/// The clients that wait, by saga.
#[derive(Default)]
struct Waiting {
    sagas: Mutex<HashMap<SagaId, oneshot::Sender<()>>>,
    /// Sagas that end with the transaction that is open in a task; each worker is a task.
    ending: Mutex<HashMap<tokio::task::Id, Vec<SagaId>>>,
}

/// The engine's handler, and a watch for the sagas that it ends.
struct Watching<H> {
    inner: H,
    waiting: Arc<Waiting>,
}

impl<H: Handler> Handler for Watching<H> {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        let last =
            batch.iter().filter_map(|message| message.envelope.saga.as_ref()).filter(|saga| saga.step == LAST_STEP);
        let ending = last.map(|saga| saga.saga).collect();
        lock(&self.waiting.ending).insert(tokio::task::id(), ending);
        self.inner.handle(tx, batch).await
    }

    fn ends_with_a_statement(&self) -> bool {
        self.inner.ends_with_a_statement()
    }

    fn says_how_far_it_read(&self) -> bool {
        self.inner.says_how_far_it_read()
    }

    fn committed(&self) {
        self.inner.committed();
        let ended = lock(&self.waiting.ending).remove(&tokio::task::id()).unwrap_or_default();
        let mut sagas = lock(&self.waiting.sagas);
        for client in ended.iter().filter_map(|id| sagas.remove(id)) {
            // A client that has gone does not wait any more.
            client.send(()).ok();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs sagas until `stop`, then writes to `out` which sagas ended when.
pub async fn play(
    kafka: &str,
    run: &str,
    layout: Layout,
    url: &str,
    in_flight: usize,
    out: &Path,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let pool = database::connect(&DatabaseSettings::from_url(url)?, "bench-orchestrator").await?;
    let saga = layout.definition();
    let engine = Engine::builder(pool.clone(), REPLIES).define(&saga).build()?;
    let waiting = Arc::new(Waiting::default());
    let handler = Watching { inner: engine.handler(), waiting: Arc::clone(&waiting) };
    let config = ConsumerConfig::new(kafka, &format!("{REPLIES}.{run}"), [REPLIES]);
    let consumer = Consumer::new(config, pool.clone(), Arc::new(handler)).run(stop.clone());
    let timers = engine.run_timers(stop.clone());
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..in_flight {
        let client = Client { engine: Arc::clone(&engine), saga: saga.clone(), waiting: Arc::clone(&waiting) };
        clients.spawn(client.run(stop.clone()));
    }
    let clients = async {
        let mut ended = Vec::new();
        while let Some(client) = clients.join_next().await {
            ended.extend(client??);
        }
        anyhow::Ok(ended)
    };
    let consumer = async { consumer.await.map_err(anyhow::Error::from) };
    let timers = async { timers.await.map_err(anyhow::Error::from) };
    let ((), (), ended) = tokio::try_join!(consumer, timers, clients)?;
    fs::write(out, serde_json::to_vec(&ended)?).with_context(|| format!("write {}", out.display()))
}

struct Client {
    engine: Arc<Engine>,
    saga: Saga<Nothing>,
    waiting: Arc<Waiting>,
}

impl Client {
    async fn run(self, stop: CancellationToken) -> anyhow::Result<Vec<Ended>> {
        let input =
            Nothing { note: "an input of some size, as an order's would be: a few lines and a customer".into() };
        let mut all = Vec::new();
        loop {
            let began = Instant::now();
            let id = SagaId::new();
            let (tell, answer) = oneshot::channel();
            lock(&self.waiting.sagas).insert(id, tell);
            self.engine.start(id, &self.saga, &input, &id.to_string()).await?;
            tokio::select! {
                () = stop.cancelled() => return Ok(all),
                ended = answer => ended.context("nobody tells when sagas end")?,
            }
            let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            all.push(Ended { at: u64::try_from(at.as_micros())?, took: u64::try_from(began.elapsed().as_micros())? });
        }
    }
}

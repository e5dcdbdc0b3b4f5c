//! The one task that polls.
//!
//! ```text
//!  Kafka -> poll -> buffer of partition 0 -> worker 0 -> PostgreSQL
//!                -> buffer of partition 1 -> worker 1 ->
//! ```
//!
//! The task never waits for a worker except, within a bound, when that worker's partition is taken away. So the poll
//! interval is never at risk. A full buffer pauses its partition. Offsets of a partition that was taken away are never
//! stored: its worker is gone before the library hears that the partition was let go.

use super::{
    ConsumerConfig, ConsumerError, Handler,
    buffer::{Buffer, PushResult},
    client::{self, Client, Context, Rebalance},
    group_offsets::{self, Start},
    health::{HealthState, Reporter},
    offsets::{self, Offsets, names, one},
    portion::Portions,
    reading::ReadMark,
    record::Raw,
    refusal,
    transaction::{PartitionContext, Stage},
    worker::{Worker, WorkerEnd},
};
use crate::{
    brokers::Inquirer,
    clock,
    error_class::{ErrorClass, classify_kafka},
};
use futures::{FutureExt, StreamExt};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::Consumer as _,
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, HashMap},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, Weak, atomic::AtomicBool},
    time::{Duration, Instant},
};
use tokio::{
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        watch,
    },
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use uuid::Uuid;

/// How long a worker may finish its open transaction when its partition is taken away or the process stops. It is well
/// below what the group allows a member to take (five minutes).
const FINISH_MAX: Duration = Duration::from_secs(10);
/// How long closing the client may take; it can hang, and nothing depends on it.
const CLOSE_MAX: Duration = Duration::from_secs(10);
/// A client that could not take partitions gives way after so long, unless Kafka refuses something.
const UNTAKEN_MAX: Duration = Duration::from_secs(10);
/// The most records that are dispatched before other events get their turn.
const RECORDS_PER_TURN: usize = 256;

/// A partition that this process reads. When it is dropped without being finished (the consumer's future was), its
/// worker is cut off. Otherwise the worker would keep the client, and with it the partition, as long as the process.
struct AssignedPartition {
    buffer: Arc<Buffer>,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
    _reading: Option<AbortOnDropHandle<()>>,
}

/// Rebalances that wait for our answer. The library waits for it, also when it is closed. When the polling future is
/// dropped in the middle (its task is aborted, its runtime ends), nothing polls any more, and closing would never end.
struct Unanswered {
    receiver: UnboundedReceiver<Rebalance>,
    client: Weak<Client>,
}

impl Unanswered {
    /// From now on nothing polls: rebalances that wait are answered, and later ones are answered at once.
    fn close(&mut self) {
        let Some(client) = self.client.upgrade() else { return };
        client.context().close();
        while let Ok(rebalance) = self.receiver.try_recv() {
            client::answer(&*client, &rebalance);
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.close();
    }
}

/// Why polling ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Polled {
    /// The consumer was asked to stop.
    ToTheEnd,
    /// The client goes no further: the consumer makes another one.
    UntilAnew,
}

/// A channel from the workers to the polling task.
type Channel<T> = (UnboundedSender<T>, UnboundedReceiver<T>);

pub(super) struct Poll<H> {
    config: Arc<ConsumerConfig>,
    pool: PgPool,
    handler: Arc<H>,
    health: Arc<HealthState>,
    /// The field stands before the client: fields are dropped in their order.
    rebalances: Unanswered,
    client: Arc<Client>,
    /// Asks where partitions end, for a handler that another part waits for.
    brokers: Option<Arc<Inquirer>>,
    held: HashMap<String, HashMap<i32, AssignedPartition>>,
    drained: Channel<(String, i32)>,
    broken: Channel<ConsumerError>,
    /// When the task last asked whether Kafka still refuses.
    asked: Instant,
    asking: Option<JoinHandle<Option<Result<(), RDKafkaErrorCode>>>>,
    /// Partitions that were assigned, and whose committed offset the brokers did not say: since when they are not read.
    untaken: BTreeMap<(String, i32), Instant>,
}

impl<H: Handler> Poll<H> {
    pub(super) fn new(
        config: Arc<ConsumerConfig>,
        pool: PgPool,
        handler: Arc<H>,
        health: Arc<HealthState>,
    ) -> Result<Self, ConsumerError> {
        let (sender, receiver) = unbounded_channel();
        let context = Context { rebalances: sender, health: Arc::clone(&health), closing: AtomicBool::new(false) };
        let client = Arc::new(client::connect(&config, context)?);
        let rebalances = Unanswered { receiver, client: Arc::downgrade(&client) };
        let (drained, broken) = (unbounded_channel(), unbounded_channel());
        let held = HashMap::new();
        let says = handler.says_how_far_it_read();
        let brokers = if says { Some(Arc::new(Inquirer::new(&config.brokers, &config.group)?)) } else { None };
        let (asked, asking, untaken) = (clock::monotonic(), None, BTreeMap::new());
        Ok(Self {
            config,
            pool,
            handler,
            health,
            client,
            brokers,
            held,
            rebalances,
            drained,
            broken,
            asked,
            asking,
            untaken,
        })
    }

    /// Polls until `stop`, or until the client has to be made anew, then lets go of everything in good order, in time.
    pub(super) async fn run(mut self, stop: &CancellationToken) -> Result<Polled, ConsumerError> {
        let health = Arc::clone(&self.health);
        health.begins(clock::monotonic());
        let ended = self.poll_until(stop).await;
        health.busy(self.let_go(if ended.is_ok() { FINISH_MAX } else { Duration::ZERO })).await;
        ended
    }

    async fn let_go(mut self, bound: Duration) {
        let held: Vec<_> = self
            .held
            .drain()
            .flat_map(|(topic, held)| held.into_iter().map(move |held| (topic.clone(), held)))
            .collect();
        let (places, all) = held.into_iter().map(|(topic, (partition, held))| ((topic, partition), held)).unzip();
        finish(all, bound).await;
        offsets::give_back(&self.client, &self.health, places);
        self.health.all_gone();
        self.rebalances.close();
        close(self.client).await;
    }

    async fn poll_until(&mut self, stop: &CancellationToken) -> Result<Polled, ConsumerError> {
        let client = Arc::clone(&self.client);
        let mut records = client.stream();
        let mut heartbeat = tokio::time::interval(Duration::from_secs(1));
        loop {
            self.health.polled();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(Polled::ToTheEnd),
                () = self.health.anew() => return Ok(Polled::UntilAnew),
                Some(error) = self.broken.1.recv() => return Err(error),
                Some(rebalance) = self.rebalances.receiver.recv() => self.rebalance(&rebalance).await,
                Some((topic, partition)) = self.drained.1.recv() => self.resume(&topic, partition),
                Some(polled) = records.next() => {
                    self.dispatch(polled)?;
                    for _ in 1..RECORDS_PER_TURN {
                        match records.next().now_or_never() {
                            Some(Some(polled)) => self.dispatch(polled)?,
                            _ => break,
                        }
                    }
                    self.held.values().flat_map(HashMap::values).for_each(|held| held.buffer.announce());
                }
                _ = heartbeat.tick() => self.ask_again(),
            }
        }
    }

    fn dispatch(&mut self, polled: Result<BorrowedMessage<'_>, KafkaError>) -> Result<(), ConsumerError> {
        let record = match polled {
            Ok(record) => record,
            Err(error) => return self.complain(error),
        };
        let (topic, partition) = (record.topic(), record.partition());
        let Some(held) = self.held.get(topic).and_then(|partitions| partitions.get(&partition)) else { return Ok(()) };
        if held.buffer.push(Raw::copy(&record)) == PushResult::Full {
            metrics::counter!("consumer_pauses_total", "group" => self.config.group.clone()).increment(1);
            self.client.pause(&one(topic, partition))?;
        }
        Ok(())
    }

    /// An error that the client cannot recover from ends the consumer, for a new client. An error that an operator has
    /// to set right is kept until it is. Any other error passes by itself.
    fn complain(&mut self, error: KafkaError) -> Result<(), ConsumerError> {
        let code = match error {
            KafkaError::MessageConsumption(code) => code,
            KafkaError::MessageConsumptionFatal(_) => return Err(error.into()),
            other => {
                self.health.kafka.failing(&other.to_string());
                return Ok(());
            }
        };
        match (code, classify_kafka(code)) {
            // Waiting does not make the brokers allow it.
            (RDKafkaErrorCode::InvalidSessionTimeout, _) | (_, ErrorClass::Stale) => return Err(error.into()),
            (RDKafkaErrorCode::AllBrokersDown, _) => self.health.connected(false),
            // One broker of several is away, or an idle connection was closed.
            (RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::OperationTimedOut, _) => {}
            (_, ErrorClass::Configuration | ErrorClass::Own) => {
                self.health.refused(refusal::cause(code), refusal::reason(&self.config, code));
                self.asked = clock::monotonic();
            }
            (_, ErrorClass::Passing) => self.health.kafka.failing(&error.to_string()),
        }
        Ok(())
    }

    /// While Kafka refuses something, asks now and then whether it still does.
    fn ask_again(&mut self) {
        if let Some(answer) = self.asking.as_mut().and_then(FutureExt::now_or_never) {
            self.asking = None;
            match answer {
                Ok(Some(Ok(()))) => self.health.served(),
                Ok(Some(Err(code))) if classify_kafka(code) == ErrorClass::Configuration => {
                    self.health.refused(refusal::cause(code), refusal::reason(&self.config, code));
                }
                Ok(Some(Err(_)) | None) | Err(_) => {}
            }
        }
        let now = clock::monotonic();
        if self.untaken.values().any(|since| now >= *since + UNTAKEN_MAX) && !self.health.is_refused() {
            self.health.make_anew(None, None, "where the group has come to was not said");
        }
        if self.health.is_refused() && self.asking.is_none() && now >= self.asked + refusal::ASK_EVERY {
            let config = Arc::clone(&self.config);
            self.asked = now;
            self.asking = Some(tokio::task::spawn_blocking(move || refusal::ask(&config)));
        }
    }

    fn resume(&self, topic: &str, partition: i32) {
        let ours = self.held.get(topic).is_some_and(|partitions| partitions.contains_key(&partition));
        if ours && let Err(error) = self.client.resume(&one(topic, partition)) {
            // The library cannot resume a partition only when it is no longer ours.
            tracing::debug!(topic, partition, %error, "a partition was not resumed");
        }
    }

    async fn rebalance(&mut self, rebalance: &Rebalance) {
        match rebalance {
            Rebalance::Assigned(partitions) => self.take(partitions).await,
            Rebalance::Revoked(partitions) => {
                let gone = names(partitions).into_iter();
                let gone =
                    gone.filter_map(|(topic, partition)| self.held.get_mut(&topic)?.remove(&partition)).collect();
                self.health.busy(finish(gone, FINISH_MAX)).await;
                self.health.gone(&names(partitions));
                self.waits_no_more(partitions);
                // The library remembers a pause beyond the assignment. When the partition comes back, this task would
                // not know that it is paused, and it would never be read.
                if let Err(error) = self.client.resume(partitions) {
                    tracing::debug!(%error, "partitions that go were not resumed");
                }
                if self.client.assignment_lost() {
                    self.health.lost();
                }
                client::answer(&*self.client, rebalance);
            }
        }
        let held: usize = self.held.values().map(HashMap::len).sum();
        tracing::info!(group = self.config.group, partitions = held, "rebalanced");
    }

    /// Reads on from where the group has come to in the topics that are there now.
    async fn take(&mut self, partitions: &TopicPartitionList) {
        let health = Arc::clone(&self.health);
        let partitions = partitions.clone();
        match health.busy(group_offsets::ask(&self.config, &partitions)).await {
            Ok(offsets) => {
                self.waits_no_more(&partitions);
                for mut element in partitions.elements() {
                    let (topic, partition) = (element.topic().to_owned(), element.partition());
                    let start = offsets.start(&topic, partition, health.rewind(&topic, partition).as_ref());
                    if let Some(offset) = start.instead {
                        let group = &self.config.group;
                        match offset {
                            Offset::Beginning => {
                                tracing::warn!(group, topic, partition, "the topic is read again from its begin");
                            }
                            end => {
                                tracing::warn!(group, topic, partition, ?end, "the partition is read on from its end");
                            }
                        }
                        if let Err(error) = element.set_offset(offset) {
                            tracing::warn!(topic, partition, %error, "a partition is read from where the group has come to");
                        }
                    }
                    health.rewound(&topic, partition);
                    let held = self.employ(&topic, partition, start);
                    self.held.entry(topic).or_default().insert(partition, held);
                }
                health.assigned();
            }
            // No record of them is handled: a guess could pass over records.
            Err(why) => {
                self.untaken.extend(names(&partitions).into_iter().map(|partition| (partition, clock::monotonic())));
                health.takes(Some(&why));
            }
        }
        client::answer(&*self.client, &Rebalance::Assigned(partitions));
    }

    /// These partitions are read here, or belong to other members.
    fn waits_no_more(&mut self, partitions: &TopicPartitionList) {
        names(partitions).iter().for_each(|partition| _ = self.untaken.remove(partition));
        if self.untaken.is_empty() {
            self.health.takes(None);
        }
    }

    fn employ(&self, topic: &str, partition: i32, start: Start) -> AssignedPartition {
        let (sender, name) = (self.drained.0.clone(), topic.to_owned());
        let buffer = Arc::new(Buffer::new(self.config.buffer, move || {
            // The receiver is gone only when the poll has ended.
            sender.send((name.clone(), partition)).ok();
        }));
        let (stop, owner) = (CancellationToken::new(), Uuid::new_v4());
        let (done, is_done) = watch::channel(start.next().unwrap_or(-1));
        self.health.reads(topic, partition, Arc::clone(&buffer), is_done.clone(), &start);
        let worker = Worker {
            context: PartitionContext {
                prefetched: super::transaction::PrefetchedTx::default(),
                pool: self.pool.clone(),
                handler: Arc::clone(&self.handler),
                config: Arc::clone(&self.config),
                topic: topic.to_owned(),
                partition,
                clock: Arc::clone(&self.health.clock),
                silence: self.config.attempt_timeout,
                stage: watch::channel(Stage::Beginning).0,
            },
            buffer: Arc::clone(&buffer),
            offsets: Offsets::new(&self.client, start.id, done),
            report: Reporter { health: Arc::clone(&self.health), partition: (topic.to_owned(), partition) },
            stop: stop.clone(),
            records_to_note: 0,
            noted: None,
            owner,
            look_at_parked: clock::monotonic(),
            portions: Portions::new(self.config.batch_max),
            counted: None,
            alone: Mutex::default(),
        };
        let broken = self.broken.0.clone();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let error = match AssertUnwindSafe(worker.run()).catch_unwind().await {
                Ok(WorkerEnd::Stopped) => return,
                Ok(WorkerEnd::Crashed) => ConsumerError::Crashed,
                Err(_) => ConsumerError::WorkerPanicked,
            };
            broken.send(error).ok();
        }));
        AssignedPartition { buffer, stop, task, _reading: self.read(topic, partition, owner, is_done) }
    }

    fn read(
        &self,
        topic: &str,
        partition: i32,
        owner: Uuid,
        done: watch::Receiver<i64>,
    ) -> Option<AbortOnDropHandle<()>> {
        let (brokers, pool) = (self.brokers.clone()?, self.pool.clone());
        let (group, topic) = (self.config.group.clone(), topic.to_owned());
        let reading = ReadMark { brokers, pool, group, topic, partition, owner, done };
        Some(AbortOnDropHandle::new(tokio::spawn(reading.say())))
    }
}

/// Tells workers to stop and waits until their open transactions are finished. A worker that takes longer than `bound`
/// is cut off. Its transaction is rolled back, or committed and not known to be, and the inbox knows which.
async fn finish(workers: Vec<AssignedPartition>, bound: Duration) {
    workers.iter().for_each(|held| held.stop.cancel());
    let mut tasks: Vec<_> = workers.into_iter().map(|held| held.task).collect();
    if tokio::time::timeout(bound, futures::future::join_all(&mut tasks)).await.is_err() {
        for task in tasks.iter().filter(|task| !task.is_finished()) {
            tracing::warn!("a worker did not finish in time and is cut off");
            task.abort();
        }
        // A task that was awaited to its end must not be awaited again.
        for task in tasks.into_iter().filter(|task| !task.is_finished()) {
            task.await.ok();
        }
    }
}

/// Closes the client: commits what is stored and leaves the group. It runs on a thread of its own and with a bound, as
/// it can hang. A group that hears nothing finds out by the session's timeout.
async fn close(client: Arc<Client>) {
    let (closed, closing) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        drop(client);
        closed.send(()).ok();
    });
    if tokio::time::timeout(CLOSE_MAX, closing).await.is_err() {
        tracing::warn!("the Kafka client did not close in time and is left behind");
    }
}

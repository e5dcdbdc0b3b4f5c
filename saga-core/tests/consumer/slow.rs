//! Handlers that are slow, hang or wait for others, and records that fail among many: the cost, and the records that
//! bear it.

use crate::support::{Fixture, SOON, event, events, says};
use saga_core::{
    consumer::{Consumer, ConsumerHealth, HandleError, Handler, Message},
    outbox::Tx,
    service::database::pool_options,
    testkit::{FailPoint, FreezingProxy, Log, Record, eventually, failpoints::Fault, produce, size},
};
use sqlx::PgPool;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

const LOCK: i64 = 4_711;

/// An error of a handler's own, through which the database's is not seen by its type.
#[derive(Debug, thiserror::Error)]
enum Wrapped {
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// A handler that does what each message asks, then writes it down.
#[derive(Default)]
struct Obedient {
    calls: Mutex<Vec<usize>>,
}

impl Handler for Obedient {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        self.calls.lock().unwrap().push(batch.len());
        for message in batch {
            let value = String::from_utf8_lossy(message.payload.as_deref().unwrap_or_default()).into_owned();
            match value.as_str() {
                "hang" => std::future::pending().await,
                "silent" => drop(timeout(Duration::from_secs(1), std::future::pending::<()>()).await),
                // The wait lasts until its attempt is given up.
                "wait" => {
                    sqlx::query("set local lock_timeout = 0").execute(&mut **tx).await?;
                    let lock = sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK);
                    lock.execute(&mut **tx).await?;
                }
                "row" => {
                    sqlx::query("select from shelf for update").execute(&mut **tx).await?;
                }
                "nowait" => {
                    let locked = sqlx::query("select from shelf for update nowait").execute(&mut **tx).await;
                    locked.map_err(|error| anyhow::Error::from(error).context("the shelf is not free"))?;
                }
                "impatient" => {
                    let slow = "set local statement_timeout = 50; select pg_sleep(60)";
                    let ended = sqlx::raw_sql(slow).execute(&mut **tx).await.map_err(Wrapped::from);
                    ended.map_err(anyhow::Error::from)?;
                }
                "slow" => {
                    sqlx::query("select pg_sleep(0.02)").execute(&mut **tx).await?;
                }
                _ => {}
            }
            let key = String::from_utf8_lossy(message.key.as_deref().unwrap_or_default()).into_owned();
            let write = sqlx::query("insert into handled (key, value) values ($1, $2)").bind(key).bind(value);
            write.execute(&mut **tx).await?;
        }
        Ok(())
    }
}

struct Started {
    handler: Arc<Obedient>,
    health: ConsumerHealth,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

fn start(fixture: &Fixture, pool: &PgPool) -> Started {
    let (handler, stop) = (Arc::new(Obedient::default()), CancellationToken::new());
    let consumer = Consumer::new(fixture.config.clone(), pool.clone(), Arc::clone(&handler));
    let (health, running) = (consumer.health(), consumer.run(stop.clone()));
    let task = tokio::spawn(async move { running.await.unwrap() });
    Started { handler, health, stop, task }
}

impl Started {
    fn calls(&self) -> Vec<usize> {
        self.handler.calls.lock().unwrap().clone()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// A few records of other keys around the one with the payload `value`.
fn among_others(value: &str) -> Vec<Record> {
    let others = (0..20).map(|n| event(&format!("k{n}"), "1"));
    let mut records: Vec<_> = others.collect();
    records.insert(7, event("odd", value));
    records
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_takes_too_long_is_halved_until_it_fits() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempt_timeout = Duration::from_secs(1);
    fixture.send(&(0..200).map(|n| event(&format!("k{n}"), "slow")).collect::<Vec<_>>()).await;

    let running = start(&fixture, &fixture.database.pool);
    fixture.until_handled(200).await;

    let calls = running.calls();
    assert!(calls.iter().any(|size| *size > 50), "the first was too large: {calls:?}");
    assert!(calls.len() < 40, "what fitted is remembered: {calls:?}");
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_whose_handler_never_returns_is_given_up_and_others_flow() {
    let mut fixture = Fixture::new(1).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_millis(500), 2);
    fixture.send(&among_others("hang")).await;

    let running = start(&fixture, &fixture.database.pool);
    fixture.until_handled(20).await;
    let letters = fixture.until_dead_letters(1).await;

    let headers = &letters[0].2;
    assert_eq!((&headers["x-error-class"], &headers["x-attempts"]), (&"timed-out".into(), &"2".into()));
    let reason = headers["x-error-message"].as_str().unwrap();
    assert!(reason.contains("`attempt_timeout`, 500ms"), "{reason}");
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_is_silent_on_its_connection_is_counted_and_given_up() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 2;
    let options = fixture.database.pool.connect_options().as_ref().clone();
    let impatient = options.options([("idle_in_transaction_session_timeout", "400ms")]);
    let pool = pool_options(4).connect_with(impatient).await.unwrap();
    fixture.send(&among_others("silent")).await;

    let running = start(&fixture, &pool);
    fixture.until_handled(20).await;
    let letters = fixture.until_dead_letters(1).await;

    let headers = &letters[0].2;
    assert_eq!((&headers["x-error-class"], &headers["x-attempts"]), (&"silent".into(), &"2".into()));
    let reason = headers["x-error-message"].as_str().unwrap();
    assert!(reason.contains("`idle_in_transaction_session_timeout`, 400ms"), "{reason}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_a_handler_bounds_itself_is_counted_whatever_wraps_it() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 2;
    fixture.send(&among_others("impatient")).await;

    let running = start(&fixture, &fixture.database.pool);
    fixture.until_handled(20).await;
    let letters = fixture.until_dead_letters(1).await;

    let headers = &letters[0].2;
    assert_eq!((&headers["x-error-class"], &headers["x-attempts"]), (&"timed-out".into(), &"2".into()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_while_a_handler_is_at_work_counts_nothing() {
    let mut fixture = Fixture::new(1).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_millis(500), 1);
    let (proxy, url) = FreezingProxy::of_database(&fixture.database.url).await;
    let pool = pool_options(4).connect(&url).await.unwrap();
    let running = fixture.start_on(&pool);
    running.gate.send_replace(false);
    fixture.send(&[event("k", "1")]).await;
    let is_called = || !running.recorder.batches.lock().unwrap().is_empty();
    eventually(SOON, || async { is_called().then_some(()) }).await;

    proxy.shut();
    // The handler takes longer than its bound, and does not touch its connection, which is lost meanwhile.
    eventually(SOON, || async { running.health.check().is_err_and(|e| e.starts_with("database ")).then_some(()) })
        .await;
    running.gate.send_replace(true);
    proxy.open();

    fixture.until_handled(1).await;
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    let counted: i32 =
        sqlx::query_scalar("select attempts from inbox_partition").fetch_one(&fixture.database.pool).await.unwrap();
    assert_eq!(counted, 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_behind_a_parked_record_has_the_same_bounds() {
    let mut fixture = Fixture::new(1).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_millis(600), 2);
    let says = |values: &[&str]| values.iter().map(|value| event("k", value)).collect::<Vec<_>>();
    // The first record is given up; behind it are more slow ones than fit at once, and one that hangs.
    fixture.send(&says(&["hang"])).await;
    let slow = vec!["slow"; 60];
    fixture.send(&says(&[&slow[..], &["hang", "1"]].concat())).await;

    let running = start(&fixture, &fixture.database.pool);
    fixture.until_dead_letters(2).await;
    let handled = fixture.until_handled(61).await;

    assert_eq!(handled.last().unwrap().1, "1");
    fixture.until_unparked().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poison_record_in_five_hundred_costs_one_more_call() {
    let fixture = Fixture::new(1).await;
    let mut records = events(100, 2_000);
    for n in [250, 750, 1_250, 1_750] {
        records.insert(n, event("p", "poison"));
    }
    fixture.send(&records).await;

    let running = fixture.start_with(|message| match says(message, "poison") {
        true => Err(HandleError::Poison("no JSON".into()).of(message.envelope.id)),
        false => Ok(()),
    });
    fixture.until_handled(2_000).await;
    let letters = fixture.until_dead_letters(4).await;

    assert!(letters.iter().all(|letter| letter.2["x-error-message"] == "no JSON"));
    let calls = running.recorder.batches.lock().unwrap().clone();
    // The batches are what has arrived, and none of them is made smaller.
    let commits = running.recorder.commits.load(std::sync::atomic::Ordering::SeqCst);
    assert!(calls.len() <= commits + 4 && commits < 60, "{commits} commits, {calls:?}");
    assert!(fixture.parked().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_culprit_of_an_error_that_names_nobody_is_searched_for_by_halves() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1;
    let mut records = events(500, 499);
    records.insert(333, event("p", "bad"));
    // The records are one batch: all of them have arrived when the gate opens.
    let running = fixture.start_with(|message| match says(message, "bad") {
        true => Err(anyhow::anyhow!("the shelf is gone").into()),
        false => Ok(()),
    });
    running.gate.send_replace(false);
    fixture.send(&[event("first", "1")]).await;
    eventually(SOON, || async { (!running.recorder.batches.lock().unwrap().is_empty()).then_some(()) }).await;
    fixture.send(&records).await;
    running.gate.send_replace(true);

    fixture.until_handled(500).await;
    fixture.until_dead_letters(1).await;

    let calls = running.recorder.batches.lock().unwrap().clone();
    assert!(calls.len() < 30, "{calls:?}");
    running.stop().await;
}

/// Starts and stops a consumer, in good order, while a counted attempt waits for a lock. Returns how long each stop
/// took.
async fn restarts_while_it_waits(fixture: &Fixture) {
    let mut holding = fixture.database.pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *holding).await.unwrap();
    for _ in 0..size(2, 5) {
        let running = start(fixture, &fixture.database.pool);
        fixture.until_somebody_waits_for(LOCK).await;
        let stopping = Instant::now();
        running.stop().await;
        assert!(stopping.elapsed() < Duration::from_secs(15), "{:?}", stopping.elapsed());
    }
    holding.rollback().await.unwrap();
    let running = start(fixture, &fixture.database.pool);
    fixture.until_handled(1).await;
    assert!(fixture.dead_letters().await.is_empty(), "it was never tried to the end before");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_good_order_during_a_counted_attempt_counts_nothing() {
    let alone = async {
        let mut fixture = Fixture::new(1).await;
        fixture.config.attempts = 1;
        fixture.send(&[event("k", "wait")]).await;
        // After two deaths the record is suspected: tried alone, each attempt counted.
        for _ in 0..2 {
            let _armed = FailPoint::once("consumer.after-inbox", &fixture.config.group, Fault::Crash);
            fixture.start().dies().await;
        }
        restarts_while_it_waits(&fixture).await;
    };
    let parked = async {
        let mut fixture = Fixture::new(1).await;
        fixture.config.attempts = 2;
        fixture.send(&[event("k", "wait")]).await;
        let first = fixture.start_with(|_| Err(anyhow::anyhow!("not yet").into()));
        eventually(SOON, || async { (fixture.parked().await.len() == 1).then_some(()) }).await;
        first.stop().await;
        sqlx::query("update inbox_parked set attempts = 1").execute(&fixture.database.pool).await.unwrap();
        restarts_while_it_waits(&fixture).await;
    };
    tokio::join!(alone, parked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_that_were_given_up_have_ended_in_the_server_too() {
    const PARTITIONS: i32 = 8;
    const POOL: u32 = 8;
    let mut fixture = Fixture::new(PARTITIONS).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_secs(1), 1_000);
    let pool = pool_options(POOL).connect(&fixture.database.url).await.unwrap();
    let mut holding = fixture.database.pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *holding).await.unwrap();
    let waits = |n| Record { partition: Some(n), ..event(&format!("k{n}"), "wait") };
    produce(&fixture.topic, &(0..PARTITIONS).map(waits).collect::<Vec<_>>()).await;

    let running = start(&fixture, &pool);
    let waiting = "select count(*) from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock' and backend_type = 'client backend'";
    let (mut most, began) = (0, Instant::now());
    while running.calls().len() < 24 && began.elapsed() < SOON {
        // Each look is a transaction of its own: within one the answer would be the same for ever.
        let now: i64 = sqlx::query_scalar(waiting).fetch_one(&fixture.database.pool).await.unwrap();
        most = most.max(now);
    }

    assert!((1..=i64::from(POOL)).contains(&most), "{most} server processes waited at once");
    holding.rollback().await.unwrap();
    let handled: BTreeSet<_> = fixture.until_handled(8).await.into_iter().collect();
    assert_eq!(handled.len(), 8);
    running.stop().await;
}

/// A record that does `value`, which waits for a lock, is parked until the lock is let go of.
async fn waits_for_a_held_lock(value: &str) {
    let mut fixture = Fixture::new(1).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_millis(500), 2);
    let pool = &fixture.database.pool;
    sqlx::raw_sql("create table shelf (); insert into shelf default values").execute(pool).await.unwrap();
    let mut holding = pool.begin().await.unwrap();
    sqlx::query("select from shelf for update").execute(&mut *holding).await.unwrap();
    let held = Instant::now();
    fixture.send(&among_others(value)).await;

    let running = start(&fixture, pool);
    fixture.until_handled(20).await;
    // The test waits for longer than all of the record's attempts could take, and until it was tried more often.
    let longer = 2 * fixture.config.attempts * fixture.config.attempt_timeout;
    let tried = || running.calls().iter().filter(|size| **size == 1).count();
    eventually(SOON, || async { (held.elapsed() > longer && tried() > 8).then_some(()) }).await;
    let (class, reason, attempts): (String, String, i32) =
        sqlx::query_as("select error_class, reason, attempts from inbox_parked").fetch_one(pool).await.unwrap();
    assert_eq!(class, "locked");
    assert!(reason.starts_with("waits for a lock that another transaction holds: "), "{reason}");
    assert!(attempts <= 1, "one at most is counted, while it is made: {attempts}");
    running.health.check().unwrap();

    // After some minutes of waiting health reports it.
    let minutes_go_by = "update inbox_parked set parked_at = parked_at - interval '3 minutes'";
    sqlx::query(minutes_go_by).execute(pool).await.unwrap();
    let said = eventually(SOON, || async { running.health.check().err() }).await;
    assert!(said.starts_with("parked records that wait for locks: 1; the first, since "), "{said}");
    assert!(fixture.dead_letters().await.is_empty());
    holding.rollback().await.unwrap();
    assert_eq!(fixture.until_handled(21).await.last().unwrap().1, value);
    fixture.until_unparked().await;
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_waits_for_a_held_lock_is_never_given_up_and_others_flow() {
    tokio::join!(waits_for_a_held_lock("row"), waits_for_a_held_lock("nowait"));
}

#[tokio::test]
async fn slow_handlers_on_a_full_pool_are_no_outage_and_all_is_handled() {
    const PARTITIONS: i32 = 4;
    let mut fixture = Fixture::new(PARTITIONS).await;
    (fixture.config.attempt_timeout, fixture.config.attempts) = (Duration::from_secs(1), 1);
    // Two connections for four partitions: a worker that waits for one gives up long before an attempt does.
    let options = pool_options(2).acquire_timeout(Duration::from_millis(200));
    let pool = options.connect(&fixture.database.url).await.unwrap();
    let log = Log::hear("warn");
    let slow = |n: i32| Record { partition: Some(n % PARTITIONS), ..event(&format!("k{n}"), "slow") };
    produce(&fixture.topic, &(0..PARTITIONS * 80).map(slow).collect::<Vec<_>>()).await;

    let running = start(&fixture, &pool);
    fixture.until_handled(320).await;

    let calls = running.calls();
    assert!(calls.iter().any(|size| *size > 50), "the first were too large: {calls:?}");
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    assert!(log.said("waiting for the database").is_empty(), "{:?}", log.warnings());
    running.health.check().unwrap();
    running.stop().await;
}

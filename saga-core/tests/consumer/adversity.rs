//! The consumer holds its own against handlers that swallow errors, connections that fall silent, records that would
//! take others with them, users that drop it.

use crate::support::{Fixture, Running, SOON, event, says, with_id};
use saga_core::{
    consumer::{Consumer, HandleError, Handler, Message},
    id::MessageId,
    outbox::Tx,
    service::database::pool_options,
    testkit::{
        FreezingProxy, Record, eventually,
        failpoints::{Fault, Injected},
        produce,
    },
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn on(partition: i32, record: Record) -> Record {
    Record { partition: Some(partition), ..record }
}

/// Writes the message's value; when that is `swallow`, ignores an error of the database.
struct Careless;

impl Handler for Careless {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        for message in batch {
            let value = String::from_utf8_lossy(message.payload.as_deref().unwrap_or_default());
            let write = sqlx::query("insert into handled (key, value) values ('k', $1)").bind(&value);
            write.execute(&mut **tx).await?;
            if value == "swallow" {
                sqlx::query("select 1 / 0").execute(&mut **tx).await.ok();
            }
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_swallows_an_error_of_the_database_loses_no_message() {
    let fixture = Fixture::new(1).await;
    let stop = CancellationToken::new();
    let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), Arc::new(Careless));
    let running = tokio::spawn(consumer.run(stop.clone()));
    fixture.send(&[event("k", "1"), event("k", "swallow"), event("k", "2")]).await;
    let letters = fixture.until_dead_letters(1).await;
    assert_eq!(letters[0].1.as_deref(), Some("swallow"));
    assert_eq!(letters[0].2["x-error-class"], "database-25P02", "in failed SQL transaction");
    assert_eq!(fixture.until_handled(2).await, [("k".into(), "1".into()), ("k".into(), "2".into())]);
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_asks_for_the_same_again_gets_it_at_once_and_nothing_is_counted() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1;
    let asked = AtomicUsize::new(0);
    let running = fixture.start_with(move |message| match says(message, "again") {
        true if asked.fetch_add(1, Ordering::SeqCst) < 3 => Err(HandleError::Again),
        _ => Ok(()),
    });
    fixture.send(&[event("k", "again")]).await;
    assert_eq!(fixture.until_handled(1).await, [("k".into(), "again".into())]);
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_falls_silent_is_given_up_and_another_one_used() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempt_timeout = Duration::from_secs(2);
    let (proxy, url) = FreezingProxy::of_database(&fixture.database.url).await;
    // The connection falls silent within a batch or behind one. In either case the server holds the partition's lock
    // until it ends that session.
    let direct = std::mem::replace(&mut fixture.database.pool, pool_options(4).connect(&url).await.unwrap());
    let running = fixture.start();
    fixture.database.pool = direct;
    for (n, value) in ["1", "2", "3"].into_iter().enumerate() {
        fixture.send(&[event("k", value)]).await;
        fixture.until_handled(n + 1).await;
        proxy.freeze();
    }
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    running.stop().await;
}

/// A handler whose killer dies when it has the other record's attempt in hand, or soon when there is none.
struct Deadly {
    in_hand: watch::Sender<bool>,
}

impl Handler for Deadly {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        const A_WHILE: Duration = Duration::from_millis(300);
        if batch.iter().any(|message| says(message, "killer")) {
            let mut others = self.in_hand.subscribe();
            let _ = tokio::time::timeout(A_WHILE, others.wait_for(|in_hand| *in_hand)).await;
            return Err(HandleError::Failed(Injected(Fault::Crash).into()));
        }
        self.in_hand.send_replace(true);
        let _ = tokio::time::timeout(A_WHILE, std::future::pending::<()>()).await;
        self.in_hand.send_replace(false);
        sqlx::query("insert into handled (key, value) values ('b', 'innocent')").execute(&mut **tx).await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_kills_its_process_takes_no_record_of_another_partition_with_it() {
    let fixture = Fixture::new(2).await;
    produce(&fixture.topic, &[on(0, event("a", "killer")), on(1, event("b", "innocent"))]).await;
    let mut deaths = 0;
    loop {
        let stop = CancellationToken::new();
        let handler = Arc::new(Deadly { in_hand: watch::channel(false).0 });
        let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), handler);
        let running = tokio::spawn(consumer.run(stop.clone()));
        let over = eventually(SOON, || async {
            let done = fixture.dead_letters().await.len() + fixture.handled().await.len() == 2;
            (running.is_finished() || done).then(|| running.is_finished())
        })
        .await;
        if !over {
            stop.cancel();
            running.await.unwrap().unwrap();
            break;
        }
        deaths += 1;
        assert!(deaths < 10, "it kills for ever");
    }
    let letters = fixture.dead_letters().await;
    assert_eq!(letters.iter().map(|letter| letter.1.as_deref()).collect::<Vec<_>>(), [Some("killer")]);
    assert_eq!(fixture.handled().await, [("b".into(), "innocent".into())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_is_dropped_lets_go_of_its_partitions() {
    let fixture = Fixture::new(1).await;
    let first: Running = fixture.start();
    fixture.send(&[event("k", "1")]).await;
    fixture.until_handled(1).await;
    let handler = Arc::downgrade(&first.recorder);
    first.drop_it().await;
    eventually(SOON, || async { (handler.strong_count() == 0).then_some(()) }).await;
    let second = fixture.start();
    fixture.send(&[event("k", "2")]).await;
    fixture.until_handled(2).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_comes_while_the_parked_one_leaves_holds_up_nobody() {
    const LOCK: i64 = 4_711;
    let mut fixture = Fixture::new(2).await;
    fixture.config.attempts = 1_000;
    // The commit that takes the parked record out waits for the test.
    for sql in [
        "create function wait() returns trigger language plpgsql as $$
         begin perform pg_advisory_xact_lock_shared(4711); return null; end $$",
        "create constraint trigger wait after delete on inbox_parked deferrable initially deferred
         for each row execute function wait()",
    ] {
        sqlx::query(sql).execute(&fixture.database.pool).await.unwrap();
    }
    let mut holding = fixture.database.pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *holding).await.unwrap();

    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let running = fixture.start_with(move |message| match says(message, "1") && is_broken.load(Ordering::SeqCst) {
        true => Err(anyhow::anyhow!("not yet").into()),
        false => Ok(()),
    });
    let id = MessageId::new();
    let waiting = |count: i64| {
        let pool = &fixture.database.pool;
        eventually(SOON, move || async move {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
            )
            .fetch_one(pool)
            .await
            .ok()?;
            (waiting == count).then_some(())
        })
    };
    produce(&fixture.topic, &[on(0, with_id(id, "k", "1"))]).await;
    eventually(SOON, || async { (fixture.parked().await.len() == 1).then_some(()) }).await;
    broken.store(false, Ordering::SeqCst);
    waiting(1).await;
    produce(&fixture.topic, &[on(1, with_id(id, "k", "1"))]).await;
    waiting(2).await;
    holding.rollback().await.unwrap();

    produce(&fixture.topic, &[on(1, event("k", "2"))]).await;
    assert_eq!(fixture.until_handled(2).await, [("k".into(), "1".into()), ("k".into(), "2".into())]);
    fixture.until_unparked().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_timeout_that_the_brokers_refuse_is_an_error_that_says_so() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.session_timeout = Duration::from_millis(300);
    let consumer =
        Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), fixture.start().recorder.clone());
    let ended = tokio::time::timeout(SOON, consumer.run(CancellationToken::new())).await.expect("it ends");
    let error = ended.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("InvalidSessionTimeout"), "{error}: {source}");
}

//! Messages that nothing is wrong with: each is handled once, in order, whichever member reads it.

use crate::support::{Fixture, SOON, assert_complete, event, events, with_id};
use saga_core::{
    consumer::{Consumer, ConsumerConfig, HandleError, Handler, Message},
    envelope::header,
    id::MessageId,
    outbox::{NewMessage, Tx},
    service::database::pool_options,
    testkit::{Log, Record, TestTopic, brokers, eventually, produce, unique},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_comes_twice_is_handled_once_and_offsets_are_committed() {
    let fixture = Fixture::new(1).await;
    let id = MessageId::new();
    fixture.send(&[with_id(id, "a", "1"), with_id(id, "a", "1"), event("a", "2")]).await;
    let running = fixture.start();
    assert_eq!(fixture.until_handled(2).await, [("a".into(), "1".into()), ("a".into(), "2".into())]);
    // The same message comes again, after the first was committed.
    fixture.send(&[with_id(id, "a", "1"), event("a", "3")]).await;
    assert_eq!(fixture.until_handled(3).await.last().unwrap().1, "3");
    running.stop().await;

    // The next member of the group starts behind all of it: its handler sees the new message and no other.
    fixture.send(&[event("a", "4")]).await;
    let next = fixture.start();
    assert_eq!(fixture.until_handled(4).await.last().unwrap().1, "4");
    assert_eq!(*next.recorder.batches.lock().unwrap(), [1]);
    assert_eq!(next.recorder.commits.load(Ordering::SeqCst), 1);
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_arrived_is_one_batch_and_keeps_its_order() {
    let fixture = Fixture::new(2).await;
    fixture.send(&events(10, 3_000)).await;
    let running = fixture.start();
    assert_complete(&fixture.until_handled(3_000).await, 10, 3_000);
    let largest = running.recorder.batches.lock().unwrap().iter().copied().max();
    assert!(largest > Some(100) && largest <= Some(500), "{largest:?}");
    assert_eq!(running.health.check(), Ok(()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_is_told_when_a_batch_is_committed() {
    let fixture = Fixture::new(1).await;
    let mut nudges = fixture.database.nudges().await;
    let running = fixture.start();
    fixture.send(&[event("a", "1")]).await;
    timeout(SOON, nudges.recv()).await.expect("the relay is told").unwrap();
    // The nudge does not come before the commit.
    assert_eq!(fixture.until_handled(1).await.len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_batch_is_committed_and_the_next_one_begun_in_one_round_trip() {
    let fixture = Fixture::new(1).await;
    let log = Log::hear("sqlx::query=debug");
    let running = fixture.start();
    // A transaction that has begun ahead waits for 0.1 s; a record may take longer now and then.
    let (mut batches, began) = (1, Instant::now());
    while !fixture.handles_in_what_has_begun(batches).await {
        batches += 1;
        assert!(began.elapsed() < SOON, "none was used");
    }
    running.stop().await;
    let ends = |sql: &String| sql.contains("commit") || sql.contains("notify");
    let ends: Vec<_> = log.statements().into_iter().filter(ends).collect();
    let parts =
        ["commit; begin;", "notify outbox", "begin isolation level read committed", "pg_try_advisory_xact_lock"];
    let in_one = |sql: &String| parts.iter().all(|part| sql.contains(part));
    assert!(ends.len() == batches && ends.iter().all(in_one), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_begun_and_is_not_used_is_given_back() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    for nth in 1..=3 {
        assert!(!fixture.handles_in_what_has_begun(nth).await);
        // No connection has a commit, with a transaction begun behind it, as the last statement that it did or does.
        eventually(SOON, || async {
            let given_back: bool = sqlx::query_scalar(
                "select not exists (select from pg_stat_activity
                                     where datname = current_database() and query like 'commit;%')",
            )
            .fetch_one(&fixture.database.pool)
            .await
            .unwrap();
            given_back.then_some(())
        })
        .await;
        eventually(SOON, || async { fixture.locks(true).await.is_empty().then_some(()) }).await;
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_have_one_connection_between_them_take_turns() {
    let mut fixture = Fixture::new(4).await;
    let one = pool_options(1).connect_with(fixture.database.pool.connect_options().as_ref().clone()).await.unwrap();
    let many = std::mem::replace(&mut fixture.database.pool, one);
    let running = fixture.start();
    fixture.database.pool = many;
    for turn in 1..=5 {
        fixture.send(&events(10, 40)).await;
        fixture.until_handled(40 * turn).await;
    }
    // No transaction begins ahead: the others would have to wait for that.
    for nth in 201..=205 {
        assert!(!fixture.handles_in_what_has_begun(nth).await);
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_partition_gets_it_with_the_next_commit() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    running.gate.send_replace(false);
    fixture.send(&[event("a", "1")]).await;
    let lock = eventually(SOON, || async { fixture.locks(true).await.first().copied() }).await;
    let mut other = fixture.database.pool.begin().await.unwrap();
    let waits = sqlx::query("select pg_advisory_xact_lock($1)").bind(lock).execute(&mut *other);
    let commits = async {
        fixture.until_somebody_waits_for(lock).await;
        running.gate.send_replace(true);
    };
    tokio::join!(waits, commits).0.unwrap();
    // The batch is done, whichever member has the partition now; the next batch waits.
    eventually(SOON, || async { (running.recorder.commits.load(Ordering::SeqCst) == 1).then_some(()) }).await;
    fixture.send(&[event("a", "2")]).await;
    fixture.until_somebody_waits_for(lock).await;
    assert_eq!(fixture.handled().await.len(), 1);
    other.rollback().await.unwrap();
    fixture.until_handled(2).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_wrong_behind_a_commit_is_no_failure_of_its_batch() {
    let mut fixture = Fixture::new(1).await;
    // The next transaction can never begin together with a commit.
    sqlx::query(
        "create function pg_try_advisory_xact_lock(bigint) returns boolean language plpgsql as $$
         begin raise exception 'not today'; end $$",
    )
    .execute(&fixture.database.pool)
    .await
    .unwrap();
    let ours_first =
        fixture.database.pool.connect_options().as_ref().clone().options([("search_path", "public,pg_catalog")]);
    fixture.database.pool = pool_options(8).connect_with(ours_first).await.unwrap();
    let running = fixture.start();
    for (count, value) in [(1, "1"), (2, "2"), (3, "3")] {
        fixture.send(&[event("a", value)]).await;
        fixture.until_handled(count).await;
    }
    let recorder = Arc::clone(&running.recorder);
    running.stop().await;
    assert_eq!((recorder.batches.lock().unwrap().clone(), recorder.commits.load(Ordering::SeqCst)), (vec![1; 3], 3));
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tombstone_and_a_record_without_a_key_are_messages_like_others() {
    let fixture = Fixture::new(1).await;
    fixture.send(&[Record { value: None, ..event("a", "") }, Record { key: None, ..event("", "no key") }]).await;
    let running = fixture.start();
    fixture.until_handled(2).await;
    let rows: Vec<(Option<String>, Option<String>)> =
        sqlx::query_as("select key, value from handled order by n").fetch_all(&fixture.database.pool).await.unwrap();
    assert_eq!(rows, [(Some("a".into()), None), (None, Some("no key".into()))]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_is_held_up_is_paused_and_the_others_flow_on() {
    let mut fixture = Fixture::new(2).await;
    (fixture.config.batch_max, fixture.config.buffer) = (50, 200);
    let at = |partition, n: usize| Record {
        partition: Some(partition),
        ..event(&format!("p{partition}"), &format!("{n:04}"))
    };
    let running = fixture.start();
    running.gate.send(false).unwrap();
    fixture.send(&(0..1_000).map(|n| at(0, n)).collect::<Vec<_>>()).await;
    fixture.send(&(0..1_000).map(|n| at(1, n)).collect::<Vec<_>>()).await;
    let others = fixture.until_handled(1_000).await;
    assert!(others.iter().all(|(key, _)| key == "p1"));
    running.gate.send(true).unwrap();
    let all = fixture.until_handled(2_000).await;
    for key in ["p0", "p1"] {
        let values: Vec<_> = all.iter().filter(|(of, _)| of == key).map(|(_, value)| value.clone()).collect();
        assert_eq!(values, (0..1_000).map(|n| format!("{n:04}")).collect::<Vec<_>>());
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_under_load_loses_nothing_and_repeats_nothing() {
    const KEYS: usize = 40;
    let mut fixture = Fixture::new(4).await;
    fixture.config.batch_max = 20;
    let mut load = Load { fixture: &fixture, waves: 0 };
    let first = fixture.start();
    load.until(|| first.recorder.commits.load(Ordering::SeqCst) > 10).await;
    let second = fixture.start();
    load.until(|| second.recorder.commits.load(Ordering::SeqCst) > 10).await;
    let third = fixture.start();
    load.until(|| third.recorder.commits.load(Ordering::SeqCst) > 10).await;
    first.stop().await;
    load.until(|| second.recorder.commits.load(Ordering::SeqCst) > 30).await;
    let sent = load.waves * KEYS;
    assert_complete(&fixture.until_handled(sent).await, KEYS, sent);
    second.stop().await;
    third.stop().await;
    assert!(fixture.parked().await.is_empty());
}

/// Sends an event of each key, again and again.
struct Load<'a> {
    fixture: &'a Fixture,
    waves: usize,
}

impl Load<'_> {
    async fn until(&mut self, reached: impl Fn() -> bool) {
        let started = Instant::now();
        while !reached() {
            assert!(started.elapsed() < SOON);
            let wave: Vec<_> = (0..40).map(|k| event(&format!("k{k}"), &format!("{:06}", self.waves))).collect();
            self.fixture.send(&wave).await;
            self.waves += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_partitions_is_ready_to_take_over() {
    let fixture = Fixture::new(1).await;
    let members = [fixture.start(), fixture.start()];
    fixture.send(&[event("a", "1")]).await;
    fixture.until_handled(1).await;
    for member in &members {
        eventually(SOON, || async { member.health.check().ok() }).await;
    }
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_created_later_is_read() {
    let mut fixture = Fixture::new(1).await;
    let later = unique("later");
    fixture.config.topics.push(later.clone());
    fixture.send(&[event("a", "1")]).await;
    let running = fixture.start();
    fixture.until_handled(1).await;
    let later = TestTopic::create_named(&later, 1).await;
    produce(&later, &[event("b", "1")]).await;
    assert_eq!(fixture.until_handled(2).await[1].0, "b");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_broker_it_is_not_ready_and_stops_when_told() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.brokers = "127.0.0.1:1".into();
    let running = fixture.start();
    eventually(SOON, || async {
        running.health.check().is_err_and(|reason| reason.contains("no broker can be reached")).then_some(())
    })
    .await;
    let stopping = Instant::now();
    running.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(12), "{:?}", stopping.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_hangs_does_not_keep_the_process_from_stopping() {
    let fixture = Fixture::new(1).await;
    fixture.send(&[event("a", "1")]).await;
    let running = fixture.start();
    running.gate.send(false).unwrap();
    eventually(SOON, || async { (!running.recorder.batches.lock().unwrap().is_empty()).then_some(()) }).await;
    let stopping = Instant::now();
    running.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(15), "{:?}", stopping.elapsed());
    assert!(fixture.handled().await.is_empty());
    // The handler was cut off within its transaction, which is rolled back; the next consumer handles the message.
    let next = fixture.start();
    fixture.until_handled(1).await;
    next.stop().await;
}

struct Replies(Mutex<Vec<NewMessage>>);

impl Handler for Replies {
    async fn handle(&self, _: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        let reply =
            NewMessage::json("replies", "a", "test.reply.v1", &batch[0].payload).map_err(anyhow::Error::from)?;
        self.0.lock().unwrap().push(reply);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_handler_sends_belongs_to_the_trace_of_what_it_handles() {
    use opentelemetry::trace::TracerProvider;
    use tracing_subscriber::layer::SubscriberExt;
    let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
    let layer = tracing_opentelemetry::layer().with_tracer(tracer);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();

    let fixture = Fixture::new(1).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut record = event("a", "1");
    record.headers.push((header::TRACEPARENT.into(), Some(format!("00-{trace}-00f067aa0ba902b7-01").into_bytes())));
    fixture.send(&[record]).await;
    let replies = Arc::new(Replies(Mutex::default()));
    let config = ConsumerConfig::new(&brokers(), &unique("group"), [fixture.topic.name()]);
    let stop = CancellationToken::new();
    let consumer = Consumer::new(config, fixture.database.pool.clone(), Arc::clone(&replies));
    let task = tokio::spawn(consumer.run(stop.clone()));
    let reply = eventually(SOON, || async { replies.0.lock().unwrap().first().cloned() }).await;
    assert!(reply.headers[header::TRACEPARENT].contains(trace), "{:?}", reply.headers);
    assert_eq!(reply.headers[header::CORRELATION_ID], trace);
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_was_paused_when_it_was_taken_away_is_read_on_when_it_comes_back() {
    let mut fixture = Fixture::new(2).await;
    (fixture.config.batch_max, fixture.config.buffer) = (4, 8);
    let away = Arc::new(AtomicBool::new(true));
    let opinion = {
        let away = Arc::clone(&away);
        move |_: &Message| {
            let lost = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
            if away.load(Ordering::SeqCst) { Err(lost().into()) } else { Ok(()) }
        }
    };
    let first = fixture.start_with(opinion.clone());
    fixture.send(&events(20, 400)).await;
    eventually(SOON, || async { (first.recorder.batches.lock().unwrap().len() > 4).then_some(()) }).await;
    let second = fixture.start_with(opinion);
    eventually(SOON, || async { (!second.recorder.batches.lock().unwrap().is_empty()).then_some(()) }).await;
    second.stop().await;
    away.store(false, Ordering::SeqCst);
    assert_complete(&fixture.until_handled(400).await, 20, 400);
    first.stop().await;
}

/// Counts what it handles, and another part waits for what it reads.
#[derive(Default)]
struct WaitedFor(AtomicUsize);

impl Handler for WaitedFor {
    async fn handle(&self, _: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        self.0.fetch_add(batch.len(), Ordering::SeqCst);
        Ok(())
    }

    fn says_how_far_it_read(&self) -> bool {
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_far_a_partition_is_read_is_recorded_while_records_keep_coming() {
    let fixture = Fixture::new(1).await;
    let handler = Arc::new(WaitedFor::default());
    let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), Arc::clone(&handler));
    let stop = CancellationToken::new();
    let running = tokio::spawn(consumer.run(stop.clone()));
    let sends = async {
        for sent in (0..).step_by(300) {
            fixture.send(&events(7, 300)).await;
            // The consumer keeps up, and always has records to handle: where the partition ends is in the middle of a batch.
            eventually(SOON, || async { (handler.0.load(Ordering::SeqCst) + 1_200 >= sent).then_some(()) }).await;
        }
    };
    let read_until = async || -> Option<time::OffsetDateTime> {
        sqlx::query_scalar("select max(read_until) from inbox_partition")
            .fetch_one(&fixture.database.pool)
            .await
            .unwrap()
    };
    let recorded = async {
        let mut last = eventually(SOON, &read_until).await;
        for _ in 0..3 {
            last = eventually(SOON, async || read_until().await.filter(|until| *until > last)).await;
        }
    };
    tokio::select! {
        in_time = timeout(SOON, recorded) => in_time.expect("a record of how far it read every few seconds"),
        () = sends => unreachable!("it sends for ever"),
    }
    stop.cancel();
    running.await.unwrap().unwrap();
}

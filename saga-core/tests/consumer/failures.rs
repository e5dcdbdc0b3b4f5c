//! Records that fail: parked with their successors, retried, dead-lettered; all other records flow on.

use crate::support::{Fixture, SOON, assert_complete, event, events, says, with_id};
use saga_core::{
    command::Op,
    consumer::{HandleError, TooOld},
    envelope::{Envelope, SagaHeaders},
    id::{CommandId, MessageId, SagaId},
    testkit::{Log, Record, eventually, produce},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use uuid::{NoContext, Timestamp, Uuid};

fn values(handled: &[(String, String)], key: &str) -> Vec<String> {
    handled.iter().filter(|(of, _)| of == key).map(|(_, value)| value.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_fails_is_parked_with_its_successors_and_other_keys_flow_on() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1_000;
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let running = fixture.start_with(move |message| {
        let fails = says(message, "a2") && is_broken.load(Ordering::SeqCst);
        if fails { Err(anyhow::anyhow!("not yet").into()) } else { Ok(()) }
    });
    let said = ["a1", "b1", "a2", "a3", "b2", "a4", "c1"];
    fixture.send(&said.map(|value| event(&value[..1], value))).await;
    assert_eq!(values(&fixture.until_handled(4).await, "a"), ["a1"]);
    // A record of that key that comes much later waits behind as well.
    fixture.send(&[event("a", "a5"), event("b", "b3")]).await;
    let handled = fixture.until_handled(5).await;
    assert_eq!(
        (values(&handled, "b"), values(&handled, "c")),
        (vec!["b1".into(), "b2".into(), "b3".into()], vec!["c1".into()])
    );
    let parked = fixture.parked().await;
    let order: Vec<_> = parked.iter().map(|(value, _, due)| (value.as_str(), *due)).collect();
    assert_eq!(order, [("a2", true), ("a3", false), ("a4", false), ("a5", false)]);

    broken.store(false, Ordering::SeqCst);
    fixture.until_unparked().await;
    assert_eq!(values(&fixture.handled().await, "a"), ["a1", "a2", "a3", "a4", "a5"]);
    fixture.send(&[event("a", "a6")]).await;
    assert_eq!(fixture.until_handled(10).await.last().unwrap().1, "a6");
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_record_that_this_build_cannot_read_holds_up_its_key_alone() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1_000;
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let running = fixture.start_with(move |_| match is_broken.load(Ordering::SeqCst) {
        true => Err(anyhow::anyhow!("not yet").into()),
        false => Ok(()),
    });
    fixture.send(&[event("a", "a1"), event("b", "b1")]).await;
    eventually(SOON, || async { (fixture.parked().await.len() == 2).then_some(()) }).await;
    let garble = sqlx::query("update inbox_parked set headers = '{}' where payload = 'a1'::bytea");
    garble.execute(&fixture.database.pool).await.unwrap();
    // From then on no attempt is under way that read the row before.
    let unreadable = "select count(*) from inbox_parked where error_class = 'unreadable'";
    eventually(SOON, || async {
        let count: i64 = sqlx::query_scalar(unreadable).fetch_one(&fixture.database.pool).await.unwrap();
        (count == 1).then_some(())
    })
    .await;

    broken.store(false, Ordering::SeqCst);
    fixture.send(&[event("a", "a2"), event("b", "b2")]).await;

    assert_eq!(values(&fixture.until_handled(2).await, "b"), ["b1", "b2"]);
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_last_attempt_a_record_is_dead_lettered_and_its_successors_proceed() {
    let fixture = Fixture::new(1).await;
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    let running = fixture.start_with(move |message| {
        if says(message, "a2") {
            counted.fetch_add(1, Ordering::SeqCst);
            return Err(anyhow::anyhow!("the shelf is gone").context("could not pick").into());
        }
        Ok(())
    });
    let failing = MessageId::new();
    fixture.send(&[event("a", "a1"), with_id(failing, "a", "a2"), event("a", "a3"), event("b", "b1")]).await;
    let letters = fixture.until_dead_letters(1).await;
    assert_eq!(values(&fixture.until_handled(3).await, "a"), ["a1", "a3"]);
    let (key, value, headers) = &letters[0];
    assert_eq!((key.as_deref(), value.as_deref()), (Some("a"), Some("a2")));
    let header = |name: &str| headers[name].as_str().unwrap_or_default().to_owned();
    assert_eq!(header("x-original-topic"), fixture.topic.name());
    assert_eq!((header("x-original-partition"), header("x-original-offset")), ("0".into(), "1".into()));
    assert_eq!(header("x-original-group"), fixture.config.group);
    assert!(!header("x-original-timestamp").is_empty());
    assert_eq!((header("x-attempts"), header("x-error-class")), ("3".into(), "failed".into()));
    assert_eq!(header("x-error-message"), "could not pick: the shelf is gone");
    assert_eq!(header("id"), failing.to_string());
    // There are three counted attempts, and those that found the record in its batch of at most four.
    assert!((3..=5).contains(&attempts.load(Ordering::SeqCst)), "{attempts:?}");
    fixture.until_unparked().await;

    // The message is known when it is published once more: given up is given up.
    fixture.send(&[with_id(failing, "a", "a2"), event("a", "a4")]).await;
    assert_eq!(values(&fixture.until_handled(4).await, "a"), ["a1", "a3", "a4"]);
    assert_eq!(fixture.dead_letters().await.len(), 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_for_which_the_last_value_wins_handles_the_old_messages_of_a_topic_that_keeps_them() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.too_old = TooOld::Handle;
    let running = fixture.start();
    let now = u64::try_from(time::OffsetDateTime::now_utc().unix_timestamp()).unwrap();
    let old = MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, now - 400 * 24 * 3600, 0)));
    let new = MessageId::new();
    let sent = [with_id(old, "a", "a1"), with_id(new, "a", "a2"), with_id(old, "a", "a1"), with_id(new, "a", "a2")];
    fixture.send(&sent).await;
    // The old message is handled whenever it comes. One that the inbox remembers is still handled once.
    assert_eq!(values(&fixture.until_handled(3).await, "a"), ["a1", "a2", "a1"]);
    fixture.send(&[event("a", "a3")]).await;
    assert_eq!(values(&fixture.until_handled(4).await, "a"), ["a1", "a2", "a1", "a3"]);
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_decoded_or_remembered_is_dead_lettered_at_once_and_the_partition_goes_on() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start_with(|message| {
        if says(message, "poison") { Err(HandleError::Poison("unknown version 9".into())) } else { Ok(()) }
    });
    let at = |seconds| MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, 0)));
    let now = u64::try_from(time::OffsetDateTime::now_utc().unix_timestamp()).unwrap();
    let unreadable = Record { headers: Vec::new(), ..event("a", "no headers") };
    let mut odd = event("a", "odd headers");
    odd.headers =
        vec![("ce_id".into(), Some(vec![0xff, 0])), ("x\u{1}".into(), None), ("ce_type".into(), Some(vec![0]))];
    let binary_key = Record { key: Some(vec![0xff, 0]), headers: Vec::new(), ..event("a", "binary key") };
    fixture
        .send(&[
            event("a", "1"),
            unreadable,
            odd,
            binary_key,
            with_id(MessageId(Uuid::new_v4()), "a", "not v7"),
            with_id(at(now - 15 * 24 * 3600), "a", "too old"),
            with_id(at(now + 25 * 3600), "a", "from the future"),
            with_id(at(now + 23 * 3600), "a", "a fast clock"),
            event("a", "poison"),
            event("a", "2"),
        ])
        .await;
    let letters = fixture.until_dead_letters(7).await;
    let mut said: Vec<_> = letters
        .iter()
        .map(|(_, value, headers)| (value.clone().unwrap(), headers["x-error-class"].as_str().unwrap().to_owned()))
        .collect();
    said.sort();
    let expected = [
        ("binary key", "undecodable"),
        ("from the future", "inadmissible"),
        ("no headers", "undecodable"),
        ("not v7", "inadmissible"),
        ("odd headers", "undecodable"),
        ("poison", "poison"),
        ("too old", "inadmissible"),
    ];
    assert_eq!(said, expected.map(|(value, class)| (value.to_owned(), class.to_owned())));
    assert_eq!(values(&fixture.until_handled(3).await, "a"), ["1", "a fast clock", "2"]);
    assert!(fixture.parked().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_of_many_is_drained_in_order_while_new_ones_arrive() {
    let mut fixture = Fixture::new(1).await;
    (fixture.config.batch_max, fixture.config.attempts) = (50, 1_000);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let running = fixture.start_with(move |message| {
        let fails = message.key.as_deref() == Some(b"k0") && is_broken.load(Ordering::SeqCst);
        if fails { Err(anyhow::anyhow!("not yet").into()) } else { Ok(()) }
    });
    let all = events(3, 900);
    fixture.send(&all[..600]).await;
    fixture.until_handled(400).await;
    broken.store(false, Ordering::SeqCst);
    fixture.send(&all[600..]).await;
    assert_complete(&fixture.until_handled(900).await, 3, 900);
    fixture.until_unparked().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_panics_fails_its_record_and_nothing_else() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start_with(|message| {
        assert!(!says(message, "panic"), "this one is too much");
        Ok(())
    });
    fixture.send(&[event("a", "1"), event("b", "panic"), event("a", "2")]).await;
    let letters = fixture.until_dead_letters(1).await;
    assert!(letters[0].2["x-error-message"].as_str().unwrap().contains("this one is too much"));
    assert_eq!(values(&fixture.until_handled(2).await, "a"), ["1", "2"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_database_is_waited_for_and_counts_nothing() {
    let mut fixture = Fixture::new(2).await;
    fixture.config.batch_max = 20;
    let running = fixture.start();
    for wave in 0..5 {
        let sent: Vec<_> =
            (0..400).map(|n| event(&format!("k{}", n % 8), &format!("{:06}", wave * 50 + n / 8))).collect();
        produce(&fixture.topic, &sent).await;
        fixture.until_handled(wave * 400 + 50).await;
        fixture.database.cut_connections().await;
    }
    assert_complete(&fixture.until_handled(2_000).await, 8, 2_000);
    assert!(fixture.parked().await.is_empty());
    assert!(fixture.dead_letters().await.is_empty());
    let attempts: i64 = sqlx::query_scalar("select coalesce(sum(attempts), 0)::bigint from inbox_partition")
        .fetch_one(&fixture.database.pool)
        .await
        .unwrap();
    assert_eq!(attempts, 0, "nothing was counted");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_away_it_is_not_ready_and_then_goes_on_by_itself() {
    let fixture = Fixture::new(2).await;
    let running = fixture.start();
    let sent = events(8, 400);
    fixture.send(&sent[..200]).await;
    fixture.until_handled(200).await;
    fixture.database.shut().await;
    fixture.send(&sent[200..]).await;
    eventually(SOON, || async {
        running.health.check().is_err_and(|reason| reason.starts_with("database ")).then_some(())
    })
    .await;
    fixture.database.open().await;
    assert_complete(&fixture.until_handled(400).await, 8, 400);
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());

    // The database is away once more: that does not keep the process from stopping.
    fixture.database.shut().await;
    let stopping = std::time::Instant::now();
    running.stop().await;
    assert!(stopping.elapsed() < std::time::Duration::from_secs(8), "{:?}", stopping.elapsed());
    fixture.database.open().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_passes_by_itself_is_repeated_and_counts_nothing_however_a_handler_words_it() {
    let fixture = Fixture::new(1).await;
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let running = fixture.start_with(move |_| {
        let cut = || sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        match counted.fetch_add(1, Ordering::SeqCst) {
            0 | 2 => Err(cut().into()),
            // A handler that knows only `anyhow` wraps the error like this.
            1 | 3 => Err(anyhow::Error::from(cut()).context("could not read the stock").into()),
            _ => Ok(()),
        }
    });
    fixture.send(&[event("a", "1")]).await;
    fixture.until_handled(1).await;
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert_eq!(tries.load(Ordering::SeqCst), 5);
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_with_another_transaction_is_repeated_and_counts_nothing() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1;
    // The server looks for deadlocks once in each wait, so the handler's last wait has to begin when ours has. Lock 3
    // is a gate before it. It must find the handler's transaction, not ours: ours is patient.
    sqlx::query(
        "create function locks_a_then_b() returns trigger language plpgsql as $$
         begin
             set local deadlock_timeout = '50ms';
             perform pg_advisory_xact_lock(1);
             perform pg_advisory_xact_lock(3);
             perform pg_advisory_xact_lock(2);
             return new;
         end $$",
    )
    .execute(&fixture.database.pool)
    .await
    .unwrap();
    sqlx::query("create trigger locks before insert on handled for each row execute function locks_a_then_b()")
        .execute(&fixture.database.pool)
        .await
        .unwrap();
    let mut gate = fixture.database.pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(3)").execute(&mut *gate).await.unwrap();
    let mut other = fixture.database.pool.begin().await.unwrap();
    sqlx::query("set local deadlock_timeout = '1h'").execute(&mut *other).await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(2)").execute(&mut *other).await.unwrap();
    fixture.send(&[event("a", "1")]).await;
    let running = fixture.start();
    fixture.until_somebody_waits_for(3).await;
    // The handler holds lock 1. Now the test waits for that, then the handler waits for 2, and one of them has to give
    // way.
    let ours = sqlx::query("select pg_advisory_xact_lock(1)").execute(&mut *other);
    let opened = async {
        fixture.until_somebody_waits_for(1).await;
        gate.commit().await.unwrap();
    };
    tokio::join!(ours, opened).0.unwrap();
    other.commit().await.unwrap();
    fixture.until_handled(1).await;
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_whose_commit_the_database_refuses_is_dead_lettered_and_the_partition_goes_on() {
    let fixture = Fixture::new(1).await;
    for sql in [
        "create function refuse() returns trigger language plpgsql as $$
         begin if new.value = 'bad' then raise exception 'not this one'; end if; return null; end $$",
        "create constraint trigger refuse after insert on handled deferrable initially deferred
         for each row execute function refuse()",
    ] {
        sqlx::query(sql).execute(&fixture.database.pool).await.unwrap();
    }
    fixture.send(&[event("a", "good"), event("b", "bad"), event("c", "good")]).await;
    let running = fixture.start();
    let letters = fixture.until_dead_letters(1).await;
    assert_eq!(letters[0].1.as_deref(), Some("bad"));
    assert!(
        letters[0].2["x-error-message"].as_str().is_some_and(|reason| reason.contains("not this one")),
        "{letters:?}"
    );
    let good = |key: &str| (key.to_owned(), "good".to_owned());
    assert_eq!(fixture.until_handled(2).await, [good("a"), good("c")]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_no_index_can_hold_is_dead_lettered_and_the_partition_goes_on() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    let mut long = event("k", "long");
    // The digits are random: a text that repeats itself would be compressed.
    let source: String = (0..200).map(|_| Uuid::new_v4().simple().to_string()).collect();
    for (name, value) in &mut long.headers {
        if name == "ce_source" {
            *value = Some(source.clone().into_bytes());
        }
    }
    fixture.send(&[long, event("k", "good")]).await;
    assert_eq!(values(&fixture.until_handled(1).await, "k"), ["good"]);
    let letters = fixture.until_dead_letters(1).await;
    assert_eq!(
        (letters[0].1.as_deref(), letters[0].2["x-original-source"].as_str()),
        (Some("long"), Some(source.as_str()))
    );
    running.stop().await;
}

#[tokio::test]
async fn what_is_parked_and_what_is_dead_lettered_say_their_ids_where_there_are_no_spans() {
    let log = Log::hear("warn");
    let fixture = Fixture::new(1).await;
    let running = fixture.start_with(|message| match says(message, "bad") {
        true => Err(anyhow::anyhow!("the shelf is gone").into()),
        false => Ok(()),
    });
    let mut envelope = Envelope::new(MessageId::new(), "orders", "stock.reserve.v1");
    let saga = SagaId::new();
    envelope.saga = Some(SagaHeaders {
        saga,
        definition: "order".into(),
        version: 1,
        step: "reserve".into(),
        op: Op::Do,
        occurrence: 0,
        command: CommandId::derive(saga, "reserve", Op::Do, 0),
        attempt: 1,
        undoes: None,
        happened: None,
        orchestrator: None,
        reply_to: Some("replies".into()),
        outcome: None,
    });
    let bad = Record { headers: Record::of(&envelope).headers, ..event("b", "bad") };
    fixture.send(&[event("a", "good"), bad]).await;
    fixture.until_dead_letters(1).await;
    for message in ["parked", "dead-lettered"] {
        let [line] = &log.said(message)[..] else { panic!("{message}: {:?}", log.warnings()) };
        assert_eq!(line["trace_id"], "", "there are spans: {line}");
        assert_eq!((&line["topic"], &line["group"]), (&fixture.topic.name().into(), &(*fixture.config.group).into()));
        assert_eq!((&line["partition"], &line["offset"]), (&0.into(), &1.into()), "{line}");
        assert_eq!(line["message_id"], envelope.id.to_string(), "{line}");
        let id = serde_json::Value::from(saga.to_string());
        assert_eq!((&line["saga"], &line["saga_type"]), (&id, &"order".into()), "{line}");
        assert_eq!(line["order"], serde_json::Value::Null, "nothing in this process has declared such sagas: {line}");
    }
    running.stop().await;
}

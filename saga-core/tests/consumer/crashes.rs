//! The process dies at the edges of a transaction, or an error strikes there: every message is handled once, in order.

use crate::support::{Fixture, Running, SOON, assert_complete, event, events, with_id};
use saga_core::{
    consumer::{HandleError, TooOld},
    id::MessageId,
    retry::Backoff,
    testkit::{
        FailPoint, eventually,
        failpoints::{Fault, Injected},
    },
};
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};
use uuid::{NoContext, Timestamp, Uuid};

/// The process dies once at the edge, and then, `again` and again, in the lives that note their batches because of that.
async fn dies_at(edge: &str, skip: usize, again: &[&str]) {
    let mut fixture = Fixture::new(1).await;
    fixture.config.batch_max = 30;
    let sent = events(5, 100);
    fixture.send(&sent[..60]).await;
    for (edge, skip) in [(edge, skip)].into_iter().chain(again.iter().map(|edge| (*edge, 0))) {
        let _armed = FailPoint::arm(edge, &fixture.config.group, Fault::Crash, skip, 1);
        fixture.start().dies().await;
    }
    fixture.send(&sent[60..]).await;
    let next = fixture.start();
    assert_complete(&fixture.until_handled(100).await, 5, 100);
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    next.stop().await;
}

async fn goes_wrong_at(edge: &str, fault: Fault) {
    let mut fixture = Fixture::new(1).await;
    fixture.config.batch_max = 30;
    let _armed = FailPoint::arm(edge, &fixture.config.group, fault, 1, 2);
    fixture.send(&events(5, 100)).await;
    let running = fixture.start();
    assert_complete(&fixture.until_handled(100).await, 5, 100);
    fixture.until_unparked().await;
    assert!(fixture.dead_letters().await.is_empty());
    running.stop().await;
}

const EDGES: [&str; 4] =
    ["consumer.before-begin", "consumer.after-inbox", "consumer.before-commit", "consumer.after-commit"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_at_an_edge_loses_nothing_and_repeats_nothing() {
    let edges = EDGES.iter().chain(&["consumer.before-store"]);
    let deaths = edges.flat_map(|edge| [dies_at(edge, 0, &[]), dies_at(edge, 1, &[])]);
    futures::future::join_all(deaths).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_again_and_again_loses_nothing_and_repeats_nothing() {
    let again: [&[&str]; 4] = [
        &["consumer.after-note"],
        &["consumer.after-inbox", "consumer.after-attempt"],
        &["consumer.before-commit", "consumer.before-commit", "consumer.after-note"],
        &["consumer.before-begin", "consumer.after-attempt", "consumer.after-attempt"],
    ];
    futures::future::join_all(again.map(|again| dies_at("consumer.before-commit", 1, again))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_at_an_edge_loses_nothing_and_repeats_nothing() {
    let errors = EDGES.iter().flat_map(|edge| [goes_wrong_at(edge, Fault::Error), goes_wrong_at(edge, Fault::Outage)]);
    futures::future::join_all(errors).await;
}

/// Records that fail are given up or retried, and the records behind them are handled. The connection is lost around
/// one of those commits.
async fn loses_a_commit_of_what_failed(edge: &str, skip: usize) {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 2;
    let database = fixture.database.pool.connect_options().get_database().unwrap().to_owned();
    let armed = FailPoint::arm(edge, &database, Fault::Outage, skip, 1);
    let events =
        [("a", "twice"), ("a", "1"), ("b", "poison"), ("c", "never"), ("a", "2"), ("b", "3"), ("c", "4"), ("d", "5")];
    fixture.send(&events.map(|(key, value)| event(key, value))).await;
    let tries = AtomicUsize::new(0);
    // The record fails in the batch, and alone: the error names its message.
    let fails_twice = move || tries.fetch_add(1, Ordering::SeqCst) < 2;
    let running = fixture.start_with(move |message| match message.payload.as_deref() {
        Some(b"twice") if fails_twice() => Err(HandleError::Failed(anyhow::anyhow!("not yet")).of(message.envelope.id)),
        Some(b"never") => Err(anyhow::anyhow!("never").into()),
        Some(b"poison") => Err(HandleError::Poison("unknown".into())),
        _ => Ok(()),
    });
    let mut handled = fixture.until_handled(6).await;
    fixture.until_unparked().await;
    running.stop().await;
    drop(armed);
    assert_eq!(fixture.handled().await.len(), 6, "{edge}, {skip}");
    handled.sort_by_key(|(key, _)| key.clone());
    let values: Vec<_> = handled.iter().map(|(_, value)| value.as_str()).collect();
    assert_eq!(values, ["twice", "1", "2", "3", "4", "5"], "{edge}, {skip}");
    let letters = fixture.dead_letters().await;
    let letters: BTreeSet<_> = letters.iter().map(|(_, value, _)| value.as_deref().unwrap()).collect();
    assert_eq!(letters, BTreeSet::from(["never", "poison"]), "{edge}, {skip}");
    assert_eq!(fixture.dead_letters().await.len(), 2, "{edge}, {skip}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_of_what_failed_that_is_lost_or_not_heard_of_loses_nothing_and_repeats_nothing() {
    let edges = ["outbox.before-commit", "outbox.after-commit"];
    // One record is given up at once and one in the end, one is retried, and those behind two of them are handled.
    let commits = edges.iter().flat_map(|edge| (0..5).map(move |skip| loses_a_commit_of_what_failed(edge, skip)));
    futures::future::join_all(commits).await;
}

/// Starts consumers, one after another, that fail at `fail` and die of `kill`, until there are so many dead letters.
/// Returns how many died, and the one that did not.
async fn outlives(fixture: &Fixture, letters: usize) -> (u32, Running) {
    for deaths in 0..20 {
        let running = fixture.start_with(|message| match message.payload.as_deref() {
            Some(b"fail") => Err(anyhow::anyhow!("it fails").into()),
            Some(b"kill") => Err(anyhow::Error::from(Injected(Fault::Crash)).into()),
            _ => Ok(()),
        });
        let died = eventually(SOON, || async {
            let given_up = fixture.dead_letters().await.len() == letters;
            if running.is_over() { Some(true) } else { given_up.then_some(false) }
        });
        if !died.await {
            return (deaths, running);
        }
        running.dies().await;
    }
    panic!("it loops for ever");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_kills_its_process_is_given_up_after_its_attempts() {
    let fixture = Fixture::new(1).await;
    fixture.send(&[event("a", "1"), event("b", "kill"), event("b", "2"), event("c", "3")]).await;
    let (deaths, survivor) = outlives(&fixture, 1).await;
    // The process died twice in a batch, where nothing is counted (the second was noted); then as often as it may be
    // tried.
    assert_eq!(deaths, 2 + fixture.config.attempts);
    let letters = fixture.dead_letters().await;
    assert_eq!(letters[0].2["x-error-class"], "unclean-stop");
    assert_eq!(letters[0].2["x-attempts"], fixture.config.attempts.to_string());
    let handled = fixture.until_handled(3).await;
    assert_eq!(handled.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["1", "2", "3"]);
    survivor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_kills_its_process_behind_one_that_only_fails_is_given_up_after_its_attempts() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 4;
    fixture.config.backoff = Backoff::doubling(SOON, SOON);
    fixture.send(&[event("a", "fail"), event("b", "kill"), event("c", "1")]).await;
    let (deaths, survivor) = outlives(&fixture, 1).await;
    // The record was alone from the first time when they came in one batch; otherwise it killed in two batches before.
    let attempts = fixture.config.attempts;
    assert!((attempts..=attempts + 2).contains(&deaths), "{deaths} deaths");
    assert_eq!(fixture.until_handled(1).await, [("c".into(), "1".into())]);
    assert_eq!(fixture.parked().await.len(), 1, "the one that fails waits for its next attempt");
    survivor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_record_that_kills_its_process_is_given_up_too() {
    let fixture = Fixture::new(1).await;
    fixture.send(&[event("a", "fail"), event("a", "kill"), event("a", "1")]).await;
    let (_, survivor) = outlives(&fixture, 2).await;
    assert_eq!(fixture.until_handled(1).await, [("a".into(), "1".into())]);
    fixture.until_unparked().await;
    survivor.stop().await;
}

/// Starts a consumer that dies in its first batch.
async fn dies(fixture: &Fixture) {
    let _armed = FailPoint::once("consumer.before-commit", &fixture.config.group, Fault::Crash);
    fixture.start().dies().await;
}

/// Starts a consumer that handles everything there is, stops it, and returns how large its batches were.
async fn batches(fixture: &Fixture, handled: usize) -> Vec<usize> {
    let running = fixture.start();
    fixture.until_handled(handled).await;
    let sizes = running.recorder.batches.lock().unwrap().clone();
    running.stop().await;
    sizes
}

/// Whether the partition was let go in good order, and what is noted of it.
async fn left_behind(fixture: &Fixture) -> (bool, Option<i64>, i32) {
    let row = sqlx::query_as("select clean, record_offset, attempts from inbox_partition");
    row.fetch_one(&fixture.database.pool).await.unwrap()
}

async fn a_batch_of_thirty_at_most() -> Fixture {
    let mut fixture = Fixture::new(1).await;
    fixture.config.batch_max = 30;
    fixture
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_after_an_unclean_stop_in_a_batch_that_was_noted_its_records_are_taken_singly() {
    let fixture = a_batch_of_thirty_at_most().await;
    fixture.send(&events(5, 200)).await;
    dies(&fixture).await;
    assert_eq!(left_behind(&fixture).await, (false, None, 0));
    let sizes = batches(&fixture, 200).await;
    assert!(sizes.len() < 20, "one death is nobody's fault: {sizes:?}");

    assert!(left_behind(&fixture).await.0, "it was let go in good order");
    fixture.send(&events(5, 200)).await;
    dies(&fixture).await;
    dies(&fixture).await;
    let (clean, noted, attempts) = left_behind(&fixture).await;
    assert_eq!((clean, attempts), (false, 0));
    // The topic's offsets begin at 0 and have no gaps.
    let suspects = usize::try_from(noted.unwrap() + 1 - 200).unwrap();
    assert!((1..=30).contains(&suspects), "{suspects}");
    let sizes = batches(&fixture, 400).await;
    assert!(sizes[..suspects].iter().all(|size| *size == 1), "those of the second death's batch: {sizes:?}");
    assert_eq!(sizes.iter().sum::<usize>(), 200, "each once: {sizes:?}");
    assert!(sizes.len() < suspects + 20, "then in batches again: {sizes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_stop_in_good_order_nothing_is_noted_any_more() {
    let fixture = a_batch_of_thirty_at_most().await;
    fixture.send(&events(5, 60)).await;
    dies(&fixture).await;
    batches(&fixture, 60).await;
    assert!(left_behind(&fixture).await.0);
    fixture.send(&events(5, 60)).await;
    dies(&fixture).await;
    let sizes = batches(&fixture, 120).await;
    assert!(sizes.len() < 15, "{sizes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_good_order_while_a_noted_batch_is_tried_withdraws_the_note() {
    let fixture = a_batch_of_thirty_at_most().await;
    fixture.send(&events(5, 20)).await;
    dies(&fixture).await;
    let stalled = fixture.start_with(|_| Err(HandleError::Again));
    eventually(SOON, || async { left_behind(&fixture).await.1 }).await;
    stalled.stop().await;
    assert_eq!(left_behind(&fixture).await, (true, None, 0), "nothing died of it");
    let next = fixture.start();
    assert_complete(&fixture.until_handled(20).await, 5, 20);
    next.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_inbox_does_not_remember_comes_again_at_every_start_and_says_nothing_of_what_comes_behind_it() {
    let mut fixture = a_batch_of_thirty_at_most().await;
    fixture.config.too_old = TooOld::Handle;
    let old = || MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, 1_600_000_000, 0)));
    let sent: Vec<_> = (0..60).map(|_| with_id(old(), "a", "old")).collect();
    fixture.send(&sent).await;
    dies(&fixture).await;
    let running = fixture.start();
    fixture.until_handled(60).await;
    fixture.send(&[event("a", "new")]).await;
    fixture.until_handled(61).await;
    assert_eq!(left_behind(&fixture).await, (false, Some(60), 0), "the batch of the new one was noted");
    running.stop().await;
}

//! The process dies at the edges of a transaction, or an error strikes there: every message is handled once, in order.

use crate::support::{Fixture, SOON, assert_complete, event, events, says};
use saga_core::{
    retry::Backoff,
    testkit::{
        FailPoint, eventually,
        failpoints::{Fault, Injected},
    },
};

/// Once at the edge, and then, `again` and again, in the lives that are careful because of that.
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_kills_its_process_is_given_up_after_its_attempts() {
    let fixture = Fixture::new(1).await;
    fixture.send(&[event("a", "1"), event("b", "kill"), event("b", "2"), event("c", "3")]).await;
    let mut deaths = 0;
    let survivor = loop {
        let running = fixture.start_with(|message| match says(message, "kill") {
            true => Err(anyhow::Error::from(Injected(Fault::Crash)).into()),
            false => Ok(()),
        });
        let gone = eventually(SOON, || async {
            match (running.is_over(), fixture.dead_letters().await.is_empty()) {
                (true, _) => Some(true),
                (false, false) => Some(false),
                (false, true) => None,
            }
        })
        .await;
        if !gone {
            break running;
        }
        running.dies().await;
        deaths += 1;
    };
    // Twice in a batch, where nothing is counted (the second was noted); then as often as it may be tried.
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
    let mut deaths = 0;
    let survivor = loop {
        let running = fixture.start_with(|message| match message.payload.as_deref() {
            Some(b"fail") => Err(anyhow::anyhow!("it fails").into()),
            Some(b"kill") => Err(anyhow::Error::from(Injected(Fault::Crash)).into()),
            _ => Ok(()),
        });
        let gone = eventually(SOON, || async {
            let given_up = !fixture.dead_letters().await.is_empty();
            if running.is_over() { Some(true) } else { given_up.then_some(false) }
        })
        .await;
        if !gone {
            break running;
        }
        running.dies().await;
        deaths += 1;
        assert!(deaths < 20, "it loops for ever");
    };
    // It was alone from the first time when they came in one batch; otherwise it died in two batches before.
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
    let mut deaths = 0;
    let survivor = loop {
        let running = fixture.start_with(|message| match message.payload.as_deref() {
            Some(b"fail") => Err(anyhow::anyhow!("it fails").into()),
            Some(b"kill") => Err(anyhow::Error::from(Injected(Fault::Crash)).into()),
            _ => Ok(()),
        });
        let gone = eventually(SOON, || async {
            let given_up = fixture.dead_letters().await.len() == 2;
            if running.is_over() { Some(true) } else { given_up.then_some(false) }
        })
        .await;
        if !gone {
            break running;
        }
        running.dies().await;
        deaths += 1;
        assert!(deaths < 20, "it loops for ever");
    };
    assert_eq!(fixture.until_handled(1).await, [("a".into(), "1".into())]);
    fixture.until_unparked().await;
    survivor.stop().await;
}

/// Starts a consumer that handles everything there is, stops it, and says how large its batches were.
async fn batches(fixture: &Fixture, handled: usize) -> Vec<usize> {
    let running = fixture.start();
    fixture.until_handled(handled).await;
    let sizes = running.recorder.batches.lock().unwrap().clone();
    running.stop().await;
    sizes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_after_an_unclean_stop_in_a_batch_that_was_noted_its_records_are_taken_singly() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.batch_max = 30;
    let dies = async || {
        let _armed = FailPoint::once("consumer.before-commit", &fixture.config.group, Fault::Crash);
        fixture.start().dies().await;
    };
    fixture.send(&events(5, 200)).await;
    dies().await;
    let sizes = batches(&fixture, 200).await;
    assert!(sizes.len() < 20, "one death is nobody's fault: {sizes:?}");

    fixture.send(&events(5, 200)).await;
    dies().await;
    dies().await;
    let sizes = batches(&fixture, 400).await;
    let singles = sizes.iter().take_while(|size| **size == 1).count();
    assert!((1..=30).contains(&singles), "those of the second death's batch, no more: {sizes:?}");
    assert!(sizes.len() < singles + 20, "then in batches again: {sizes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_good_order_leaves_nothing_under_suspicion() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.batch_max = 30;
    let dies = async || {
        let _armed = FailPoint::once("consumer.before-commit", &fixture.config.group, Fault::Crash);
        fixture.start().dies().await;
    };
    fixture.send(&events(5, 60)).await;
    dies().await;
    batches(&fixture, 60).await;
    // Were it still careful, it would die in a batch that it had noted, and singles would follow.
    fixture.send(&events(5, 60)).await;
    dies().await;
    let sizes = batches(&fixture, 120).await;
    assert!(sizes.len() < 15, "{sizes:?}");
}

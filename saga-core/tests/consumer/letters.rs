//! The parts of its record that a dead letter keeps, and the cost to others of many messages that can never be handled.

use crate::support::{Fixture, SOON, event, says};
use saga_core::{
    consumer::{Consumer, HandleError, Handler, Message, Unfit},
    envelope::{Headers, exact},
    outbox::{AppendError, Tx},
    testkit::eventually,
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_keeps_every_header_as_it_was_though_it_was_parked_before() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start_with(|message| match says(message, "a1") {
        true => Err(anyhow::anyhow!("not today").into()),
        false => Ok(()),
    });
    let mut odd = event("a", "a1");
    let more: [(&str, Option<&[u8]>); 9] = [
        ("binary", Some(&[0xff, 0, 7])),
        ("null", None),
        ("twice", Some(b"1")),
        ("twice", None),
        ("twice", Some(b"2")),
        ("", Some(b"no name")),
        ("ce_sequence", Some(b"12")),
        ("ce_epoch", Some(b"e")),
        ("ce_time", Some(b"yesterday")),
    ];
    odd.headers.extend(more.map(|(name, value)| (name.to_owned(), value.map(<[u8]>::to_vec))));
    fixture.send(&[odd, event("a", "a2")]).await;
    let letters = fixture.until_dead_letters(1).await;
    let stored: Headers = serde_json::from_value(letters[0].2.clone()).unwrap();
    let all = exact::to_record(&stored);
    let of =
        |name: &str| -> Vec<_> { all.iter().filter(|(of, _)| of == name).map(|(_, value)| value.as_deref()).collect() };
    assert_eq!(of("binary"), [Some(&[0xff_u8, 0, 7][..])]);
    assert_eq!(of("null"), [None]);
    assert_eq!(of("twice"), [Some(&b"1"[..]), None, Some(b"2")]);
    assert_eq!(of(""), [Some(&b"no name"[..])]);
    assert_eq!(of("ce_source"), [Some(&b"orders"[..])]);
    assert_eq!((of("x-original-sequence"), of("x-original-epoch")), (vec![Some(&b"12"[..])], vec![Some(&b"e"[..])]));
    assert_eq!((of("x-original-time"), of("ce_time")), (vec![Some(&b"yesterday"[..])], vec![]));
    assert_eq!(of("x-attempts"), [Some(&b"3"[..])], "it was parked in between");
    running.stop().await;
}

/// A handler that finds all messages that it can never handle in one look.
#[derive(Default)]
struct Strict {
    looks: AtomicUsize,
}

impl Handler for Strict {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        let bad = batch.iter().filter(|message| says(message, "forged"));
        let unfit = |message: &Message| Unfit {
            message: message.envelope.id,
            class: "forged",
            reason: "of nobody that is known".into(),
        };
        HandleError::unfit(bad.map(unfit).collect())?;
        for message in batch {
            sqlx::query("insert into handled (value) values (convert_from($1, 'utf8'))")
                .bind(&message.payload)
                .execute(&mut **tx)
                .await?;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_that_can_never_be_handled_cost_one_more_look_and_no_attempt() {
    let fixture = Fixture::new(1).await;
    let forged = 400;
    let mut records: Vec<_> = (0..forged).map(|n| event(&format!("f{n}"), "forged")).collect();
    records.insert(50, event("a", "a1"));
    records.push(event("a", "a2"));
    fixture.send(&records).await;
    let strict = Arc::new(Strict::default());
    let stop = CancellationToken::new();
    let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), Arc::clone(&strict));
    let running = tokio::spawn(consumer.run(stop.clone()));
    fixture.until_handled(2).await;
    let letters = eventually(SOON, || async {
        let letters = fixture.dead_letters().await;
        (letters.len() == forged).then_some(letters)
    })
    .await;
    assert!(letters.iter().all(|(_, _, headers)| headers["x-error-class"] == "forged"));
    assert_eq!(letters[0].2["x-error-message"], "of nobody that is known");
    // Two looks for each batch that had some; the records come in a few batches.
    let looks = strict.looks.load(Ordering::SeqCst);
    assert!(looks <= 40, "{looks} looks at {forged} forged messages");
    assert!(fixture.parked().await.is_empty(), "nothing waits behind them");
    stop.cancel();
    running.await.unwrap().unwrap();
}

/// A handler that answers the messages that it gives up.
struct Answers;

impl Handler for Answers {
    async fn handle(&self, _: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        for message in batch {
            if says(message, "unreadable") {
                return Err(HandleError::Poison("it cannot be read".into()).of(message.envelope.id));
            }
            if says(message, "failing") {
                return Err(anyhow::anyhow!("not today").into());
            }
        }
        Ok(())
    }

    async fn gave_up(&self, tx: &mut Tx<'_>, messages: &[(&Message, &str)]) -> Result<(), AppendError> {
        for (message, reason) in messages {
            sqlx::query("insert into handled (key, value) values (convert_from($1, 'utf8'), $2)")
                .bind(&message.payload)
                .bind(reason)
                .execute(&mut **tx)
                .await?;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_answers_what_is_given_up_in_the_transaction_that_dead_letters_it() {
    let fixture = Fixture::new(1).await;
    let records = [("a", "unreadable"), ("b", "failing"), ("c", "good"), ("d", "unreadable")];
    fixture.send(&records.map(|(key, value)| event(key, value))).await;
    let stop = CancellationToken::new();
    let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), Arc::new(Answers));
    let running = tokio::spawn(consumer.run(stop.clone()));
    assert_eq!(fixture.until_dead_letters(3).await.len(), 3);
    let mut answered = fixture.handled().await;
    answered.sort_unstable();
    let said = |of: &str, reason: &str| (of.to_owned(), reason.to_owned());
    let unreadable = said("unreadable", "it cannot be read");
    assert_eq!(answered, [said("failing", "not today"), unreadable.clone(), unreadable]);
    stop.cancel();
    running.await.unwrap().unwrap();
}

//! A program that can write to the topic of replies confirms no order. It may know all that is public of one: its id,
//! the saga's name, its steps. A command's id needs the saga's secret, which leaves the database in commands alone.

use crate::support::Shop;
use contracts::OrderId;
use saga_core::{
    command::{
        Op,
        Outcome::{self, Rejected, Succeeded},
    },
    consumer::Message,
    id::{CommandId, CommandPlace, MessageId, Nonce, SagaId},
};
use serde_json::{Value, json};

/// The replies that would move the order, if the id of its open command could be made up.
async fn forged(shop: &Shop, order: OrderId, outcome: Outcome, payload: &Value) -> Vec<Message> {
    let real = shop.reply(order, outcome, payload.clone()).await;
    let headers = real.envelope.saga.clone().unwrap();
    let (saga, step) = (SagaId(order.0), headers.step.as_str());
    let (orchestrator, definition) = ("orders.replies", "order");
    let place = CommandPlace { orchestrator, definition, saga, step, op: Op::Do, occurrence: 0 };
    let guesses = [
        CommandId::derive(saga, step, Op::Do, 0),
        place.derive_secretly(Nonce::new()),
        CommandId(order.0),
        CommandId(uuid::Uuid::nil()),
    ];
    let guess = |command| {
        assert_ne!(command, headers.command);
        let mut forged = real.clone();
        forged.envelope.id = MessageId::new();
        forged.envelope.saga.as_mut().unwrap().command = command;
        forged
    };
    guesses.map(guess).into()
}

#[tokio::test]
async fn a_forged_success_confirms_no_order_and_a_forged_refusal_cancels_none() {
    let shop = Shop::open().await;
    let order = shop.place("k").await;
    let money = json!({ "amount": 4_498, "currency": "EUR" });
    let steps = [
        ("authorize-payment", json!({ "authorization": "auth_1", "amount": money })),
        ("reserve-stock", json!({ "pieces": 3 })),
        ("capture-payment", json!({ "capture": "cap_1", "amount": money })),
    ];
    let open = async || -> String {
        sqlx::query_scalar(
            "select headers ->> 'ce_sagastep' from outbox where key = $1 and topic like '%.commands' order by id desc limit 1",
        )
        .bind(order.to_string())
        .fetch_one(&shop.db.pool)
        .await
        .unwrap()
    };
    for (step, payload) in &steps {
        assert_eq!(open().await, *step);
        for outcome in [Succeeded, Rejected] {
            shop.deliver(&forged(&shop, order, outcome, payload).await).await;
        }
        assert_eq!((open().await, shop.status(order).await), ((*step).to_owned(), "pending".to_owned()));
        assert_eq!(shop.history(order).await, ["pending"], "{step}");
        shop.answer(order, Succeeded, payload.clone()).await;
    }
    assert_eq!(shop.status(order).await, "confirmed", "and only the real answers moved it");
}

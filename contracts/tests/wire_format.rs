//! Every message as it stands on the wire. Every running service, and every record already in a topic, has to live with
//! a snapshot that changes. So add optional fields, or give the type a new version.

use contracts::{
    OrderId,
    inventory::{CommitStock, ItemChanged, OutOfStock, ReleaseStock, ReserveStock, Reserved, Shortage},
    money::Money,
    orders::{OrderCancelled, OrderConfirmed, OrderPlaced},
    payments::{
        AuthorizePayment, Authorized, CapturePayment, CaptureRefused, Captured, Declined, RefundPayment, RefundRefused,
        Refunded, VoidPayment,
    },
    product::{Line, Quantity},
    topics,
};
use proptest::prelude::*;
use saga_core::{
    command::{Command, Done},
    topic::{Cleanup, Topic},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, fmt::Debug};

fn order() -> OrderId {
    OrderId("019391f6-3a5c-7b60-9d0c-3f6d0f7a4b11".parse().unwrap())
}

fn euros(amount: i64) -> Money {
    Money { amount, currency: "EUR".parse().unwrap() }
}

fn lines() -> Vec<Line> {
    let line = |sku: &str, n: i64| Line { sku: sku.parse().unwrap(), quantity: Quantity::try_from(n).unwrap() };
    vec![line("WIDGET-1", 2), line("GADGET-2", 1)]
}

/// Writes `message`, and reads it back. Then reads it with fields that this version does not know, one at each of its
/// objects and then one at all of them. Returns what was written.
fn on_the_wire<T: Serialize + DeserializeOwned + PartialEq + Debug>(message: &T) -> Value {
    let written = serde_json::to_value(message).unwrap();
    assert_eq!(&serde_json::from_value::<T>(written.clone()).unwrap(), message);
    let places = objects(&written);
    let alone = places.iter().map(std::slice::from_ref);
    for places in alone.chain([&places[..]]) {
        let mut of_tomorrow = written.clone();
        for place in places {
            let fields = of_tomorrow.pointer_mut(place).and_then(Value::as_object_mut).unwrap();
            fields.insert("a_field_of_tomorrow".into(), serde_json::json!({ "with": ["parts"] }));
        }
        let read = serde_json::from_value::<T>(of_tomorrow.clone());
        assert_eq!(&read.unwrap_or_else(|error| panic!("{of_tomorrow}: {error}")), message);
    }
    written
}

/// The places of objects in `json`, as JSON pointers.
fn objects(json: &Value) -> Vec<String> {
    let below =
        |name: &str, value: &Value| objects(value).into_iter().map(|at| format!("/{name}{at}")).collect::<Vec<_>>();
    match json {
        Value::Object(fields) => {
            let nested = fields.iter().flat_map(|(name, value)| below(name, value));
            std::iter::once(String::new()).chain(nested).collect()
        }
        Value::Array(values) => {
            values.iter().enumerate().flat_map(|(index, value)| below(&index.to_string(), value)).collect()
        }
        _ => Vec::new(),
    }
}

fn snapshot<C>(command: &C, reply: &C::Reply, rejection: Option<&C::Rejection>) -> Value
where
    C: Command<Reply: PartialEq + Debug, Rejection: PartialEq + Debug> + PartialEq + Debug,
{
    serde_json::json!({
        "topic": C::TOPIC.name,
        "command": on_the_wire(command),
        "reply": on_the_wire(reply),
        "rejection": rejection.map(on_the_wire),
    })
}

#[test]
fn commands_their_replies_and_their_rejections_are_what_they_were() {
    let authorize = AuthorizePayment {
        order: order(),
        customer: "customer-17".into(),
        amount: euros(4_497),
        method: "tok_visa".into(),
    };
    let authorized = Authorized { authorization: "auth_1".into(), amount: euros(4_497) };
    let declined = Declined { reason: "insufficient_funds".into() };
    let capture = CapturePayment { order: order(), amount: euros(4_497) };
    let captured = Captured { capture: "cap_1".into(), amount: euros(4_497) };
    let refused = CaptureRefused { reason: "authorization_expired".into() };
    let refund = RefundPayment { order: order(), amount: euros(500) };
    let refunded = Refunded { refund: "ref_1".into(), amount: euros(500) };
    let refund_refused = RefundRefused { reason: "more than was captured".into() };
    let short = vec![Shortage { sku: "WIDGET-1".parse().unwrap(), requested: 2, available: 1 }];
    let messages = BTreeMap::from([
        (AuthorizePayment::TYPE, snapshot(&authorize, &authorized, Some(&declined))),
        (VoidPayment::TYPE, snapshot(&VoidPayment { order: order() }, &Done {}, None)),
        (CapturePayment::TYPE, snapshot(&capture, &captured, Some(&refused))),
        (RefundPayment::TYPE, snapshot(&refund, &refunded, Some(&refund_refused))),
        (
            ReserveStock::TYPE,
            snapshot(
                &ReserveStock { order: order(), lines: lines() },
                &Reserved { pieces: 3 },
                Some(&OutOfStock { short }),
            ),
        ),
        (ReleaseStock::TYPE, snapshot(&ReleaseStock { order: order() }, &Done {}, None)),
        (CommitStock::TYPE, snapshot(&CommitStock { order: order() }, &Done {}, None)),
    ]);
    insta::assert_json_snapshot!("commands", messages);
}

#[test]
fn events_are_what_they_were() {
    let placed = OrderPlaced { order: order(), customer: "customer-17".into(), lines: lines(), total: euros(4_497) };
    let cancelled = OrderCancelled { order: order(), reason: "out_of_stock".into() };
    let item = ItemChanged { sku: "WIDGET-1".parse().unwrap(), name: "A widget".into(), unit_price: euros(1_999) };
    let messages = BTreeMap::from([
        (OrderPlaced::TYPE, on_the_wire(&placed)),
        (OrderConfirmed::TYPE, on_the_wire(&OrderConfirmed { order: order() })),
        (OrderCancelled::TYPE, on_the_wire(&cancelled)),
        (ItemChanged::TYPE, on_the_wire(&item)),
    ]);
    insta::assert_json_snapshot!("events", messages);
}

#[test]
fn topics_are_what_they_were() {
    let describe = |topic: Topic| {
        let cleanup = match topic.cleanup {
            Cleanup::Delete => "delete",
            Cleanup::Compact => "compact",
        };
        let days = topic.retention.map(|kept| kept.as_secs() / 86_400);
        (topic.name, serde_json::json!({ "partitions": topic.partitions, "cleanup": cleanup, "days": days }))
    };
    let all = [
        topics::PAYMENTS_COMMANDS,
        topics::INVENTORY_COMMANDS,
        topics::ORDERS_REPLIES,
        topics::ORDERS_EVENTS,
        topics::INVENTORY_ITEMS,
    ];
    insta::assert_json_snapshot!("topics", BTreeMap::from(all.map(describe)));
}

#[test]
fn a_message_with_a_value_that_cannot_be_is_not_read() {
    let good = serde_json::to_value(ReserveStock { order: order(), lines: lines() }).unwrap();
    let bad = [
        ("/lines/0/quantity", Value::from(0)),
        ("/lines/0/quantity", Value::from(-1)),
        ("/lines/0/quantity", Value::from(Quantity::MAX + 1)),
        ("/lines/0/quantity", Value::from(1.5)),
        ("/lines/0/sku", Value::from("a b")),
        ("/lines/0/sku", Value::from("a\0")),
        ("/order", Value::from("not a uuid")),
    ];
    for (pointer, value) in bad {
        let mut message = good.clone();
        *message.pointer_mut(pointer).unwrap() = value.clone();
        assert!(serde_json::from_value::<ReserveStock>(message).is_err(), "{pointer} = {value}");
    }
    for currency in ["eur", "EURO", "E1R", ""] {
        let money = serde_json::json!({ "amount": 1, "currency": currency });
        assert!(serde_json::from_value::<Money>(money).is_err(), "{currency:?}");
    }
    assert!(serde_json::from_value::<Money>(serde_json::json!({ "amount": 1.5, "currency": "EUR" })).is_err());
}

proptest! {
    #[test]
    fn any_line_and_any_amount_survive_the_wire(
        sku in "[A-Za-z0-9._-]{1,64}",
        pieces in 1i64..=Quantity::MAX,
        amount in any::<i64>(),
        currency in prop::sample::select(vec!["EUR", "USD", "JPY", "KWD"]),
    ) {
        let line = Line { sku: sku.parse().unwrap(), quantity: Quantity::try_from(pieces).unwrap() };
        let money = Money { amount, currency: currency.parse().unwrap() };
        prop_assert_eq!(&serde_json::from_str::<Line>(&serde_json::to_string(&line).unwrap()).unwrap(), &line);
        prop_assert_eq!(serde_json::from_str::<Money>(&serde_json::to_string(&money).unwrap()).unwrap(), money);
    }
}

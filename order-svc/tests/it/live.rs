//! Server-sent events: past and live statuses, resume, end.

use crate::support::{PATIENCE, Shop, basket, json_of};
use contracts::OrderId;
use order_svc::{
    domain::{CancelReason, StatusChange},
    live::{MAX_OF_ONE, MAX_STREAMS, MAX_WAITS, Purpose},
};
use reqwest::{Response, StatusCode};
use saga_core::testkit::eventually;
use serde_json::Value;
use uuid::Uuid;

/// Reads events off a stream, one by one.
struct Events {
    response: Response,
    text: String,
}

impl Events {
    async fn open(shop: &Shop, order: OrderId, last_event_id: Option<&str>) -> Self {
        let response = request(shop, order, last_event_id).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new() }
    }

    /// The next event's id and status; `None` when the stream has ended.
    async fn next(&mut self) -> Option<(String, String)> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                if let (Some(id), Some(data)) = (field("id:"), field("data:")) {
                    assert_eq!(field("event:"), Some("status"));
                    let data: Value = serde_json::from_str(data).unwrap();
                    assert_eq!(data["sequence"].to_string(), id);
                    return Some((id.to_owned(), data["status"].as_str().unwrap().to_owned()));
                }
            }
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await.expect("an event, or the end");
            self.text.push_str(std::str::from_utf8(&chunk.unwrap()?).unwrap());
        }
    }

    async fn rest(mut self) -> Vec<(String, String)> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

async fn request(shop: &Shop, order: OrderId, last_event_id: Option<&str>) -> Response {
    let request = shop.client.get(shop.url(&format!("/v1/orders/{order}/events")));
    let request = match last_event_id {
        Some(id) => request.header("Last-Event-ID", id),
        None => request,
    };
    request.send().await.unwrap()
}

fn event(id: &str, status: &str) -> (String, String) {
    (id.into(), status.into())
}

#[tokio::test]
async fn a_stream_tells_the_past_then_what_happens_and_ends_with_the_order() {
    let shop = Shop::open().await;
    let order = shop.write_order("c").await;
    let mut events = Events::open(&shop, order, None).await;
    assert_eq!(events.next().await, Some(event("1", "pending")));
    // Another replica would do it like this: no task of this process hears of it.
    shop.change(order, StatusChange::RequestCancel(CancelReason::CancelledByCustomer)).await;
    assert_eq!(events.next().await, Some(event("2", "cancelling")));
    shop.change(order, StatusChange::Cancel(CancelReason::CancelledByCustomer)).await;
    assert_eq!(events.next().await, Some(event("3", "cancelled")));
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_client_that_comes_back_gets_what_it_missed_and_nothing_twice() {
    let shop = Shop::open().await;
    let order = shop.write_order("c").await;
    let mut events = Events::open(&shop, order, None).await;
    assert_eq!(events.next().await, Some(event("1", "pending")));
    drop(events);
    shop.change(order, StatusChange::RequestCancel(CancelReason::CancelledByCustomer)).await;
    shop.change(order, StatusChange::Cancel(CancelReason::CancelledByCustomer)).await;
    let rest = Events::open(&shop, order, Some("1")).await.rest().await;
    assert_eq!(rest, [event("2", "cancelling"), event("3", "cancelled")]);
    let all = Events::open(&shop, order, Some("0")).await.rest().await;
    assert_eq!(all.len(), 3);
    assert_eq!(request(&shop, order, Some("3")).await.status(), StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn an_id_that_the_order_never_had_is_refused() {
    let shop = Shop::open().await;
    let order = shop.write_order("c").await;
    for wrong in ["2", "-1", "x", "1.0", "99999999999999999999"] {
        let response = request(&shop, order, Some(wrong)).await;
        assert_eq!(response.status(), 400, "{wrong}");
        assert_eq!(json_of(response).await["errors"][0]["field"], "Last-Event-ID");
    }
}

#[tokio::test]
async fn many_clients_of_one_order_hear_the_same_whenever_they_come() {
    let shop = Shop::open().await;
    let order = shop.write_order("c").await;
    let early = futures::future::join_all((0..20).map(|_| Events::open(&shop, order, None))).await;
    shop.change(order, StatusChange::Confirm).await;
    let late = futures::future::join_all((0..20).map(|_| Events::open(&shop, order, None))).await;
    for events in early.into_iter().chain(late) {
        assert_eq!(events.rest().await, [event("1", "pending"), event("2", "confirmed")]);
    }
    // No client waits any more: the next turn forgets the order and asks the database nothing.
    assert_eq!(shop.orders.live.run_once().await.unwrap(), 0);
}

#[tokio::test]
async fn an_open_stream_does_not_keep_the_process_from_stopping() {
    let mut shop = Shop::open().await;
    let order = shop.write_order("c").await;
    let mut events = Events::open(&shop, order, None).await;
    assert_eq!(events.next().await, Some(event("1", "pending")));
    shop.shutdown.cancel();
    assert_eq!(events.next().await, None);
    tokio::time::timeout(PATIENCE, &mut shop.server).await.expect("the server stops").unwrap().unwrap();
}

#[tokio::test]
async fn the_oldest_of_too_many_streams_of_one_order_ends_and_others_are_followed() {
    let shop = Shop::open().await;
    let (order, other) = (shop.write_order("c").await, shop.write_order("d").await);
    let mut open = Vec::new();
    for _ in 0..MAX_OF_ONE {
        open.push(Events::open(&shop, order, None).await);
    }
    // The oldest stream ends for a newcomer, and its client goes on where it was.
    let mut newcomer = Events::open(&shop, order, None).await;
    assert_eq!(newcomer.next().await, Some(event("1", "pending")));
    assert_eq!(open.remove(0).rest().await, [event("1", "pending")]);
    open.push(Events::open(&shop, order, Some("1")).await);
    assert_eq!(open.remove(0).rest().await, [event("1", "pending")]);
    open.clear();
    drop(newcomer);
    // Waits make no room: their callers are answered soon.
    let wait = async || shop.orders.live.watch(order, 1, Purpose::Wait).ok();
    let mut waits = Vec::new();
    for _ in 0..MAX_OF_ONE {
        waits.push(eventually(PATIENCE, wait).await);
    }
    let refused = request(&shop, order, None).await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(json_of(refused).await["type"], "/problems/busy");
    let mut events = Events::open(&shop, other, None).await;
    assert_eq!(events.next().await, Some(event("1", "pending")));
    drop(waits.pop());
    eventually(PATIENCE, || async { (request(&shop, order, None).await.status() == 200).then_some(()) }).await;
}

#[tokio::test]
async fn the_oldest_of_too_many_streams_ends_and_waits_have_places_of_their_own() {
    let shop = Shop::open().await;
    let live = &shop.orders.live;
    let watch = |purpose| live.watch(OrderId(Uuid::now_v7()), 1, purpose);
    let streams: Vec<_> = (0..MAX_STREAMS).map(|_| watch(Purpose::Stream).unwrap()).collect();
    let (mut oldest, order) = (streams.into_iter(), shop.write_order("c").await);
    let (mut first, mut second) = (oldest.next().unwrap(), oldest.next().unwrap());
    assert_eq!(Events::open(&shop, order, None).await.next().await, Some(event("1", "pending")));
    assert_eq!(first.changed().await, None, "it has made room");
    assert!(futures::FutureExt::now_or_never(second.changed()).is_none(), "one is enough");
    let waits: Vec<_> = (0..MAX_WAITS).map(|_| watch(Purpose::Wait).unwrap()).collect();
    // With all waits taken, the answer comes at once, and the order is placed.
    let placed = shop.post_order("k", &basket()).header("Prefer", "wait=30").send().await.unwrap();
    assert_eq!((placed.status().as_u16(), placed.headers().get("preference-applied")), (202, None));
    drop((oldest, second, waits));
    assert_eq!(request(&shop, order, None).await.status(), 200);
}

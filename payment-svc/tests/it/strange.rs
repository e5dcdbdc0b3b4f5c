//! The provider answers otherwise than it was asked, and in every wrong form.

use crate::support::{DEADLINE, Provider, World, authorize, capture, euros, new_order, refund, void};
use contracts::OrderId;
use payment_svc::{
    api,
    gateway::{Doubt, GatewayAnswer, HttpGateway, PaymentGateway, Request},
    sim::Behaviour,
};
use saga_core::{
    command::{
        self,
        Op::{Do, Undo},
        Outcome::{self, Failed, Rejected, Succeeded},
        Why,
    },
    http::Api,
    id::CommandId,
    service,
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const AUTHORIZE: &str = "authorize-payment";
const CAPTURE: &str = "capture-payment";

/// The answers of the service's API for an order's payment: the payment, and its ledger.
async fn seen(world: &World, order: OrderId) -> (Value, Value) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/v1/payments/{order}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    tokio::spawn(service::serve(listener, Api::new(api::router(world.database.pool.clone())), stop.clone()));
    let get = async |url: String| reqwest::get(url).await.unwrap().json::<Value>().await.unwrap();
    let both = (get(base.clone()).await, get(format!("{base}/ledger")).await);
    stop.cancel();
    both
}

/// Brings a payment to where `operation` is next, and asks for it.
async fn ask(world: &World, operation: &str, method: &str) -> (OrderId, Outcome, Value) {
    let order = new_order();
    let mut answer = world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, method)).await;
    if operation == "capture" || operation == "refund" {
        assert_eq!(answer.0, Succeeded, "{method}");
        answer = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    }
    if operation == "refund" {
        assert_eq!(answer.0, Succeeded, "{method}");
        answer = world.do_and_settle(order, "refund", Do, &refund(order, 1_000)).await;
    }
    if operation == "void" {
        assert_eq!(answer.0, Succeeded, "{method}");
        answer = world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await;
    }
    (order, answer.0, answer.1)
}

#[tokio::test]
async fn an_answer_of_another_amount_or_currency_leaves_the_payment_in_doubt() {
    let world = World::impatient().await;
    for (operation, status, entries) in [
        ("authorize", "authorizing", 0),
        ("capture", "authorized", 2),
        ("void", "authorized", 2),
        ("refund", "captured", 4),
    ] {
        for (strange, answered) in [
            ("other_amount", json!({ "amount": 999, "currency": "EUR" })),
            ("other_currency", json!({ "amount": 1_000, "currency": "USD" })),
        ] {
            let method = format!("tok_{operation}_answers_{strange}");
            let (order, outcome, reply) = ask(&world, operation, &method).await;
            assert_eq!(outcome, Failed, "{method}");
            let why = format!(
                "asked to {operation} 1000 EUR, the gateway answered {} {}",
                answered["amount"],
                answered["currency"].as_str().unwrap()
            );
            assert_eq!((&reply["error"], &reply["why"]), (&json!(why), &json!("contradiction")), "{method}");
            let (payment, ledger) = seen(&world, order).await;
            assert_eq!(payment["status"], status, "{method}");
            assert_eq!(payment["in_doubt"]["reason"], why, "{method}");
            assert_eq!(ledger["entries"].as_array().unwrap().len(), entries, "{method}: nothing is entered");
            assert_eq!(ledger["differences"].as_array().unwrap().len(), 1, "{method}");
            let difference = &ledger["differences"][0];
            assert_eq!(difference["asked"], json!({ "amount": 1_000, "currency": "EUR" }), "{method}");
            assert_eq!((&difference["answered"], &difference["movement"]), (&answered, &json!(operation)), "{method}");
            // The resend gets the same answer, and nothing changes.
            assert_eq!(again(&world, order, operation, &method).await, Failed, "{method}");
            assert_eq!(seen(&world, order).await.1, ledger, "{method}");
        }
    }
}

async fn again(world: &World, order: OrderId, operation: &str, method: &str) -> Outcome {
    match operation {
        "authorize" => world.do_and_settle(order, AUTHORIZE, Do, &authorize(order, method)).await.0,
        "capture" => world.do_and_settle(order, CAPTURE, Do, &capture(order)).await.0,
        "void" => world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0,
        _ => world.do_and_settle(order, "refund", Do, &refund(order, 1_000)).await.0,
    }
}

#[tokio::test]
async fn an_authorization_of_another_amount_is_let_go_and_the_books_agree() {
    let world = World::impatient().await;
    for strange in ["other_amount", "other_currency"] {
        let method = format!("tok_authorize_answers_{strange}");
        let (order, ..) = ask(&world, "authorize", &method).await;
        assert_eq!(world.do_and_settle(order, AUTHORIZE, Undo, &void(order)).await.0, Succeeded, "{method}");
        let (payment, ledger) = seen(&world, order).await;
        assert_eq!((&payment["status"], &payment["in_doubt"]), (&json!("voided"), &Value::Null), "{method}");
        assert_eq!(ledger["differences"].as_array().unwrap().len(), 1, "{method}: it stays on record");
    }
    assert_eq!(world.provider.totals().await, [999, 0, 0, 999, 0]);
    world.books_agree().await;
}

#[tokio::test]
async fn a_refusals_code_is_cleaned_and_cut_and_the_saga_goes_its_way() {
    let world = World::patient().await;
    for operation in ["authorize", "capture", "refund"] {
        for (strange, reason) in
            [("dirty_code", "do\u{fffd}not\u{fffd}[31m honour".to_owned()), ("long_code", "x".repeat(100))]
        {
            let method = format!("tok_{operation}_answers_{strange}");
            let (_, outcome, reply) = ask(&world, operation, &method).await;
            assert_eq!((outcome, reply["reason"].as_str().unwrap()), (Rejected, reason.as_str()), "{method}");
        }
    }
    // An undo cannot be refused: it fails, with the reason.
    let (_, outcome, reply) = ask(&world, "void", "tok_void_answers_dirty_code").await;
    assert!(outcome == Failed && reply["error"].as_str().unwrap().contains("do\u{fffd}not"), "{reply}");
    world.books_agree().await;
}

#[tokio::test]
async fn a_call_in_doubt_says_in_a_word_what_the_provider_did() {
    let (impatient, patient) = (World::impatient().await, World::asking_twice().await);
    for (world, method, why) in [
        (&impatient, "tok_slow", "unreachable"),
        (&impatient, "tok_authorize_answers_trickle", "unreachable"),
        (&patient, "tok_error", "faulty"),
        (&patient, "tok_authorize_answers_500", "faulty"),
        (&patient, "tok_authorize_answers_html", "unreadable"),
        (&patient, "tok_authorize_answers_positional", "unreadable"),
        (&patient, "tok_authorize_answers_no_amount", "unreadable"),
    ] {
        let (_, outcome, reply) = ask(world, "authorize", method).await;
        assert_eq!((outcome, &reply["why"]), (Failed, &json!(why)), "{method}: {reply}");
    }
}

#[tokio::test]
async fn a_provider_that_is_away_is_unreachable_and_one_that_bars_us_is_faulty() {
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/", nowhere.local_addr().unwrap()).parse().unwrap();
    drop(nowhere);
    let gateway = HttpGateway::new(&base, DEADLINE).unwrap();
    let away = gateway.perform(CommandId(Uuid::now_v7()), &request("tok_visa")).await.unwrap_err();
    assert!(matches!(away, Doubt::Connection(_)), "{away:?}");
    let open = Doubt::CircuitOpen { operation: "authorize", again_after: Duration::ZERO };
    for (doubt, why) in [(away, Why::Unreachable), (open, Why::Unreachable), (Doubt::NotLetIn, Why::Faulty)] {
        assert_eq!(command::Failed::from(doubt).why, why);
    }
}

fn request(method: &str) -> Request {
    Request::Authorize { order: "o".into(), customer: "c".into(), amount: euros(100), method: method.into() }
}

#[tokio::test]
async fn what_is_answered_in_a_form_that_nobody_agreed_on_is_doubt() {
    let provider = Provider::new(Behaviour::default()).await;
    let gateway = HttpGateway::new(&provider.url("/").parse().unwrap(), Duration::from_secs(2)).unwrap();
    for strange in
        ["no_amount", "empty_reference", "path_reference", "long_reference", "html", "positional", "deep", "huge"]
    {
        let method = format!("tok_authorize_answers_{strange}");
        let doubt = gateway.perform(CommandId(Uuid::now_v7()), &request(&method)).await.unwrap_err();
        assert!(matches!(doubt, Doubt::Unreadable(_)), "{method}: {doubt:?}");
        assert!(doubt.to_string().len() < 500, "{method}: {doubt}");
    }
    let request = request("tok_authorize_answers_trickle");
    let endless = gateway.perform(CommandId(Uuid::now_v7()), &request);
    let doubt = timeout(DEADLINE, endless).await.expect("it has an end").unwrap_err();
    assert!(matches!(doubt, Doubt::Timeout), "{doubt:?}");
}

#[tokio::test]
async fn a_capture_is_never_asked_for_under_no_reference() {
    let world = World::impatient().await;
    let (order, outcome, reply) = ask(&world, "authorize", "tok_authorize_answers_empty_reference").await;
    assert!(outcome == Failed && reply["error"].as_str().unwrap().contains("reference"), "{reply}");
    assert_eq!(world.status(order).await, "authorizing");
    // An older build kept such a reference.
    sqlx::query("update payment set status = 'authorized', \"authorization\" = '', held = amount where order_id = $1")
        .bind(order.0)
        .execute(&world.database.pool)
        .await
        .unwrap();
    let (outcome, reply) = world.do_and_settle(order, CAPTURE, Do, &capture(order)).await;
    assert!(outcome == Failed && reply["error"].as_str().unwrap().contains("reference"), "{reply}");
    assert_eq!(world.provider.totals().await[2], 0);
}

/// A provider that answers a request with as many bytes as are taken; returns how many that were.
async fn endless(listener: TcpListener, head: &'static str) -> usize {
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut request = [0; 4_096];
    assert!(socket.read(&mut request).await.unwrap() > 0);
    socket.write_all(head.as_bytes()).await.unwrap();
    let (piece, mut sent) = (vec![b' '; 65_536], 0);
    while sent < 500_000_000 {
        match socket.write(&piece).await {
            Ok(written) if written > 0 => sent += written,
            _ => break,
        }
    }
    sent
}

#[tokio::test]
async fn a_body_without_an_end_is_read_no_further_than_its_bound() {
    for head in [
        "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\n\r\n",
        "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 500000000\r\n\r\n",
        "HTTP/1.1 402 Payment Required\r\ncontent-type: application/json\r\n\r\n",
        "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\n\r\n",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let sending = tokio::spawn(endless(listener, head));
        let gateway = HttpGateway::new(&base, DEADLINE).unwrap();
        let answer = gateway.perform(CommandId(Uuid::now_v7()), &request("tok_visa")).await;
        assert!(!matches!(answer, Ok(GatewayAnswer::Done { .. })), "{head}");
        // The unread bytes lie in the sockets' buffers.
        let sent = timeout(DEADLINE, sending).await.expect("it hangs up").unwrap();
        assert!(sent < 32_000_000, "{head}: {sent} bytes");
    }
}

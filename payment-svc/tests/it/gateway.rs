//! The provider's own rules, and the layers before it.

use crate::support::{DEADLINE, Provider, World, do_authorize, euros, new_order};
use payment_svc::{
    gateway::{Doubt, GatewayAnswer, Guarded, HttpGateway, PaymentGateway, Request, breaker::BreakerConfig},
    sim::Behaviour,
};
use saga_core::{command::Outcome, id::CommandId, part::Cause, service::config::Secret, testkit::eventually};
use serde_json::{Value, json};
use std::time::Duration;
use uuid::Uuid;

async fn post(provider: &Provider, path: &str, key: &str, body: &Value) -> (u16, Value) {
    let sent = reqwest::Client::new().post(provider.url(path)).header("idempotency-key", key).json(body).send().await;
    let response = sent.unwrap();
    let status = response.status().as_u16();
    (status, response.json().await.unwrap_or_default())
}

fn authorization(method: &str) -> Value {
    json!({ "order": "o", "customer": "c", "amount": euros(100), "method": method })
}

fn request(method: &str) -> Request {
    Request::Authorize { order: "o".into(), customer: "c".into(), amount: euros(100), method: method.into() }
}

fn key() -> CommandId {
    CommandId(Uuid::now_v7())
}

#[tokio::test]
async fn one_key_is_one_request_with_one_answer() {
    let provider = Provider::new(Behaviour::default()).await;
    let first = post(&provider, "/v1/authorizations", "k", &authorization("tok_visa")).await;
    assert_eq!(first.0, 201);
    assert_eq!(post(&provider, "/v1/authorizations", "k", &authorization("tok_visa")).await, first);
    assert_eq!(post(&provider, "/v1/authorizations", "k", &authorization("tok_slow")).await.0, 422);
    assert_eq!(provider.get("/v1/requests/k").await["body"], first.1);
    let many = (0..20).map(|_| {
        let provider = &provider;
        async move { post(provider, "/v1/authorizations", "at-once", &authorization("tok_visa")).await }
    });
    let answers = futures::future::join_all(many).await;
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(provider.totals().await[0], 200);
}

#[tokio::test]
async fn money_that_is_not_there_is_neither_taken_nor_given_back() {
    let provider = Provider::new(Behaviour::default()).await;
    let (_, made) = post(&provider, "/v1/authorizations", "a", &authorization("tok_visa")).await;
    let path = |verb: &str| format!("/v1/authorizations/{}/{verb}", made["reference"].as_str().unwrap());
    let amount = |amount: i64| json!({ "amount": euros(amount) });
    assert_eq!(post(&provider, &path("capture"), "c1", &amount(101)).await.0, 409);
    assert_eq!(post(&provider, &path("refunds"), "r1", &amount(1)).await.0, 409);
    assert_eq!(post(&provider, &path("capture"), "c2", &amount(100)).await.0, 200);
    assert_eq!(post(&provider, &path("capture"), "c3", &amount(1)).await.0, 409);
    assert_eq!(post(&provider, &path("void"), "v1", &json!({})).await.0, 409);
    assert_eq!(post(&provider, "/v1/voids", "v2", &json!({ "authorization_key": "a" })).await.0, 409);
    assert_eq!(post(&provider, &path("refunds"), "r2", &amount(101)).await.0, 409);
    assert_eq!(post(&provider, &path("refunds"), "r3", &amount(100)).await.0, 200);
    assert_eq!(provider.totals().await, [100, 0, 100, 0, 100]);
    let of_order = provider.get("/v1/authorizations?order=o").await;
    assert_eq!(of_order[0]["refunded"], 100);
}

#[tokio::test]
async fn bad_requests_are_problems_and_move_nothing() {
    let provider = Provider::new(Behaviour::default()).await;
    let client = reqwest::Client::new();
    let without_key = client.post(provider.url("/v1/authorizations")).json(&authorization("tok_visa")).send().await;
    assert_eq!(without_key.unwrap().status(), 400);
    for (field, value) in
        [("amount", json!({ "amount": 0, "currency": "EUR" })), ("order", json!("a\0b")), ("x", json!(1))]
    {
        let mut body = authorization("tok_visa");
        body[field] = value;
        let (status, problem) = post(&provider, "/v1/authorizations", "bad", &body).await;
        assert_eq!(status, 422, "{problem}");
        assert_eq!(problem["type"], "/problems/validation");
    }
    assert_eq!(provider.totals().await, [0; 5]);
}

#[tokio::test]
async fn doubt_is_not_a_refusal_and_a_refusal_is_not_doubt() {
    let provider = Provider::new(Behaviour::default()).await;
    let gateway = HttpGateway::new(&provider.url("/").parse().unwrap(), Duration::from_millis(300)).unwrap();
    let refused = gateway.perform(key(), &request("tok_insufficient_funds")).await.unwrap();
    assert_eq!(refused, GatewayAnswer::Refused { code: "insufficient_funds".into() });
    assert!(matches!(gateway.perform(key(), &request("tok_slow")).await, Err(Doubt::Timeout)));
    assert!(matches!(gateway.perform(key(), &request("tok_error")).await, Err(Doubt::Status { status: 503 })));
    let lost = key();
    assert!(matches!(gateway.perform(lost, &request("tok_lost_answer")).await, Err(Doubt::Connection(_))));
    assert!(matches!(gateway.perform(lost, &request("tok_lost_answer")).await, Ok(GatewayAnswer::Done { .. })));
    let nobody = HttpGateway::new(&"http://127.0.0.1:1".parse().unwrap(), Duration::from_secs(1)).unwrap();
    assert!(matches!(nobody.perform(key(), &request("tok_visa")).await, Err(Doubt::Connection(_))));
}

/// A gateway whose circuits open at the fifth payment in vain.
fn guarded(provider: &Provider) -> Guarded<HttpGateway> {
    let http = HttpGateway::new(&provider.url("/").parse().unwrap(), Duration::from_secs(5)).unwrap();
    let config = BreakerConfig { silence: Duration::ZERO, payments: 5, try_every: Duration::from_secs(2) };
    Guarded::new(http, config)
}

#[tokio::test]
async fn when_the_provider_is_away_nobody_is_asked_until_one_try_is_answered() {
    let provider = Provider::new(Behaviour::default()).await;
    let gateway = guarded(&provider);
    let failing: Vec<_> = (0..5).map(|_| key()).collect();
    for &failing in &failing {
        assert!(matches!(gateway.perform(failing, &request("tok_error")).await, Err(Doubt::Status { status: 503 })));
    }
    let before = arrivals(&provider).await;
    assert!(matches!(gateway.perform(failing[0], &request("tok_error")).await, Err(Doubt::CircuitOpen { .. })));
    assert_eq!(arrivals(&provider).await, before, "no call was made");
    let void = Request::Void { authorization_key: key() };
    assert!(gateway.perform(key(), &void).await.is_ok(), "the circuit is that of authorizations alone");
    assert!(matches!(gateway.perform(failing[0], &request("tok_error")).await, Err(Doubt::CircuitOpen { .. })));
    eventually(DEADLINE, async || gateway.perform(failing[1], &request("tok_visa")).await.ok()).await;
    assert!(matches!(gateway.perform(failing[0], &request("tok_error")).await, Err(Doubt::Status { status: 503 })));
}

#[tokio::test]
async fn what_one_payment_meets_opens_no_circuit() {
    let provider = Provider::new(Behaviour::default()).await;
    let gateway = guarded(&provider);
    // The provider is there, however wrong its answer is.
    for method in ["tok_authorize_answers_500", "tok_authorize_answers_html", "tok_authorize_answers_empty_reference"] {
        for _ in 0..20 {
            let doubt = gateway.perform(key(), &request(method)).await.unwrap_err();
            assert!(matches!(doubt, Doubt::Status { status: 500 } | Doubt::Unreadable(_)), "{doubt}");
        }
    }
    let one = key();
    for _ in 0..20 {
        assert!(matches!(gateway.perform(one, &request("tok_error")).await, Err(Doubt::Status { status: 503 })));
    }
    assert!(gateway.perform(key(), &request("tok_visa")).await.is_ok());
}

/// How many requests have come to the provider.
async fn arrivals(provider: &Provider) -> i64 {
    let count = sqlx::query_scalar("select coalesce(sum(count), 0)::int8 from gateway_arrival");
    count.fetch_one(&provider.database.pool).await.unwrap()
}

#[tokio::test]
async fn rates_are_kept_and_stored_answers_do_not_change() {
    let provider = Provider::new(Behaviour { success_rate: 0.0, ..Behaviour::default() }).await;
    for _ in 0..2 {
        let (status, body) = post(&provider, "/v1/authorizations", "k", &authorization("tok_visa")).await;
        assert_eq!((status, body["refused"]["code"].as_str().unwrap()), (402, "declined"));
    }
    let provider = Provider::new(Behaviour { error_rate: 1.0, ..Behaviour::default() }).await;
    assert_eq!(post(&provider, "/v1/authorizations", "k", &authorization("tok_visa")).await.0, 503);
    assert_eq!(provider.totals().await, [0; 5]);
}

/// The variable that is set in the process that the next test starts.
const CALLS: &str = "CALLS_A_PROVIDER";

#[tokio::test]
async fn no_proxy_of_the_environment_is_asked_to_carry_the_token() {
    if std::env::var_os(CALLS).is_some() {
        let gateway = HttpGateway::new(&"http://127.0.0.1:1".parse().unwrap(), Duration::from_secs(1)).unwrap();
        let gateway = gateway.with_token(&"a-token-of-the-providers".into()).unwrap();
        let doubt = gateway.perform(key(), &request("tok_visa")).await.unwrap_err();
        assert!(matches!(doubt, Doubt::Connection(_)), "nobody listens there: {doubt}");
        return;
    }
    // A test cannot set variables of its own process, so it starts itself.
    let proxy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", proxy.local_addr().unwrap());
    let mut calls = tokio::process::Command::new(std::env::current_exe().unwrap());
    calls.args(["--exact", "gateway::no_proxy_of_the_environment_is_asked_to_carry_the_token"]).env(CALLS, "");
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
        calls.env(variable, &url);
    }
    let output = calls.output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    proxy.set_nonblocking(true).unwrap();
    assert_eq!(proxy.accept().map(drop).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn guesses_at_the_providers_token_are_slowed_down_and_look_like_any_wrong_one() {
    let token = "a-token-of-the-providers";
    let provider = Provider::with_token(Behaviour::default(), Some(token.into())).await;
    let (client, ledger) = (reqwest::Client::new(), provider.url("/v1/ledger"));
    let show = async |token: &str| client.get(&ledger).bearer_auth(token).send().await.unwrap();
    assert_eq!(show(token).await.status(), 200);
    let slowed = eventually(DEADLINE, async || {
        let answer = show("another-token-of-it").await;
        assert_eq!(answer.status(), 401);
        answer.headers().contains_key("retry-after").then_some(())
    });
    slowed.await;
    // The right token is not compared now. (Once a second one is: the guesser guesses on until then.)
    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push((show("another-token-of-it").await.status().as_u16(), show(token).await.status().as_u16()));
    }
    assert!(answers.contains(&(401, 401)), "{answers:?}");
    // One guess is forgiven in a second.
    eventually(DEADLINE, async || (show(token).await.status() == 200).then_some(())).await;
}

#[tokio::test]
async fn without_the_token_the_provider_does_nothing_and_payments_wait_for_it() {
    let token = Secret::from("a-token-of-the-providers");
    let provider = Provider::with_token(Behaviour::default(), Some(token.clone())).await;
    for (shown, status) in [(None, 401), (Some("Bearer another"), 401), (Some("a-token-of-the-providers"), 401)] {
        for request in [
            reqwest::Client::new().get(provider.url("/v1/ledger")),
            reqwest::Client::new()
                .post(provider.url("/v1/authorizations"))
                .header("idempotency-key", "k")
                .json(&authorization("tok_visa")),
        ] {
            let request = shown.into_iter().fold(request, |request, shown| request.header("authorization", shown));
            assert_eq!(request.send().await.unwrap().status(), status, "{shown:?}");
        }
    }
    let world = World::before(provider, DEADLINE).await;
    let order = new_order();
    world.deliver(&[do_authorize(order, "tok_visa")]).await;
    let executor = world.executor();
    executor.run_once().await.unwrap();
    let issue = executor.report().issue.expect("it is red");
    assert_eq!(issue.cause, Cause::ProviderForbidden);
    assert!(issue.reason.contains("401") && issue.reason.contains("GATEWAY_TOKEN"), "{}", issue.reason);
    assert_eq!((world.outcomes(order).await, world.status(order).await), (vec![], "authorizing"));
    assert_eq!(arrivals(&world.provider).await, 0);

    let world = world.showing(&token);
    world.settle().await;
    assert_eq!(world.outcomes(order).await, [Outcome::Succeeded]);
    assert_eq!(arrivals(&world.provider).await, 1);
}

#[tokio::test]
async fn the_providers_requests_need_no_more_than_readiness_asks_for() {
    let provider = Provider::of_least_rights().await;
    let post = async |path: &str, key: &str, body: Value, expected: u16| {
        let (status, answer) = post(&provider, path, key, &body).await;
        assert_eq!(status, expected, "{path}: {answer}");
        answer
    };
    let amount = json!({ "amount": euros(100) });
    let made = post("/v1/authorizations", "a", authorization("tok_visa"), 201).await;
    let made = format!("/v1/authorizations/{}", made["reference"].as_str().unwrap());
    post(&format!("{made}/capture"), "c", amount.clone(), 200).await;
    post(&format!("{made}/refunds"), "r", amount, 200).await;
    post(&format!("{made}/void"), "v", json!({}), 409).await;
    post("/v1/voids", "w", json!({ "authorization_key": "never came" }), 200).await;
    for path in ["/v1/authorizations?order=o", "/v1/requests/a", "/v1/ledger"] {
        assert_eq!(reqwest::get(provider.url(path)).await.unwrap().status(), 200, "{path}");
    }
}

#[tokio::test]
async fn the_provider_stores_no_card_number_of_any_field() {
    const CARD: &str = "4111111111111111";
    let provider = Provider::new(Behaviour::default()).await;
    let with = |field: &str| {
        let mut body = authorization("tok_visa");
        body[field] = json!(CARD);
        body
    };
    let amount = json!({ "amount": euros(100) });
    let (of_card, at_voids) = (format!("/v1/authorizations/{CARD}"), json!({ "authorization_key": CARD }));
    for (path, key, body, status, field) in [
        ("/v1/authorizations", "k", with("method"), 422, "method"),
        ("/v1/authorizations", "k", with("customer"), 422, "customer"),
        ("/v1/authorizations", "k", with("order"), 422, "order"),
        (&format!("{of_card}/capture"), "k", amount.clone(), 422, "reference"),
        (&format!("{of_card}/refunds"), "k", amount, 422, "reference"),
        (&format!("{of_card}/void"), "k", json!({}), 422, "reference"),
        ("/v1/voids", "k", at_voids, 422, "authorization_key"),
    ] {
        let (is, problem) = post(&provider, path, key, &body).await;
        assert_eq!((is, problem["errors"][0]["field"].as_str().unwrap()), (status, field), "{path}: {problem}");
        assert!(!problem.to_string().contains(CARD), "{problem}");
    }
    for table in ["gateway_authorization", "gateway_movement", "gateway_answer", "gateway_arrival"] {
        let sql = sqlx::AssertSqlSafe(format!("select count(*) from {table}"));
        let rows: i64 = sqlx::query_scalar(sql).fetch_one(&provider.database.pool).await.unwrap();
        assert_eq!(rows, 0, "{table}");
    }
}

#[tokio::test]
async fn a_repeated_request_with_a_card_number_gets_the_answer_that_it_got() {
    let provider = Provider::new(Behaviour::default()).await;
    let with_a_card = authorization("4111111111111111");
    let first = post(&provider, "/v1/authorizations", "k", &authorization("tok_visa")).await;
    // As a build left it that took card numbers.
    sqlx::query("update gateway_answer set request = $1 where key = 'k'")
        .bind(&with_a_card)
        .execute(&provider.database.pool)
        .await
        .unwrap();
    assert_eq!(post(&provider, "/v1/authorizations", "k", &with_a_card).await, first);
    // A void that came first answered for the request that comes now.
    post(&provider, "/v1/voids", "v", &json!({ "authorization_key": "late" })).await;
    let (status, refusal) = post(&provider, "/v1/authorizations", "late", &with_a_card).await;
    assert_eq!((status, &refusal["refused"]["code"]), (402, &json!("voided")), "{refusal}");

    let other = authorization("4012888888881881");
    for (key, request, field) in [("k", &other, "Idempotency-Key"), ("new", &with_a_card, "method")] {
        let (status, problem) = post(&provider, "/v1/authorizations", key, request).await;
        assert_eq!((status, &problem["errors"][0]["field"]), (422, &json!(field)), "{problem}");
    }
    assert_eq!(provider.totals().await[0], 100, "one request moved money");
}

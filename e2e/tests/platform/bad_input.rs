//! The platform's reaction to input that it cannot read, to a wrong configuration, to servers that are not there, and
//! to another program's trace.

use contracts::topics::{INVENTORY_COMMANDS, ORDERS_EVENTS, ORDERS_REPLIES, PARTITIONS, PAYMENTS_COMMANDS};
use e2e::{
    audit::RecordFact,
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, alone, beside_others},
    topics::{self, ECHO},
};
use saga_core::{
    envelope::header,
    testkit::{eventually, unique},
};
use serde_json::{Value, json};
use stack::service::{Service, binary};
use std::{collections::BTreeMap, convert::Infallible, process::Command, time::Duration};

const READ: [&str; 3] = [PAYMENTS_COMMANDS.name, INVENTORY_COMMANDS.name, ORDERS_REPLIES.name];

/// A record that names its source and nothing else, with bytes that are no JSON.
fn garbage(topic: &str, partition: i32, mark: &str) -> RecordFact {
    let value = Some(format!("\u{1}{mark} is not JSON").into_bytes());
    let key = Some(mark.to_owned());
    let headers = BTreeMap::from([("ce_source".to_owned(), ECHO.to_owned())]);
    RecordFact { topic: topic.to_owned(), partition, offset: 0, key, value, headers }
}

#[test]
fn what_cannot_be_read_is_dead_lettered_with_its_reason_and_place_and_the_partition_goes_on() {
    beside_others(async |platform| {
        platform.expected().foreign_sources.insert(ECHO.to_owned());
        let mark = unique("garbage");
        for topic in READ {
            for partition in 0..PARTITIONS {
                topics::write(&platform.brokers(), &garbage(topic, partition, &mark)).await.expect("it can be written");
            }
        }
        // The orders come behind the garbage, in whichever partitions their keys fall.
        let sku = platform.item("behind-garbage", 100, 50).await;
        for _ in 0..8 {
            let order = platform.place(&Wish::of(&sku, 1)).await;
            assert_eq!(platform.outcome(order).await, "confirmed");
        }
        for topic in READ {
            let dead = dead_letters(platform, topic, &mark, usize::try_from(PARTITIONS).unwrap_or(0)).await;
            for letter in dead {
                assert_eq!(letter.header("x-original-topic"), Some(topic));
                assert!(letter.header("x-original-offset").is_some_and(|at| at.parse::<i64>().is_ok()), "{letter:?}");
                assert!(letter.header("x-error-message").is_some_and(|why| !why.is_empty()), "{letter:?}");
                assert_eq!(letter.value, garbage(topic, 0, &mark).value, "as it was");
            }
        }
    });
}

async fn dead_letters(platform: &Platform, topic: &str, key: &str, wanted: usize) -> Vec<RecordFact> {
    eventually(SETTLED_WITHIN, || async {
        let all = topics::read(&platform.brokers(), &format!("{topic}.dlt")).await.ok()?;
        let dead: Vec<_> = all.into_iter().filter(|record| record.key.as_deref() == Some(key)).collect();
        (dead.len() >= wanted).then_some(dead)
    })
    .await
}

/// Has parked records tried at once, again and again.
async fn parked_is_due(platform: &Platform, database: &str) -> Infallible {
    let mut db = platform.database(database).await;
    let due = "update inbox_parked set next_attempt_at = clock_timestamp() where next_attempt_at > clock_timestamp()";
    loop {
        sqlx::query(due).execute(&mut db).await.expect("the parked records can be hurried");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[test]
fn a_command_of_an_unknown_type_and_one_that_is_no_command_are_dead_lettered() {
    beside_others(async |platform| {
        platform.expected().foreign_sources.insert(ECHO.to_owned());
        let sku = platform.item("unknown", 100, 5).await;
        let order = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        let both = [(PAYMENTS_COMMANDS.name, "payments"), (INVENTORY_COMMANDS.name, "inventory")];
        for (topic, _) in both {
            let records = topics::read(&platform.brokers(), topic).await.expect("the topic can be read");
            let real = records.iter().find(|r| r.key == Some(order.to_string())).expect("it was commanded");
            let mut unknown = topics::resent(real);
            unknown.headers.insert("ce_type".into(), "nobody.knows.this.v9".into());
            // The record has a step of its own: otherwise the fence would know the answer before the payload is read.
            let mut undecodable = topics::resent(real);
            undecodable.headers.insert("ce_sagastep".into(), "another-step".into());
            undecodable.value = Some(b"{\"order\":7}".to_vec());
            for record in [&unknown, &undecodable] {
                topics::write(&platform.brokers(), record).await.expect("it can be written");
            }
        }
        // The next build may know the type: it is tried as often as any other. The test does not wait for that.
        let key = order.to_string();
        let letters = both.map(async |(topic, database)| {
            tokio::select! {
                letters = dead_letters(platform, topic, &key, 2) => letters,
                never = parked_is_due(platform, database) => match never {},
            }
        });
        for dead in futures::future::join_all(letters).await {
            let reasons: Vec<_> = dead.iter().filter_map(|letter| letter.header("x-error-message")).collect();
            assert!(reasons.iter().any(|why| why.contains("nobody.knows.this.v9")), "{reasons:?}");
        }
        let next = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(next).await, "confirmed");
    });
}

/// A source that no service declares.
const STRANGER: &str = "stranger";

#[test]
fn messages_of_strangers_and_commands_to_reply_elsewhere_are_refused() {
    beside_others(async |platform| {
        platform.expected().foreign_sources.extend([ECHO.to_owned(), STRANGER.to_owned()]);
        let sku = platform.item("stranger", 100, 5).await;
        let order = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        let key = order.to_string();
        // Each is a resend but for one header. A service that took it would know the answer, and refuse nothing.
        for topic in READ {
            let records = topics::read(&platform.brokers(), topic).await.expect("the topic can be read");
            let real = records.iter().find(|record| record.key.as_ref() == Some(&key)).expect("the order has one");
            let mut forged = topics::resent(real);
            forged.headers.insert(header::SOURCE.into(), STRANGER.into());
            topics::write(&platform.brokers(), &forged).await.expect("it can be written");
            if topic != ORDERS_REPLIES.name {
                let mut astray = topics::resent(real);
                astray.headers.insert(header::REPLY_TO.into(), ORDERS_EVENTS.name.into());
                topics::write(&platform.brokers(), &astray).await.expect("it can be written");
            }
        }
        for topic in READ {
            let wanted = if topic == ORDERS_REPLIES.name { 1 } else { 2 };
            let letters = dead_letters(platform, topic, &key, wanted).await;
            let of = |source: &str| letters.iter().find(|letter| letter.header(header::SOURCE) == Some(source));
            let said = |source: &str, name: &str| of(source).and_then(|letter| letter.header(name)).unwrap_or_default();
            assert_eq!(said(STRANGER, "x-error-class"), "undeclared-source", "{topic}: {letters:?}");
            assert!(said(STRANGER, "x-error-message").contains(&format!("source {STRANGER:?}")), "{topic}");
            if wanted == 2 {
                assert_eq!(said(ECHO, "x-error-class"), "poison", "{topic}: {letters:?}");
                let why = said(ECHO, "x-error-message");
                assert!(why.contains("does not reply to topic") && why.contains(ORDERS_EVENTS.name), "{topic}: {why}");
            }
        }
        let events = topics::read(&platform.brokers(), ORDERS_EVENTS.name).await.expect("the topic can be read");
        let sources: Vec<_> = events.iter().filter_map(|event| event.header(header::SOURCE)).collect();
        assert!(!sources.is_empty() && sources.iter().all(|source| *source == "orders"), "{sources:?}");
    });
}

#[test]
fn every_mistake_in_the_configuration_is_listed_and_the_program_ends() {
    for (program, wrong) in [
        ("order-svc", ["DATABASE_URL", "KAFKA_BROKERS", "HTTP_ADDR", "ADMIN_ADDR"]),
        ("inventory-svc", ["DATABASE_URL", "KAFKA_BROKERS", "HTTP_ADDR", "ADMIN_ADDR"]),
        ("payment-svc", ["DATABASE_URL", "KAFKA_BROKERS", "GATEWAY_TIMEOUT_MS", "ADMIN_ADDR"]),
        ("outbox-relay", ["OUTBOXES", "KAFKA_BROKERS", "ADMIN_ADDR", "ADMIN_ADDR"]),
    ] {
        let mut command = Command::new(binary(program).expect("it is built"));
        command.env_clear().env("HTTP_ADDR", "nowhere").env("ADMIN_ADDR", "here").env("GATEWAY_TIMEOUT_MS", "soon");
        let output = command.output().expect("it can be started");
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{program}: {said}");
        for variable in wrong {
            assert!(said.contains(variable), "{program} does not mention {variable}: {said}");
        }
    }
}

fn waits_for(lines: &[Value], what: &str) -> usize {
    lines.iter().filter(|line| line["message"] == what).count()
}

/// Starts processes while a server is down, and the server only when all of them wait for it.
async fn start_without<B>(platform: &Platform, services: &[Service], what: &str, comes_back: B) -> B::Output
where
    B: Future,
{
    let before: Vec<_> = services.iter().map(|&service| platform.log_size(service)).collect();
    for &service in services {
        platform.stack.service(service).process.start_again().expect("the program is there");
    }
    let waiting = |n: usize| waits_for(&platform.lines(services[n], before[n]), what);
    // The relay has a line for each outbox.
    let once = |n: usize| if services[n] == Service::Relay { 3 } else { 1 };
    for (n, &service) in services.iter().enumerate() {
        eventually(SETTLED_WITHIN, || async { (waiting(n) >= once(n)).then_some(()) }).await;
        eventually(SETTLED_WITHIN, || async { is_red(platform, service).await.then_some(()) }).await;
    }
    let output = comes_back.await;
    for (n, &service) in services.iter().enumerate() {
        platform.stack.service(service).ready().await.unwrap_or_else(|error| panic!("{service}: {error}"));
        assert_eq!(waiting(n), once(n), "{service} says so once");
    }
    platform.all_ready().await;
    output
}

#[test]
fn who_is_started_without_the_database_waits_says_so_once_and_resumes_by_itself() {
    alone(async |platform| {
        let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
        for service in Service::ALL {
            platform.stack.service(service).process.stop().await;
        }
        postgres.process.kill();
        let comes_back = async { postgres.restart().await.expect("PostgreSQL comes back") };
        start_without(platform, &Service::ALL, "waiting for the database", comes_back).await;
    });
}

#[test]
fn who_is_started_without_kafka_waits_says_so_once_and_resumes_by_itself() {
    const NEED_IT: [Service; 4] = [Service::Relay, Service::Payments, Service::Inventory, Service::Orders];
    alone(async |platform| {
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        let sku = platform.item("no-kafka", 100, 5).await;
        let (last, others) = NEED_IT.split_last().expect("there are some");
        for service in others {
            platform.stack.service(*service).process.stop().await;
        }
        kafka.process.kill();
        let order = start_without(platform, others, "waiting for Kafka", async {
            // An order is taken all the same.
            let order = platform.place(&Wish::of(&sku, 1)).await;
            platform.stack.service(*last).process.stop().await;
            start_without(platform, &[*last], "waiting for Kafka", async {
                kafka.restart().await.expect("Kafka comes back");
            })
            .await;
            order
        });
        assert_eq!(platform.outcome(order.await).await, "confirmed");
    });
}

/// Whether health answers no, and not merely nothing.
async fn is_red(platform: &Platform, service: Service) -> bool {
    let url = platform.admin(service, "/health");
    eventually(SETTLED_WITHIN, || async { platform.http.get(&url).send().await.ok() }).await.status().is_server_error()
}

#[test]
fn a_trace_is_carried_from_the_request_through_outbox_and_kafka_to_every_service_and_back() {
    beside_others(async |platform| {
        let sku = platform.item("traced", 100, 5).await;
        let trace = uuid::Uuid::new_v4().simple().to_string();
        let mut wish = Wish::of(&sku, 1).paid_with("tok_lost_answer");
        wish.traceparent = Some(format!("00-{trace}-00f067aa0ba902b7-01"));
        let order = platform.place(&wish).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        let mut carried = 0;
        for topic in READ {
            for record in topics::read(&platform.brokers(), topic).await.expect("the topic can be read") {
                if record.key == Some(order.to_string()) {
                    let parent = record.header("traceparent").unwrap_or_default();
                    assert!(parent.contains(&trace), "{}: {:?}", record.coordinates(), record.headers);
                    carried += 1;
                }
            }
        }
        assert!(carried >= 8, "four commands and their replies, not {carried}");
        let id = order.to_string();
        for service in [Service::Orders, Service::Payments, Service::Inventory] {
            let log = platform.lines(service, 0);
            let of_order: Vec<_> = log.iter().filter(|line| line["saga"] == id.as_str()).collect();
            // The other services log an order only when something is wrong with it (`edges.rs`).
            assert!(service != Service::Orders || !of_order.is_empty(), "{service} says nothing about {id}");
            for line in of_order {
                assert_eq!(line["trace_id"], trace.as_str(), "{service}: {line}");
                assert_eq!(line["order"], id.as_str(), "{service}: {line}");
            }
        }
    });
}

/// Bodies with an array in the place of an object, each with the field that it is. That is the whole body, and each
/// field that is an object or a list of objects.
fn positional(document: &Value, schema: &str) -> Vec<(Value, String)> {
    let properties = document["components"]["schemas"][schema]["properties"].as_object().cloned().unwrap_or_default();
    let fields = properties.iter().filter_map(|(name, property)| {
        let list = property["items"]["$ref"].is_string();
        let object = property["$ref"].is_string()
            || property["oneOf"].as_array().is_some_and(|of| of.iter().any(|one| one["$ref"].is_string()));
        let field = if list { format!("{name}[0]") } else { name.clone() };
        (list || object).then(|| (if list { json!({ name: [[]] }) } else { json!({ name: [] }) }, field))
    });
    std::iter::once((json!([]), ".".to_owned()))
        .chain(fields.filter(|(body, _)| !is_text(document, schema, body)))
        .collect()
}

/// Whether the only field of `body` refers to a schema that is no object, such as a reason of words.
fn is_text(document: &Value, schema: &str, body: &Value) -> bool {
    let name = body.as_object().and_then(|body| body.keys().next()).cloned().unwrap_or_default();
    let property = &document["components"]["schemas"][schema]["properties"][&name];
    let places =
        [&property["$ref"], &property["items"]["$ref"], &property["oneOf"][1]["$ref"], &property["oneOf"][0]["$ref"]];
    let target = places.into_iter().find_map(|place| place.as_str()?.rsplit('/').next()).unwrap_or_default();
    document["components"]["schemas"][target]["type"] != "object"
}

/// Every operation of a document that takes JSON: method, path, schema.
fn operations(document: &Value) -> Vec<(String, String, String)> {
    let paths = document["paths"].as_object().into_iter().flatten();
    let all = paths.flat_map(|(path, methods)| {
        methods.as_object().into_iter().flatten().map(move |(method, operation)| (method, path, operation))
    });
    all.filter_map(|(method, path, operation)| {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        Some((method.to_uppercase(), path.clone(), schema.as_str()?.rsplit('/').next()?.to_owned()))
    })
    .collect()
}

#[test]
fn an_array_in_the_place_of_an_object_is_refused_by_every_operation() {
    beside_others(async |platform| {
        let apis =
            [Service::Orders, Service::Inventory, Service::Gateway, Service::Payments].map(|s| platform.stack.url(s));
        let admins = [Service::Orders, Service::Relay].map(|service| platform.admin(service, ""));
        let mut tried = BTreeMap::new();
        for base in apis.into_iter().chain(admins) {
            let document: Value = platform
                .http
                .get(format!("{base}/openapi.json"))
                .send()
                .await
                .expect("an answer")
                .json()
                .await
                .expect("JSON");
            for (method, path, schema) in operations(&document) {
                let id = uuid::Uuid::now_v7().to_string();
                // The id of a parked row is a number, and is read before the body.
                let of_path = if path.contains("/parked/") { "1" } else { &id };
                let url = format!("{base}{}", path.replace("{id}", of_path).replace(['{', '}'], ""));
                for (body, field) in positional(&document, &schema) {
                    let request = platform.http.request(method.parse().expect("a method"), &url).json(&body);
                    let answer = request.header("idempotency-key", &id).send().await.expect("an answer");
                    let (status, problem) = (answer.status(), answer.json::<Value>().await.unwrap_or_default());
                    let said = problem["errors"][0]["message"].as_str().unwrap_or_default();
                    let refused = status == 422 && said.contains("an object with its fields by their names");
                    assert!(refused, "{method} {url} {body}: {status} {problem}");
                    assert_eq!(problem["errors"][0]["field"], field, "{method} {url} {body}");
                }
                *tried.entry(schema).or_insert(0) += 1;
            }
        }
        assert!(tried.len() >= 10, "{tried:?}");
    });
}

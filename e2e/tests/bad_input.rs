//! What the platform does with what it cannot read, with a configuration that is wrong, with servers that are not there,
//! and with somebody else's trace.

use contracts::topics::{INVENTORY_COMMANDS, ORDERS_REPLIES, PARTITIONS, PAYMENTS_COMMANDS};
use e2e::{
    audit::RecordFact,
    orders::Wish,
    platform::{Platform, SETTLED, alone, beside_others},
    topics::{self, ECHO},
};
use saga_core::testkit::{eventually, unique};
use serde_json::Value;
use stack::service::{Service, binary};
use std::{collections::BTreeMap, fs, path::Path, process::Command};

const READ: [&str; 3] = [PAYMENTS_COMMANDS.name, INVENTORY_COMMANDS.name, ORDERS_REPLIES.name];

/// A record that says who wrote it and nothing else, with bytes that are no JSON.
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
        // Behind the garbage, in whichever partitions its key falls.
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
    eventually(SETTLED, || async {
        let all = topics::read(&platform.brokers(), &format!("{topic}.dlt")).await.ok()?;
        let dead: Vec<_> = all.into_iter().filter(|record| record.key.as_deref() == Some(key)).collect();
        (dead.len() >= wanted).then_some(dead)
    })
    .await
}

#[test]
fn a_command_of_an_unknown_type_and_one_whose_payload_is_no_command_are_dead_lettered() {
    beside_others(async |platform| {
        platform.expected().foreign_sources.insert(ECHO.to_owned());
        let sku = platform.item("unknown", 100, 5).await;
        let order = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(order).await, "confirmed");
        platform.settles().await;
        for topic in [PAYMENTS_COMMANDS.name, INVENTORY_COMMANDS.name] {
            let records = topics::read(&platform.brokers(), topic).await.expect("the topic can be read");
            let real = records.iter().find(|r| r.key == Some(order.to_string())).expect("it was commanded");
            let mut unknown = topics::resent(real);
            unknown.headers.insert("ce_type".into(), "nobody.knows.this.v9".into());
            // A step of its own, or the fence would know the answer before the payload is looked at.
            let mut undecodable = topics::resent(real);
            undecodable.headers.insert("ce_sagastep".into(), "another-step".into());
            undecodable.value = Some(b"{\"order\":7}".to_vec());
            for record in [&unknown, &undecodable] {
                topics::write(&platform.brokers(), record).await.expect("it can be written");
            }
            let dead = dead_letters(platform, topic, &order.to_string(), 2).await;
            let reasons: Vec<_> = dead.iter().filter_map(|letter| letter.header("x-error-message")).collect();
            assert!(reasons.iter().any(|why| why.contains("nobody.knows.this.v9")), "{reasons:?}");
        }
        let next = platform.place(&Wish::of(&sku, 1)).await;
        assert_eq!(platform.outcome(next).await, "confirmed");
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

/// The lines that a process wrote to its log after the first `skip` bytes, as far as they are JSON.
fn lines(log: &Path, skip: usize) -> Vec<Value> {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(skip..).unwrap_or_default()).into_owned();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn size(log: &Path) -> usize {
    fs::metadata(log).map_or(0, |meta| usize::try_from(meta.len()).unwrap_or_default())
}

fn waits_for(lines: &[Value], what: &str) -> usize {
    let of = |line: &&Value| {
        let said = line["message"].as_str().unwrap_or_default().to_lowercase();
        said.contains("waiting for") && said.contains(what)
    };
    lines.iter().filter(of).count()
}

#[test]
fn a_service_whose_database_is_not_there_at_its_start_waits_says_so_once_and_resumes_by_itself() {
    alone(async |platform| {
        let orders = platform.stack.service(Service::Orders);
        let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
        orders.process.stop().await;
        postgres.process.kill();
        let before = size(orders.process.log());
        orders.process.start_again().expect("the program is there");
        let waiting = || waits_for(&lines(orders.process.log(), before), "database");
        eventually(SETTLED, || async { (waiting() > 0).then_some(()) }).await;
        assert!(not_ready(platform, Service::Orders).await);
        assert_eq!(waiting(), 1, "it says so once");
        postgres.restart().await.expect("PostgreSQL comes back");
        orders.ready().await.expect("it resumes");
        platform.all_ready().await;
        assert_eq!(waiting(), 1, "it says so once");
    });
}

#[test]
fn a_service_without_kafka_at_its_start_waits_says_so_once_and_resumes_by_itself() {
    alone(async |platform| {
        let inventory = platform.stack.service(Service::Inventory);
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        let sku = platform.item("no-kafka", 100, 5).await;
        inventory.process.stop().await;
        kafka.process.kill();
        let before = size(inventory.process.log());
        inventory.process.start_again().expect("the program is there");
        let waiting = || waits_for(&lines(inventory.process.log(), before), "kafka");
        eventually(SETTLED, || async { (waiting() > 0).then_some(()) }).await;
        assert!(not_ready(platform, Service::Inventory).await);
        // An order is taken all the same.
        let order = platform.place(&Wish::of(&sku, 1)).await;
        kafka.restart().await.expect("Kafka comes back");
        inventory.ready().await.expect("it resumes");
        platform.all_ready().await;
        assert_eq!(waiting(), 1, "it says so once");
        assert_eq!(platform.outcome(order).await, "confirmed");
    });
}

/// No, and not merely no answer.
async fn not_ready(platform: &Platform, service: Service) -> bool {
    let url = platform.admin(service, "/readyz");
    eventually(SETTLED, || async { platform.http.get(&url).send().await.ok() }).await.status().is_server_error()
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
        for service in [Service::Orders, Service::Payments] {
            let log = lines(platform.stack.service(service).process.log(), 0);
            let of_order: Vec<_> = log.iter().filter(|line| line["saga"] == id.as_str()).collect();
            // payment-svc speaks of an order only when something is wrong with it.
            assert!(service != Service::Orders || !of_order.is_empty(), "{service} says nothing about {id}");
            for line in of_order {
                assert_eq!(line["trace_id"], trace.as_str(), "{service}: {line}");
                assert_eq!(line["order"], id.as_str(), "{service}: {line}");
            }
        }
    });
}

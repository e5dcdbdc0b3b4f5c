//! Each dependency is broken in each way. `/livez`, `/readyz`, `/health` and the metrics report what that means, each
//! for its own readers, and no more than that. Then it is mended, and orders go through.
//!
//! Faults that take a broker that lies (a partition without a leader, a topic without rights) are in saga-core's and
//! the relay's own tests. These use librdkafka's mock cluster.

mod answers;
mod broken;

use answers::{Reds, Says, fine, go_on_saying, not_ready, stays_ready, until_healthy, until_they_say};
use broken::{Broken, delete_topic, make_topic, sql};
use contracts::topics::PARTITIONS;
use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED_WITHIN, unaudited},
};
use serde_json::Value;
use stack::service::Service::{self, Gateway, Inventory, Orders, Payments, Relay};

const AWAY: &[&str] = &["database_away", "no_answer"];
const NO_KAFKA: &[&str] = &["kafka_away"];
/// The causes of a broker that stands still: it hands the partitions of the consumers to no member.
const SILENT: &[&str] = &["kafka_away", "unassigned"];
const READ_ONLY: &[&str] = &["database_read_only"];
const OUTBOXES_AWAY: Reds = &[("outbox:orders", AWAY), ("outbox:payments", AWAY), ("outbox:inventory", AWAY)];
const OUTBOXES_WITHOUT_KAFKA: Reds =
    &[("outbox:orders", NO_KAFKA), ("outbox:payments", NO_KAFKA), ("outbox:inventory", NO_KAFKA)];

/// The answers while the provider stands still, or is dead.
const NO_PROVIDER: &[Says] = &[stays_ready(Payments, &[("effects", &["stalled"])]), fine(Orders), fine(Relay)];

/// Each fault, with the answers of each process concerned.
type Table = [(Broken, &'static [Says])];

/// Servers that die or stand still.
const SERVERS: &Table = &[
    (
        Broken::Postgres,
        &[
            not_ready(
                Orders,
                &[("database", AWAY), ("tables", AWAY), ("orders", AWAY)],
                &[("replies", AWAY), ("timers", AWAY), ("catalogue", AWAY)],
            ),
            not_ready(
                Payments,
                &[("database", AWAY), ("tables", AWAY), ("payments", AWAY)],
                &[("commands", AWAY), ("effects", AWAY)],
            ),
            not_ready(Inventory, &[("database", AWAY), ("tables", AWAY), ("items", AWAY)], &[("commands", AWAY)]),
            not_ready(Gateway, &[("database", AWAY), ("tables", AWAY)], &[]),
            not_ready(Relay, &[("databases", AWAY)], OUTBOXES_AWAY),
        ],
    ),
    (
        Broken::PostgresHangs,
        &[
            not_ready(
                Orders,
                &[("database", AWAY), ("tables", AWAY), ("orders", AWAY)],
                &[("replies", AWAY), ("timers", AWAY), ("catalogue", AWAY)],
            ),
            not_ready(Relay, &[("databases", AWAY)], OUTBOXES_AWAY),
        ],
    ),
    (
        Broken::Kafka,
        &[
            stays_ready(Orders, &[("kafka", NO_KAFKA), ("replies", NO_KAFKA), ("catalogue", NO_KAFKA)]),
            stays_ready(Payments, &[("kafka", NO_KAFKA), ("commands", NO_KAFKA)]),
            stays_ready(Inventory, &[("kafka", NO_KAFKA), ("commands", NO_KAFKA)]),
            fine(Gateway),
            stays_ready(Relay, OUTBOXES_WITHOUT_KAFKA),
        ],
    ),
    (
        Broken::KafkaHangs,
        &[
            stays_ready(Orders, &[("kafka", NO_KAFKA), ("replies", SILENT), ("catalogue", SILENT)]),
            fine(Gateway),
            Says { may: &["outbox:orders", "outbox:payments", "outbox:inventory"], ..fine(Relay) },
        ],
    ),
];

/// Faults of a database that answers, and lacks something.
const DATABASES: &Table = &[
    (
        Broken::Table("orders", "catalogue"),
        &[
            not_ready(
                Orders,
                &[("tables", &["table_missing"]), ("orders", &["table_missing"])],
                &[("catalogue", &["table_missing"])],
            ),
            fine(Payments),
            fine(Relay),
        ],
    ),
    // A table that only the consumer needs takes no traffic away.
    (
        Broken::Table("orders", "inbox_parked"),
        &[stays_ready(Orders, &[("replies", &["table_missing"]), ("catalogue", &["table_missing"])])],
    ),
    // A table that only some reads need, and one that every call needs.
    (
        Broken::Table("payments", "payment_difference"),
        &[not_ready(Payments, &[("tables", &["table_missing"])], &[]), fine(Orders)],
    ),
    (
        Broken::Table("inventory", "stock"),
        &[
            not_ready(
                Inventory,
                &[("tables", &["table_missing"]), ("items", &["table_missing"])],
                &[("commands", &["table_missing"])],
            ),
            fine(Orders),
        ],
    ),
    (Broken::Table("gateway", "gateway_arrival"), &[not_ready(Gateway, &[("tables", &["table_missing"])], &[])]),
    (
        Broken::Right("select", "catalogue"),
        &[not_ready(
            Orders,
            &[("tables", &["right_missing"]), ("orders", &["right_missing"])],
            &[("catalogue", &["right_missing"])],
        )],
    ),
    (
        Broken::ReadOnly("orders"),
        &[
            Says {
                // These parts notice when there is something to write.
                may: &["replies", "catalogue"],
                ..not_ready(Orders, &[("tables", &["database_read_only"])], &[("timers", &["database_read_only"])])
            },
            // The database is another service's.
            fine(Payments),
        ],
    ),
    // The callers of payment-svc only read.
    (
        Broken::ReadOnly("payments"),
        &[stays_ready(Payments, &[("commands", READ_ONLY), ("effects", READ_ONLY)]), fine(Orders)],
    ),
    (Broken::Catalogue, &[stays_ready(Orders, &[("catalogue", &["empty"])]), fine(Inventory)]),
];

/// Faults that last for longer than work may stand still, side by side; and the answers all the time.
const LASTING: (&[Broken], &[Says]) = (
    &[Broken::ReadOnly("payments"), Broken::Catalogue],
    &[
        stays_ready(Payments, &[("commands", READ_ONLY), ("effects", READ_ONLY)]),
        stays_ready(Orders, &[("catalogue", &["empty"])]),
        fine(Inventory),
        fine(Gateway),
    ],
);

/// Faults of topics and the provider; and of tables that only writes, or other tables' readers, need.
const TOPICS: &Table = &[
    (
        Broken::Topic("orders.replies"),
        &[
            stays_ready(Orders, &[("replies", &["topic_missing"])]),
            Says {
                // An order is confirmed before its stock is committed: that reply may be under way.
                may: &["outbox:inventory"],
                ..stays_ready(Relay, &[("outbox:payments", &["topic_missing"])])
            },
        ],
    ),
    (
        Broken::Topic("payments.commands"),
        &[
            stays_ready(Payments, &[("commands", &["topic_missing"])]),
            stays_ready(Relay, &[("outbox:orders", &["topic_missing"])]),
            fine(Inventory),
        ],
    ),
    (
        Broken::Topic("inventory.items"),
        &[stays_ready(Orders, &[("catalogue", &["topic_missing"])]), fine(Inventory), fine(Relay)],
    ),
    (Broken::Provider, NO_PROVIDER),
    // A read would not notice the missing right.
    (Broken::Right("insert", "outbox"), &[not_ready(Orders, &[("tables", &["right_missing"])], &[])]),
    (
        Broken::Table("orders", "outbox"),
        &[
            Says {
                // A reply to the last order may be under way.
                may: &["replies"],
                ..not_ready(Orders, &[("tables", &["table_missing"])], &[])
            },
            // Of one outbox the relay needs only that its requests are answered.
            stays_ready(Relay, &[("outbox:orders", &["table_missing"])]),
            fine(Payments),
        ],
    ),
    (
        Broken::Table("orders", "saga"),
        &[
            Says {
                may: &["replies"],
                ..not_ready(
                    Orders,
                    &[("tables", &["table_missing"]), ("orders", &["table_missing"])],
                    &[("timers", &["table_missing"])],
                )
            },
            fine(Relay),
        ],
    ),
    // Only a POST needs this table.
    (Broken::Held("idempotency_answer"), &[not_ready(Orders, &[("tables", &["locked"])], &[]), fine(Payments)]),
    (
        Broken::Locked("orders"),
        &[
            Says {
                // These parts may want a connection at that moment, too, and get none.
                may: &["replies", "timers", "catalogue"],
                ..not_ready(
                    Orders,
                    &[("orders", &["no_answer"]), ("tables", &["locked", "no_answer", "pool_full"])],
                    &[("connections", &["pool_full"])],
                )
            },
            fine(Payments),
        ],
    ),
];

/// Places an order, and waits until it is confirmed.
async fn an_order_goes_through(platform: &Platform, sku: &str, after: &str) {
    let order = platform.place(&Wish::of(sku, 1)).await;
    let ended = tokio::time::timeout(SETTLED_WITHIN, platform.outcome(order)).await;
    assert_eq!(ended.as_deref(), Ok("confirmed"), "after {after}");
}

/// Breaks one after the other, checks all answers, mends it, and places an order; then the faults that last.
fn each_is_told(table: &'static Table, (lasting, says_all_the_time): (&'static [Broken], &'static [Says])) {
    unaudited(async |platform| {
        let sku = platform.item("health", 100, 10_000).await;
        an_order_goes_through(platform, &sku, "the start").await;
        for (broken, says) in table {
            eprintln!("{broken:?}");
            broken.breaks(platform, &sku).await;
            until_they_say(platform, *broken, says).await;
            broken.mended(platform).await;
            until_healthy(platform, *broken).await;
            an_order_goes_through(platform, &sku, &format!("{broken:?}")).await;
        }
        for broken in lasting {
            broken.breaks(platform, &sku).await;
        }
        if !lasting.is_empty() {
            go_on_saying(platform, lasting, says_all_the_time).await;
        }
        for broken in lasting {
            broken.mended(platform).await;
        }
        if let Some(last) = lasting.last() {
            until_healthy(platform, *last).await;
        }
    });
}

#[test]
fn servers_that_die_or_stand_still_are_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(SERVERS, (&[], &[]));
}

#[test]
fn what_a_database_lacks_is_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(DATABASES, LASTING);
}

#[test]
fn topics_and_a_provider_that_fail_are_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(TOPICS, (&[], &[]));
}

#[test]
fn a_topic_that_is_deleted_and_made_again_at_once_is_read_from_its_new_begin() {
    unaudited(async |platform| {
        let sku = platform.item("again", 100, 10_000).await;
        an_order_goes_through(platform, &sku, "the start").await;
        // Now the leaders' epochs are later than those of a topic that is made anew.
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        for _ in 0..2 {
            kafka.process.kill();
            kafka.restart().await.expect("Kafka comes back");
        }
        an_order_goes_through(platform, &sku, "Kafka's restarts").await;
        let before = Service::ALL.map(|service| (service, platform.log_size(service)));
        for topic in ["orders.replies", "payments.commands", "orders.replies"] {
            delete_topic(platform, topic).await;
            make_topic(platform, topic).await;
            an_order_goes_through(platform, &sku, topic).await;
        }
        let again = |line: &Value| line["message"] == "the topic is read again from its begin";
        for (service, before) in before {
            let lines = platform.lines(service, before);
            // A partition whose offset Kafka forgot with its topic is read from its begin without a line in the log.
            let times = match service {
                Orders => 1..=2 * PARTITIONS as usize,
                Payments => 0..=PARTITIONS as usize,
                _ => 0..=0,
            };
            let read_again = lines.iter().filter(|line| again(line)).count();
            assert!(times.contains(&read_again), "{service}: {read_again} times, not {times:?}");
        }
        until_healthy(platform, Broken::Topic("made again")).await;
    });
}

#[test]
fn a_column_that_is_added_under_a_running_service_costs_no_order() {
    unaudited(async |platform| {
        for service in Service::ALL {
            let first = platform.lines(service, 0);
            let warns = |line: &&Value| line["message"] == "not ready" || line["message"] == "work does not move";
            let warned: Vec<&Value> = first.iter().filter(warns).collect();
            assert!(warned.is_empty(), "{service} warns of its own start: {warned:?}");
        }
        let sku = platform.item("column", 100, 10_000).await;
        an_order_goes_through(platform, &sku, "the start").await;
        for table in ["orders", "saga", "catalogue", "inbox_parked", "outbox"] {
            sql(platform, "orders", &format!("alter table {table} add column noted text")).await;
            an_order_goes_through(platform, &sku, table).await;
        }
        until_they_say(platform, Broken::Catalogue, &[stays_ready(Orders, &[])]).await;
        until_healthy(platform, Broken::Catalogue).await;
    });
}

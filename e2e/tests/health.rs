//! Each dependency is broken in each way, and `/livez`, `/readyz`, `/health` and the metric say what that means, each for its own
//! readers. Then it is mended, and orders go through.
//!
//! What takes a broker that lies (a partition without a leader, a topic without rights) is in saga-core's and the relay's own tests,
//! on librdkafka's mock cluster.

use e2e::{
    orders::Wish,
    platform::{Platform, SETTLED, unaudited},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use saga_core::testkit::eventually;
use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection, PgConnection, postgres::PgConnectOptions};
use stack::service::Service::{self, Gateway, Inventory, Orders, Payments, Relay};
use std::{process::Command, time::Duration};

/// Seen by the next look, or the one after it, however busy the machine is; and by the brokers' clients.
const SEEN: Duration = Duration::from_secs(60);

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// Killed.
    Postgres,
    /// All its processes stand still.
    PostgresHangs,
    /// A table is renamed away.
    Table(&'static str, &'static str),
    /// The service's role may not read a table.
    Right(&'static str),
    /// The database takes no writes.
    ReadOnly(&'static str),
    /// Killed.
    Kafka,
    /// It stands still.
    KafkaHangs,
    /// A topic is deleted.
    Topic(&'static str),
    /// The copy of the items is emptied.
    Catalogue,
    /// The provider stands still while it has calls to answer.
    Provider,
}

/// What a process says of it: what `/readyz` names (nothing: it is ready), and what `/health` does.
struct Says {
    service: Service,
    not_ready: Option<(&'static str, &'static [&'static str])>,
    red: &'static [(&'static str, &'static [&'static str])],
}

const AWAY: &[&str] = &["database_away", "no_answer"];
const NO_KAFKA: &[&str] = &["kafka_away"];

const fn stays_ready(service: Service, red: &'static [(&'static str, &'static [&'static str])]) -> Says {
    Says { service, not_ready: None, red }
}

/// What is broken, and what each process concerned says.
type Table = [(Broken, &'static [Says])];

/// Servers that die or stand still.
const SERVERS: &Table = &[
    (
        Broken::Postgres,
        &[
            Says {
                service: Orders,
                not_ready: Some(("database", AWAY)),
                red: &[("database", AWAY), ("replies", AWAY)],
            },
            Says { service: Payments, not_ready: Some(("database", AWAY)), red: &[("effects", AWAY)] },
            Says { service: Inventory, not_ready: Some(("database", AWAY)), red: &[("commands", AWAY)] },
            Says { service: Gateway, not_ready: Some(("database", AWAY)), red: &[] },
            Says { service: Relay, not_ready: Some(("databases", AWAY)), red: &[("outbox:orders", AWAY)] },
        ],
    ),
    (
        Broken::PostgresHangs,
        &[
            Says { service: Orders, not_ready: Some(("database", AWAY)), red: &[] },
            Says { service: Relay, not_ready: Some(("databases", AWAY)), red: &[("outbox:orders", AWAY)] },
        ],
    ),
    (
        Broken::Kafka,
        &[
            stays_ready(Orders, &[("kafka", NO_KAFKA), ("replies", NO_KAFKA), ("catalogue", NO_KAFKA)]),
            stays_ready(Payments, &[("commands", NO_KAFKA)]),
            stays_ready(Inventory, &[("commands", NO_KAFKA)]),
            stays_ready(Gateway, &[]),
            stays_ready(Relay, &[("outbox:orders", NO_KAFKA)]),
        ],
    ),
    (Broken::KafkaHangs, &[stays_ready(Orders, &[("kafka", NO_KAFKA)]), stays_ready(Relay, &[])]),
];

/// A database that answers, and lacks something.
const DATABASES: &Table = &[
    (
        Broken::Table("orders", "catalogue"),
        &[
            Says {
                service: Orders,
                not_ready: Some(("tables", &["table_missing"])),
                red: &[("orders", &["table_missing"])],
            },
            stays_ready(Payments, &[]),
            stays_ready(Relay, &[]),
        ],
    ),
    // What only the consumer needs takes no traffic away.
    (Broken::Table("orders", "inbox_parked"), &[stays_ready(Orders, &[("replies", &["table_missing"])])]),
    (
        Broken::Right("catalogue"),
        &[Says {
            service: Orders,
            not_ready: Some(("tables", &["right_missing"])),
            red: &[("orders", &["right_missing"])],
        }],
    ),
    (
        Broken::ReadOnly("orders"),
        &[
            Says {
                service: Orders,
                not_ready: Some(("tables", &["database_read_only"])),
                red: &[("tables", &["database_read_only"])],
            },
            // Another one's.
            stays_ready(Payments, &[]),
        ],
    ),
    // Its callers only read.
    (Broken::ReadOnly("payments"), &[stays_ready(Payments, &[]), stays_ready(Orders, &[])]),
    (Broken::Catalogue, &[stays_ready(Orders, &[("catalogue", &["empty"])])]),
];

/// Topics that are gone, and the provider.
const TOPICS: &Table = &[
    (
        Broken::Topic("orders.replies"),
        &[
            stays_ready(Orders, &[("replies", &["topic_missing"])]),
            stays_ready(Relay, &[("outbox:payments", &["topic_missing"])]),
        ],
    ),
    (
        Broken::Topic("payments.commands"),
        &[
            stays_ready(Payments, &[("commands", &["topic_missing"])]),
            stays_ready(Relay, &[("outbox:orders", &["topic_missing"])]),
        ],
    ),
    (Broken::Provider, &[stays_ready(Payments, &[("effects", &["stalled"])])]),
];

/// One of the four answers, with its body; `None` while there is none.
async fn asked(platform: &Platform, service: Service, path: &str) -> Option<(u16, Value)> {
    let answer = platform.http.get(platform.admin(service, path)).send().await.ok()?;
    let status = answer.status().as_u16();
    Some((status, serde_json::from_str(&answer.text().await.ok()?).unwrap_or(Value::Null)))
}

/// Whether all four answers of a process are those; what they are otherwise.
async fn are(platform: &Platform, says: &Says) -> Result<(), String> {
    let ask = async |path: &str| asked(platform, says.service, path).await.ok_or(format!("{path}: no answer"));
    let one_of = |word: &Value, words: &[&str]| word.as_str().is_some_and(|word| words.contains(&word));
    let (live, _) = ask("/livez").await?;
    let (status, ready) = ask("/readyz").await?;
    let (healthy, health) = ask("/health").await?;
    let readiness = match says.not_ready {
        None => status == 200,
        Some((check, words)) => status == 503 && one_of(&ready["checks"][check], words),
    };
    let reds = says.red.iter().all(|(part, words)| {
        let part = &health["parts"][part];
        part["state"] == "red" && one_of(&part["cause"], words) && part["since"].is_string()
    });
    let is_red = !says.red.is_empty() || says.not_ready.is_some();
    if live != 200 || !readiness || !reds || (is_red && healthy != 503) {
        return Err(format!("/livez {live}, /readyz {status} {ready}, /health {healthy} {health}"));
    }
    let metrics =
        platform.http.get(platform.admin(says.service, "/metrics")).send().await.map_err(|e| e.to_string())?;
    let metrics = metrics.text().await.map_err(|e| e.to_string())?;
    for (part, words) in says.red {
        let stalled = |line: &str| {
            let series = words.iter().map(|word| format!("work_stalled_seconds{{part=\"{part}\",reason=\"{word}\"}} "));
            series.into_iter().any(|series| line.strip_prefix(&series).is_some_and(|value| value != "0"))
        };
        if !metrics.lines().any(stalled) {
            return Err(format!("/metrics does not say that {part} stands still"));
        }
    }
    Ok(())
}

async fn until_they_say(platform: &Platform, broken: Broken, says: &[Says]) {
    for says in says {
        let mut last = String::new();
        let said = tokio::time::timeout(SEEN, async {
            while let Err(otherwise) = are(platform, says).await {
                last = otherwise;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(said.await.is_ok(), "{broken:?}: {} says {last}", says.service);
    }
}

/// Everything is in order.
async fn until_healthy(platform: &Platform, after: Broken) {
    for service in Service::ALL {
        let mut last = Value::Null;
        let healthy = tokio::time::timeout(SETTLED, async {
            loop {
                match asked(platform, service, "/v1/health").await {
                    Some((200, _)) => return,
                    Some((_, health)) => last = health,
                    None => {}
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(healthy.await.is_ok(), "after {after:?}: {service} says {last}");
    }
}

/// What only a superuser may do; PostgreSQL may just have been killed.
async fn sql(platform: &Platform, database: &str, statements: &str) {
    let url = platform.stack.database_url(database);
    eventually(SEEN, || async {
        let mut connection = PgConnection::connect(&url).await.ok()?;
        // Our own sessions may be read-only, and a transaction stays what it was when it began.
        sqlx::raw_sql("set default_transaction_read_only = off").execute(&mut connection).await.ok()?;
        sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut connection).await.ok()
    })
    .await;
}

async fn cut(platform: &Platform, database: &str) {
    let statement = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}' and pid <> pg_backend_pid()"
    );
    sql(platform, database, &statement).await;
}

fn admin(platform: &Platform) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", platform.brokers()).create().expect("it needs only brokers")
}

async fn delete_topic(platform: &Platform, topic: &str) {
    let deleted = admin(platform).delete_topics(&[topic], &AdminOptions::new()).await.expect("the broker answers");
    deleted.into_iter().for_each(|deleted| drop(deleted.expect("the topic can be deleted")));
}

/// With the partitions that a topic of ours has. As soon as the broker lets it.
async fn make_topic(platform: &Platform, topic: &str) {
    let admin = admin(platform);
    eventually(SEEN, || async {
        let new = NewTopic::new(topic, contracts::topics::PARTITIONS, TopicReplication::Fixed(1));
        admin.create_topics([&new], &AdminOptions::new()).await.ok()?.pop()?.ok()
    })
    .await;
}

/// All processes of PostgreSQL: its backends are no members of its group.
fn signal_postgres(platform: &Platform, signal: Signal) {
    let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
    let parent = postgres.process.pid().expect("it runs").to_string();
    let children = Command::new("pgrep").args(["-P", &parent]).output().expect("pgrep is there");
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    for pid in children.lines().chain([parent.as_str()]).filter_map(|pid| pid.trim().parse().ok()) {
        // One may have ended meanwhile.
        kill(Pid::from_raw(pid), signal).ok();
    }
}

/// order-svc under a role of its own, which owns nothing.
async fn with_a_role_of_its_own(platform: &Platform) {
    sql(
        platform,
        "orders",
        "drop role if exists shop; create role shop login password 'shop';
         grant usage, create on schema public to shop;
         grant all on all tables in schema public to shop;
         grant all on all sequences in schema public to shop",
    )
    .await;
    let options: PgConnectOptions = platform.stack.database_url("orders").parse().expect("the stack's own URL");
    let url = options.username("shop").password("shop").to_url_lossy().to_string();
    let process = &platform.stack.service(Orders).process;
    process.stop().await;
    process.start_again_with(&[("DATABASE_URL", &url)]).expect("the program is there");
    platform.stack.service(Orders).ready().await.expect("it may do all that it has to");
}

impl Broken {
    async fn breaks(self, platform: &Platform, sku: &str) {
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        match self {
            Self::Postgres => platform.stack.servers().postgres.as_ref().expect("our own").process.kill(),
            Self::PostgresHangs => signal_postgres(platform, Signal::SIGSTOP),
            Self::Table(database, table) => {
                sql(platform, database, &format!("alter table {table} rename to mislaid")).await;
                // Something for the consumers to fail at.
                platform.try_place(&Wish::of(sku, 1)).await;
            }
            Self::Right(table) => {
                with_a_role_of_its_own(platform).await;
                sql(platform, "orders", &format!("revoke select on {table} from shop")).await;
            }
            Self::ReadOnly(database) => {
                sql(platform, database, &format!("alter database {database} set default_transaction_read_only = on"))
                    .await;
                cut(platform, database).await;
            }
            Self::Kafka => kafka.process.kill(),
            Self::KafkaHangs => kafka.process.pause(),
            Self::Topic(topic) => {
                delete_topic(platform, topic).await;
                platform.try_place(&Wish::of(sku, 1)).await;
            }
            Self::Catalogue => {
                sql(platform, "orders", "create table copied as table catalogue; truncate catalogue").await;
            }
            Self::Provider => {
                platform.stack.service(Gateway).process.pause();
                platform.try_place(&Wish::of(sku, 1)).await;
            }
        }
    }

    async fn mended(self, platform: &Platform) {
        let servers = platform.stack.servers();
        match self {
            Self::Postgres => {
                servers.postgres.as_ref().expect("our own").restart().await.expect("PostgreSQL comes back");
            }
            Self::PostgresHangs => signal_postgres(platform, Signal::SIGCONT),
            Self::Table(database, table) => {
                sql(platform, database, &format!("alter table mislaid rename to {table}")).await;
            }
            Self::Right(table) => {
                sql(platform, "orders", &format!("grant select on {table} to shop")).await;
                platform.stack.service(Orders).ready().await.expect("it is ready again by itself");
                platform.stack.service(Orders).restart().await.expect("it starts as it was");
            }
            Self::ReadOnly(database) => {
                sql(platform, database, &format!("alter database {database} reset default_transaction_read_only"))
                    .await;
                cut(platform, database).await;
            }
            Self::Kafka => {
                // A process that is started while Kafka is away serves its callers.
                platform.stack.service(Inventory).process.stop().await;
                platform.stack.service(Inventory).process.start_again().expect("the program is there");
                until_they_say(platform, self, &[stays_ready(Inventory, &[("topics", NO_KAFKA)])]).await;
                servers.kafka.as_ref().expect("our own").restart().await.expect("Kafka comes back");
            }
            Self::KafkaHangs => servers.kafka.as_ref().expect("our own").process.resume(),
            Self::Topic(topic) => make_topic(platform, topic).await,
            Self::Catalogue => {
                sql(platform, "orders", "insert into catalogue table copied; drop table copied").await;
            }
            Self::Provider => platform.stack.service(Gateway).process.resume(),
        }
    }
}

/// An order is placed, and confirmed.
async fn an_order_goes_through(platform: &Platform, sku: &str, after: &str) {
    let order = platform.place(&Wish::of(sku, 1)).await;
    let ended = tokio::time::timeout(SETTLED, platform.outcome(order)).await;
    assert_eq!(ended.as_deref(), Ok("confirmed"), "after {after}");
}

/// Breaks one after the other, hears all answers, mends it, and places an order.
fn each_is_told(table: &'static Table) {
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
    });
}

#[test]
fn servers_that_die_or_stand_still_are_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(SERVERS);
}

#[test]
fn what_a_database_lacks_is_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(DATABASES);
}

#[test]
fn topics_and_a_provider_that_fail_are_told_by_each_answer_to_whom_it_concerns() {
    each_is_told(TOPICS);
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
        let before = platform.log_size(Orders);
        for topic in ["orders.replies", "payments.commands", "orders.replies"] {
            delete_topic(platform, topic).await;
            make_topic(platform, topic).await;
            an_order_goes_through(platform, &sku, topic).await;
        }
        let again = |line: &Value| line["message"] == "the topic is read again from its begin";
        assert!(platform.lines(Orders, before).iter().any(again), "order-svc did not notice");
        until_healthy(platform, Broken::Topic("made again")).await;
    });
}

#[test]
fn a_column_that_is_added_under_a_running_service_costs_no_order() {
    unaudited(async |platform| {
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

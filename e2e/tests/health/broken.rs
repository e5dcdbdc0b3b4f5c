//! The ways in which dependencies are broken, and how each is mended.

use crate::{
    NO_KAFKA, NO_PROVIDER,
    answers::{Reds, SEEN, Says, not_ready, stays_ready, until_the_reason_is, until_they_say},
};
use e2e::{orders::Wish, platform::Platform};
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
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection, PgConnection, postgres::PgConnectOptions};
use stack::service::Service::{Gateway, Inventory, Orders, Payments};
use std::process::Command;

/// More requests than order-svc's pool has connections.
const REQUESTS: usize = 40;
const STARTED_WITHOUT_KAFKA: Reds =
    &[("kafka", NO_KAFKA), ("commands", &["starting", "kafka_away"]), ("topics", NO_KAFKA)];
/// order-svc's answers about a locked table before a request needs it.
const LOCKED: Says = not_ready(Orders, &[("orders", &["no_answer"]), ("tables", &["locked"])], &[]);

/// The dependencies that a test breaks, each in its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// PostgreSQL is killed.
    Postgres,
    /// All of PostgreSQL's processes stand still.
    PostgresHangs,
    /// A table is renamed away.
    Table(&'static str, &'static str),
    /// The service's role lacks a right to a table.
    Right(&'static str, &'static str),
    /// A table of order-svc is locked.
    Held(&'static str),
    /// A table is locked, and so many requests wait for it that the pool is full.
    Locked(&'static str),
    /// The database takes no writes.
    ReadOnly(&'static str),
    /// Kafka is killed.
    Kafka,
    /// Kafka stands still.
    KafkaHangs,
    /// A topic is deleted.
    Topic(&'static str),
    /// The copy of the items is emptied.
    Catalogue,
    /// The provider stands still while it has calls to answer, and is killed before it goes on.
    Provider,
}

/// Runs statements that only a superuser may run; PostgreSQL may just have been killed.
pub(crate) async fn sql(platform: &Platform, database: &str, statements: &str) {
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

pub(crate) async fn delete_topic(platform: &Platform, topic: &str) {
    let deleted = admin(platform).delete_topics(&[topic], &AdminOptions::new()).await.expect("the broker answers");
    deleted.into_iter().for_each(|deleted| drop(deleted.expect("the topic can be deleted")));
}

/// Makes a topic with the partitions of the platform's topics, as soon as the broker lets it.
pub(crate) async fn make_topic(platform: &Platform, topic: &str) {
    let admin = admin(platform);
    eventually(SEEN, || async {
        let new = NewTopic::new(topic, contracts::topics::PARTITIONS, TopicReplication::Fixed(1));
        admin.create_topics([&new], &AdminOptions::new()).await.ok()?.pop()?.ok()
    })
    .await;
}

/// Signals all processes of PostgreSQL: its backends are no members of its group.
fn signal_postgres(platform: &Platform, signal: Signal) {
    let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
    let parent = postgres.process.pid().expect("it runs").to_string();
    let children = Command::new("pgrep").args(["-P", &parent]).output().expect("pgrep is there");
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    for pid in children.lines().chain([parent.as_str()]).filter_map(|pid| pid.trim().parse().ok()) {
        // One process may have ended meanwhile.
        kill(Pid::from_raw(pid), signal).ok();
    }
}

/// Runs order-svc under a role of its own, which owns nothing.
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

/// Locks a table of order-svc.
fn lock(platform: &Platform, table: &'static str) {
    let url = platform.stack.database_url("orders");
    tokio::spawn(async move {
        let mut connection = PgConnection::connect(&url).await.expect("PostgreSQL is there");
        let hold = format!("set application_name = 'holder'; begin; lock table {table}; select pg_sleep(600)");
        // The statement is ended when the table is free again.
        sqlx::raw_sql(AssertSqlSafe(hold)).execute(&mut connection).await.ok();
    });
}

/// Locks a table of order-svc. When order-svc has reported that, more requests come than its pool has connections, over
/// and over until they are answered.
async fn lock_and_ask(platform: &Platform, table: &'static str) {
    lock(platform, table);
    until_they_say(platform, Broken::Locked(table), &[LOCKED]).await;
    for _ in 0..REQUESTS {
        let request = platform.http.get(format!("{}/v1/orders", platform.stack.url(Orders)));
        tokio::spawn(async move {
            let ask = async || request.try_clone().expect("it has no body").send().await;
            while !ask().await.is_ok_and(|answer| answer.status().is_success()) {}
        });
    }
}

impl Broken {
    pub(crate) async fn breaks(self, platform: &Platform, sku: &str) {
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        match self {
            Self::Postgres => platform.stack.servers().postgres.as_ref().expect("our own").process.kill(),
            Self::PostgresHangs => signal_postgres(platform, Signal::SIGSTOP),
            Self::Table(database, table) => {
                sql(platform, database, &format!("alter table {table} rename to mislaid")).await;
                // The order gives the consumers something to fail at.
                platform.try_place(&Wish::of(sku, 1)).await;
            }
            Self::Right(right, table) => {
                with_a_role_of_its_own(platform).await;
                sql(platform, "orders", &format!("revoke {right} on {table} from shop")).await;
            }
            Self::Held(table) => lock(platform, table),
            Self::Locked(table) => lock_and_ask(platform, table).await,
            Self::ReadOnly(database) => {
                sql(platform, database, &format!("alter database {database} set default_transaction_read_only = on"))
                    .await;
                cut(platform, database).await;
                // The order gives the consumers something to fail at.
                platform.try_place(&Wish::of(sku, 1)).await;
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

    pub(crate) async fn mended(self, platform: &Platform) {
        let servers = platform.stack.servers();
        match self {
            Self::Postgres => {
                servers.postgres.as_ref().expect("our own").restart().await.expect("PostgreSQL comes back");
            }
            Self::PostgresHangs => signal_postgres(platform, Signal::SIGCONT),
            Self::Table(database, table) => {
                sql(platform, database, &format!("alter table mislaid rename to {table}")).await;
            }
            Self::Right(right, table) => {
                sql(platform, "orders", &format!("grant {right} on {table} to shop")).await;
                platform.stack.service(Orders).ready().await.expect("it is ready again by itself");
                platform.stack.service(Orders).restart().await.expect("it starts as it was");
            }
            Self::Held(_) | Self::Locked(_) => {
                let holder = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'holder'";
                sql(platform, "orders", holder).await;
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
                until_they_say(platform, self, &[stays_ready(Inventory, STARTED_WITHOUT_KAFKA)]).await;
                servers.kafka.as_ref().expect("our own").restart().await.expect("Kafka comes back");
            }
            Self::KafkaHangs => servers.kafka.as_ref().expect("our own").process.resume(),
            Self::Topic(topic) => make_topic(platform, topic).await,
            Self::Catalogue => {
                sql(platform, "orders", "insert into catalogue table copied; drop table copied").await;
            }
            Self::Provider => {
                // It dies before it goes on. What waits for it is red all the while, with the reason of the last call.
                let gateway = &platform.stack.service(Gateway).process;
                gateway.kill();
                until_the_reason_is(platform, Payments, "effects", "the connection to the gateway failed").await;
                until_they_say(platform, self, NO_PROVIDER).await;
                gateway.start_again().expect("the program is there");
            }
        }
    }
}

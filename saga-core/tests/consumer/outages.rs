//! An outage is logged once, however often the consumer tries meanwhile, and so is its end. The next outage has lines
//! of its own.

use crate::support::{Fixture, Running, SOON, events};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::{
    brokers::Inquirer,
    outage::Outage,
    part::Cause,
    service::database::pool_options,
    testkit::{FreezingProxy, KafkaProxy, Log, TestTopic, brokers, eventually, unique},
};
use sqlx::Connection as _;
use std::time::{Duration, Instant};

/// How often this line was logged, once it was logged `count` times.
async fn says(log: &Log, message: &str, count: usize) -> usize {
    eventually(SOON, || async {
        let said = log.said(message).len();
        (said >= count).then_some(said)
    })
    .await
}

#[tokio::test]
async fn each_outage_of_the_database_and_its_end_are_said_once() {
    const BEGINS: &str = "waiting for the database";
    const ENDS: &str = "the database is there again";
    const TRIES: usize = 6;
    let log = Log::hear("saga_core=info");
    let mut fixture = Fixture::new(2).await;
    let (proxy, url) = FreezingProxy::of_database(&fixture.database.url).await;
    let direct = std::mem::replace(&mut fixture.database.pool, pool_options(4).connect(&url).await.unwrap());
    let running = fixture.start();
    fixture.database.pool = direct;
    fixture.send(&events(8, 80)).await;
    fixture.until_handled(80).await;
    for outage in 1..=3 {
        proxy.shut();
        let refused = proxy.refused();
        // Both partitions have something to do.
        fixture.send(&events(8, 80)).await;
        assert_eq!(says(&log, BEGINS, outage).await, outage);
        eventually(SOON, || async { (proxy.refused() > refused + TRIES).then_some(()) }).await;
        assert!(running.health.check().unwrap_err().starts_with("database "));
        proxy.open();
        fixture.until_handled(80 + 80 * outage).await;
        eventually(SOON, || async { running.health.check().ok() }).await;
        assert_eq!(says(&log, ENDS, outage).await, outage);
        assert_eq!(log.said(BEGINS).len(), outage, "not once per try, nor per partition");
    }
    running.stop().await;
    assert_eq!(log.warnings().len(), 3, "{:?}", log.warnings());
}

/// Waits until the consumer's cause is this one.
async fn says_why(running: &Running, cause: Cause) {
    let is = || running.health.report().issue.is_some_and(|issue| issue.cause == cause);
    eventually(SOON, || async { is().then_some(()) }).await;
}

async fn is_said_until_it_is_let_go_of(table: &str) {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempt_timeout = Duration::from_secs(2);
    let running = fixture.start();
    fixture.send(&events(1, 1)).await;
    fixture.until_handled(1).await;
    let mut holding = fixture.database.pool.begin().await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("lock table {table}"))).execute(&mut *holding).await.unwrap();
    fixture.send(&events(1, 1)).await;
    says_why(&running, Cause::Locked).await;
    let (said, longer) = (Instant::now(), Duration::from_secs(5));
    while said.elapsed() < longer {
        // The statements of another part are answered.
        Outage::of_database(&fixture.database.pool).working();
        fixture.send(&events(1, 1)).await;
        let issue = running.health.report().issue;
        assert_eq!(issue.as_ref().map(|issue| issue.cause), Some(Cause::Locked), "{table}: {issue:?}");
        assert!(issue.unwrap().reason.contains("pg_blocking_pids"), "what to do is said");
    }
    holding.rollback().await.unwrap();
    fixture.until_handled(3).await;
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test]
async fn a_lock_on_the_inbox_is_said_until_it_is_let_go_of() {
    tokio::join!(is_said_until_it_is_let_go_of("inbox"), is_said_until_it_is_let_go_of("inbox_parked"));
}

/// Lets every session that begins from now on write, or not; ends the sessions that there are.
async fn may_write(fixture: &Fixture, may: bool) {
    let value = if may { "reset default_transaction_read_only" } else { "set default_transaction_read_only = on" };
    let alter = format!(
        "do $$ begin execute format('alter database %I {value}', current_database()); end $$;
         select pg_terminate_backend(pid) from pg_stat_activity
          where datname = current_database() and pid <> pg_backend_pid()"
    );
    let mut connection = sqlx::PgConnection::connect(&fixture.database.url).await.unwrap();
    // A transaction stays what it was when it began.
    sqlx::raw_sql("set default_transaction_read_only = off").execute(&mut connection).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(alter)).execute(&mut connection).await.unwrap();
}

#[tokio::test]
async fn a_database_that_takes_no_writes_is_said_and_is_not_away() {
    let fixture = Fixture::new(1).await;
    let running = fixture.start();
    fixture.send(&events(1, 1)).await;
    fixture.until_handled(1).await;
    may_write(&fixture, false).await;
    fixture.send(&events(1, 1)).await;
    says_why(&running, Cause::DatabaseReadOnly).await;
    assert!(running.health.check().unwrap_err().contains("default_transaction_read_only"), "what to do is said");
    may_write(&fixture, true).await;
    fixture.until_handled(2).await;
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test]
async fn each_outage_of_kafka_and_its_end_are_said_once() {
    const BEGINS: &str = "waiting for Kafka";
    const ENDS: &str = "Kafka is there again";
    let log = Log::hear("saga_core=info");
    let mut fixture = Fixture::new(1).await;
    // The real broker is every test's. This test is about the client: that it reaches no broker.
    let cluster = MockCluster::new(1).unwrap();
    let topic = unique("events");
    cluster.create_topic(&topic, 1, 1).unwrap();
    (fixture.config.brokers, fixture.config.topics) = (cluster.bootstrap_servers(), vec![topic]);
    let running = fixture.start();
    eventually(SOON, || async { running.health.check().ok() }).await;
    for outage in 1..=2 {
        cluster.broker_down(1).unwrap();
        assert_eq!(says(&log, BEGINS, outage).await, outage);
        assert!(running.health.check().unwrap_err().contains("no broker can be reached"));
        cluster.broker_up(1).unwrap();
        eventually(SOON, || async { running.health.check().ok() }).await;
        assert_eq!(says(&log, ENDS, outage).await, outage);
        assert_eq!(log.said(BEGINS).len(), outage);
    }
    running.stop().await;
    assert_eq!(log.warnings().len(), 2, "{:?}", log.warnings());
}

#[tokio::test]
async fn a_right_that_the_broker_refuses_is_red_with_its_cure_until_it_is_given() {
    let log = Log::hear("saga_core=info");
    let mut fixture = Fixture::new(1).await;
    let cluster = MockCluster::new(1).unwrap();
    let topic = unique("events");
    cluster.create_topic(&topic, 1, 1).unwrap();
    (fixture.config.brokers, fixture.config.topics) = (cluster.bootstrap_servers(), vec![topic]);
    let running = fixture.start();
    eventually(SOON, || async { running.health.check().ok() }).await;

    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    cluster.request_errors(RDKafkaApiKey::Fetch, &[refused; 10_000]);
    let said = eventually(SOON, || async { running.health.check().err() }).await;
    assert!(said.contains("TopicAuthorizationFailed") && said.contains("grant this client the rights Read"), "{said}");
    assert_eq!(log.said("the consumer waits until this is set right").len(), 1);

    // No record is sent: that Kafka serves the consumer again does not show in records.
    cluster.clear_request_errors(RDKafkaApiKey::Fetch);
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert_eq!(log.said("the consumer goes on: what Kafka refused was set right").len(), 1);
    running.stop().await;
    assert_eq!(log.warnings().len(), 1, "{:?}", log.warnings());
}

#[tokio::test]
async fn brokers_that_do_not_say_where_the_group_has_come_to_are_red_and_why() {
    let mut fixture = Fixture::new(1).await;
    let cluster = MockCluster::new(1).unwrap();
    let topic = unique("events");
    cluster.create_topic(&topic, 1, 1).unwrap();
    (fixture.config.brokers, fixture.config.topics) = (cluster.bootstrap_servers(), vec![topic]);
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN;
    cluster.request_errors(RDKafkaApiKey::OffsetFetch, &[refused; 10_000]);
    let running = fixture.start();
    let said = || async {
        let issue = running.health.report().issue?;
        issue.reason.contains("where the group has come to").then_some(issue)
    };
    let issue = eventually(SOON, said).await;
    assert!(issue.cause == Cause::KafkaAway && issue.since.is_some(), "{issue:?}");
    assert!(issue.reason.contains("Unknown"), "the broker's own word is said: {}", issue.reason);
    cluster.clear_request_errors(RDKafkaApiKey::OffsetFetch);
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test]
async fn questions_are_answered_again_after_an_answer_that_there_are_no_brokers() {
    let log = Log::hear("saga_core::brokers=debug");
    let proxy = KafkaProxy::new(&brokers()).await;
    let topic = TestTopic::create("inquirer", 100).await;
    let inquirer = Inquirer::new(&proxy.brokers(), "inquirer").unwrap();
    let ask = async || {
        let name = topic.name().to_owned();
        inquirer.ask(move |client| client.fetch_metadata(Some(&name), Duration::from_secs(1))).await
    };

    // Whether librdkafka then forgets all brokers is a race between two of its threads.
    let through = proxy.brokers();
    let is_replaced = || async {
        for has_brokers in [true, false, false] {
            proxy.has_brokers(has_brokers);
            ask().await.ok();
        }
        log.said("a client for questions is replaced").iter().any(|line| line["brokers"] == through).then_some(())
    };
    eventually(Duration::from_secs(60), is_replaced).await;
    proxy.has_brokers(true);

    let answer = eventually(Duration::from_secs(30), || async { ask().await.ok() }).await;
    assert_eq!(answer.brokers().len(), 1);
}

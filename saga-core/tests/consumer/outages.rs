//! Outages are said once each, however often is tried meanwhile, and so is their end. The next one is an outage of its own.

use crate::support::{Fixture, SOON, events};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::{
    service::database::pool_options,
    testkit::{FreezingProxy, Log, eventually, unique},
};

/// How often this was said, once it was said `count` times.
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

#[tokio::test]
async fn each_outage_of_kafka_and_its_end_are_said_once() {
    const BEGINS: &str = "waiting for Kafka";
    const ENDS: &str = "Kafka is there again";
    let log = Log::hear("saga_core=info");
    let mut fixture = Fixture::new(1).await;
    // The real broker is every test's. What is asked about here is the client's: that it reaches none.
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

    // Nothing is sent: that it is served again does not show in records.
    cluster.clear_request_errors(RDKafkaApiKey::Fetch);
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert_eq!(log.said("the consumer goes on: what Kafka refused was set right").len(), 1);
    running.stop().await;
    assert_eq!(log.warnings().len(), 1, "{:?}", log.warnings());
}

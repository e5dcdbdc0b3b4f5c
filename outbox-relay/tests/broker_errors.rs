//! Brokers that answer with errors. librdkafka's mock cluster injects them; nothing else here is pretended.
//!
//! Order is not checked here: the mock checks sequence numbers of transactional producers only. When it refuses a batch
//! it takes the ones behind it all the same, which no real broker does.

mod common;

use common::{PATIENCE, RECORDED, Running, World, append, is_healthy, read_from};
use outbox_relay::{Relay, RelaySettings, admin};
use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::{service::Health, testkit::eventually};
use tokio_util::sync::CancellationToken;

const ROWS: i64 = 300;

async fn publish_through(errors: &[RDKafkaRespErr]) {
    let cluster = MockCluster::new(3).unwrap();
    let world = World::new().await;
    cluster.create_topic("orders.events", 3, 3).unwrap();
    let _relay = Running::start(&RelaySettings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() });
    append(world.db(), "orders.events", "key-0", "0").await;
    world.counts(RECORDED, 1).await;
    cluster.request_errors(RDKafkaApiKey::Produce, errors);
    for i in 1..ROWS {
        append(world.db(), "orders.events", &format!("key-{}", i % 7), &i.to_string()).await;
    }
    world.counts(RECORDED, ROWS).await;
    read_from(cluster.bootstrap_servers(), "orders.events", 3, usize::try_from(ROWS).unwrap()).await;
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_pass_are_waited_out_and_nothing_is_lost() {
    use RDKafkaRespErr::*;
    publish_through(&[
        RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        RD_KAFKA_RESP_ERR__TRANSPORT,
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_that_gives_up_is_rebuilt_and_nothing_is_lost() {
    use RDKafkaRespErr::*;
    publish_through(&[
        RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED,
        RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
        RD_KAFKA_RESP_ERR_INVALID_REQUIRED_ACKS,
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_nothing_to_send_is_ready_again_when_the_brokers_are_back() {
    let cluster = MockCluster::new(1).unwrap();
    let world = World::new().await;
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let relay = Relay::new(&RelaySettings { kafka_brokers: cluster.bootstrap_servers(), ..world.settings() }).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let running = Running::of(relay);
    append(world.db(), "orders.events", "k", "0").await;
    world.counts(RECORDED, 1).await;
    cluster.broker_down(1).unwrap();
    eventually(PATIENCE, || async { is_healthy(&health, false).await }).await;
    cluster.broker_up(1).unwrap();
    eventually(PATIENCE, || async { is_healthy(&health, true).await }).await;
    running.stop().await;
}

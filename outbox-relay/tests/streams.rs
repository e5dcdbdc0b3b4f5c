//! What is set apart flows on its own, and what flows with the others pays for none of it.

mod common;

use common::{PATIENCE, Running, World, append, call as call_relay, ids, payloads, published};
use outbox_relay::{Relay, Settings, admin};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    mocking::MockCluster,
    producer::DefaultProducerContext,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::{
    outbox::nudge,
    service::Health,
    testkit::{brokers, create_topic, eventually, read_to_end},
};
use serde_json::{Value, json};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(1);

type Cluster = MockCluster<'static, DefaultProducerContext>;

/// A topic's name that no other test has.
fn unique(name: &str) -> String {
    format!("{name}-{}", uuid::Uuid::new_v4().simple())
}

/// Appends rows with payloads 1 to `rows` in one commit; of each `every`th the topic is `rare`, else `topic`.
async fn append_many(world: &World, topic: &str, rare: &str, every: i32, rows: i32) {
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload)
         select gen_random_uuid(), case when i % $3 = 0 then $2 else $1 end, 'k' || i % 7, 'test.v1',
                convert_to(i::text, 'UTF8')
           from generate_series(1, $4) as i order by i",
    )
    .bind(topic)
    .bind(rare)
    .bind(every)
    .bind(rows)
    .execute(world.db())
    .await
    .unwrap();
}

async fn call(world: &World, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    call_relay(&Relay::new(&world.settings()).unwrap(), method, path, body).await
}

/// Waits until the topic is set apart for this cause; returns the admin API's view of it.
async fn set_apart(world: &World, topic: &str, cause: &str) -> Value {
    eventually(PATIENCE, || async {
        let (_, outboxes) = call(world, "GET", "/v1/outboxes", None).await;
        let topics = outboxes[0]["paused_topics"].as_array()?.clone();
        topics.into_iter().find(|view| view["topic"] == topic && view["cause"] == cause)
    })
    .await
}

/// Waits until no topic is set apart any more.
async fn all_together(world: &World) {
    let apart = "select count(*) from outbox_pause";
    eventually(PATIENCE, || async { (world.count(apart).await == 0).then_some(()) }).await;
}

async fn recorded(world: &World) -> i64 {
    world.count("select coalesce(sum(rows), 0)::bigint from outbox_batch").await
}

/// Distinct payloads of a topic of the mock cluster, read until there are `count`.
async fn read_mock(cluster: &Cluster, topic: &str, count: usize) {
    let (brokers, topic) = (cluster.bootstrap_servers(), topic.to_owned());
    let read = move || {
        let consumer: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", brokers).set("group.id", "test").create().unwrap();
        let mut all = TopicPartitionList::new();
        all.add_partition_offset(&topic, 0, Offset::Beginning).unwrap();
        consumer.assign(&all).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut seen = HashSet::new();
        while seen.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} arrived", seen.len());
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
            seen.insert(message.payload().unwrap().to_vec());
        }
    };
    tokio::task::spawn_blocking(read).await.unwrap();
}

/// A lease that a busy machine does not lose.
fn settings(world: &World) -> Settings {
    Settings { lease: Duration::from_secs(20), ..world.settings() }
}

/// A relay on a mock cluster with the topics `stuck` and `flows`; the latter has a row already.
async fn on_mock(world: &World, cluster: &Cluster, leader: Option<i32>) -> (Relay, Running) {
    for topic in ["stuck", "flows"] {
        cluster.create_topic(topic, 1, 1).unwrap();
    }
    // The mock cluster crashes when it loses the leader of a partition that a producer knows.
    cluster.partition_leader("stuck", 0, leader).unwrap();
    cluster.partition_leader("flows", 0, Some(2)).unwrap();
    let settings = Settings { kafka_brokers: cluster.bootstrap_servers(), stuck_after: SOON, ..settings(world) };
    let relay = Relay::new(&settings).unwrap();
    let running = Running::of(relay.clone());
    append(world.db(), "flows", "k", "0").await;
    eventually(PATIENCE, || async { (recorded(world).await == 1).then_some(()) }).await;
    (relay, running)
}

async fn others_flow_while(leader: Option<i32>, lose: impl Fn(&Cluster), find: impl Fn(&Cluster)) {
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (_relay, _running) = on_mock(&world, &cluster, leader).await;
    lose(&cluster);
    for i in 1..=20 {
        append(world.db(), "stuck", "k", &i.to_string()).await;
        append(world.db(), "flows", "k", &i.to_string()).await;
    }
    let view = set_apart(&world, "stuck", "leaderless").await;
    assert!(view["reason"].as_str().unwrap().contains("no broker"), "{view}");
    append(world.db(), "flows", "k", "21").await;
    read_mock(&cluster, "flows", 22).await;
    eventually(PATIENCE, || async { (world.count("select max(to_id) from outbox_batch").await == 42).then_some(()) })
        .await;
    find(&cluster);
    all_together(&world).await;
    read_mock(&cluster, "stuck", 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_without_a_leader_sets_its_topic_apart_until_it_has_one() {
    others_flow_while(None, |_| (), |cluster| cluster.partition_leader("stuck", 0, Some(1)).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_gone_sets_apart_the_topics_that_it_leads() {
    others_flow_while(Some(1), |cluster| cluster.broker_down(1).unwrap(), |cluster| cluster.broker_up(1).unwrap())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_fills_the_stream_is_set_apart_though_no_other_flows() {
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (_relay, _running) = on_mock(&world, &cluster, Some(1)).await;
    cluster.broker_down(1).unwrap();
    // More bytes than are sent before others are acknowledged.
    let large = "x".repeat(900_000);
    for _ in 0..90 {
        append(world.db(), "stuck", "k", &large).await;
    }
    append(world.db(), "flows", "k", "1").await;
    let view = set_apart(&world, "stuck", "leaderless").await;
    assert!(view["reason"].as_str().unwrap().contains("no broker"), "{view}");
    read_mock(&cluster, "flows", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_may_not_be_written_to_is_set_apart_and_the_others_flow() {
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (_relay, _running) = on_mock(&world, &cluster, Some(1)).await;
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED]);
    append(world.db(), "stuck", "k", "1").await;
    let view = set_apart(&world, "stuck", "forbidden").await;
    assert!(view["reason"].as_str().unwrap().contains("TopicAuthorizationFailed"), "{view}");
    append(world.db(), "flows", "k", "1").await;
    read_mock(&cluster, "flows", 2).await;
    let resume = json!({ "topic": "stuck", "reason": "it has the right now" });
    call(&world, "POST", "/v1/outboxes/orders/resume", Some(resume)).await;
    all_together(&world).await;
    read_mock(&cluster, "stuck", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_whole_cluster_is_a_problem_with_its_code_until_it_is_over() {
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (relay, _running) = on_mock(&world, &cluster, Some(1)).await;
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let denied = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED; 1_000];
    cluster.request_errors(RDKafkaApiKey::Produce, &denied);
    append(world.db(), "flows", "k", "1").await;
    let problem = eventually(PATIENCE, || async {
        let readiness = health.readiness().await;
        readiness.checks.get("outboxes").filter(|text| text.contains("ClusterAuthorizationFailed")).cloned()
    })
    .await;
    assert!(problem.contains("main stream"), "{problem}");
    assert_eq!(world.count("select count(*) from outbox_pause").await, 0, "it says nothing about the topic");
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    read_mock(&cluster, "flows", 2).await;
    eventually(PATIENCE, || async { health.readiness().await.ready.then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_of_everything_takes_back_what_no_broker_has_got_yet() {
    const ROWS: i32 = 40_000;
    let world = World::new().await;
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("slow", 1, 1).unwrap();
    let settings = Settings { kafka_brokers: cluster.bootstrap_servers(), ..settings(&world) };
    let _running = Running::start(&settings);
    append(world.db(), "slow", "k", "first").await;
    eventually(PATIENCE, || async { (recorded(&world).await == 1).then_some(()) }).await;
    cluster.broker_round_trip_time(-1, Duration::from_millis(500)).unwrap();
    // Few to a batch, and five batches on their way at most.
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload)
         select gen_random_uuid(), 'slow', 'k', 'test.v1', convert_to(i || repeat('x', 3000), 'UTF8')
           from generate_series(1, $1) as i order by i",
    )
    .bind(ROWS)
    .execute(world.db())
    .await
    .unwrap();
    let before = eventually(PATIENCE, || async {
        let now = recorded(&world).await;
        (now > 1_000).then_some(now)
    })
    .await;
    call(&world, "POST", "/v1/outboxes/orders/pause", Some(json!({ "reason": "stop" }))).await;
    // Nothing is recorded any more for as long as several round trips take.
    let last = std::sync::Mutex::new((before, Instant::now()));
    let after = eventually(PATIENCE, || async {
        let now = recorded(&world).await;
        let mut last = last.lock().unwrap();
        if now != last.0 {
            *last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(3)).then_some(now)
    })
    .await;
    assert!(after - before < 8_000, "{} rows came out", after - before);
    cluster.broker_round_trip_time(-1, Duration::ZERO).unwrap();
    call(&world, "POST", "/v1/outboxes/orders/resume", Some(json!({ "reason": "go on" }))).await;
    eventually(PATIENCE, || async { (recorded(&world).await == i64::from(ROWS) + 1).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_missing_topic_amid_many_are_published_once_when_it_appears() {
    const ROWS: i32 = 20_000;
    let world = World::new().await;
    let missing = unique("missing");
    let _relay = Running::start(&settings(&world));
    append_many(&world, &world.topic, &missing, 100, ROWS).await;
    set_apart(&world, &missing, "missing").await;
    create_topic(&missing, 1).await;
    all_together(&world).await;
    append(world.db(), &missing, "k0", "last").await;
    let mut found = ids(&published(&missing, 201).await);
    assert!(found.is_sorted());
    found.dedup();
    assert_eq!((found.len(), read_to_end(&missing).await.len()), (201, 201), "each once");
    assert_eq!(ids(&world.published(19_800).await).len(), 19_800, "the others once as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_topic_is_back_long_before_the_others_backlog_is_gone() {
    const ROWS: i32 = 300_000;
    let world = World::new().await;
    let rare = unique("rare");
    create_topic(&rare, 1).await;
    let relay = Running::start(&settings(&world));
    append(world.db(), &rare, "k0", "0").await;
    published(&rare, 1).await;
    let pause = json!({ "topic": rare, "reason": "maintenance" });
    call(&world, "POST", "/v1/outboxes/orders/pause", Some(pause.clone())).await;
    let left = "select count(*) from outbox_pause where base is not null";
    eventually(PATIENCE, || async { (world.count(left).await == 1).then_some(()) }).await;
    append_many(&world, &world.topic, &rare, 30_000, ROWS).await;
    eventually(PATIENCE, || async { (recorded(&world).await > 1_000).then_some(()) }).await;
    call(&world, "POST", "/v1/outboxes/orders/resume", Some(pause)).await;
    // More rows of the others come as long as it is not back: a topic that waits for their end waits for ever.
    let others_go_on = async {
        loop {
            append_many(&world, &world.topic, &world.topic, 30_000, ROWS / 3).await;
        }
    };
    tokio::select! {
        () = all_together(&world) => {}
        () = others_go_on => {}
    }
    let records = published(&rare, 11).await;
    assert_eq!((ids(&records).len(), ids(&records).is_sorted()), (11, true), "each once, in order");
    relay.stop().await;
}

/// How long a row of the good topic takes, in turn with what `bad` does: the slowest but one in a hundred.
async fn p99(world: &World, rows: usize, bad: impl AsyncFn(usize)) -> Duration {
    let mut took = Vec::new();
    let published = || world.count("select coalesce(max(to_id), 0) from outbox_batch");
    for i in 0..rows {
        bad(i).await;
        let began = Instant::now();
        let id = world.append("good", &i.to_string()).await;
        nudge(world.db());
        // To the millisecond: it is recorded up to 25 ms after Kafka has it.
        while published().await < id {
            assert!(began.elapsed() < PATIENCE, "row {id} is not published");
            tokio::task::yield_now().await;
        }
        took.push(began.elapsed());
    }
    took.sort_unstable();
    took[(rows * 99).div_ceil(100) - 1]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_refuses_row_after_row_costs_the_others_nearly_nothing() {
    const ROWS: usize = 300;
    let world = World::with_partitions(1).await;
    let compacted = unique("compacted");
    let topic = NewTopic::new(&compacted, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact");
    let kafka: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
    kafka.create_topics([&topic], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let _relay = Running::start(&settings(&world));
    append(world.db(), &compacted, "k", "good").await;
    published(&compacted, 1).await;
    let quiet = p99(&world, ROWS, async |_| ()).await;
    let beside = p99(&world, ROWS, async |i| {
        // A record without a key is refused by every broker for a topic that is compacted.
        if i % 5 == 0 {
            sqlx::query("select outbox_append($1, null, 'test.v1', 'x')")
                .bind(&compacted)
                .execute(world.db())
                .await
                .unwrap();
        }
    })
    .await;
    let view = set_apart(&world, &compacted, "refusing").await;
    assert!(view["reason"].as_str().unwrap().contains("InvalidRecord"), "{view}");
    let parked = "select count(*) from outbox_parked";
    eventually(PATIENCE, || async { (world.count(parked).await == 60).then_some(()) }).await;
    // Its good rows flow as well.
    append(world.db(), &compacted, "k", "still good").await;
    assert_eq!(payloads(&published(&compacted, 2).await, "k"), ["good", "still good"]);
    assert!(beside < 3 * quiet.max(Duration::from_millis(40)), "{beside:?} beside it, {quiet:?} without");
}

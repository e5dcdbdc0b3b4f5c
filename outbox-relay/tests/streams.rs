//! A topic that is set apart flows on its own, and the topics that flow together pay for none of it.

mod common;

use common::{
    PATIENCE, RECORDED, Rows, Running, World, append, ids, is_healthy, is_red, patience, payloads, published,
    published_ids, read_from, topic_with,
};
use outbox_relay::{Relay, RelaySettings, admin, budget};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
    mocking::MockCluster,
    producer::DefaultProducerContext,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use saga_core::{
    outbox::nudge,
    part::Cause,
    service::Health,
    testkit::{brokers, count_to_end, create_topic, eventually, size, unique},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(1);

type Cluster = MockCluster<'static, DefaultProducerContext>;

/// Waits until the topic is set apart for this cause; returns the admin API's view of it.
async fn set_apart(world: &World, topic: &str, cause: &str) -> Value {
    eventually(patience(), || async {
        let (_, outboxes) = world.call("GET", "/v1/outboxes", None).await;
        let topics = outboxes[0]["paused_topics"].as_array()?.clone();
        topics.into_iter().find(|view| view["topic"] == topic && view["cause"] == cause)
    })
    .await
}

/// Waits until no topic is set apart any more.
async fn all_together(world: &World) {
    world.counts("select count(*) from outbox_pause", 0).await;
}

/// Reads a topic of the mock cluster until there are `count` distinct payloads.
async fn read_mock(cluster: &Cluster, topic: &str, count: usize) {
    read_from(cluster.bootstrap_servers(), topic, 1, count).await;
}

/// A relay on a mock cluster with the topics `stuck` and `flows`; the latter has a row already.
async fn on_mock(world: &World, cluster: &Cluster, leader: Option<i32>) -> (Relay, Running) {
    for topic in ["stuck", "flows"] {
        cluster.create_topic(topic, 1, 1).unwrap();
    }
    // The mock cluster crashes when it loses the leader of a partition that a producer knows.
    cluster.partition_leader("stuck", 0, leader).unwrap();
    cluster.partition_leader("flows", 0, Some(2)).unwrap();
    let (kafka_brokers, held) = (cluster.bootstrap_servers(), budget::least(1));
    let settings = RelaySettings { kafka_brokers, held, stuck_after: SOON, ..world.unhurried() };
    let relay = Relay::new(&settings).unwrap();
    let running = Running::of(relay.clone());
    append(world.db(), "flows", "k", "0").await;
    world.counts(RECORDED, 1).await;
    (relay, running)
}

async fn others_flow_while(leader: Option<i32>, lose: impl Fn(&Cluster), find: impl Fn(&Cluster)) {
    // There are more rows than are sent before others are acknowledged.
    let rows = size(20, 60_500);
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (relay, _running) = on_mock(&world, &cluster, leader).await;
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    lose(&cluster);
    // The topic that flows has as many rows, and some behind the last of the others.
    Rows::of("flows", rows).append(world.db()).await;
    Rows::of("stuck", 2 * rows).each(2, "flows").append(world.db()).await;
    let view = set_apart(&world, "stuck", "leaderless").await;
    assert!(view["reason"].as_str().unwrap().contains("no broker"), "{view}");
    eventually(PATIENCE, || is_red(&health, "outbox:orders", "rows of topic \"stuck\" wait: no broker")).await;
    assert_eq!(health.healthiness().parts["outbox:orders"].cause, Some(Cause::Leaderless));
    append(world.db(), "flows", "k", "last").await;
    let all = 3 * i64::try_from(rows).unwrap() + 2;
    world.counts("select max(to_id) from outbox_batch", all).await;
    find(&cluster);
    all_together(&world).await;
    append(world.db(), "stuck", "k", "last").await;
    world.counts("select max(to_id) from outbox_batch", all + 1).await;
    read_mock(&cluster, "flows", size(32, 1)).await;
    read_mock(&cluster, "stuck", size(21, 1)).await;
    eventually(PATIENCE, || is_healthy(&health, true)).await;
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
async fn topics_that_fill_the_stream_are_set_apart_though_no_other_flows() {
    let world = World::new().await;
    let cluster = MockCluster::new(3).unwrap();
    let (_relay, _running) = on_mock(&world, &cluster, Some(1)).await;
    let topics = ["stuck", "stuck-too"];
    cluster.create_topic(topics[1], 1, 1).unwrap();
    cluster.partition_leader(topics[1], 0, Some(1)).unwrap();
    append(world.db(), topics[1], "k", "0").await;
    world.counts(RECORDED, 2).await;
    cluster.broker_down(1).unwrap();
    // There are more bytes than are sent before others are acknowledged.
    let large = "x".repeat(900_000);
    for i in 0..20 {
        append(world.db(), topics[i % 2], "k", &large).await;
    }
    append(world.db(), "flows", "k", "1").await;
    for topic in topics {
        let view = set_apart(&world, topic, "leaderless").await;
        assert!(view["reason"].as_str().unwrap().contains("no broker"), "{view}");
    }
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
    world.call("POST", "/v1/outboxes/orders/resume", Some(resume)).await;
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
        health.look().await;
        health.healthiness().parts["outbox:orders"]
            .reason
            .as_ref()
            .filter(|text| text.contains("ClusterAuthorizationFailed"))
            .cloned()
    })
    .await;
    assert!(problem.contains("main stream"), "{problem}");
    assert_eq!(world.count("select count(*) from outbox_pause").await, 0, "it says nothing about the topic");
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    read_mock(&cluster, "flows", 2).await;
    eventually(PATIENCE, || async { is_healthy(&health, true).await }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_of_everything_takes_back_what_no_broker_has_got_yet() {
    let rows = size(40_000, 100_000);
    let world = World::new().await;
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("slow", 1, 1).unwrap();
    let settings = RelaySettings { kafka_brokers: cluster.bootstrap_servers(), ..world.unhurried() };
    let _running = Running::start(&settings);
    append(world.db(), "slow", "k", "first").await;
    world.counts(RECORDED, 1).await;
    cluster.broker_round_trip_time(-1, Duration::from_millis(500)).unwrap();
    // A batch holds few rows, and at most five batches are on their way.
    Rows::of("slow", rows).of_bytes(3_000).append(world.db()).await;
    let before = eventually(patience(), || async {
        let now = world.recorded().await;
        (now > 1_000).then_some(now)
    })
    .await;
    world.call("POST", "/v1/outboxes/orders/pause", Some(json!({ "reason": "stop" }))).await;
    // The wait ends when nothing is recorded any more for as long as several round trips take.
    let last = std::sync::Mutex::new((before, Instant::now()));
    let after = eventually(patience(), || async {
        let now = world.recorded().await;
        let mut last = last.lock().unwrap();
        if now != last.0 {
            *last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(3)).then_some(now)
    })
    .await;
    assert!(after - before < 8_000, "{} rows came out", after - before);
    cluster.broker_round_trip_time(-1, Duration::ZERO).unwrap();
    world.call("POST", "/v1/outboxes/orders/resume", Some(json!({ "reason": "go on" }))).await;
    world.counts(RECORDED, i64::try_from(rows).unwrap() + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_missing_topic_amid_many_are_published_once_when_it_appears() {
    let rows = size(20_000, 400_000);
    let world = World::new().await;
    let missing = unique("missing");
    let _relay = Running::start(&world.unhurried());
    let every = rows / 300;
    Rows::of(&world.topic, rows).each(every, &missing).append(world.db()).await;
    set_apart(&world, &missing, "missing").await;
    create_topic(&missing, 1).await;
    all_together(&world).await;
    append(world.db(), &missing, "k0", "last").await;
    let of_missing = rows / every + 1;
    let mut found = published_ids(&missing, of_missing).await;
    assert!(found.is_sorted());
    found.dedup();
    assert_eq!((found.len(), count_to_end(&missing).await), (of_missing, of_missing), "each once");
    let others = rows + 1 - of_missing;
    let found = published_ids(&world.topic, others).await;
    assert_eq!(found.len(), others, "the others once as well");
}

/// Pauses a topic, and waits until its relay has seen that.
async fn pause(world: &World, topic: &str) -> Value {
    append(world.db(), topic, "k0", "0").await;
    published(topic, 1).await;
    let pause = json!({ "topic": topic, "reason": "maintenance" });
    world.call("POST", "/v1/outboxes/orders/pause", Some(pause.clone())).await;
    world.counts("select count(*) from outbox_pause where base is not null", 1).await;
    pause
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_topic_is_back_long_before_the_others_backlog_is_gone() {
    let rows = size(600_000, 5_000_000);
    let world = World::new().await;
    let rare = unique("rare");
    create_topic(&rare, 1).await;
    let relay = Running::start(&world.unhurried());
    let paused = pause(&world, &rare).await;
    Rows::of(&world.topic, rows).each(rows / 10, &rare).append(world.db()).await;
    eventually(patience(), || async { (world.recorded().await > 1_000).then_some(()) }).await;
    world.call("POST", "/v1/outboxes/orders/resume", Some(paused)).await;
    // More rows of the others come as long as it is not back: a topic that waits for their end waits for ever.
    let others_go_on = async {
        loop {
            Rows::of(&world.topic, 100_000).append(world.db()).await;
        }
    };
    tokio::select! {
        () = all_together(&world) => {}
        () = others_go_on => {}
    }
    assert!(world.recorded().await < i64::try_from(rows).unwrap(), "the backlog was gone before");
    let records = published(&rare, 11).await;
    assert_eq!((ids(&records).len(), ids(&records).is_sorted()), (11, true), "each once, in order");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_catches_up_over_many_rows_costs_the_others_nearly_nothing() {
    let rows = size(300_000, 5_000_000);
    let world = World::with_partitions(1).await;
    let rare = unique("rare");
    create_topic(&rare, 1).await;
    let settings = RelaySettings { lease: SOON, ..world.unhurried() };
    let relay = Running::start(&settings);
    let paused = pause(&world, &rare).await;
    relay.stop().await;
    Rows::of(&world.topic, rows).each(rows / 3, &rare).append(world.db()).await;
    // The others were published long ago.
    sqlx::query(
        "insert into outbox_batch (outbox, n, base, target, from_id, to_id, rows, owner, system_identifier)
         select outbox, n + 1, pg_current_snapshot(), pg_current_snapshot(), 1, 1, 0, owner, system_identifier
           from outbox_batch
          order by n desc
          limit 1",
    )
    .execute(world.db())
    .await
    .unwrap();
    let relay = Running::start(&settings);
    let mut arrived = arrivals(&world.topic);
    let mut quiet = took(&world, &mut arrived, 300, async |_| ()).await;
    world.call("POST", "/v1/outboxes/orders/resume", Some(paused)).await;
    let mut beside = took(&world, &mut arrived, 300, async |_| ()).await;
    let (beside, quiet) = (p99(&mut beside), p99(&mut quiet));
    assert!(beside < 3 * quiet.max(Duration::from_millis(40)), "{beside:?} beside it, {quiet:?} without");
    all_together(&world).await;
    let records = published(&rare, 4).await;
    assert_eq!((ids(&records).len(), ids(&records).is_sorted()), (4, true), "each once, in order");
    relay.stop().await;
}

/// The arrivals of rows at a consumer of the topic: each row's id, with its time.
fn arrivals(topic: &str) -> mpsc::UnboundedReceiver<(i64, Instant)> {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", brokers()).set("group.id", topic).create().unwrap();
    let mut all = TopicPartitionList::new();
    all.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    consumer.assign(&all).unwrap();
    let (sender, arrived) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
            let at = Instant::now();
            let headers = message.headers().unwrap();
            let sequence = headers.iter().find(|header| header.key == "ce_sequence").unwrap();
            let id = std::str::from_utf8(sequence.value.unwrap()).unwrap().parse().unwrap();
            sender.send((id, at)).ok();
        }
    });
    arrived
}

/// The time from a good row's commit to its arrival at a consumer, row after row, each after `before`.
async fn took(
    world: &World,
    arrived: &mut mpsc::UnboundedReceiver<(i64, Instant)>,
    rows: usize,
    before: impl AsyncFn(usize),
) -> Vec<Duration> {
    let mut took = Vec::new();
    for i in 0..rows {
        before(i).await;
        let began = Instant::now();
        let id = world.append("good", "x").await;
        nudge(world.db());
        // A repeat of an earlier row may come first.
        let at = loop {
            let arrival = tokio::time::timeout(PATIENCE, arrived.recv()).await.expect("the row is published");
            match arrival.unwrap() {
                (arrived, at) if arrived == id => break at,
                _ => {}
            }
        };
        took.push(at - began);
    }
    took
}

fn p99(took: &mut [Duration]) -> Duration {
    took.sort_unstable();
    took[(took.len() * 99).div_ceil(100) - 1]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_refuses_row_after_row_costs_the_others_nearly_nothing() {
    const TURNS: usize = 6;
    const ROWS: usize = 50;
    const ROUNDS: usize = 3;
    let world = World::with_partitions(1).await;
    let compacted = topic_with(1, "cleanup.policy", "compact").await;
    let _relay = Running::start(&world.unhurried());
    append(world.db(), &compacted, "k", "good").await;
    published(&compacted, 1).await;
    let mut arrived = arrivals(&world.topic);
    let refused = async |i: usize| {
        // Every broker refuses a record without a key for a topic that is compacted.
        if i.is_multiple_of(5) {
            let append = sqlx::query("select outbox_append($1, null, 'test.v1', 'x')").bind(&compacted);
            append.execute(world.db()).await.unwrap();
        }
    };
    // The rounds take turns, so that the machine is as busy beside the bad topic as without it. A cost to the others
    // shows in every round; the machine's own delays do not come in each.
    let mut rounds = Vec::new();
    while rounds.last().is_none_or(|(beside, quiet)| *beside > 3 * *quiet) {
        assert!(rounds.len() < ROUNDS, "the slowest but one in a hundred, beside it and without it: {rounds:?}");
        let (mut quiet, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            quiet.extend(took(&world, &mut arrived, ROWS, async |_| ()).await);
            beside.extend(took(&world, &mut arrived, ROWS, &refused).await);
        }
        rounds.push((p99(&mut beside), p99(&mut quiet)));
    }
    let view = set_apart(&world, &compacted, "refusing").await;
    assert!(view["reason"].as_str().unwrap().contains("InvalidRecord"), "{view}");
    world.parked(i64::try_from(rounds.len() * TURNS * ROWS / 5).unwrap()).await;
    // The good rows of the bad topic flow as well.
    append(world.db(), &compacted, "k", "still good").await;
    assert_eq!(payloads(&published(&compacted, 2).await, "k"), ["good", "still good"]);
}

//! After an outage: timers wait for the replies that came meanwhile, each for those of its saga's partition.

use crate::support::*;
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
    util::Timeout,
};
use saga_core::{
    consumer::{Consumer, ConsumerConfig, Message},
    id::SagaId,
    saga::Engine,
    service::database::pool_options,
    testkit::{FailPoint, TestTopic, brokers, eventually, failpoints::Fault, unique},
};
use sqlx::AssertSqlSafe;
use std::{sync::Arc, time::Duration};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The replies' consumer, in the group of this name.
struct Reader {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Reader {
    fn start(world: &World, engine: &Arc<Engine>, topic: &TestTopic, group: &str) -> Self {
        let config = ConsumerConfig::new(&brokers(), group, [topic.name()]);
        let consumer = Consumer::new(config, world.database.pool.clone(), Arc::new(engine.handler()));
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { consumer.run(stop).await.unwrap() }
        });
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// Ends the reader as if its process had died.
    async fn dies(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

impl World {
    /// The number of partitions that were read until lately.
    async fn read_lately(&self) -> i64 {
        self.count("select count(*) from inbox_partition where read_until > clock_timestamp() - interval '10 seconds'")
            .await
    }

    /// Makes the rows as if no partition had been read for an hour, and every wait had ended a minute ago.
    async fn an_hour_goes_by(&self) {
        for sql in [
            "update inbox_partition set read_until = clock_timestamp() - interval '1 hour'",
            "update saga set armed_at = clock_timestamp() - interval '1 minute',
                    state = jsonb_set(state, '{status,open,due}', to_jsonb(floor(extract(epoch from clock_timestamp() - interval '1 minute') * 1000)))
              where finished_at is null",
            "update saga_due set due_at = clock_timestamp() - interval '1 minute'",
        ] {
            sqlx::query(sql).execute(&self.database.pool).await.unwrap();
        }
    }
}

/// Writes a reply as the relay does, and returns the partition that it went to.
async fn reply_as_the_relay_does(topic: &str, message: &Message) -> i32 {
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", brokers()).set("partitioner", "murmur2_random").create().unwrap();
    let mut headers = rdkafka::message::OwnedHeaders::new();
    for (name, value) in message.envelope.encode() {
        headers = headers.insert(rdkafka::message::Header { key: &name, value: Some(value.as_bytes()) });
    }
    let record = FutureRecord::to(topic)
        .key(message.key.as_deref().unwrap())
        .payload(message.payload.as_deref().unwrap())
        .headers(headers);
    producer.send(record, Timeout::After(SOON)).await.unwrap().partition
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_timers_wait_for_the_replies_of_their_partition_and_no_other() {
    let world = World::new().await;
    let topic = TestTopic::create("replies", 2).await;
    let group = unique("orders");
    let engine = engine_of(&world.database, topic.name(), 1);
    let reader = Reader::start(&world, &engine, &topic, &group);
    eventually(SOON, async || (world.read_lately().await == 2).then_some(())).await;
    reader.stop().await;

    let mut sagas = Vec::new();
    for number in 0..8 {
        let saga = SagaId::new();
        let mut tx = world.database.pool.begin().await.unwrap();
        engine.start_in(&mut tx, saga, &order_saga(1), &Order { order: number }, &number.to_string()).await.unwrap();
        tx.commit().await.unwrap();
        sagas.push((saga, 0));
    }
    for (saga, partition) in &mut sagas {
        *partition = reply_as_the_relay_does(&topic, &succeeded(&world.last(*saga).await)).await;
    }
    world.an_hour_goes_by().await;
    // Another replica has read this partition meanwhile.
    let read = sagas[0].1;
    sqlx::query("update inbox_partition set read_until = clock_timestamp() where partition = $1")
        .bind(read)
        .execute(&world.database.pool)
        .await
        .unwrap();
    let others = sagas.iter().filter(|(_, partition)| *partition == read).count();
    assert_eq!(engine.tick().await.unwrap().due, others, "other sagas' timers go on");
    for (saga, partition) in &sagas {
        let expected: &[&str] = if *partition == read { &["authorize", "authorize #2"] } else { &["authorize"] };
        assert_eq!(world.trail(*saga).await, expected, "of partition {partition}");
    }

    let reader = Reader::start(&world, &engine, &topic, &group);
    for (saga, partition) in &sagas {
        eventually(SOON, async || {
            engine.tick().await.unwrap();
            (world.last(*saga).await.step == "reserve").then_some(())
        })
        .await;
        let trail = world.trail(*saga).await;
        assert_eq!(trail.contains(&"authorize #2".into()), *partition == read, "{trail:?}");
    }
    // A partition that is read to its end holds up no saga, and its row goes on being updated.
    eventually(SOON, async || (world.read_lately().await == 2).then_some(())).await;
    assert_eq!(world.time_out().await, 8);
    reader.stop().await;
    world.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_before_it_says_how_far_it_has_read_resends_nothing() {
    let world = World::new().await;
    let topic = TestTopic::create("replies", 1).await;
    let group = unique("orders");
    let engine = engine_of(&world.database, topic.name(), 1);
    let reader = Reader::start(&world, &engine, &topic, &group);
    eventually(SOON, async || (world.read_lately().await == 1).then_some(())).await;
    let dies = FailPoint::once("consumer.before-read-until", &group, Fault::Crash);
    eventually(SOON, async || dies.has_fired().then_some(())).await;

    // A reply is committed, and its partition's row does not show that it was read so far. The next reply comes when no
    // consumer reads.
    let saga = SagaId::new();
    let mut tx = world.database.pool.begin().await.unwrap();
    engine.start_in(&mut tx, saga, &order_saga(1), &Order { order: 1 }, "1").await.unwrap();
    tx.commit().await.unwrap();
    reply_as_the_relay_does(&topic, &succeeded(&world.last(saga).await)).await;
    eventually(SOON, async || (world.last(saga).await.step == "reserve").then_some(())).await;
    reader.dies().await;
    let unsaid = "select count(*) from inbox_partition, saga where read_until < updated_at";
    assert_eq!(world.count(unsaid).await, 1);
    reply_as_the_relay_does(&topic, &succeeded(&world.last(saga).await)).await;
    world.an_hour_goes_by().await;

    let engine = engine_of(&world.database, topic.name(), 1);
    assert_eq!(engine.tick().await.unwrap().due, 0, "the answer may be there already");
    let reader = Reader::start(&world, &engine, &topic, &group);
    eventually(SOON, async || {
        engine.tick().await.unwrap();
        (world.last(saga).await.step == "capture").then_some(())
    })
    .await;
    assert_eq!(world.trail(saga).await, ["authorize", "reserve", "capture"]);
    reader.stop().await;
    world.audit().await;
}

#[tokio::test]
async fn timers_wait_for_a_partition_that_nobody_reads_within_a_bound_and_say_when_they_go_on() {
    let world = World::new().await;
    let saga = world.start(1).await;
    for partition in 0..2 {
        sqlx::query(
            "insert into inbox_partition (consumer, topic, partition, owner, reader, read_until)
             select 'orders', $1, $2, worker, worker, clock_timestamp() from gen_random_uuid() as worker",
        )
        .bind(&world.reply_topic)
        .bind(partition)
        .execute(&world.database.pool)
        .await
        .unwrap();
    }
    world.an_hour_goes_by().await;
    assert_eq!(world.engine.tick().await.unwrap().due, 0);
    let log = saga_core::testkit::Log::hear("warn");
    let hasty = builder_of(world.database.pool.clone(), &world.reply_topic, 1).wait_for_replies(Duration::ZERO);
    let hasty = hasty.build().unwrap();
    assert_eq!(hasty.tick().await.unwrap().due, 1);
    hasty.tick().await.unwrap();
    assert_eq!(log.said("the replies of a partition are not read").len(), 2, "once for each partition");
    assert_eq!(world.trail(saga).await, ["authorize", "authorize #2"]);
    world.audit().await;
}

#[tokio::test]
async fn timers_do_not_wait_for_partitions_that_a_topic_made_again_has_not() {
    let world = World::new().await;
    for business_key in 1..=8 {
        world.start(business_key).await;
    }
    for (partition, id, taken) in
        [(0, "now", "now() - interval '5 minutes'"), (1, "before", "now() - interval '1 day'")]
    {
        sqlx::query(AssertSqlSafe(format!(
            "insert into inbox_partition (consumer, topic, partition, owner, reader, topic_id, taken_at, read_until)
             select 'orders', $1, $2, worker, worker, $3, {taken}, now() from gen_random_uuid() as worker"
        )))
        .bind(&world.reply_topic)
        .bind(partition)
        .bind(id)
        .execute(&world.database.pool)
        .await
        .unwrap();
    }
    world.an_hour_goes_by().await;
    let read = "update inbox_partition set read_until = clock_timestamp() where partition = 0";
    sqlx::query(read).execute(&world.database.pool).await.unwrap();

    assert_eq!(world.engine.tick().await.unwrap().due, 8);
    world.audit().await;
}

#[tokio::test]
async fn a_wait_that_began_later_than_saga_due_says_is_judged_by_its_own_time() {
    let world = World::new().await;
    let saga = world.start(1).await;
    sqlx::query(
        "insert into inbox_partition (consumer, topic, partition, owner, reader)
         select 'orders', $1, 0, worker, worker from gen_random_uuid() as worker",
    )
    .bind(&world.reply_topic)
    .execute(&world.database.pool)
    .await
    .unwrap();
    world.an_hour_goes_by().await;
    // A quick saga never touches its row there, so the row holds a wait that was over before.
    for sql in [
        "update saga_due set due_at = clock_timestamp() - interval '2 hours'",
        "update saga set armed_at = (select due_at from saga_due)",
    ] {
        sqlx::query(sql).execute(&world.database.pool).await.unwrap();
    }
    assert_eq!(world.engine.tick().await.unwrap().due, 0);
    assert_eq!(world.trail(saga).await, ["authorize"]);
    let later = world.count("select count(*) from saga_due where due_at > clock_timestamp() - interval '1 hour'").await;
    assert_eq!(later, 1, "it is set right");
    world.audit().await;
}

#[tokio::test]
async fn what_has_to_wait_for_replies_is_not_looked_at_five_times_a_second() {
    const WAIT: i64 = 2_000;
    const TICKS: i64 = 20;
    let world = World::new().await;
    let first = world.start(1).await;
    let partition = world.count("select (key_hash % 2)::bigint from saga_due").await;
    for (partition, read) in
        [(partition, "clock_timestamp()"), (1 - partition, "clock_timestamp() - interval '1 hour'")]
    {
        sqlx::query(AssertSqlSafe(format!(
            "insert into inbox_partition (consumer, topic, partition, owner, reader, read_until)
             select 'orders', $1, $2, worker, worker, {read} from gen_random_uuid() as worker"
        )))
        .bind(&world.reply_topic)
        .bind(i32::try_from(partition).unwrap())
        .execute(&world.database.pool)
        .await
        .unwrap();
    }
    // These sagas are of the other partition, which no consumer has read.
    sqlx::query(
        "with waiting as (
             insert into saga
             select (jsonb_populate_record(s, jsonb_build_object('saga_id', gen_random_uuid(), 'business_key', n + 100))).*
               from saga s, generate_series(1, $1) n
             returning *
         )
         insert into saga_due (saga_id, definition, version, status, due_at, key_hash)
         select saga_id, definition, version, status, clock_timestamp() - interval '1 minute', $2 from waiting",
    )
    .bind(WAIT)
    .bind(i32::try_from(1 - partition).unwrap())
    .execute(&world.database.pool)
    .await
    .unwrap();
    let pool = pool_options(1).connect(&world.database.url).await.unwrap();
    let engine = builder_of(pool.clone(), &world.reply_topic, 1).build().unwrap();
    let read = async || -> i64 {
        sqlx::query("select pg_stat_force_next_flush()").execute(&pool).await.unwrap();
        let entries = "select idx_tup_read from pg_stat_user_indexes where indexrelname = 'saga_due_at'";
        sqlx::query_scalar(entries).fetch_one(&pool).await.unwrap()
    };

    let before = read().await;
    for _ in 0..TICKS {
        assert_eq!(engine.tick().await.unwrap().due, 0);
    }
    let entries = read().await - before;
    // However slow the machine is, there are a few looks at all of them, and not one each time.
    assert!((WAIT..TICKS * WAIT / 4).contains(&entries), "{entries} entries of the index were read in {TICKS} ticks");

    // A saga that becomes due for a partition that is read is seen at once.
    for table in ["saga_due set due_at", "saga set armed_at"] {
        sqlx::query(AssertSqlSafe(format!("update {table} = clock_timestamp() where saga_id = $1")))
            .bind(first.0)
            .execute(&world.database.pool)
            .await
            .unwrap();
    }
    engine.tick().await.unwrap();
    let due = world.count("select count(*) from saga_due where due_at > clock_timestamp()").await;
    assert_eq!(due, 1, "it was taken, and its time set right");
}

//! The binary: killed again and again under load, and paused past its lease.

#[path = "../common/mod.rs"]
mod common;
mod parked;

use common::{PATIENCE, RECORDED, Rows, World, append, ids, published_ids};
use rdkafka::mocking::MockCluster;
use saga_core::{
    service::messaging_migrations,
    testkit::{TestDatabase, brokers, create_topic, eventually, read_to_end, size, unique},
};
use std::{
    collections::{HashMap, HashSet},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// The relay as a process of its own; killed when it is dropped.
struct Process {
    child: Child,
    /// The port of its admin listener.
    port: u16,
}

impl Process {
    fn start(world: &World) -> Self {
        Self::start_with(world, &[])
    }

    fn start_with(world: &World, settings: &[(&str, &str)]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
            .env("OUTBOXES", format!("orders={}", world.database.url))
            .env("KAFKA_BROKERS", brokers())
            .env("ADMIN_ADDR", format!("127.0.0.1:{port}"))
            .env("LEASE_SECONDS", "2")
            .env("RUST_LOG", "warn")
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, port }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// The most memory that the process ever had, in megabytes.
    #[cfg(target_os = "linux")]
    fn most_megabytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("every process has it");
        most.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
    }

    /// Waits until the process's health is red with this reason; green without one.
    async fn is_red_with(&self, reason: Option<&str>) {
        let url = format!("http://127.0.0.1:{}/v1/health", self.port);
        eventually(PATIENCE, || async {
            let answer = reqwest::get(&url).await.ok()?;
            let (green, said) = (answer.status().is_success(), answer.text().await.ok()?);
            reason.map_or(green, |reason| !green && said.contains(reason)).then_some(())
        })
        .await;
    }

    /// Waits until the process's metrics have these lines.
    async fn tells(&self, lines: &[&str]) {
        let url = format!("http://127.0.0.1:{}/metrics", self.port);
        eventually(PATIENCE, || async {
            let metrics = reqwest::get(&url).await.ok()?.text().await.ok()?;
            lines.iter().all(|expected| metrics.lines().any(|line| line == *expected)).then_some(())
        })
        .await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Appends under load until `stop` is set: ten keys, each locked by its row as an aggregate is.
async fn load(world: &World, stop: Arc<AtomicBool>) {
    let writers = (0..4).map(|writer| {
        let stop = stop.clone();
        async move {
            let mut i = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let key = format!("key-{}", (i * 7 + writer) % 10);
                let mut tx = world.db().begin().await.unwrap();
                sqlx::query("select from aggregate where key = $1 for update")
                    .bind(&key)
                    .execute(&mut *tx)
                    .await
                    .unwrap();
                for row in 0..5 {
                    append(&mut *tx, &world.topic, &key, &format!("{writer}/{i}/{row}")).await;
                }
                if i.is_multiple_of(9) {
                    tx.rollback().await.unwrap();
                } else {
                    tx.commit().await.unwrap();
                }
                i += 1;
            }
        }
    });
    futures::future::join_all(writers).await;
}

async fn world_with_aggregates() -> World {
    let world = World::new().await;
    sqlx::raw_sql(
        "create table aggregate (key text primary key);
         insert into aggregate select 'key-' || i from generate_series(0, 9) as i",
    )
    .execute(world.db())
    .await
    .unwrap();
    world
}

/// Checks that committed ids are the topic's ids, and that first occurrences are in order along each key.
async fn audit(world: &World) {
    let committed: Vec<i64> =
        sqlx::query_scalar("select id from outbox order by id").fetch_all(world.db()).await.unwrap();
    let records = world.published(committed.len()).await;
    let found: HashSet<i64> = ids(&records).into_iter().collect();
    assert_eq!(found, committed.iter().copied().collect(), "of {} committed rows", committed.len());
    let mut seen = HashSet::new();
    let mut last: HashMap<Vec<u8>, i64> = HashMap::new();
    for (record, id) in records.iter().zip(ids(&records)) {
        if seen.insert(id) {
            let key = record.key.clone().unwrap_or_default();
            let before = last.insert(key.clone(), id).unwrap_or(0);
            assert!(before < id, "{id} came after {before} on {}", String::from_utf8_lossy(&key));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_under_load_it_loses_nothing_and_inverts_nothing() {
    let world = world_with_aggregates().await;
    let stop = Arc::new(AtomicBool::new(false));
    let killing = async {
        for _ in 0..6 {
            let before = world.count("select coalesce(max(n), 0) from outbox_batch").await;
            let process = Process::start(&world);
            // The process is killed in the middle of publishing, not before it began.
            eventually(PATIENCE, || async {
                (world.count("select coalesce(max(n), 0) from outbox_batch").await > before + 20).then_some(())
            })
            .await;
            drop(process);
        }
        stop.store(true, Ordering::Relaxed);
    };
    futures::future::join(load(&world, stop.clone()), killing).await;
    let _last = Process::start(&world);
    audit(&world).await;
    assert!(world.count("select count(distinct owner) from outbox_batch").await >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_paused_past_its_lease_and_resumed_changes_no_position() {
    let world = world_with_aggregates().await;
    let stop = Arc::new(AtomicBool::new(false));
    let pausing = async {
        let first = Process::start(&world);
        let n = || world.count("select coalesce(max(n), 0) from outbox_batch");
        let progress = |n: i64| {
            let world = &world;
            eventually(PATIENCE, move || async move {
                (world.count("select coalesce(max(n), 0) from outbox_batch").await > n).then_some(())
            })
        };
        progress(10).await;
        let owner: uuid::Uuid =
            sqlx::query_scalar("select owner from outbox_lease").fetch_one(world.db()).await.unwrap();
        first.signal("-STOP");
        let second = Process::start(&world);
        eventually(PATIENCE, || async {
            let now: Option<uuid::Uuid> =
                sqlx::query_scalar("select owner from outbox_lease").fetch_optional(world.db()).await.unwrap();
            now.filter(|now| *now != owner)
        })
        .await;
        let taken_over_at = n().await;
        progress(taken_over_at + 10).await;
        first.signal("-CONT");
        progress(n().await + 30).await;
        let late: i64 = sqlx::query_scalar("select count(*) from outbox_batch where owner = $1 and n > $2")
            .bind(owner)
            .bind(taken_over_at)
            .fetch_one(world.db())
            .await
            .unwrap();
        assert_eq!(late, 0, "the former owner recorded something");
        stop.store(true, Ordering::Relaxed);
        (first, second)
    };
    let ((), _processes) = futures::future::join(load(&world, stop.clone()), pausing).await;
    audit(&world).await;
    assert!(read_to_end(&world.topic).await.len() >= 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_without_its_broker_is_red_with_the_reason_and_green_after() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders.events", 1, 1).unwrap();
    let world = World::new().await;
    let relay = Process::start_with(&world, &[("KAFKA_BROKERS", &cluster.bootstrap_servers())]);
    append(world.db(), "orders.events", "k", "1").await;
    world.counts(RECORDED, 1).await;
    relay.is_red_with(None).await;
    for row in 2..=3 {
        cluster.broker_down(1).unwrap();
        append(world.db(), "orders.events", "k", "while it is away").await;
        relay.is_red_with(Some("Kafka is not there")).await;
        cluster.broker_up(1).unwrap();
        relay.is_red_with(None).await;
        world.counts(RECORDED, row).await;
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_has_in_memory_does_not_grow_with_its_rows() {
    let (row, headers) = (size(100_000_000, 300_000_000), size(2_000, 5_000));
    let world = World::new().await;
    let missing = unique("missing");
    // The payload is stored like one that cannot be compressed.
    sqlx::raw_sql(
        "alter table outbox alter column payload set storage external;
         alter table outbox_parked alter column payload set storage external",
    )
    .execute(world.db())
    .await
    .unwrap();
    Rows::of(&missing, 1).of_bytes(row).append(world.db()).await;
    sqlx::query(
        "insert into outbox (message_id, topic, key, type, payload, headers)
         select gen_random_uuid(), $1, 'k', 'test.v1', 'x', jsonb_build_object('h', repeat('x', 100000))
           from generate_series(1, $2)",
    )
    .bind(world.topic.name())
    .bind(i64::try_from(headers).unwrap())
    .execute(world.db())
    .await
    .unwrap();
    let relay = Process::start_with(&world, &[("LEASE_SECONDS", "20")]);
    let found = published_ids(&world.topic, headers).await;
    assert_eq!(found.len(), headers, "each once");
    create_topic(&missing, 1).await;
    world.parked(1).await;
    world.counts("select count(*) from outbox_pause", 0).await;
    let most = relay.most_megabytes();
    println!("{most} MB at most");
    assert!(most < 300, "{most} MB");
}

#[test]
fn every_mistake_of_a_configuration_is_listed_at_start() {
    let output = Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
        .env_remove("OUTBOXES")
        .env_remove("KAFKA_BROKERS")
        .env("ADMIN_ADDR", "nonsense")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    for variable in ["OUTBOXES", "KAFKA_BROKERS", "ADMIN_ADDR"] {
        assert!(stderr.contains(variable), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_stands_by_tells_how_far_behind_the_outbox_is() {
    let world = World::new().await;
    sqlx::query(
        "insert into outbox_pause (outbox, topic, cause, reason, actor) values ('orders', '*', 'operator', 'a test', 'me')",
    )
    .execute(world.db())
    .await
    .unwrap();
    let owner = world.relay();
    eventually(PATIENCE, || async { (world.count("select count(*) from outbox_lease").await == 1).then_some(()) })
        .await;
    let replica = Process::start(&world);
    world.append("k", "1").await;
    world.append("k", "2").await;
    let (owns, not) = ("outbox_owner{outbox=\"orders\"} 1", "outbox_owner{outbox=\"orders\"} 0");
    replica.tells(&["outbox_pending{outbox=\"orders\"} 2", "outbox_paused_topics{outbox=\"orders\"} 1", not]).await;
    owner.stop().await;
    replica.tells(&[owns]).await;
    // Another relay takes the lease: the former owner's metrics stay true.
    let owner = world.relay();
    replica.signal("-STOP");
    sqlx::query("update outbox_lease set expires_at = now()").execute(world.db()).await.unwrap();
    eventually(PATIENCE, || async {
        let holder = world.count("select count(*) from outbox_lease where expires_at > clock_timestamp()").await;
        (holder == 1).then_some(())
    })
    .await;
    replica.signal("-CONT");
    sqlx::query("delete from outbox_pause").execute(world.db()).await.unwrap();
    world.published(2).await;
    replica.tells(&["outbox_pending{outbox=\"orders\"} 0", "outbox_paused_topics{outbox=\"orders\"} 0", not]).await;
    owner.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_that_nobody_may_publish_still_tells_how_far_behind_it_is() {
    let world = World::new().await;
    world.append("k", "published").await;
    sqlx::query(
        "insert into outbox_batch (outbox, n, base, target, from_id, to_id, rows, owner, system_identifier)
         values ('orders', 1, '999999999:999999999:', '999999999:999999999:', 1, 1, 1, gen_random_uuid(), 4711)",
    )
    .execute(world.db())
    .await
    .unwrap();
    let relay = Process::start(&world);
    for pending in 1..3 {
        world.append("k", "pending").await;
        relay
            .tells(&[&format!("outbox_pending{{outbox=\"orders\"}} {pending}"), "outbox_owner{outbox=\"orders\"} 0"])
            .await;
    }
}

#[tokio::test]
async fn migrate_needs_nothing_but_the_databases() {
    let database = TestDatabase::new(&[]).await;
    let mut relay = Command::new(env!("CARGO_BIN_EXE_outbox-relay"));
    let outboxes = format!("orders={}", database.url);
    let output = relay.arg("migrate").env_clear().env("OUTBOXES", outboxes).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let applied: i64 =
        sqlx::query_scalar("select count(*) from refinery_messaging").fetch_one(&database.pool).await.unwrap();
    assert_eq!(usize::try_from(applied).unwrap(), messaging_migrations().count());
}

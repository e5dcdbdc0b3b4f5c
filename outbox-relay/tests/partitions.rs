//! The outbox's partitions: made ahead by every replica, and in the way of no transaction.

mod common;

use common::{PATIENCE, Rows, Running, World, is_red};
use outbox_relay::{Relay, RelaySettings, admin};
use saga_core::{
    service::Health,
    testkit::{eventually, size},
};
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use std::{
    str::FromStr as _,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// A world in which so many rows have overflowed, as if no relay had run for long.
async fn overflowed(rows: usize) -> World {
    let world = World::new().await;
    // Vacuum is off: it holds a lock for as long as it takes, and then a step is put off.
    sqlx::raw_sql(
        "alter table outbox_overflow set (autovacuum_enabled = off);
         alter sequence outbox_id_seq restart 25000001",
    )
    .execute(world.db())
    .await
    .unwrap();
    Rows::of(&world.topic, rows).append(world.db()).await;
    let overflowed = world.count("select count(*) from outbox_overflow").await;
    assert_eq!(usize::try_from(overflowed), Ok(rows));
    world
}

/// One call of the function that makes partitions.
async fn step(db: impl sqlx::PgExecutor<'_>) -> Option<String> {
    sqlx::query_scalar("select outbox_add_partition()").fetch_one(db).await.unwrap()
}

/// The settings of a relay that sees no broker.
fn without_kafka(world: &World) -> RelaySettings {
    RelaySettings { kafka_brokers: "127.0.0.1:9".to_owned(), ..world.settings() }
}

const PARTITIONS: &str = "select count(*) from pg_inherits where inhparent = 'outbox'::regclass";
const CHECKS: &str = "select count(*) from pg_constraint where conname like 'outbox_ahead%'";

#[tokio::test]
async fn no_insert_waits_while_the_overflow_is_searched_for_rows() {
    let rows = size(50, 2_000_000);
    let world = overflowed(rows).await;
    let mut maker = PgConnection::connect(&world.database.url).await.unwrap();
    let mut made: Option<String> = None;
    let mut searched = 0;
    while made.is_none() {
        assert!(searched < 5, "it makes no partition");
        searched += 1;
        let read = "select coalesce(pg_stat_get_xact_tuples_returned('outbox_overflow'::regclass), 0)";
        let mut tx = maker.begin().await.unwrap();
        let before: i64 = sqlx::query_scalar(read).fetch_one(&mut *tx).await.unwrap();
        made = step(&mut *tx).await;
        let after: i64 = sqlx::query_scalar(read).fetch_one(&mut *tx).await.unwrap();
        let modes: Vec<String> = sqlx::query_scalar(
            "select mode from pg_locks where relation = 'outbox_overflow'::regclass and pid = pg_backend_pid()",
        )
        .fetch_all(&mut *tx)
        .await
        .unwrap();
        if usize::try_from(after - before).unwrap() >= rows {
            assert!(!modes.contains(&"AccessExclusiveLock".to_owned()), "it holds {modes:?} while it searches");
            world.append("k", "meanwhile").await;
        }
        tx.commit().await.unwrap();
    }
    assert_eq!(world.count(PARTITIONS).await, 3);
    assert_eq!(world.count(CHECKS).await, 0);
    // The ids go on in the new partition.
    let first: i64 = made.unwrap().trim_start_matches("outbox_").parse().unwrap();
    assert_eq!(step(world.db()).await, None);
    let before = world.count("select count(*) from outbox_overflow").await;
    assert_eq!(world.append("k", "there").await, first);
    assert_eq!(world.count("select count(*) from outbox_overflow").await, before);
    assert_eq!(world.count("select outbox_ids_ahead()").await, 10_000_000 - 1);
}

/// The slowest of the inserts that are made one after another while `meanwhile` is at work, and of 200 at least.
async fn slowest_insert(world: &World, meanwhile: impl Future<Output = ()>) -> Duration {
    let mut db = PgConnection::connect(&world.database.url).await.unwrap();
    slowest_insert_over(&mut db, world, meanwhile).await
}

async fn slowest_insert_over(db: &mut PgConnection, world: &World, meanwhile: impl Future<Output = ()>) -> Duration {
    let over = std::cell::Cell::new(false);
    let inserting = async {
        let mut slowest = Duration::ZERO;
        for i in 0.. {
            let began = Instant::now();
            common::append(&mut *db, &world.topic, "k", "meanwhile").await;
            slowest = slowest.max(began.elapsed());
            if over.get() && i >= 200 {
                break;
            }
        }
        slowest
    };
    let meanwhile = async {
        meanwhile.await;
        over.set(true);
    };
    tokio::join!(inserting, meanwhile).0
}

#[tokio::test]
async fn the_slowest_insert_while_a_partition_is_made_is_as_quick_as_others() {
    let world = overflowed(size(200_000, 2_000_000)).await;
    let quiet = slowest_insert(&world, async {}).await;
    let _relay = Running::start(&without_kafka(&world));
    let beside = slowest_insert(&world, world.counts(PARTITIONS, 3)).await;
    // A busy machine takes so long for a commit now and then.
    assert!(beside < 3 * quiet.max(Duration::from_millis(60)), "{beside:?} beside it, {quiet:?} without");
}

#[tokio::test]
async fn no_row_is_refused_whenever_the_maker_of_a_partition_dies() {
    // The steps: the check is added, validated, used, and the ids go on in the partition.
    for steps in 0..4 {
        let world = overflowed(50).await;
        for _ in 0..steps {
            step(world.db()).await;
        }
        assert_eq!(world.count(CHECKS).await, i64::from(steps == 1 || steps == 2));
        // No replica goes on with it, for the rows of a hundred partitions.
        sqlx::query("select setval('outbox_id_seq', nextval('outbox_id_seq') + 1000000000)")
            .execute(world.db())
            .await
            .unwrap();
        world.append("k", "meanwhile").await;
        let _relay = Running::start(&without_kafka(&world));
        eventually(PATIENCE, || async {
            (world.count(PARTITIONS).await == 3 && world.count(CHECKS).await == 0).then_some(())
        })
        .await;
        eventually(PATIENCE, || async { (world.append("k", "after it").await > 1_000_000_000_000).then_some(()) })
            .await;
    }
}

#[tokio::test]
async fn the_next_partition_after_an_overflow_is_used_when_the_last_is_nearly_full() {
    let world = overflowed(50).await;
    for _ in 0..4 {
        step(world.db()).await;
    }
    let first = world.append("k", "first").await;
    for _ in 0..4 {
        step(world.db()).await;
    }
    assert_eq!(world.count(PARTITIONS).await, 4);
    assert_eq!(world.append("k", "second").await, first + 1, "there is room");
    assert_eq!(world.count("select outbox_ids_ahead()").await, 20_000_000 - 2);
    sqlx::query("select setval('outbox_id_seq', $1)").bind(first + 9_500_000).execute(world.db()).await.unwrap();
    step(world.db()).await;
    assert!(world.append("k", "third").await > first + 1_000_000_000_000);
}

#[tokio::test]
async fn who_keeps_a_partition_from_being_made_is_said_in_health() {
    let world = overflowed(50).await;
    let options = PgConnectOptions::from_str(&world.database.url).unwrap().application_name("a-report");
    let mut reader = PgConnection::connect_with(&options).await.unwrap();
    let mut reading = reader.begin().await.unwrap();
    sqlx::query("select count(*) from outbox_overflow").execute(&mut *reading).await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *reading).await.unwrap();
    let relay = Relay::new(&world.settings()).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let _running = Running::of(relay);
    let said = eventually(PATIENCE, || is_red(&health, "upkeep:orders", "outbox_overflow")).await;
    assert!(said.contains(&format!("process {pid} (a-report, in its transaction for")), "{said}");
    world.append("k", "meanwhile").await;
    reading.commit().await.unwrap();
    eventually(PATIENCE, || async {
        health.look().await;
        health.healthiness().healthy.then_some(())
    })
    .await;
    assert!(world.append("k", "after it").await > 1_000_000_000_000);
    world.published(52).await;
}

#[tokio::test]
async fn a_vacuum_of_the_overflow_makes_no_insert_wait_and_is_named_while_it_lasts() {
    let world = overflowed(50).await;
    let options = PgConnectOptions::from_str(&world.database.url).unwrap().application_name("a-vacuum");
    let mut vacuum = PgConnection::connect_with(&options).await.unwrap();
    // This is the lock of a vacuum, and this one gives no way.
    let mut vacuuming = vacuum.begin().await.unwrap();
    sqlx::query("lock table outbox_overflow in share update exclusive mode").execute(&mut *vacuuming).await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *vacuuming).await.unwrap();
    let relay = Relay::new(&without_kafka(&world)).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let _running = Running::of(relay);
    let process = format!("process {pid} (a-vacuum, in its transaction for");
    let named = eventually(PATIENCE, || async { is_red(&health, "upkeep:orders", &process).await.map(drop) });
    let mut inserter = PgConnection::connect(&world.database.url).await.unwrap();
    sqlx::query("set lock_timeout = '50ms'").execute(&mut inserter).await.unwrap();
    // Inserts go on while the maker waits for the vacuum.
    eventually(PATIENCE, || async {
        let waits = "select count(*)
                       from pg_locks
                      where relation = 'outbox_overflow'::regclass and not granted
                        and database = (select oid from pg_database where datname = current_database())";
        (world.count(waits).await > 0).then_some(())
    })
    .await;
    let slowest = slowest_insert_over(&mut inserter, &world, named).await;
    assert!(slowest < Duration::from_secs(1), "an insert took {slowest:?}");
    assert_eq!((world.count(PARTITIONS).await, world.count(CHECKS).await), (2, 0));
    vacuuming.commit().await.unwrap();
    world.counts(PARTITIONS, 3).await;
    eventually(PATIENCE, || async { (world.append("k", "after it").await > 1_000_000_000_000).then_some(()) }).await;
}

#[tokio::test]
async fn an_ordinary_vacuum_of_any_partition_keeps_none_from_being_made() {
    let world = overflowed(50).await;
    let mut vacuum = PgConnection::connect(&world.database.url).await.unwrap();
    let mut vacuuming = vacuum.begin().await.unwrap();
    let used = "lock table outbox_000000000000001 in share update exclusive mode";
    sqlx::query(used).execute(&mut *vacuuming).await.unwrap();
    let _relay = Running::start(&without_kafka(&world));
    world.counts(PARTITIONS, 3).await;
}

#[tokio::test]
async fn a_long_reader_of_the_overflow_makes_no_insert_wait() {
    let world = overflowed(50).await;
    let mut reader = PgConnection::connect(&world.database.url).await.unwrap();
    let mut reading = reader.begin().await.unwrap();
    sqlx::query("select count(*) from outbox_overflow").execute(&mut *reading).await.unwrap();
    let mut inserter = PgConnection::connect(&world.database.url).await.unwrap();
    sqlx::query("set lock_timeout = '1s'").execute(&mut inserter).await.unwrap();
    let making =
        async { sqlx::query_scalar::<_, Option<String>>("select outbox_add_partition()").fetch_one(world.db()).await };
    let inserting = async {
        // The insert comes as soon as the maker waits for its lock, and so stands before all others.
        eventually(PATIENCE, || async {
            let tried = "select count(*) from pg_stat_activity
                          where datname = current_database() and query like '%outbox_add_partition%'
                            and pid <> pg_backend_pid()";
            (world.count(tried).await > 0).then_some(())
        })
        .await;
        common::append(&mut inserter, &world.topic, "k", "meanwhile").await
    };
    let (made, _) = futures::future::join(making, inserting).await;
    let code = made.unwrap_err().as_database_error().unwrap().code().unwrap().into_owned();
    assert_eq!(code, "55P03", "it gives up and is tried again");
}

#[tokio::test]
async fn a_replica_that_neither_owns_the_outbox_nor_sees_kafka_makes_partitions() {
    let world = overflowed(50).await;
    sqlx::query(
        "insert into outbox_lease values
         ('orders', gen_random_uuid(), 'another', now(), now(), clock_timestamp() + interval '2 seconds')",
    )
    .execute(world.db())
    .await
    .unwrap();
    let _relay = Running::start(&without_kafka(&world));
    world.counts(PARTITIONS, 3).await;
    assert_eq!(world.count("select count(*) from outbox_batch").await, 0, "it has published nothing");
}

//! The ownership of an outbox: one relay publishes at a time. What a second one, a late one and a killed one can do.

mod common;

use common::{LEASE, PATIENCE, RECORDED, Running, World, append, ids, payloads};
use outbox_relay::{OutboxSettings, RelaySettings};
use saga_core::testkit::eventually;
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use std::{
    collections::BTreeSet,
    str::FromStr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// The id of the owner whose lease has not run out.
async fn owner(world: &World) -> Option<uuid::Uuid> {
    sqlx::query_scalar("select owner from outbox_lease where outbox = 'orders' and expires_at > clock_timestamp()")
        .fetch_optional(world.db())
        .await
        .unwrap()
}

#[tokio::test]
async fn of_two_relays_one_publishes_and_the_other_takes_over_when_it_stops() {
    let world = World::new().await;
    let first = world.relay();
    let owned = eventually(PATIENCE, || owner(&world)).await;
    let second = world.relay();
    for i in 0..20 {
        world.append("k", &i.to_string()).await;
    }
    assert_eq!(ids(&world.published(20).await).len(), 20, "each once");
    assert_eq!(owner(&world).await, Some(owned));
    first.stop().await;
    assert_ne!(owner(&world).await, Some(owned), "a clean stop gives the lease back");
    for i in 20..40 {
        world.append("k", &i.to_string()).await;
    }
    let records = world.published(40).await;
    let expected: Vec<String> = (0..40).map(|i| i.to_string()).collect();
    assert_eq!(payloads(&records, "k"), expected);
    assert_eq!(records.len(), 40, "a clean hand-over repeats nothing");
    second.stop().await;
}

#[tokio::test]
async fn an_owner_whose_lease_was_taken_stops_and_changes_no_position() {
    let world = World::new().await;
    let _relay = world.relay();
    world.append("k", "1").await;
    world.published(1).await;
    world.counts("select count(*) from outbox_batch", 1).await;
    // Another owner takes the lease, as if it had run out: the relay is a zombie from here on.
    let somebody = uuid::Uuid::new_v4();
    sqlx::query(
        "update outbox_lease set owner = $1, holder = 'somebody', expires_at = clock_timestamp() + interval '1 second'",
    )
    .bind(somebody)
    .execute(world.db())
    .await
    .unwrap();
    world.append("k", "2").await;
    world.append("k", "3").await;
    // The zombie may still send; it records nothing until it has a lease of its own again.
    let records = world.published(3).await;
    assert_eq!(payloads(&records, "k"), ["1", "2", "3"]);
    world.counts(RECORDED, 3).await;
    let owners = world.count("select count(distinct owner) from outbox_batch").await;
    assert_eq!(owners, 2, "what was sent without the lease was recorded only under the next one");
    let by_somebody: i64 = sqlx::query_scalar("select count(*) from outbox_batch where owner = $1")
        .bind(somebody)
        .fetch_one(world.db())
        .await
        .unwrap();
    assert_eq!(by_somebody, 0);
}

#[tokio::test]
async fn an_expiry_further_ahead_than_one_lease_counts_as_expired() {
    let world = World::new().await;
    sqlx::query(
        "insert into outbox_lease values
         ('orders', gen_random_uuid(), 'a clock that is ahead', now(), now(), clock_timestamp() + interval '1 day')",
    )
    .execute(world.db())
    .await
    .unwrap();
    let _relay = world.relay();
    world.append("k", "1").await;
    world.published(1).await;
}

#[tokio::test]
async fn a_lease_that_was_not_given_back_is_waited_for() {
    let world = World::new().await;
    sqlx::query(
        "insert into outbox_lease values ('orders', gen_random_uuid(), 'killed', now(), now(), clock_timestamp() + $1)",
    )
    .bind(LEASE)
    .execute(world.db())
    .await
    .unwrap();
    let _relay = world.relay();
    world.append("k", "1").await;
    world.published(1).await;
    let waited: bool = sqlx::query_scalar(
        "select (select min(at) from outbox_batch) >= (select min(created_at) from outbox) + interval '1 second'",
    )
    .fetch_one(world.db())
    .await
    .unwrap();
    assert!(waited, "it did not publish while the lease ran");
}

#[tokio::test]
async fn a_position_from_another_cluster_is_refused_and_stops_no_other_outbox() {
    let (moved, fine) = (World::new().await, World::new().await);
    sqlx::query(
        "insert into outbox_batch (outbox, n, base, target, from_id, to_id, rows, owner, system_identifier)
         values ('orders', 1, '1:1:', '1:1:', 0, 0, 0, gen_random_uuid(), 4711)",
    )
    .execute(moved.db())
    .await
    .unwrap();
    let outbox = |world: &World, name: &str| OutboxSettings {
        name: name.to_owned(),
        database: PgConnectOptions::from_str(&world.database.url).unwrap(),
    };
    let settings =
        RelaySettings { outboxes: vec![outbox(&moved, "orders"), outbox(&fine, "payments")], ..moved.settings() };
    let relay = outbox_relay::Relay::new(&settings).unwrap();
    let health = saga_core::service::Health::new(&tokio_util::sync::CancellationToken::new());
    outbox_relay::admin::check_health(&health, &relay);
    let running = Running::of(relay);
    moved.append("k", "never").await;
    fine.append("k", "published").await;
    fine.published(1).await;
    let problem = eventually(PATIENCE, || async {
        health.look().await;
        health.healthiness().parts["outbox:orders"]
            .reason
            .as_ref()
            .filter(|text| text.contains("another PostgreSQL cluster"))
            .cloned()
    })
    .await;
    assert!(problem.contains("nothing is lost") && problem.contains("pg_upgrade"), "{problem}");
    assert_eq!(saga_core::testkit::read_to_end(&moved.topic).await.len(), 0);
    running.stop().await;
}

#[tokio::test]
async fn when_postgres_cuts_every_connection_the_relay_goes_on_by_itself() {
    let world = World::new().await;
    let _relay = world.relay();
    for round in 0..6 {
        // The test's own pool is cut too.
        let mut db = PgConnection::connect(&world.database.url).await.expect("the database is there");
        append(&mut db, &world.topic, "k", &round.to_string()).await;
        world.published(round + 1).await;
        world.database.cut_connections().await;
    }
    let expected: Vec<String> = (0..6).map(|i| i.to_string()).collect();
    assert_eq!(payloads(&world.published(6).await, "k"), expected);
}

#[tokio::test]
async fn a_relay_that_waits_for_tables_or_brokers_stops_when_it_is_asked() {
    let world = World::new().await;
    let nowhere = RelaySettings {
        // The port refuses connections.
        kafka_brokers: String::from("127.0.0.1:1"),
        ..world.settings()
    };
    let relay = Running::start(&nowhere);
    eventually(PATIENCE, || owner(&world)).await;
    tokio::time::timeout(Duration::from_secs(30), relay.stop()).await.expect("it stops though Kafka is away");
    let empty = saga_core::testkit::TestDatabase::new(&[]).await;
    let outbox = OutboxSettings { name: "orders".into(), database: PgConnectOptions::from_str(&empty.url).unwrap() };
    let relay = Running::start(&RelaySettings { outboxes: vec![outbox], ..world.settings() });
    relay.stop().await;
}

#[tokio::test]
async fn a_replica_that_stands_by_writes_nothing() {
    let world = World::new().await;
    sqlx::query(
        "insert into outbox_lease values ('orders', gen_random_uuid(), 'another', now(), now(), clock_timestamp() + $1)",
    )
    .bind(LEASE)
    .execute(world.db())
    .await
    .unwrap();
    let _relay = world.relay();
    // Each statement that locks the row leaves its transaction id there.
    let looks = AtomicUsize::new(0);
    eventually(PATIENCE, || async {
        let found: Option<(String, bool)> = sqlx::query_as(
            "select xmax::text, expires_at > clock_timestamp() + interval '0.2 seconds'
               from outbox_lease
              where holder = 'another'",
        )
        .fetch_optional(world.db())
        .await
        .unwrap();
        let Some((locked_by, true)) = found else { return Some(()) };
        assert_eq!(locked_by, "0", "the lease's row was locked");
        looks.fetch_add(1, Ordering::Relaxed);
        None
    })
    .await;
    assert!(looks.into_inner() > 5, "it was looked at while the relay stood by");
}

#[tokio::test]
async fn a_replica_that_stands_by_takes_no_transaction_id() {
    let world = World::new().await;
    // The partitions of the first upkeep are there already; each takes some calls.
    for _ in 0..10 {
        sqlx::query("select outbox_add_partition()").execute(world.db()).await.unwrap();
    }
    let hold = async |lease: Duration| {
        sqlx::query(
            "insert into outbox_lease as lease
             values ('orders', gen_random_uuid(), 'another', now(), now(), clock_timestamp() + $1)
                 on conflict (outbox) do update set expires_at = excluded.expires_at",
        )
        .bind(lease)
        .execute(world.db())
        .await
        .unwrap();
    };
    // The test may stand still for less than this.
    let lease = LEASE * 10;
    hold(lease).await;
    let mut settings = world.settings();
    settings.lease = lease;
    let database = settings.outboxes.remove(0).database;
    // A read-only transaction gets no transaction id: what needs one is refused.
    let database = database.options([("default_transaction_read_only", "on")]);
    settings.outboxes = vec![OutboxSettings { name: world.name.clone(), database }];
    let relay = outbox_relay::Relay::new(&settings).unwrap();
    let health = saga_core::service::Health::new(&tokio_util::sync::CancellationToken::new());
    outbox_relay::admin::check_health(&health, &relay);
    let running = Running::of(relay);
    let looks = Mutex::new(BTreeSet::new());
    eventually(PATIENCE, || async {
        hold(lease).await;
        let look: Option<String> = sqlx::query_scalar(
            "select query_start::text
               from pg_stat_activity
              where datname = current_database() and application_name = 'outbox-relay' and state = 'idle'
                and query like 'select now, not exists%outbox_lease%'",
        )
        .fetch_optional(world.db())
        .await
        .unwrap();
        let mut looks = looks.lock().unwrap();
        looks.extend(look);
        (looks.len() >= 10).then_some(())
    })
    .await;
    health.look().await;
    for part in ["outbox:orders", "upkeep:orders"] {
        let part = health.healthiness().parts.remove(part).unwrap();
        assert_eq!((part.cause, part.reason), (None, None), "it was refused nothing");
    }
    // Such a session would be refused the lease.
    hold(Duration::ZERO).await;
    eventually(PATIENCE, || async {
        health.look().await;
        let reason = health.healthiness().parts.remove("outbox:orders").unwrap().reason?;
        reason.contains("read-only transaction").then_some(())
    })
    .await;
    running.stop().await;
}

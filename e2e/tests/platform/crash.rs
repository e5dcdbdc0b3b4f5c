//! The processes die, stop and lose their servers under load; everything settles, and the audit passes.

use e2e::{
    faults::Chance,
    load::{CUSTOMERS_AT_ONCE, load},
    platform::{Platform, alone},
};
use saga_core::testkit::eventually;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use stack::{platform::Running, service::Service};
use std::{collections::BTreeMap, time::Duration};
use tokio_util::sync::CancellationToken;

/// How many orders a test places: enough that every fault meets some of them, few enough for two cores.
const ORDERS: usize = 120;
/// How long a stand-by may take to take over, and everything else that happens by itself.
const TAKEN_OVER: Duration = Duration::from_secs(60);

/// Places orders while `services` are killed again and again; then everything settles.
async fn killed_under_load(platform: &Platform, services: &[Service]) {
    let chance = Chance::new("moments");
    services.iter().for_each(|service| platform.wants_fault(&format!("SIGKILL {service}"), 1));
    let killed = |service: &Service| platform.expected().faults[&format!("SIGKILL {service}")].fired;
    let before: Vec<_> = services.iter().map(killed).collect();
    let token = CancellationToken::new();
    let orders = async {
        // The load goes on until each of them was hit: an order may be faster than the next kill.
        while !token.is_cancelled() {
            load(platform, ORDERS, chance.clone()).await;
            if services.iter().zip(&before).all(|(service, before)| killed(service) > *before) {
                token.cancel();
            }
        }
    };
    let ((), killed) = tokio::join!(orders, platform.kills(services, chance.clone(), token.clone()));
    println!("{killed} kills");
    platform.settles().await;
}

#[test]
fn the_relay_is_killed_again_and_again_under_load() {
    alone(async |platform| killed_under_load(platform, &[Service::Relay]).await);
}

#[test]
fn participants_are_killed_again_and_again_under_load() {
    alone(async |platform| killed_under_load(platform, &[Service::Payments, Service::Inventory]).await);
}

#[test]
fn the_orchestrator_is_killed_again_and_again_under_load() {
    alone(async |platform| killed_under_load(platform, &[Service::Orders]).await);
}

#[test]
fn everything_is_killed_in_any_order_under_load() {
    let all = [Service::Relay, Service::Payments, Service::Inventory, Service::Orders, Service::Gateway];
    alone(async |platform| killed_under_load(platform, &all).await);
}

/// The owner of each outbox, and how many batches there are.
async fn owners(platform: &Platform) -> Vec<(String, String)> {
    let mut owners = Vec::new();
    for outbox in ["orders", "payments", "inventory"] {
        let mut db = PgConnection::connect(&platform.stack.database_url(outbox)).await.expect("the database is there");
        let owner: Option<String> = sqlx::query_scalar(
            "select owner::text from outbox_lease where outbox = $1 and expires_at > clock_timestamp()",
        )
        .bind(outbox)
        .fetch_optional(&mut db)
        .await
        .expect("the lease can be read");
        owners.push((outbox.to_owned(), owner.unwrap_or_default()));
        db.close().await.ok();
    }
    owners
}

/// The owners that have written batches, per outbox, in the order of their first ones.
async fn writers(platform: &Platform) -> Vec<(String, Vec<String>)> {
    let mut writers = Vec::new();
    for outbox in ["orders", "payments", "inventory"] {
        let mut db = PgConnection::connect(&platform.stack.database_url(outbox)).await.expect("the database is there");
        let all: Vec<String> =
            sqlx::query_scalar("select owner::text from outbox_batch where outbox = $1 group by owner order by min(n)")
                .bind(outbox)
                .fetch_all(&mut db)
                .await
                .expect("the batch log can be read");
        writers.push((outbox.to_owned(), all));
        db.close().await.ok();
    }
    writers
}

/// Waits until every outbox has an owner that it did not have before.
async fn taken_over(platform: &Platform, before: &[(String, String)]) -> Vec<(String, String)> {
    eventually(TAKEN_OVER, || async {
        let now = owners(platform).await;
        let moved = now.iter().zip(before).all(|(now, before)| !now.1.is_empty() && now.1 != before.1);
        moved.then_some(now)
    })
    .await
}

/// `n` of the last batch of each outbox, and the owner that wrote it.
async fn positions(platform: &Platform) -> Vec<(i64, String)> {
    let mut positions = Vec::new();
    for outbox in ["orders", "payments", "inventory"] {
        let mut db = PgConnection::connect(&platform.stack.database_url(outbox)).await.expect("the database is there");
        let last: Option<(i64, String)> =
            sqlx::query_as("select n, owner::text from outbox_batch where outbox = $1 order by n desc limit 1")
                .bind(outbox)
                .fetch_optional(&mut db)
                .await
                .expect("the batch log can be read");
        positions.extend(last);
        db.close().await.ok();
    }
    positions
}

#[test]
fn of_two_relays_one_publishes_and_the_other_takes_over_when_it_stops() {
    alone(async |platform| {
        let before = owners(platform).await;
        let standby = platform.stack.start_another(Service::Relay).await.expect("a second relay starts");
        load(platform, 40, Chance::new("load")).await;
        platform.settles().await;
        assert_eq!(owners(platform).await, before, "the second one stands by");
        let publishing = writers(platform).await;
        platform.stack.service(Service::Relay).process.stop().await;
        let after = taken_over(platform, &before).await;
        load(platform, 40, Chance::new("load")).await;
        platform.settles().await;
        for (((outbox, earlier), (_, later)), (_, owner)) in publishing.iter().zip(writers(platform).await).zip(&after)
        {
            assert_eq!(&later[..earlier.len()], &earlier[..], "{outbox}: nobody else has published before");
            assert!(later[earlier.len()..].iter().all(|writer| writer == owner), "{outbox}: {later:?}");
        }
        platform.stack.service(Service::Relay).start_again().await.expect("it comes back");
        stop(&standby).await;
        taken_over(platform, &after).await;
    });
}

async fn stop(running: &Running) {
    assert!(running.process.stop().await, "{} stops when it is asked to", running.process.name());
}

#[test]
fn a_relay_that_is_paused_past_its_lease_and_comes_back_changes_no_position() {
    alone(async |platform| {
        platform.wants_fault("SIGSTOP outbox-relay", 1);
        let before = owners(platform).await;
        let standby = platform.stack.start_another(Service::Relay).await.expect("a second relay starts");
        let zombie = platform.stack.service(Service::Relay);
        let meanwhile = async {
            // The relay is under load, so that it has records on their way.
            eventually(TAKEN_OVER, || async { (platform.accepted() % CUSTOMERS_AT_ONCE > 3).then_some(()) }).await;
            zombie.process.pause();
            platform.fault_fired("SIGSTOP outbox-relay");
            taken_over(platform, &before).await
        };
        let ((), after) = tokio::join!(load(platform, ORDERS, Chance::new("load")), meanwhile);
        platform.settles().await;
        let at_rest = positions(platform).await;
        assert_eq!(owners(platform).await, after);
        zombie.process.resume();
        zombie.ready().await.expect("the zombie finds out, and stands by");
        load(platform, 20, Chance::new("load")).await;
        platform.settles().await;
        // The new owner wrote all since then. The zombie wrote nothing, and the numbers have no gap or fork.
        for (outbox, owner) in &after {
            let mut db = PgConnection::connect(&platform.stack.database_url(outbox)).await.expect("it is there");
            let (batches, last): (i64, i64) =
                sqlx::query_as("select count(*), coalesce(max(n), 0) - coalesce(min(n), 1) + 1 from outbox_batch")
                    .fetch_one(&mut db)
                    .await
                    .expect("the batch log can be read");
            assert_eq!(batches, last, "{outbox} has gaps");
            let (_, of_zombie) = before.iter().find(|(name, _)| name == outbox).expect("the same outboxes");
            let late: i64 = sqlx::query_scalar(
                "select count(*) from outbox_batch
                  where owner::text = $1 and n > (select min(n) from outbox_batch where owner::text = $2)",
            )
            .bind(of_zombie)
            .bind(owner)
            .fetch_one(&mut db)
            .await
            .expect("the batch log can be read");
            assert_eq!(late, 0, "{outbox}: the zombie wrote after its successor; positions at rest: {at_rest:?}");
        }
        assert_eq!(owners(platform).await, after, "who has it keeps it");
        stop(&standby).await;
        taken_over(platform, &after).await;
    });
}

/// Cuts every client's connections to PostgreSQL, ours too; returns how many.
async fn cut_connections(platform: &Platform) -> i64 {
    let mut admin = PgConnection::connect(&platform.stack.database_url("postgres")).await.expect("PostgreSQL runs");
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                where pid <> pg_backend_pid() and backend_type = 'client backend'";
    sqlx::query_scalar(cut).fetch_one(&mut admin).await.expect("we may")
}

#[test]
fn connections_to_postgresql_are_cut_under_load() {
    alone(async |platform| {
        platform.wants_fault("connections cut", 20);
        let mut chance = Chance::new("moments");
        let seed = chance.clone();
        let done = CancellationToken::new();
        let cutting = async {
            while !done.is_cancelled() {
                tokio::time::sleep(chance.millis(100, 500)).await;
                (0..cut_connections(platform).await).for_each(|_| platform.fault_fired("connections cut"));
            }
        };
        let orders = async {
            load(platform, ORDERS, seed).await;
            done.cancel();
        };
        tokio::join!(orders, cutting);
    });
}

/// Waits until `/health` of each process reports that not all its work moves.
async fn are_red(platform: &Platform, services: &[Service]) {
    for service in services {
        let url = platform.admin(*service, "/health");
        let red = || async { (platform.http.get(&url).send().await.ok()?.status() == 503).then_some(()) };
        eventually(TAKEN_OVER, red).await;
    }
}

/// Checks the processes' logs of an outage, which began when the logs had these sizes: no line comes over and over.
/// Each request that failed, and each slow statement, has a line of its own.
fn nothing_is_said_over_and_over(platform: &Platform, logs: &[(Service, usize)]) {
    let mut said = BTreeMap::<_, usize>::new();
    for &(service, since) in logs {
        for line in platform.lines(service, since) {
            let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
            let of_one = ["saga_core::http::problem", "sqlx::query"].contains(&&*text("target"));
            if matches!(&*text("level"), "WARN" | "ERROR") && !of_one {
                let what = ["message", "dependency", "group", "outbox", "check", "saga"].map(text);
                *said.entry((service.name(), what)).or_default() += 1;
            }
        }
    }
    assert!(!said.is_empty(), "nobody said anything");
    said.retain(|_, times| *times > 2);
    assert!(said.is_empty(), "{said:#?}");
}

fn logs(platform: &Platform) -> Vec<(Service, usize)> {
    Service::ALL.iter().map(|&service| (service, platform.log_size(service))).collect()
}

#[test]
fn postgresql_is_killed_under_load_and_everything_resumes_by_itself() {
    alone(async |platform| {
        platform.wants_fault("SIGKILL postgres", 1);
        let logs = logs(platform);
        let postgres = platform.stack.servers().postgres.as_ref().expect("the stack started its own");
        let crash = async {
            let placed = platform.accepted();
            eventually(TAKEN_OVER, || async { (platform.accepted() > placed + 10).then_some(()) }).await;
            postgres.process.kill();
            platform.fault_fired("SIGKILL postgres");
            are_red(platform, &Service::ALL).await;
            postgres.restart().await.expect("PostgreSQL comes back");
        };
        tokio::join!(load(platform, ORDERS, Chance::new("load")), crash);
        platform.all_ready().await;
        nothing_is_said_over_and_over(platform, &logs);
    });
}

#[test]
fn kafka_is_killed_under_load_and_everything_resumes_by_itself() {
    alone(async |platform| {
        platform.wants_fault("SIGKILL kafka", 1);
        let logs = logs(platform);
        let kafka = platform.stack.servers().kafka.as_ref().expect("the stack started its own");
        let crash = async {
            let placed = platform.accepted();
            eventually(TAKEN_OVER, || async { (platform.accepted() > placed + 10).then_some(()) }).await;
            kafka.process.kill();
            platform.fault_fired("SIGKILL kafka");
            // Orders are still taken: no request waits for Kafka.
            let placed = platform.accepted();
            eventually(TAKEN_OVER, || async { (platform.accepted() > placed).then_some(()) }).await;
            are_red(platform, &[Service::Payments, Service::Inventory, Service::Orders, Service::Relay]).await;
            kafka.restart().await.expect("Kafka comes back");
        };
        tokio::join!(load(platform, ORDERS, Chance::new("load")), crash);
        platform.all_ready().await;
        nothing_is_said_over_and_over(platform, &logs);
        let relay: Value = platform
            .http
            .get(platform.admin(Service::Relay, "/v1/outboxes"))
            .send()
            .await
            .expect("it answers")
            .json()
            .await
            .expect("JSON");
        assert!(relay.to_string().contains("orders"), "{relay}");
    });
}

//! An outbox in another cluster, or under another name. The relay refuses it and names the right command; and that
//! command.

mod common;

use common::{PATIENCE, Running, World, call, ids, payloads};
use outbox_relay::{OutboxSettings, Relay, RelaySettings};
use saga_core::testkit::{eventually, read_to_end};
use std::process::Command;

/// The problem that the relay reports of its first outbox.
async fn problem(relay: &Relay, part: &str) -> String {
    eventually(PATIENCE, || async {
        let (_, outboxes) = call(relay, "GET", "/v1/outboxes", None).await;
        outboxes[0]["problem"].as_str().filter(|problem| problem.contains(part)).map(str::to_owned)
    })
    .await
}

/// Runs the binary, as an operator does.
fn run(world: &World, name: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_outbox-relay"))
        .args(arguments)
        .env_clear()
        .env("OUTBOXES", format!("{name}={}", world.database.url))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

fn named(world: &World, name: &str) -> RelaySettings {
    let settings = world.settings();
    let outboxes = vec![OutboxSettings { name: name.to_owned(), ..settings.outboxes[0].clone() }];
    RelaySettings { outboxes, ..settings }
}

/// Other transactions of the cluster that begin and commit all the time, as those of its other databases do. Returns once
/// they do so.
async fn transactions_of_others(world: &World) -> tokio::task::JoinHandle<()> {
    let (pool, (begin, began)) = (world.db().clone(), tokio::sync::oneshot::channel());
    let others = tokio::spawn(async move {
        let transaction = || sqlx::query("select pg_current_xact_id()").execute(&pool);
        begin.send(transaction().await.is_ok()).ok();
        loop {
            futures::future::join_all((0..4).map(|_| transaction())).await;
        }
    });
    assert!(began.await.unwrap());
    others
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_logical_copy_are_refused_and_then_rewritten_by_a_command() {
    let world = World::with_partitions(1).await;
    world.append("k", "0").await;
    for i in 1..4 {
        sqlx::query(
            "insert into outbox (xid, message_id, topic, key, type, payload)
             values ('9000000000000000000', gen_random_uuid(), $1, 'k', 'test.v1', convert_to($2, 'UTF8'))",
        )
        .bind(world.topic.name())
        .bind(i.to_string())
        .execute(world.db())
        .await
        .unwrap();
    }
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    let problem = problem(&relay, "logical copy").await;
    assert!(problem.contains("outbox-relay reanchor orders --rewrite"), "{problem}");
    running.stop().await;
    assert!(read_to_end(&world.topic).await.is_empty(), "nothing is published");
    // Some of them begin and commit between the command's first write and its next statement.
    sqlx::raw_sql(
        "create function takes_long() returns trigger language plpgsql as
             $$ begin perform pg_sleep(0.05); return new; end $$;
         create trigger takes_long before update on outbox for each row execute function takes_long()",
    )
    .execute(world.db())
    .await
    .unwrap();
    let others = transactions_of_others(&world).await;
    let (done, said) = run(&world, "orders", &["reanchor", "orders", "--rewrite"]);
    others.abort();
    assert!(done, "{said}");
    let running = world.relay();
    assert_eq!(payloads(&world.published(4).await, "k"), ["0", "1", "2", "3"]);
    world.append("k", "4").await;
    let records = world.published(5).await;
    assert_eq!(ids(&records).len(), 5, "each once");
    // Rows that were published stay so when everything is moved again.
    running.stop().await;
    sqlx::query("update outbox_batch set system_identifier = 4711").execute(world.db()).await.unwrap();
    sqlx::query("update outbox set xid = '8000000000000000000' where id > 2").execute(world.db()).await.unwrap();
    sqlx::query("update outbox_batch set base = '9000000000000000000:9000000000000000000:', target = base")
        .execute(world.db())
        .await
        .unwrap();
    sqlx::query("update outbox_batch set target = base").execute(world.db()).await.unwrap();
    let (done, said) = run(&world, "orders", &["reanchor", "orders", "--rewrite"]);
    assert!(done, "{said}");
    world.append("k", "5").await;
    let _running = world.relay();
    assert_eq!(ids(&world.published(6).await).len(), 6, "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_of_a_physical_copy_is_accepted_by_a_command() {
    let world = World::new().await;
    let running = world.relay();
    world.append("k", "0").await;
    world.published(1).await;
    let (done, said) = run(&world, "orders", &["reanchor", "orders", "--accept"]);
    assert!(!done && said.contains("stop the relays first"), "{said}");
    running.stop().await;
    sqlx::query("update outbox_batch set system_identifier = 4711").execute(world.db()).await.unwrap();
    let relay = Relay::new(&world.settings()).unwrap();
    let running = Running::of(relay.clone());
    let problem = problem(&relay, "another PostgreSQL cluster").await;
    assert!(problem.contains("outbox-relay reanchor orders --accept"), "{problem}");
    running.stop().await;
    let (done, said) = run(&world, "orders", &["reanchor", "orders", "--accept"]);
    assert!(done, "{said}");
    let _running = world.relay();
    world.append("k", "1").await;
    assert_eq!(ids(&world.published(2).await).len(), 2, "each once");
    assert_eq!(world.count("select count(*) from outbox_audit where action = 'reanchor'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_under_another_name_publishes_nothing_again_unless_it_is_said() {
    let world = World::new().await;
    let running = world.relay();
    world.append("k", "0").await;
    world.published(1).await;
    // A second name comes, while the first is at work.
    let second = Relay::new(&named(&world, "again")).unwrap();
    let beside = Running::of(second.clone());
    problem(&second, "orders").await;
    running.stop().await;
    beside.stop().await;
    let renamed = Relay::new(&named(&world, "renamed")).unwrap();
    let refused = Running::of(renamed.clone());
    let problem = problem(&renamed, "under the name").await;
    assert!(problem.contains("outbox-relay rename orders renamed") && problem.contains("PUBLISH_AGAIN"), "{problem}");
    refused.stop().await;
    assert_eq!(ids(&read_to_end(&world.topic).await).len(), 1);

    let (done, said) = run(&world, "renamed", &["rename", "orders", "renamed"]);
    assert!(done, "{said}");
    let running = Running::start(&named(&world, "renamed"));
    world.append("k", "1").await;
    assert_eq!(ids(&world.published(2).await).len(), 2, "each once");
    running.stop().await;
    let _running = Running::start(&RelaySettings { publish_again: true, ..named(&world, "anew") });
    eventually(PATIENCE, || async { (ids(&read_to_end(&world.topic).await).len() == 4).then_some(()) }).await;
}

#[test]
fn help_offers_only_what_the_relay_heeds() {
    let output = Command::new(env!("CARGO_BIN_EXE_outbox-relay")).arg("--help").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("KAFKA_BROKERS") && said.contains("PUBLISH_AGAIN"), "{said}");
    for nothing in ["KAFKA_REPLICATION_FACTOR", "KAFKA_SESSION_TIMEOUT_MS"] {
        assert!(!said.contains(nothing), "{said}");
    }
}

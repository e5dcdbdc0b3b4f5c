//! A relay whose role owns nothing, and has what `outbox_grant` gives it.

mod common;

use common::{World, append, limited_topic, published};
use outbox_relay::{Relay, admin};
use saga_core::service::Health;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_relay_publishes_parks_pauses_and_repairs_with_the_least_rights() {
    let world = World::of_least_rights().await;
    let topic = limited_topic("3000").await;
    let relay = world.relay();
    let culprit = append(world.db(), &topic, "k", &"x".repeat(5_000)).await;
    append(world.db(), &topic, "k", "behind").await;
    world.append("k", "flows").await;
    world.published(1).await;
    world.parked(2).await;

    let post = async |path: &str, body| world.call("POST", &format!("/v1/outboxes/orders/{path}"), Some(body)).await.0;
    assert_eq!(post("parked/retry", json!({ "reason": "try" })).await, 202);
    let refused_again = "select count(*) from outbox_parked where retry_requested_at is null and status = 'parked'";
    world.counts(refused_again, 2).await;
    let pause = json!({ "topic": world.topic.name(), "reason": "for a while" });
    assert_eq!(post("pause", pause.clone()).await, 202);
    world.counts("select count(*) from outbox_pause where base is not null", 1).await;
    world.append("k", "waits").await;
    assert_eq!(post("resume", pause).await, 202);
    world.published(2).await;
    assert_eq!(post(&format!("parked/{culprit}/discard"), json!({ "reason": "not needed" })).await, 200);
    published(&topic, 1).await;
    for list in ["outboxes", "outboxes/orders/parked", "outboxes/orders/events?state=discarded"] {
        let (status, answer) = world.call("GET", &format!("/v1/{list}"), None).await;
        assert_eq!(status, 200, "{answer}");
    }
    assert_eq!(world.count("select count(*) from outbox_audit").await, 4);
    // The relay's upkeep works: the second partition is the relay's, by way of the owner.
    let made =
        "select count(*) from pg_class where relname = 'outbox_000000010000001' and relowner = current_user::regrole";
    world.counts(made, 1).await;
    relay.stop().await;
    world.drop_role().await;
}

#[tokio::test]
async fn what_a_relay_may_not_do_is_a_missing_right_and_harms_nothing() {
    let world = World::of_least_rights().await;
    world.append("k", "as it was").await;
    let database = world.settings().outboxes.remove(0).database;
    let mut db = PgConnection::connect_with(&database).await.unwrap();
    for sql in [
        "update outbox set topic = 'another'",
        "delete from outbox",
        "insert into outbox (message_id, topic, type) values (gen_random_uuid(), 't', 'a.v1')",
        "update outbox_batch set rows = 0",
        "delete from outbox_batch",
        "delete from outbox_audit",
        "truncate outbox_parked",
        "drop table outbox_overflow",
        "select from inbox",
        "select from participant_fence",
        "select from idempotency_answer",
        "select setval('outbox_id_seq', 1)",
    ] {
        let refused = sqlx::query(sql).execute(&mut db).await.unwrap_err();
        let code = refused.as_database_error().unwrap().code();
        assert_eq!(code.as_deref(), Some("42501"), "{sql}: {refused}");
    }
    // In its own temporary schema the role may make things of any name, and they are not taken for the outbox.
    sqlx::raw_sql("create temporary table outbox (id bigint generated always as identity)")
        .execute(&mut db)
        .await
        .unwrap();
    sqlx::query("select outbox_add_partition()").execute(&mut db).await.unwrap();
    // A partition without an end would be the last one that is made.
    for rows in ["4000000000000000000", "100000001", "0", "-1", "null"] {
        let sql = format!("select outbox_add_partition({rows})");
        let refused = sqlx::query(AssertSqlSafe(sql)).execute(&mut db).await.unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().code().as_deref(), Some("22023"), "{rows}: {refused}");
    }
    drop(db);
    assert_eq!(world.count("select count(*) from outbox where topic <> 'another'").await, 1);
    world.drop_role().await;
}

#[tokio::test]
async fn a_relay_whose_requests_lack_a_table_or_a_right_is_not_ready() {
    let world = World::of_least_rights().await;
    let relay = Relay::new(&world.settings()).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let role = world.role.as_deref().expect("it has a role of its own");
    let said = async || {
        health.look().await;
        health.readiness().checks["databases"]
    };
    assert_eq!(said().await, "ok", "it has all that its requests need");
    let alter = async |sql: String| sqlx::raw_sql(AssertSqlSafe(sql)).execute(world.db()).await.unwrap();
    for table in ["outbox", "outbox_batch", "outbox_lease", "outbox_parked", "outbox_pause", "outbox_audit"] {
        alter(format!("alter table {table} rename to mislaid")).await;
        assert_eq!(said().await, "table_missing", "{table}");
        alter(format!("alter table mislaid rename to {table}")).await;
    }
    for (right, table) in [("update", "outbox_parked"), ("delete", "outbox_pause"), ("insert", "outbox_audit")] {
        alter(format!("revoke {right} on {table} from {role}")).await;
        assert_eq!(said().await, "right_missing", "{right} on {table}");
        alter(format!("grant {right} on {table} to {role}")).await;
    }
    assert_eq!(said().await, "ok");
    alter(format!("alter role {role} set default_transaction_read_only = on")).await;
    let standby = Relay::new(&world.settings()).unwrap();
    admin::check_health(&health, &standby);
    assert_eq!(said().await, "database_read_only");
    world.drop_role().await;
}

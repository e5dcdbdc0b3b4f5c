//! Rows that Kafka refuses: too large, or to topics that are not there. All other rows flow on.

mod common;

use common::{
    PATIENCE, Running, World, append, ids, is_healthy, is_red, kafka, limit_topic, limited_topic, park, payloads,
    published, set_topic, topic_with,
};
use outbox_relay::{OutboxSettings, Relay, admin};
use rdkafka::admin::AdminOptions;
use saga_core::{
    command::Op,
    envelope::SagaHeaders,
    id::{CommandId, SagaId},
    outbox::{self, NewMessage, nudge},
    part::Cause,
    service::Health,
    testkit::{Log, Record, eventually, read_to_end, unique},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_row_that_is_too_large_is_parked_with_its_lane_and_retried_in_order() {
    let world = World::new().await;
    let log = Log::hear("warn");
    let topic = limited_topic("3000").await;
    let _relay = world.relay();
    append(world.db(), &topic, "k", "before").await;
    let large = "x".repeat(5_000);
    let culprit = append(world.db(), &topic, "k", &large).await;
    let successor = append(world.db(), &topic, "k", "after").await;
    append(world.db(), &topic, "other", "flows").await;
    world.append("k", "another topic flows").await;
    world.parked(2).await;
    for (line, id) in log.said("parked a row").iter().zip([culprit, successor]) {
        assert_eq!((&line["outbox"], &line["topic"]), (&world.name.as_str().into(), &topic.as_str().into()), "{line}");
        assert_eq!(line["id"], id, "{line}");
    }
    assert_eq!(log.said("parked a row").len(), 2);
    assert_eq!(payloads(&published(&topic, 2).await, "k"), ["before"]);
    assert_eq!(payloads(&read_to_end(&topic).await, "other"), ["flows"]);
    world.published(1).await;

    let (status, list) = world.call("GET", "/v1/outboxes/orders/parked", None).await;
    assert_eq!(status, 200);
    assert_eq!(list["items"][0]["id"], culprit);
    assert_eq!(list["items"][0]["blocked_by"], Value::Null);
    assert!(list["items"][0]["reason"].as_str().unwrap().contains("max.message.bytes"), "{list}");
    assert_eq!(list["items"][1]["blocked_by"], culprit);
    let (_, outboxes) = world.call("GET", "/v1/outboxes", None).await;
    assert_eq!(outboxes[0]["parked"], 2, "{outboxes}");

    // Later rows join the lane, also after a restart; a retry that cannot succeed changes nothing.
    append(world.db(), &topic, "k", "later").await;
    world.parked(3).await;
    let again = json!({ "reason": "try" });
    let (status, _) = world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again.clone())).await;
    assert_eq!(status, 202);
    world.counts("select count(*) from outbox_parked where attempts = 1 and retry_requested_at is null", 1).await;

    limit_topic(&topic, "100000").await;
    let (status, _) = world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
    assert_eq!(status, 202);
    assert_eq!(payloads(&published(&topic, 5).await, "k"), ["before", large.as_str(), "after", "later"]);
    append(world.db(), &topic, "k", "free again").await;
    assert_eq!(payloads(&published(&topic, 6).await, "k").last().unwrap(), "free again");
    assert_eq!(world.count("select count(*) from outbox_parked where status = 'published'").await, 3);
    assert_eq!(world.count("select count(*) from outbox_audit where action = 'retry-parked'").await, 2);
}

#[tokio::test]
async fn what_is_said_of_a_row_says_whose_it_is() {
    let world = World::new().await;
    let log = Log::hear("warn");
    let topic = limited_topic("3000").await;
    let id = SagaId::new();
    let saga = SagaHeaders {
        saga: id,
        definition: "order".into(),
        version: 1,
        step: "reserve".into(),
        op: Op::Do,
        occurrence: 0,
        command: CommandId::derive(id, "reserve", Op::Do, 0),
        attempt: 1,
        undoes: None,
        happened: None,
        orchestrator: None,
        reply_to: None,
        outcome: None,
    };
    let large = NewMessage::json(&topic, "k", "test.v1", &"x".repeat(5_000)).unwrap().with_saga(&saga);
    let mut tx = world.db().begin().await.unwrap();
    outbox::append_in(&mut tx, std::slice::from_ref(&large)).await.unwrap();
    tx.commit().await.unwrap();
    let _relay = world.relay();
    world.parked(1).await;
    let again = json!({ "reason": "try" });
    let (status, _) = world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
    assert_eq!(status, 202);
    for said in ["parked a row", "a parked row was refused again"] {
        let line = eventually(PATIENCE, || async { log.said(said).pop() }).await;
        let ids = ["saga", "saga_type", "saga_step", "message_id"].map(|name| line[name].clone());
        let id = json!(id.to_string());
        assert_eq!(ids, [id, json!("order"), json!("reserve"), json!(large.id.to_string())], "{line}");
    }
}

#[tokio::test]
async fn a_discarded_row_is_never_published_and_releases_those_behind_it() {
    let world = World::new().await;
    let topic = limited_topic("3000").await;
    let relay = world.relay();
    let culprit = append(world.db(), &topic, "k", &"x".repeat(5_000)).await;
    append(world.db(), &topic, "k", "behind").await;
    world.parked(2).await;
    relay.stop().await;
    let _relay = world.relay();
    append(world.db(), &topic, "k", "after a restart").await;
    world.parked(3).await;

    let path = format!("/v1/outboxes/orders/parked/{culprit}/discard");
    let (status, problem) = world.call("POST", &path, Some(json!({ "reason": " " }))).await;
    assert_eq!((status, problem["errors"][0]["field"].as_str()), (422, Some("reason")));
    let (status, answer) = world.call("POST", &path, Some(json!({ "reason": "not needed" }))).await;
    assert_eq!((status, answer["released"].as_i64()), (200, Some(2)));
    assert_eq!(payloads(&published(&topic, 2).await, "k"), ["behind", "after a restart"]);
    let (status, _) = world.call("POST", &path, Some(json!({ "reason": "again" }))).await;
    assert_eq!(status, 409);
    append(world.db(), &topic, "k", "free").await;
    published(&topic, 3).await;
    assert_eq!(world.count("select count(*) from outbox_audit where action = 'discard-parked'").await, 1);
    let (_, events) = world.call("GET", "/v1/outboxes/orders/events?state=discarded", None).await;
    assert_eq!(events["items"][0]["id"], culprit, "{events}");
}

#[tokio::test]
async fn after_a_discard_the_row_that_still_stands_in_the_way_is_named() {
    let world = World::new().await;
    let topic = limited_topic("3000").await;
    let _relay = world.relay();
    let first = append(world.db(), &topic, "k", &"x".repeat(5_000)).await;
    let second = append(world.db(), &topic, "k", &"y".repeat(5_000)).await;
    let third = append(world.db(), &topic, "k", "small").await;
    world.parked(3).await;
    let discard = json!({ "reason": "not needed" });
    let (status, _) = world.call("POST", &format!("/v1/outboxes/orders/parked/{first}/discard"), Some(discard)).await;
    assert_eq!(status, 200);
    let refused = eventually(PATIENCE, || async {
        let (_, list) = world.call("GET", "/v1/outboxes/orders/parked", None).await;
        list["items"][0]["reason"].as_str()?.contains("max.message.bytes").then_some(list)
    })
    .await;
    let ids = [&refused["items"][0]["id"], &refused["items"][1]["id"]];
    assert_eq!(ids, [second, third], "{refused}");
    let blocked_by = [&refused["items"][0]["blocked_by"], &refused["items"][1]["blocked_by"]];
    assert_eq!(blocked_by, [&Value::Null, &json!(second)], "{refused}");
    let reason = refused["items"][1]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("row {second} of")), "{reason}");
}

#[tokio::test]
async fn a_row_that_only_the_broker_refuses_is_found_and_parked() {
    let world = World::new().await;
    let topic = limited_topic("200000").await;
    let _relay = world.relay();
    append(world.db(), &topic, "k", "seen, with its limit").await;
    published(&topic, 1).await;
    // The limit goes down behind the relay's back: now the broker refuses, and the producer becomes fatal.
    limit_topic(&topic, "3000").await;
    let mut tx = world.db().begin().await.unwrap();
    for i in 0..20 {
        append(&mut *tx, &topic, &format!("small-{}", i % 3), &i.to_string()).await;
        append(&mut *tx, &world.topic, "elsewhere", &i.to_string()).await;
    }
    // The text is not compressible: otherwise lz4 would make it fit.
    let noise: String = (0..200).map(|_| uuid::Uuid::new_v4().to_string()).collect();
    append(&mut *tx, &topic, "large", &noise).await;
    append(&mut *tx, &topic, "large", "behind").await;
    tx.commit().await.unwrap();
    world.parked(2).await;
    let records = published(&topic, 21).await;
    for key in ["small-0", "small-1", "small-2"] {
        assert!(payloads(&records, key).iter().map(|i| i.parse::<i32>().unwrap()).is_sorted());
    }
    assert_eq!(payloads(&world.published(20).await, "elsewhere").len(), 20);
}

#[tokio::test]
async fn a_topic_that_refuses_every_timestamp_waits_and_costs_no_row_and_no_topic() {
    const BOUND: &str = "message.timestamp.before.max.ms";
    let world = World::new().await;
    // The database's clock is behind the brokers', for the relay's sessions: they look into `public` first.
    sqlx::raw_sql(
        "create function public.clock_timestamp() returns timestamptz language sql volatile
         return pg_catalog.clock_timestamp() - interval '20 seconds'",
    )
    .execute(world.db())
    .await
    .unwrap();
    let mut settings = world.settings();
    let database = settings.outboxes.remove(0).database.options([("search_path", "public,pg_catalog")]);
    settings.outboxes = vec![OutboxSettings { name: world.name.clone(), database }];
    let topic = topic_with(1, BOUND, "5000").await;
    let relay = Relay::new(&settings).unwrap();
    let health = Health::new(&CancellationToken::new());
    admin::check_health(&health, &relay);
    let _relay = Running::of(relay);
    // Kafka refuses several rows at once with another code than a row alone.
    let mut tx = world.db().begin().await.unwrap();
    for i in 0..20 {
        append(&mut *tx, &topic, &format!("k{}", i % 2), &i.to_string()).await;
        append(&mut *tx, &world.topic, "k", &i.to_string()).await;
    }
    tx.commit().await.unwrap();
    world.published(20).await;
    eventually(PATIENCE, || is_red(&health, "outbox:orders", "InvalidTimestamp")).await;
    assert_eq!(health.healthiness().parts["outbox:orders"].cause, Some(Cause::Refused));
    let (_, outboxes) = world.call("GET", "/v1/outboxes", None).await;
    let paused = &outboxes[0]["paused_topics"][0];
    assert_eq!((&paused["topic"], &paused["cause"]), (&json!(topic), &json!("refusing")), "{outboxes}");
    append(world.db(), &topic, "k0", "20").await;
    world.append("k", "20").await;
    world.published(21).await;
    assert_eq!(read_to_end(&topic).await.len(), 0);
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0, "no row is given up");

    set_topic(&topic, BOUND, "3600000").await;
    let records = published(&topic, 21).await;
    for key in ["k0", "k1"] {
        let numbers: Vec<i32> = payloads(&records, key).iter().map(|i| i.parse().unwrap()).collect();
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
    assert_eq!(records.len(), 21, "each once");
    eventually(PATIENCE, || is_healthy(&health, true)).await;
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0);
}

#[tokio::test]
async fn a_missing_topic_pauses_only_itself_and_resumes_when_it_appears() {
    let world = World::new().await;
    let missing = unique("missing");
    let relay = world.relay();
    for i in 0..10 {
        append(world.db(), &missing, "k", &i.to_string()).await;
        world.append("k", &i.to_string()).await;
    }
    world.published(10).await;
    eventually(PATIENCE, || async {
        let (_, outboxes) = world.call("GET", "/v1/outboxes", None).await;
        let outbox = &outboxes[0];
        (outbox["paused_topics"][0]["cause"] == "missing" && outbox["lag"]["rows"] == 10).then_some(())
    })
    .await;
    let (_, events) = world.call("GET", "/v1/outboxes/orders/events?state=pending", None).await;
    assert_eq!(events["items"].as_array().unwrap().len(), 10);
    // The pause is still known after a restart.
    relay.stop().await;
    let _relay = world.relay();
    for i in 10..20 {
        append(world.db(), &missing, "k", &i.to_string()).await;
        world.append("k", &i.to_string()).await;
    }
    world.published(20).await;
    assert_eq!(world.count("select count(*) from outbox_parked").await, 0, "nothing is parked for it");

    saga_core::testkit::create_topic(&missing, 2).await;
    let records = published(&missing, 20).await;
    let expected: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    assert_eq!(payloads(&records, "k"), expected);
    world.counts("select count(*) from outbox_pause", 0).await;
    append(world.db(), &missing, "k", "20").await;
    let records = published(&missing, 21).await;
    assert_eq!(ids(&records).len(), 21, "each once");
}

#[tokio::test]
async fn an_operator_pauses_a_topic_while_others_flow_and_resumes_it_in_order() {
    let world = World::new().await;
    let other = saga_core::testkit::TestTopic::create("other", 1).await;
    let _relay = world.relay();
    world.append("k", "0").await;
    world.published(1).await;
    let request = json!({ "topic": world.topic.name(), "reason": "maintenance" });
    let (status, _) = world.call("POST", "/v1/outboxes/orders/resume", Some(request.clone())).await;
    assert_eq!(status, 409, "it is not paused");
    let (status, _) = world.call("POST", "/v1/outboxes/orders/pause", Some(request.clone())).await;
    assert_eq!(status, 202);
    world.counts("select count(*) from outbox_pause where base is not null", 1).await;
    for i in 1..=5 {
        world.append("k", &i.to_string()).await;
        append(world.db(), &other, "k", &i.to_string()).await;
        // A transaction that commits does not know what is paused.
        nudge(world.db());
    }
    published(&other, 5).await;
    assert_eq!(read_to_end(&world.topic).await.len(), 1);
    let (status, _) = world.call("POST", "/v1/outboxes/orders/resume", Some(request)).await;
    assert_eq!(status, 202);
    world.append("k", "6").await;
    assert_eq!(payloads(&world.published(7).await, "k"), ["0", "1", "2", "3", "4", "5", "6"]);
    assert_eq!(world.count("select count(*) from outbox_audit").await, 2);
}

#[tokio::test]
async fn an_operator_pauses_and_resumes_everything() {
    let world = World::new().await;
    let request = json!({ "reason": "maintenance" });
    world.call("POST", "/v1/outboxes/orders/pause", Some(request.clone())).await;
    let _relay = world.relay();
    world.append("k", "1").await;
    // The relay owns the outbox and reads it, and publishes nothing.
    eventually(PATIENCE, || async {
        let (_, outboxes) = world.call("GET", "/v1/outboxes", None).await;
        (outboxes[0]["paused"] == true && outboxes[0]["owner"].is_object() && outboxes[0]["lag"]["rows"] == 1)
            .then_some(())
    })
    .await;
    assert_eq!(read_to_end(&world.topic).await.len(), 0);
    world.call("POST", "/v1/outboxes/orders/resume", Some(request)).await;
    world.published(1).await;
    let (status, _) = world.call("GET", "/v1/outboxes/unknown/events", None).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn a_row_whose_topic_has_no_legal_name_is_parked_and_stops_nothing() {
    let world = World::new().await;
    let _relay = world.relay();
    // `*` is the name of a pause of everything. The last topic exists, and takes nothing from clients.
    let names = ["*", "two words", "..", "__consumer_offsets"];
    for topic in names {
        append(world.db(), topic, "k", "lost").await;
        world.append("k", topic).await;
    }
    assert_eq!(payloads(&world.published(4).await, "k"), names);
    world.parked(4).await;
    assert_eq!(world.count("select count(*) from outbox_pause").await, 0);
    let again = json!({ "reason": "try" });
    world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
    world.counts("select count(*) from outbox_parked where retry_requested_at is not null", 0).await;
    world.parked(4).await;
}

#[tokio::test]
async fn a_lane_that_is_tried_while_its_topic_is_missing_waits_for_the_topic() {
    let world = World::new().await;
    let topic = limited_topic("3000").await;
    let _relay = world.relay();
    append(world.db(), &topic, "k", &"x".repeat(5_000)).await;
    append(world.db(), &topic, "k", "behind").await;
    world.parked(2).await;
    kafka().delete_topics(&[&topic], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let again = json!({ "reason": "try" });
    world.call("POST", "/v1/outboxes/orders/parked/retry", Some(again)).await;
    world.counts("select count(*) from outbox_pause where cause = 'missing'", 1).await;
    world.append("k", "others flow").await;
    world.published(1).await;
    saga_core::testkit::create_topic(&topic, 2).await;
    world.parked(0).await;
    assert_eq!(payloads(&published(&topic, 2).await, "k")[1], "behind");
}

#[tokio::test]
async fn while_many_parked_rows_are_tried_again_other_rows_are_published() {
    const PARKED: usize = 20_000;
    let world = World::with_partitions(1).await;
    park(&world, &world.topic, PARKED, 60).await;
    let _relay = world.relay();
    let (status, asked) =
        world.call("POST", "/v1/outboxes/orders/parked/retry", Some(json!({ "reason": "try" }))).await;
    assert_eq!((status, asked["rows"].as_u64()), (202, Some(PARKED as u64)));
    eventually(PATIENCE, || async {
        let published = world.count("select count(*) from outbox_parked where status = 'published'").await;
        (published > 0).then_some(())
    })
    .await;
    let other = world.append("other", "flows").await;
    let records = world.published(PARKED + 1).await;
    let order = ids(&records);
    let at = order.iter().position(|id| *id == other).unwrap();
    assert!(at < PARKED, "it waited for all of them");
    for key in ["k0", "k1", "k59"] {
        let of_key = |record: &&Record| record.key.as_deref() == Some(key.as_bytes());
        let lane: Vec<Record> = records.iter().filter(of_key).cloned().collect();
        assert!(ids(&lane).is_sorted(), "{key} is in order");
    }
}

#[tokio::test]
async fn an_operator_sees_position_and_lag_of_an_outbox_and_what_became_of_each_row() {
    let world = World::new().await;
    let topic = limited_topic("3000").await;
    let outbox = async || world.call("GET", "/v1/outboxes", None).await.1[0].clone();
    let ids = async |state: &str| {
        let (status, page) = world.call("GET", &format!("/v1/outboxes/orders/events?state={state}"), None).await;
        assert_eq!(status, 200, "{page}");
        let items = page["items"].as_array().unwrap().clone();
        assert!(items.iter().all(|item| item["state"] == state && item["topic"] == topic.as_str()), "{page}");
        items.iter().map(|item| item["id"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    let first = append(world.db(), &topic, "k", "an hour old").await;
    sqlx::query("update outbox set created_at = created_at - interval '1 hour'").execute(world.db()).await.unwrap();
    let second = append(world.db(), &topic, "k", "new").await;
    let behind = outbox().await;
    assert_eq!(
        (&behind["owner"], &behind["position"]["n"], &behind["lag"]["rows"]),
        (&Value::Null, &json!(0), &json!(2))
    );
    assert!(behind["lag"]["seconds"].as_f64().is_some_and(|age| (3_600.0..3_700.0).contains(&age)), "{behind}");
    assert_eq!(ids("pending").await, [second, first]);

    let _relay = world.relay();
    let culprit = append(world.db(), &topic, "k", &"x".repeat(5_000)).await;
    world.parked(1).await;
    let ahead = eventually(PATIENCE, || async {
        let outbox = outbox().await;
        (outbox["lag"]["rows"] == 0).then_some(outbox)
    })
    .await;
    assert!(ahead["owner"].is_object() && ahead["position"]["n"].as_i64() > Some(0), "{ahead}");
    assert_eq!((&ahead["position"]["to_id"], &ahead["lag"]["seconds"]), (&json!(culprit), &json!(0.0)), "{ahead}");
    assert_eq!((ids("published").await, ids("parked").await), (vec![second, first], vec![culprit]));
    assert!(ids("pending").await.is_empty());
}

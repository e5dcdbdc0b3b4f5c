//! The audit is itself tested. It passes on the platform's own rows, and finds every corruption that is sown into
//! copies of its databases and topics.

use contracts::topics;
use e2e::{
    audit::{Expectations, Facts, Finding, Fired, Invariant, PostAnswer, Request, Sources, audit},
    orders::Wish,
    platform::{Platform, alone},
};
use saga_core::testkit::unique;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stack::service::Service;
use uuid::Uuid;

/// The corruptions: the database, the statement, and the invariant that has to find it. `$ok` is a confirmed order,
/// `$no` a cancelled one whose payment was voided, `$sku` an item.
const SEEDS: &[(&str, &str, Invariant)] = &[
    ("orders", "delete from idempotency_answer where location like '%$ok'", Invariant::I1),
    (
        "orders",
        "delete from order_line where order_id = '$ok'; delete from order_status_history where order_id = '$ok';
                delete from orders where id = '$ok'",
        Invariant::I1,
    ),
    (
        "payments",
        "insert into outbox (message_id, topic, key, type) select gen_random_uuid(), topic, key, type
                  from outbox limit 1",
        Invariant::I2,
    ),
    ("orders", "delete from outbox where id = (select max(id) from outbox)", Invariant::I2),
    ("inventory", "update outbox set payload = 'other' where id = 1", Invariant::I2),
    (
        "gateway",
        "insert into gateway_movement (reference, key, kind, amount, currency)
                 select reference, key || '-again', kind, amount, currency from gateway_movement
                 where kind = 'captured' limit 1",
        Invariant::I3,
    ),
    (
        "inventory",
        "insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reservation_id)
                   select sku, kind, on_hand_delta, reserved_delta, reservation_id from stock_movement
                   where kind = 'committed' limit 1",
        Invariant::I3,
    ),
    (
        "orders",
        "delete from saga_due; update saga set status = 'running', finished_at = null, armed_at = now()
                where saga_id = '$ok'",
        Invariant::I4,
    ),
    (
        "orders",
        "insert into saga_due (saga_id, definition, version, status, due_at)
                values ('$ok', 'order', 1, 'running', now() - interval '1 hour')",
        Invariant::I4,
    ),
    (
        "payments",
        "insert into participant_intent (command_id, saga_id, step, occurrence, op, type, state, origin, payload,
                  prepared) select gen_random_uuid(), saga_id, step, occurrence, 'do', 't', 'open', '{}', '', '{}'
                  from participant_fence limit 1",
        Invariant::I4,
    ),
    (
        "inventory",
        "insert into inbox_parked (consumer, topic, partition, record_offset, lane, source, message_id, headers)
                   values ('g', 't', 0, 1, 1, 's', gen_random_uuid(), '{}')",
        Invariant::I4,
    ),
    ("orders", "update saga set status = 'compensated' where saga_id = '$ok'", Invariant::I6),
    ("orders", "update saga set status = 'stuck' where saga_id = '$ok'", Invariant::I6),
    ("inventory", "update reservation set status = 'released' where order_id = '$ok'", Invariant::I6),
    ("gateway", "delete from gateway_movement where kind = 'voided'", Invariant::I6),
    (
        "payments",
        "update ledger_entry set amount = amount + 1 where movement = 'capture' and account = 'merchant'",
        Invariant::I7,
    ),
    ("payments", "update payment set captured = captured - 1 where captured > 0", Invariant::I7),
    ("gateway", "update gateway_authorization set captured = captured - 1 where captured > 0", Invariant::I7),
    ("inventory", "update stock set on_hand = on_hand - 1 where sku = '$sku'", Invariant::I7),
    ("inventory", "update stock set on_hand = on_hand - 1, reserved = reserved + 1 where sku = '$sku'", Invariant::I7),
    ("orders", "update orders set total = total + 1 where id = '$ok'", Invariant::I7),
    (
        "orders",
        "update order_status_history set status = 'pending' where order_id = '$ok' and sequence = 2",
        Invariant::I8,
    ),
    ("orders", "delete from order_status_history where order_id = '$no' and sequence = 1", Invariant::I8),
    ("orders", "delete from saga_event where saga_id = '$ok' and revision = 2", Invariant::I8),
    (
        "orders",
        "insert into outbox_audit (outbox, actor, action, reason) values ('orders', 'x', 'pause', 'y')",
        Invariant::I9,
    ),
];

#[test]
fn every_seeded_corruption_is_found_and_nothing_else_is() {
    alone(async |platform| {
        let sku = platform.item("audited", 300, 5).await;
        let confirmed = platform.place(&Wish::of(&sku, 2)).await;
        let cancelled = platform.place(&Wish::of(&sku, 9)).await;
        assert_eq!(platform.outcome(confirmed).await, "confirmed");
        assert_eq!(platform.outcome(cancelled).await, "out_of_stock");
        platform.passes_the_audit().await;
        // No process may be connected to a database that is copied.
        Service::ALL.into_iter().for_each(|service| platform.stack.service(service).process.kill());
        let (facts, findings) = platform.judge().await.expect("the facts can be read");
        assert_eq!(findings, [], "at rest");
        let places = [("$ok", confirmed.to_string()), ("$no", cancelled.to_string()), ("$sku", sku)];
        for (database, sql, invariant) in SEEDS {
            let sql = places.iter().fold((*sql).to_owned(), |sql, (name, value)| sql.replace(name, value));
            let found = sown(platform, &facts, database, &sql).await;
            assert!(found.iter().any(|f| f.invariant == *invariant), "{invariant:?} does not see {sql}: {found:#?}");
        }
        in_topics(&facts, &platform.expected().clone());
        in_requests(&facts, &platform.expected().clone());
        for service in Service::ALL {
            platform.stack.service(service).start_again().await.expect("it comes back");
        }
    });
}

/// The audit's findings on a copy of the platform's databases into which `sql` was sown. The topics stay as they are.
async fn sown(platform: &Platform, facts: &Facts, database: &str, sql: &str) -> Vec<Finding> {
    let sources = platform.sources();
    let url = |name: &str| platform.stack.database_url(name);
    let copy = unique("sown").replace('-', "_");
    let mut admin = PgConnection::connect(&url("postgres")).await.expect("PostgreSQL runs");
    // Idle connections of our own pool end, too; it makes new ones.
    let alone = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = $1";
    sqlx::query(alone).bind(database).execute(&mut admin).await.expect("we may");
    let create = format!("create database {copy} template {database}");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut admin).await.expect("a copy can be made");
    let mut db = PgConnection::connect(&url(&copy)).await.expect("the copy is there");
    // Corruption does not ask for permission: it comes without triggers and foreign keys, and without checks.
    sqlx::raw_sql(AssertSqlSafe(format!("set session_replication_role = replica; {UNCHECKED}; {sql}")))
        .execute(&mut db)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
    db.close().await.ok();
    let at = |name: &str| if name == database { url(&copy) } else { url(name) };
    let sources = Sources {
        orders: at("orders"),
        payments: at("payments"),
        inventory: at("inventory"),
        gateway: at("gateway"),
        ..sources
    };
    let mut corrupted = sources.read_databases().await.expect("the copy can be read");
    (corrupted.records, corrupted.lag) = (facts.records.clone(), facts.lag.clone());
    let findings = audit(&corrupted, &platform.expected());
    sqlx::raw_sql(AssertSqlSafe(format!("drop database {copy}"))).execute(&mut admin).await.expect("nobody uses it");
    findings
}

/// Drops every check and unique constraint, so that anything can be written.
const UNCHECKED: &str = "do $$
declare c record;
begin
    for c in select conrelid::regclass as of, conname as name from pg_constraint
              where contype = 'c' and connamespace = 'public'::regnamespace and conparentid = 0 and conislocal
    loop
        execute format('alter table %s drop constraint if exists %I', c.of, c.name);
    end loop;
end
$$";

/// Corruptions of the topics' records, and of how far they are read.
fn in_topics(facts: &Facts, expected: &Expectations) {
    let finds = |what: &str, invariant, corrupt: &dyn Fn(&mut Facts)| {
        let mut facts = facts.clone();
        corrupt(&mut facts);
        let found = audit(&facts, expected);
        assert!(found.iter().any(|f| f.invariant == invariant), "{invariant:?} does not see {what}: {found:#?}");
    };
    let reply = |facts: &Facts| {
        let of = |r: &e2e::audit::RecordFact| r.topic == topics::ORDERS_REPLIES.name;
        facts.records.iter().position(of).expect("there are replies")
    };
    finds("a lost record", Invariant::I2, &|facts| drop(facts.records.remove(reply(facts))));
    finds("a record from nowhere", Invariant::I2, &|facts| {
        let mut record = facts.records[reply(facts)].clone();
        record.headers.insert("ce_sequence".into(), "999999".into());
        facts.records.push(record);
    });
    finds("an inversion", Invariant::I5, &|facts| facts.records.reverse());
    finds("a key in two partitions", Invariant::I5, &|facts| {
        let at = reply(facts);
        facts.records[at].partition += 1;
    });
    finds("an unread record", Invariant::I4, &|facts| facts.lag[0].3 = 1);
    finds("a dead letter", Invariant::I4, &|facts| {
        let mut record = facts.records[reply(facts)].clone();
        record.topic.push_str(".dlt");
        facts.records.push(record);
    });
    // A repeat is no corruption: at-least-once means just that.
    let mut repeated = facts.clone();
    repeated.records.push(facts.records[reply(facts)].clone());
    assert_eq!(audit(&repeated, expected), []);
}

/// Answers that the databases do not bear out, and runs that prove nothing.
fn in_requests(facts: &Facts, expected: &Expectations) {
    let finds = |what: &str, invariant, corrupt: &dyn Fn(&mut Expectations)| {
        let mut expected = expected.clone();
        corrupt(&mut expected);
        let found = audit(facts, &expected);
        assert!(found.iter().any(|f| f.invariant == invariant), "{invariant:?} does not see {what}: {found:#?}");
    };
    let request = |answer| Request { key: unique("key"), answer };
    finds("an order that was promised", Invariant::I1, &|expected| {
        expected.requests.push(request(PostAnswer::Accepted(Uuid::now_v7())));
    });
    finds("an order that nobody asked for", Invariant::I1, &|expected| drop(expected.requests.pop()));
    finds("an action without a trace", Invariant::I9, &|expected| {
        expected.operator_actions.insert("pause".into(), 1);
    });
    finds("a fault that never fired", Invariant::I10, &|expected| {
        expected.faults.insert("SIGKILL".into(), Fired { wanted: 3, fired: 2 });
    });
    finds("a run in which nothing worked", Invariant::I10, &|expected| {
        let as_many = 0..expected.requests.len();
        expected.requests.extend(as_many.map(|_| request(PostAnswer::Refused(503))));
    });
}

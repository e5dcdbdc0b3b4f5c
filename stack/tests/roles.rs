//! The roles that `docker/databases.sql` makes, on a real PostgreSQL. The platform works under them, and each has no
//! right that it does not need.

use reqwest::{StatusCode, Url};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use stack::{
    platform::{Stack, StackConfig},
    progress::Progress,
    servers::{Servers, ServersConfig},
    service::Service,
};
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// How long a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(50);

fn password(role: &str) -> String {
    format!("{role}-0123456789abcdef")
}

/// The statements that psql would send: `\getenv` takes from the environment, `:'…'` puts in.
fn statements() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docker/databases.sql");
    let script = fs::read_to_string(path).unwrap();
    let (mut variables, mut sql) = (BTreeMap::new(), String::new());
    for line in script.lines().filter(|line| !line.starts_with("--")) {
        match line.strip_prefix("\\getenv ").map(|rest| rest.split_once(' ').unwrap()) {
            Some((variable, from)) => {
                let role = from.strip_suffix("_DB_PASSWORD").unwrap().to_lowercase();
                variables.insert(format!(":'{variable}'"), format!("'{}'", password(&role)));
            }
            None => sql.push_str(&format!("{line}\n")),
        }
    }
    let sql = variables.iter().fold(sql, |sql, (variable, value)| sql.replace(variable, value));
    assert!(!sql.contains(":'") && !sql.contains('\\'), "{sql}");
    sql.split(';').map(str::trim).filter(|statement| !statement.is_empty()).map(str::to_owned).collect()
}

/// The URL with which a role connects to a database of the server.
fn url(server: &str, role: &str, database: &str) -> String {
    let mut url: Url = server.parse().unwrap();
    url.set_username(role).unwrap();
    url.set_password(Some(&password(role))).unwrap();
    url.set_path(database);
    url.into()
}

async fn run(server: &str, role: &str, database: &str, sql: &str) -> Result<Option<String>, String> {
    let said = |error: sqlx::Error| error.as_database_error().and_then(|e| e.code()).unwrap_or_default().into_owned();
    let mut connection = PgConnection::connect(&url(server, role, database)).await.map_err(said)?;
    let row = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_optional(&mut connection).await.map_err(said)?;
    Ok(row.and_then(|row| row.try_get(0).ok()))
}

/// PostgreSQL's code for a right that is missing.
const MISSING: &str = "42501";

/// A platform whose processes have the roles of the containers.
async fn platform(servers: &Servers) -> Stack {
    let server = servers.database_url.clone();
    let outboxes = ["orders", "payments", "inventory"].map(|name| format!("{name}={}", url(&server, "relay", name)));
    let mut config = StackConfig::for_tests();
    config.servers.database_url = Some(server.clone());
    config.servers.kafka_brokers = Some(servers.kafka_brokers.clone());
    for service in Service::ALL {
        config = match service.database() {
            Some(database) => config.env(service, "DATABASE_URL", url(&server, database, database)),
            None => config.env(service, "OUTBOXES", outboxes.join(",")),
        };
    }
    for service in [Service::Gateway, Service::Payments] {
        config = config.env(service, "GATEWAY_TOKEN", "a-token-of-the-providers");
    }
    Stack::start(config, &Progress::Silent).await.unwrap()
}

/// Waits for an order, through every process, topic and database.
async fn is_confirmed(stack: &Stack) {
    let http = reqwest::Client::new();
    let post = async |url: String, key: &str, body: &Value| {
        let answer = http.post(url).header("idempotency-key", key).json(body).timeout(PATIENCE).send().await.unwrap();
        (answer.status(), answer.json::<Value>().await.unwrap())
    };
    let (orders, inventory) = (stack.url(Service::Orders), stack.url(Service::Inventory));
    let item = json!({ "sku": "W", "name": "W", "unit_price": { "amount": 100, "currency": "EUR" } });
    let delivery = json!({ "delta": 10, "reason": "delivered" });
    assert_eq!(post(format!("{inventory}/v1/items"), "i", &item).await.0, 201);
    assert_eq!(post(format!("{inventory}/v1/items/W/adjustments"), "a", &delivery).await.0, 201);
    let order = json!({ "customer_id": "ada", "items": [{ "sku": "W", "quantity": 1 }], "payment_method": "tok_visa" });
    let placed = tokio::time::timeout(PATIENCE, async {
        loop {
            // The order's item is unknown to order-svc until the record of it arrives.
            match post(format!("{orders}/v1/orders"), "o", &order).await {
                (StatusCode::UNPROCESSABLE_ENTITY, _) => tokio::time::sleep(LOOK).await,
                (status, placed) => {
                    assert!(status.is_success(), "{status}: {placed}");
                    return placed;
                }
            }
        }
    });
    let place = format!("{orders}/v1/orders/{}", placed.await.unwrap()["id"].as_str().unwrap());
    let confirmed = async {
        while http.get(&place).send().await.unwrap().json::<Value>().await.unwrap()["status"] != "confirmed" {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, confirmed).await.expect("the order is confirmed");
}

#[tokio::test]
async fn the_platform_works_under_the_roles_of_the_containers_and_they_may_no_more() {
    let config = ServersConfig { database_url: None, kafka_brokers: None, ..ServersConfig::for_tests() };
    let servers = Servers::start(config, &Progress::Silent).await.unwrap();
    let server = servers.database_url.as_str();
    let mut superuser = PgConnection::connect(server).await.unwrap();
    for statement in statements() {
        let made = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut superuser).await;
        made.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    let stack = platform(&servers).await;
    is_confirmed(&stack).await;

    let databases = ["orders", "payments", "inventory", "gateway"];
    for role in databases.into_iter().chain(["relay"]) {
        for database in databases.into_iter().chain(["postgres", "template1"]) {
            let may = role == database || role == "relay" && !["gateway", "postgres", "template1"].contains(&database);
            let connected = run(server, role, database, "select 'in'").await;
            assert_eq!(
                connected,
                if may { Ok(Some("in".into())) } else { Err(MISSING.into()) },
                "{role} in {database}"
            );
        }
    }
    for (database, own) in [("orders", "orders"), ("payments", "payment"), ("inventory", "item")] {
        for sql in [
            &*format!("select from {own}"),
            "select from saga",
            "select from participant_fence",
            "insert into outbox (message_id, topic, type) values (gen_random_uuid(), 't', 'a.v1')",
            "update outbox set topic = 'other'",
            "delete from outbox",
            "delete from outbox_batch",
            "delete from outbox_audit",
            "create table relays (n integer)",
            "create temporary table outbox (n integer)",
            "select setval('outbox_id_seq', 1)",
            "drop table outbox_overflow",
        ] {
            let refused = run(server, "relay", database, sql).await;
            let missing = refused == Err(MISSING.into());
            // Not every service has a saga or fences.
            assert!(missing || refused == Err("42P01".into()) && sql.starts_with("select from"), "{sql}: {refused:?}");
        }
        assert_eq!(run(server, "relay", database, &format!("select from {own}")).await, Err(MISSING.into()));
        // Rows have come, so a whole partition is to be there ahead of them. The relay's role makes it, and its service
        // owns it.
        let owner = "select pg_get_userbyid(relowner)::text from pg_class where relname = 'outbox_000000010000001'";
        let made = async {
            loop {
                // The relay that runs may be faster.
                run(server, "relay", database, "select outbox_add_partition()").await.ok();
                if let Some(owner) = run(server, database, database, owner).await.unwrap() {
                    return owner;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        assert_eq!(tokio::time::timeout(PATIENCE, made).await.unwrap(), database);
    }
    let strangers = "select has_function_privilege('public', 'outbox_add_partition(bigint)', 'execute')::text";
    assert_eq!(run(server, "orders", "orders", strangers).await, Ok(Some("false".into())));
    stack.stop().await;
}

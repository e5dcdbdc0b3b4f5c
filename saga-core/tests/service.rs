//! The parts that every service is started with, on a real PostgreSQL and Kafka.

use refinery::{Migration, Runner};
use saga_core::{
    error_class::{self, ErrorClass},
    http::{Problem, REQUEST_MAX},
    outage::Outage,
    part::Cause,
    service::{
        self, AdminArgs, DatabaseArgs, DatabaseSettings, Health, HttpArgs, Identity, KafkaArgs, KafkaSettings,
        Migrations, Needs, Parts, ServiceArgs,
        database::{self, pool_options},
        messaging_migrations,
        migrate::migrate,
        saga_migrations, topics,
    },
    testkit::{Log, TestDatabase, brokers, eventually, unique},
    topic::Topic,
    transaction::Transaction,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

fn settings(database: &TestDatabase) -> DatabaseSettings {
    DatabaseSettings::from_url(&database.url).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_first_starts_at_once_on_an_empty_database_all_succeed() {
    let database = TestDatabase::new(&[]).await;
    let starts = (0..50).map(|_| {
        let settings = settings(&database);
        tokio::spawn(async move { migrate(&settings, &[messaging_migrations(), saga_migrations()]).await })
    });
    let mut applied = Vec::new();
    for start in starts.collect::<Vec<_>>() {
        applied.push(start.await.unwrap().unwrap());
    }
    let all = messaging_migrations().count() + saga_migrations().count();
    assert_eq!(applied.iter().sum::<usize>(), all, "each migration ran once: {applied:?}");
    let recorded: i64 =
        sqlx::query_scalar("select count(*) from refinery_messaging").fetch_one(&database.pool).await.unwrap();
    assert_eq!(usize::try_from(recorded).unwrap(), messaging_migrations().count());
}

#[tokio::test]
async fn a_second_start_applies_nothing_and_an_edited_migration_is_refused() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    assert_eq!(migrate(&settings(&database), &[messaging_migrations()]).await.unwrap(), 0);

    let edited = Migration::unapplied("V1__outbox", "select 'edited'").unwrap();
    let edited = Migrations { owner: "messaging", runner: Runner::new(&[edited]) };
    let error = migrate(&settings(&database), &[edited]).await.unwrap_err().to_string();
    assert!(error.contains("messaging"), "{error}");
}

#[tokio::test]
async fn the_previous_release_starts_beside_the_next_one() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    let all = messaging_migrations();
    let older: Vec<_> = all.runner.get_migrations().iter().take(1).cloned().collect();
    let older = Migrations { owner: "messaging", runner: Runner::new(&older) };
    assert_eq!(migrate(&settings(&database), &[older]).await.unwrap(), 0);
}

#[test]
fn every_migration_file_is_embedded() {
    // refinery ignores a file with a name that it does not understand.
    for (folder, embedded) in [("messaging", messaging_migrations().count()), ("saga", saga_migrations().count())] {
        let files = std::fs::read_dir(format!("{}/../migrations/{folder}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let sql = files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|kind| kind == "sql"));
        assert_eq!(sql.count(), embedded, "{folder}");
    }
}

#[tokio::test]
async fn migrating_waits_for_its_turn_and_lets_go_of_the_lock() {
    let database = TestDatabase::new(&[messaging_migrations()]).await;
    for _ in 0..3 {
        migrate(&settings(&database), &[messaging_migrations()]).await.unwrap();
    }
    let held: i64 = sqlx::query_scalar(
        "select count(*)
           from pg_locks
          where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())",
    )
    .fetch_one(&database.pool)
    .await
    .unwrap();
    assert_eq!(held, 0);
}

#[tokio::test]
async fn a_migration_that_waits_for_a_lock_says_for_whom_and_so_does_who_waits_for_its_turn() {
    const SOON: Duration = Duration::from_secs(30);
    let log = Log::hear("warn");
    let database = TestDatabase::new(&[]).await;
    sqlx::query("create table item (id int)").execute(&database.pool).await.unwrap();
    let options = settings(&database).options.application_name("nightly-report");
    let mut report = PgConnection::connect_with(&options).await.unwrap();
    let report_pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut report).await.unwrap();
    let mut reading = report.begin().await.unwrap();
    sqlx::query("select from item").execute(&mut *reading).await.unwrap();

    let start = || {
        let settings = settings(&database);
        let weight = Migration::unapplied("V1__weight", "alter table item add weight int").unwrap();
        let migrations = Migrations { owner: "shop", runner: Runner::new(&[weight]) };
        tokio::spawn(async move { migrate(&settings, &[migrations]).await })
    };
    let says = async |message: &str| eventually(SOON, || async { log.said(message).pop() }).await;
    let first = start();
    let line = says("a migration waits for a lock").await;
    let name: String = sqlx::query_scalar("select current_database()::text").fetch_one(&database.pool).await.unwrap();
    assert_eq!((&line["level"], &line["database"]), (&"WARN".into(), &name.as_str().into()), "{line}");
    assert_eq!((&line["owner"], &line["migration"]), (&"shop".into(), &"V1__weight".into()), "{line}");
    let expected = format!("pid {report_pid} (nightly-report, idle in transaction, its transaction is ");
    assert!(line["blocked_by"].as_str().unwrap().starts_with(&expected), "{line}");
    let second = start();
    let line = says("another process migrates this database").await;
    assert_eq!((&line["level"], &line["database"]), (&"WARN".into(), &name.as_str().into()), "{line}");
    assert!(line["blocked_by"].as_str().unwrap().contains("(migrate, active, "), "{line}");

    // Both processes look once more, and find nothing new to report.
    let looked_at = async || -> time::OffsetDateTime {
        sqlx::query_scalar(
            "select min(query_start) from pg_stat_activity
              where datname = current_database() and application_name = 'migrate-watch'",
        )
        .fetch_one(&database.pool)
        .await
        .unwrap()
    };
    let before = looked_at().await;
    eventually(SOON, || async { (looked_at().await > before).then_some(()) }).await;
    reading.rollback().await.unwrap();
    assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap().unwrap()), (1, 0));
    for message in ["a migration waits for a lock", "another process migrates this database"] {
        assert_eq!(log.said(message).len(), 1, "{message}");
    }
}

#[tokio::test]
async fn a_begin_that_is_cancelled_poisons_no_connection() {
    let database = TestDatabase::new(&[]).await;
    let pool = pool_options(2).connect(&database.url).await.unwrap();
    sqlx::query("create table written (n int)").execute(&pool).await.unwrap();
    // The test cuts `begin` off at every moment from at once to long after its answer.
    for n in 0..400_u64 {
        let begin = pool.begin();
        // The result does not matter: the test is about futures that are cut off.
        drop(tokio::time::timeout(Duration::from_micros(n % 200), begin).await);
        // The insert is acknowledged, so the row must be there.
        sqlx::query("insert into written values ($1)").bind(i32::try_from(n).unwrap()).execute(&pool).await.unwrap();
    }
    pool.close().await;
    let mut reader = PgConnection::connect(&database.url).await.unwrap();
    let kept: i64 = sqlx::query_scalar("select count(*) from written").fetch_one(&mut reader).await.unwrap();
    assert_eq!(kept, 400);
}

#[tokio::test]
async fn a_database_that_does_not_exist_is_an_error_at_once_and_not_waited_for() {
    let database = TestDatabase::new(&[]).await;
    let mut nowhere = settings(&database);
    nowhere.options = nowhere.options.database("there_is_no_such_database");
    let error = tokio::time::timeout(Duration::from_secs(10), database::connect(&nowhere, "test")).await.unwrap();
    assert!(error.unwrap_err().to_string().contains("there_is_no_such_database"));
}

#[tokio::test]
async fn a_database_that_is_away_is_waited_for() {
    let database = TestDatabase::new(&[]).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut away = settings(&database);
    let (host, there) = (away.options.get_host().to_owned(), away.options.get_port());
    away.options = away.options.host("127.0.0.1").port(port);
    let waiting = tokio::spawn(async move { database::connect(&away, "test").await });
    // The server comes up: each connection to the port is passed on to the real one.
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = tokio::net::TcpStream::connect((host.as_str(), there)).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    let pool = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap().unwrap();
    sqlx::query("select 1").execute(&pool).await.unwrap();
}

#[tokio::test]
async fn every_connection_ends_a_transaction_that_nobody_continues() {
    let database = TestDatabase::new(&[]).await;
    let pool = database::connect(&settings(&database), "test").await.unwrap();
    let limit: String = sqlx::query_scalar("show idle_in_transaction_session_timeout").fetch_one(&pool).await.unwrap();
    assert_eq!(limit, "8s");
    let name: String = sqlx::query_scalar("show application_name").fetch_one(&pool).await.unwrap();
    assert_eq!(name, "test");
}

#[tokio::test]
async fn a_column_that_is_added_under_warm_connections_costs_one_request() {
    let database = TestDatabase::new(&[]).await;
    let pool = pool_options(8).connect(&database.url).await.unwrap();
    sqlx::query("create table item (sku text)").execute(&pool).await.unwrap();
    let all = async || sqlx::query("select * from item").fetch_all(&pool).await;
    // A renewal is the whole process's: another test's can replace the warm connections before they are asked.
    let columns = AtomicUsize::new(0);
    let stale = eventually(Duration::from_secs(60), || async {
        let mut held = Vec::new();
        for _ in 0..8 {
            let mut connection = pool.acquire().await.unwrap();
            if let Err(stale) = sqlx::query("select * from item").fetch_all(&mut *connection).await {
                return Some(stale);
            }
            held.push(connection);
        }
        drop(held);
        let column = columns.fetch_add(1, Ordering::Relaxed);
        let added = format!("alter table item add column price_{column} bigint");
        sqlx::query(AssertSqlSafe(added)).execute(&pool).await.unwrap();
        all().await.err()
    })
    .await;
    assert_eq!(error_class::classify(&stale), ErrorClass::Stale);
    assert_eq!(Problem::from(stale).status(), 503, "the client may repeat it");
    for _ in 0..24 {
        all().await.expect("every connection was replaced");
    }
}

#[tokio::test]
async fn clients_and_health_are_told_whether_the_pool_is_full_or_the_database_away() {
    let database = TestDatabase::new(&[]).await;
    let patience = Duration::from_millis(100);
    let pool = pool_options(1).acquire_timeout(patience).connect(&database.url).await.unwrap();
    let health = Health::new(&CancellationToken::new());
    health.database(&pool);
    let looked = async || {
        health.look().await;
        (health.readiness(), health.healthiness().parts)
    };
    assert!(looked().await.0.ready);
    let busy = pool.acquire().await.unwrap();
    // While another test's database is away, no database counts as there.
    eventually(Duration::from_secs(60), || async {
        let begun = Transaction::begin(&pool, REQUEST_MAX).await.err()?;
        let read = sqlx::query("select 1").execute(&pool).await.err()?;
        [begun, read].into_iter().all(|error| Problem::from(error).kind() == "/problems/busy").then_some(())
    })
    .await;
    let (ready, parts) = looked().await;
    assert!(ready.ready, "a busy process can be sent requests: {ready:?}");
    assert_eq!(parts["connections"].cause, Some(Cause::PoolFull), "{parts:?}");
    assert!(parts["connections"].reason.as_deref().is_some_and(|reason| reason.contains("a larger pool")), "{parts:?}");
    drop(busy);
    eventually(Duration::from_secs(60), || async { looked().await.1["connections"].cause.is_none().then_some(()) })
        .await;

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = pool_options(1).acquire_timeout(patience).connect_lazy(&format!("postgres://nobody@{closed}/nothing"));
    let away = away.unwrap();
    health.database(&away);
    let (red, parts) = looked().await;
    assert_eq!(red.checks["database"], "database_away");
    assert_eq!(parts["connections"].cause, None, "{parts:?}");
    let begun = Transaction::begin(&away, REQUEST_MAX).await.err().unwrap();
    let read = sqlx::query("select 1").execute(&away).await.unwrap_err();
    for error in [begun, read] {
        assert_eq!(Problem::from(error).kind(), "/problems/unavailable");
    }
    Outage::of_database(&away).working();
}

#[tokio::test]
async fn a_locked_table_is_not_ready_also_when_what_waits_for_it_fills_the_pool() {
    const HUNG: u32 = 3;
    let database = TestDatabase::new(&[]).await;
    sqlx::query("create table item (sku text)").execute(&database.pool).await.unwrap();
    let options = pool_options(HUNG).acquire_timeout(Duration::from_millis(300));
    let pool = options.connect(&database.url).await.unwrap();
    let health = Health::new(&CancellationToken::new());
    health.database(&pool);
    let asked = pool.clone();
    let ask = move || {
        let pool = asked.clone();
        async move { sqlx::query("select from item limit 1").execute(&pool).await.map(drop) }
    };
    health.answers("items", ask);
    health.look().await;
    assert!(health.readiness().ready);
    let mut lock = database.pool.begin().await.unwrap();
    sqlx::query("lock table item").execute(&mut *lock).await.unwrap();
    health.look().await;
    assert_eq!(health.readiness().checks["items"], "no_answer");

    let hang = |pool: PgPool| async move {
        // A query that was given up keeps its connection for a while.
        while sqlx::query("select from item").execute(&pool).await.is_err() {}
    };
    let hung: Vec<_> = (0..HUNG).map(|_| tokio::spawn(hang(pool.clone()))).collect();
    // The first look may find the pool not yet full, or another test's database away.
    eventually(Duration::from_secs(60), || async {
        health.look().await;
        assert!(!health.readiness().ready, "requests that hang are not answered: {:?}", health.readiness());
        (health.healthiness().parts["connections"].cause == Some(Cause::PoolFull)).then_some(())
    })
    .await;

    lock.rollback().await.unwrap();
    for hung in hung {
        hung.await.unwrap();
    }
    health.look().await;
    assert!(health.readiness().ready, "{:?}", health.readiness());
}

#[tokio::test]
async fn a_statement_whose_client_is_gone_ends_although_it_waits_for_a_lock() {
    let database = TestDatabase::new(&[]).await;
    let mut holder = database.pool.acquire().await.unwrap();
    sqlx::query("select pg_advisory_lock(7)").execute(&mut *holder).await.unwrap();
    let pool = pool_options(1).connect(&database.url).await.unwrap();
    let mut gone = pool.acquire().await.unwrap().detach();
    let waits = sqlx::query("select pg_advisory_lock(7)").execute(&mut gone);
    tokio::time::timeout(Duration::from_millis(200), waits).await.expect_err("somebody else has the lock");

    drop(gone);

    let waiting = async || {
        sqlx::query_scalar::<_, i64>(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&database.pool)
        .await
        .unwrap()
    };
    eventually(Duration::from_secs(30), || async { (waiting().await == 0).then_some(()) }).await;
}

#[tokio::test]
async fn a_connection_to_a_server_that_became_a_standby_is_replaced() {
    let database = TestDatabase::new(&[]).await;
    let pool = pool_options(1).connect(&database.url).await.unwrap();
    sqlx::query("create table written (n int)").execute(&pool).await.unwrap();
    // A failover leaves it like this: sessions that are there may only read, new ones may write.
    let write = "insert into written values (1)";
    let mut session = pool.acquire().await.unwrap();
    sqlx::query("set default_transaction_read_only = on").execute(&mut *session).await.unwrap();
    let refused = sqlx::query(write).execute(&mut *session).await.expect_err("the session may only read");
    assert_eq!(error_class::classify(&refused), ErrorClass::Stale, "{refused}");
    drop(session);
    drop(Problem::from(refused));
    sqlx::query(write).execute(&pool).await.expect("a new session may write");
}

#[tokio::test]
async fn topics_are_created_with_their_dead_letters_and_a_mismatch_is_reported_and_left_alone() {
    let kafka = KafkaSettings { brokers: brokers(), replication_factor: 1, session_timeout: Duration::from_secs(6) };
    // A declaration is for the life of a program, and so is this name.
    let name: &'static str = unique("svc-topics").leak();
    let declared = Topic::events(name, 2);
    let first = topics::ensure(&kafka, &[declared]).await.unwrap();
    let created: BTreeSet<_> = first.created.into_iter().collect();
    assert_eq!(created, BTreeSet::from([name.to_owned(), format!("{name}.dlt")]));

    let again = eventually(Duration::from_secs(20), || async {
        let report = topics::ensure(&kafka, &[Topic::events(name, 3)]).await.unwrap();
        (!report.mismatches.is_empty()).then_some(report)
    })
    .await;
    assert_eq!(again.created, Vec::<String>::new());
    let partitions = again.mismatches.iter().find(|mismatch| mismatch.topic == name).unwrap();
    assert_eq!((partitions.setting, &*partitions.declared, &*partitions.actual), ("partitions", "3", "2"));
}

#[tokio::test]
async fn a_service_gets_ready_serves_turns_red_without_its_database_and_green_again_and_stops() {
    let database = TestDatabase::new(&[]).await;
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (http, admin) = (free(), free());
    let args = ServiceArgs {
        database: DatabaseArgs { database_url: Some(database.url.as_str().into()), ..DatabaseArgs::default() },
        kafka: KafkaArgs { kafka_brokers: Some(brokers()), ..KafkaArgs::default() },
        http: HttpArgs { http_addr: Some(http.clone()), ..HttpArgs::default() },
        admin: AdminArgs { admin_addr: Some(admin.clone()), ..AdminArgs::default() },
        ..ServiceArgs::default()
    };
    let settings = args.validate(&Identity { name: "test", http_port: 1, admin_port: 2 }).unwrap();
    let token = CancellationToken::new();
    let (health, pool) = (Health::new(&token), database::pool(&settings.database, "test"));
    let parts = Parts {
        migrations: vec![messaging_migrations()],
        topics: vec![Topic::events(unique("svc-run").leak(), 1)],
        needs: &[Needs { table: "outbox", rights: &["insert"] }],
        api: axum::Router::new().route("/hello", axum::routing::get(|| async { "hello" })),
        admin: axum::Router::new(),
        tasks: Vec::new(),
        consumers: Vec::new(),
    };
    let running = tokio::spawn(service::run(settings, pool, health.clone(), token.clone(), parts));

    let client = reqwest::Client::new();
    let readyz = || async { Some(client.get(format!("http://{admin}/readyz")).send().await.ok()?.status().as_u16()) };
    let readyz = &readyz;
    let becomes = |wanted: u16| {
        eventually(Duration::from_secs(60), move || async move { (readyz().await? == wanted).then_some(()) })
    };
    becomes(200).await;
    let hello = client.get(format!("http://{http}/hello")).send().await.unwrap();
    assert_eq!(hello.text().await.unwrap(), "hello", "whoever is ready also listens");
    assert_eq!(health.readiness().checks.keys().collect::<Vec<_>>(), ["database", "tables"]);
    let healthy = || async { health.healthiness().healthy.then_some(health.healthiness()) };
    let parts = eventually(Duration::from_secs(60), healthy).await.parts;
    assert_eq!(parts.keys().collect::<Vec<_>>(), ["clock", "connections", "database", "kafka", "tables", "topics"]);

    let name: String = sqlx::query_scalar("select current_database()::text").fetch_one(&database.pool).await.unwrap();
    let mut server = PgConnection::connect(&std::env::var("DATABASE_URL").unwrap()).await.unwrap();
    sqlx::query(AssertSqlSafe(format!("alter database {name} allow_connections false")))
        .execute(&mut server)
        .await
        .unwrap();
    database.cut_connections().await;
    becomes(503).await;
    sqlx::query(AssertSqlSafe(format!("alter database {name} allow_connections true")))
        .execute(&mut server)
        .await
        .unwrap();
    becomes(200).await;

    token.cancel();
    running.await.unwrap().unwrap();
}

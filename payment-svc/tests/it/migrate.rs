//! The binary's `migrate` and `migrate-gateway-sim`.

use payment_svc::migrations;
use refinery::{Migration, Runner};
use saga_core::{
    service::{DatabaseSettings, Migrations, messaging_migrations, migrate::migrate},
    testkit::TestDatabase,
};
use sqlx::{AssertSqlSafe, postgres::PgConnectOptions};
use std::{fs, path::Path};
use tokio::process::Command;

#[tokio::test]
async fn each_database_is_brought_up_to_date_by_a_command_that_needs_nothing_else() {
    for (command, migrations, history) in [
        ("migrate", migrations::own(), "refinery_payment"),
        ("migrate-gateway-sim", migrations::gateway(), "refinery_gateway"),
    ] {
        let database = TestDatabase::new(&[]).await;
        let mut binary = Command::new(env!("CARGO_BIN_EXE_payment-svc"));
        let output = binary.arg(command).env_clear().env("DATABASE_URL", &database.url).output().await.unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let applied: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {history}")))
            .fetch_one(&database.pool)
            .await
            .unwrap();
        assert_eq!(usize::try_from(applied).unwrap(), migrations.count(), "{command}");
    }
}

/// The database as a build left it that knew no roles but the superuser's: the messaging tables up to V15, and the
/// payments'.
async fn of_before_roles() -> TestDatabase {
    let messaging = messaging_migrations().runner;
    let before: Vec<Migration> = messaging.get_migrations().iter().filter(|m| m.version() <= 15).cloned().collect();
    let before = Migrations { owner: "messaging", runner: Runner::new(&before) };
    TestDatabase::new(&[before, migrations::own()]).await
}

#[tokio::test]
async fn a_database_of_before_roles_is_given_to_its_role_and_then_migrated_by_it() {
    let database = of_before_roles().await;
    let role: String = sqlx::query_scalar("select current_database()").fetch_one(&database.pool).await.unwrap();
    let superuser = async |sql: String| sqlx::raw_sql(AssertSqlSafe(sql)).execute(&database.pool).await.unwrap();
    superuser(format!("create role {role} login password 'of-a-test'")).await;
    superuser("create sequence alone; create procedure does_nothing() language sql as ''".into()).await;
    let options: PgConnectOptions = database.url.parse().unwrap();
    let options = options.username(&role).password("of-a-test");
    let its_own = DatabaseSettings { options, ..DatabaseSettings::from_url(&database.url).unwrap() };
    migrate(&its_own, &migrations::all()).await.expect_err("it owns nothing yet");

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docker/owners.sql");
    let script = fs::read_to_string(script).unwrap();
    for _ in 0..2 {
        superuser(script.clone()).await;
    }
    migrate(&its_own, &migrations::all()).await.unwrap();
    let others: Vec<String> = sqlx::query_scalar(
        "select oid::regclass::text from pg_class where relnamespace = 'public'::regnamespace and relowner <> $1::regrole
         union all
         select oid::regprocedure::text from pg_proc where pronamespace = 'public'::regnamespace and proowner <> $1::regrole",
    )
    .bind(&role)
    .fetch_all(&database.pool)
    .await
    .unwrap();
    assert_eq!(others, [""; 0], "nothing is left to the superuser");
    superuser(format!("reassign owned by {role} to current_user; drop owned by {role}; drop role {role}")).await;
}

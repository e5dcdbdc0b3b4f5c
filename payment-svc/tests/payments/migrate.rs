//! The binary's `migrate` and `migrate-gateway-sim`.

use payment_svc::migrations;
use saga_core::testkit::TestDatabase;
use tokio::process::Command;

#[tokio::test]
async fn each_database_is_brought_up_to_date_by_a_command_that_needs_nothing_else() {
    for (command, migrations, history) in [
        ("migrate", migrations::payment(), "refinery_payment"),
        ("migrate-gateway-sim", migrations::gateway(), "refinery_gateway"),
    ] {
        let database = TestDatabase::new(&[]).await;
        let mut binary = Command::new(env!("CARGO_BIN_EXE_payment-svc"));
        let output = binary.arg(command).env_clear().env("DATABASE_URL", &database.url).output().await.unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let applied: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) from {history}")))
            .fetch_one(&database.pool)
            .await
            .unwrap();
        assert_eq!(usize::try_from(applied).unwrap(), migrations.count(), "{command}");
    }
}

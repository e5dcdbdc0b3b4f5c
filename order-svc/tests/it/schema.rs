//! The database refuses the rows that the code must never write, by constraints with names.

use futures::future::join_all;
use order_svc::{
    domain::{CancelReason, OrderStatus, StatusName},
    migrations::own,
};
use saga_core::{
    service::{messaging_migrations, saga_migrations},
    testkit::TestDatabase,
};
use sqlx::{AssertSqlSafe, PgPool};
use std::{collections::BTreeSet, process::Stdio};
use tokio::process::Command;
use uuid::Uuid;

async fn database() -> TestDatabase {
    TestDatabase::new(&[own()]).await
}

/// Runs `sql` and returns the constraint that refused it.
async fn refused_by(pool: &PgPool, sql: &str) -> Option<String> {
    let error = sqlx::query(AssertSqlSafe(sql.to_owned())).execute(pool).await.err()?;
    let error = error.into_database_error().expect("the server refused, not the connection");
    Some(error.constraint().map_or_else(|| error.message().to_owned(), ToOwned::to_owned))
}

fn order(id: Uuid, columns: &str, values: &str) -> String {
    format!(
        "insert into orders (id, customer, total, currency, placed_at{columns}) values ('{id}', 'c', 1, 'EUR', now(){values})"
    )
}

#[tokio::test]
async fn every_migration_file_is_embedded() {
    let embedded = own().count();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations/order");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), embedded);
}

#[tokio::test]
async fn fifty_processes_that_migrate_an_empty_database_at_once_all_succeed() {
    let empty = TestDatabase::new(&[]).await;
    let migrate = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_order-svc"));
        command.arg("migrate").env_clear().env("DATABASE_URL", &empty.url).stdin(Stdio::null()).kill_on_drop(true);
        command.output()
    };
    for output in join_all((0..50).map(|_| migrate())).await {
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    for (owner, all) in [("messaging", messaging_migrations()), ("saga", saga_migrations()), ("order", own())] {
        let applied: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from refinery_{owner}")))
            .fetch_one(&empty.pool)
            .await
            .unwrap();
        assert_eq!(usize::try_from(applied).unwrap(), all.count(), "{owner}");
    }
}

#[tokio::test]
async fn a_status_has_its_data_and_no_other() {
    let db = database().await;
    for name in StatusName::ALL {
        for reason in [None, Some(CancelReason::OutOfStock)] {
            for closed in [false, true] {
                let at = closed.then_some(time::OffsetDateTime::UNIX_EPOCH);
                let columns = ", status, reason, closed_at";
                let reason_value = reason.map_or("null".into(), |reason| format!("'{reason}'"));
                let closed_value = if closed { "now()" } else { "null" };
                let values = format!(", '{name}', {reason_value}, {closed_value}");
                let refused = refused_by(&db.pool, &order(Uuid::now_v7(), columns, &values)).await;
                let representable = OrderStatus::from_parts(name, reason, at).is_some();
                assert_eq!(refused.is_none(), representable, "{values}: {refused:?}");
            }
        }
    }
}

#[tokio::test]
async fn every_reason_of_the_code_is_known_to_the_database_and_no_other() {
    let db = database().await;
    for reason in CancelReason::ALL {
        let sql = order(Uuid::now_v7(), ", status, reason", &format!(", 'cancelling', '{reason}'"));
        assert_eq!(refused_by(&db.pool, &sql).await, None, "{reason}");
    }
    let sql = order(Uuid::now_v7(), ", status, reason", ", 'cancelling', 'whim'");
    assert_eq!(refused_by(&db.pool, &sql).await.as_deref(), Some("orders_reason_known"));
}

#[tokio::test]
async fn the_histories_constraint_is_the_declared_graph() {
    let db = database().await;
    let id = Uuid::now_v7();
    sqlx::query(AssertSqlSafe(order(id, "", ""))).execute(&db.pool).await.unwrap();
    let mut allowed = BTreeSet::new();
    let mut sequence = 2;
    for from in StatusName::ALL {
        for to in StatusName::ALL {
            let cancelled = matches!(to, StatusName::Cancelling | StatusName::Cancelled);
            let reason = if cancelled { "'failed'" } else { "null" };
            let sql = format!(
                "insert into order_status_history (order_id, sequence, previous, status, reason, at)
                 values ('{id}', {sequence}, '{from}', '{to}', {reason}, now())"
            );
            match refused_by(&db.pool, &sql).await.as_deref() {
                None => {
                    allowed.insert((from, to));
                    sequence += 1;
                }
                Some(constraint) => assert_eq!(constraint, "order_status_history_walks_the_graph"),
            }
        }
    }
    assert_eq!(allowed, BTreeSet::from(OrderStatus::GRAPH));
}

#[tokio::test]
async fn a_history_cannot_be_edited() {
    let db = database().await;
    let id = Uuid::now_v7();
    sqlx::query(AssertSqlSafe(order(id, "", ""))).execute(&db.pool).await.unwrap();
    let first = "insert into order_status_history (order_id, sequence, status, at) values ($1, 1, 'pending', now())";
    sqlx::query(first).bind(id).execute(&db.pool).await.unwrap();
    for sql in [
        "update order_status_history set at = now()",
        "delete from order_status_history",
        "truncate order_status_history",
    ] {
        let refused = refused_by(&db.pool, sql).await;
        assert_eq!(refused.as_deref(), Some("order_status_history is append-only"), "{sql}");
    }
}

#[tokio::test]
async fn every_constraint_refuses_what_it_is_named_after() {
    let db = database().await;
    let id = Uuid::now_v7();
    sqlx::query(AssertSqlSafe(order(id, "", ""))).execute(&db.pool).await.unwrap();
    let line = |order: Uuid, position: i32, sku: &str, quantity: i64, price: i64| {
        format!("insert into order_line values ('{order}', {position}, '{sku}', {quantity}, {price})")
    };
    let item = |price: i64, currency: &str| {
        format!(
            "insert into catalogue (sku, name, unit_price, currency, sequence) values ('A', 'A', {price}, '{currency}', 1)"
        )
    };
    assert_eq!(refused_by(&db.pool, &line(id, 0, "A", 1, 0)).await, None);
    assert_eq!(refused_by(&db.pool, &item(0, "EUR")).await, None);
    let other = Uuid::now_v7();
    let total = |total: &str| order(other, "", "").replace("'c', 1,", &format!("'c', {total},"));
    let cases = [
        (order(id, "", ""), "orders_pkey"),
        (total("0"), "orders_total_fits"),
        (total("9007199254740992"), "orders_total_fits"),
        (order(other, "", "").replace("EUR", "eur"), "orders_currency_is_iso_4217"),
        (order(other, ", version", ", 0"), "orders_version_positive"),
        (order(other, ", status", ", 'lost'"), "orders_status_known"),
        (line(id, 0, "B", 1, 1), "order_line_pkey"),
        (line(id, 1, "A", 1, 1), "order_line_each_sku_once"),
        (line(other, 0, "A", 1, 1), "order_line_of_an_order"),
        (line(id, 100, "B", 1, 1), "order_line_position_in_range"),
        (line(id, 1, "B", 0, 1), "order_line_quantity_in_range"),
        (line(id, 1, "B", 1_000_001, 1), "order_line_quantity_in_range"),
        (line(id, 1, "B", 1, -1), "order_line_price_not_negative"),
        (item(1, "EUR"), "catalogue_pkey"),
        (item(-1, "EUR").replace("'A'", "'B'"), "catalogue_price_not_negative"),
        (item(1, "eur").replace("'A'", "'B'"), "catalogue_currency_is_iso_4217"),
    ];
    for (sql, constraint) in cases {
        assert_eq!(refused_by(&db.pool, &sql).await.as_deref(), Some(constraint), "{sql}");
    }
}

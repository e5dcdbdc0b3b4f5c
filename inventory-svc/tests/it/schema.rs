//! The schema keeps its own rules, whichever program writes to it; the names of its constraints are part of the code.

use inventory_svc::migrations;
use saga_core::testkit::TestDatabase;

#[test]
fn every_migration_file_is_embedded() {
    let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations/inventory")).unwrap();
    let sql = files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|kind| kind == "sql"));
    assert_eq!(sql.count(), migrations::all().last().unwrap().count());
}

#[tokio::test]
async fn each_constraint_refuses_what_it_is_named_after() {
    let database = TestDatabase::new(&migrations::all()).await;
    let pool = &database.pool;
    sqlx::raw_sql(
        "insert into item (sku, name, unit_price, currency) values ('A', 'a', 1, 'EUR'), ('B', 'b', 1, 'EUR');
         insert into stock (sku, on_hand) values ('A', 5);
         insert into reservation (id, order_id) values ('00000000-0000-0000-0000-000000000001', gen_random_uuid());
         insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reason) values ('A', 'adjusted', 5, 0, 'r')",
    )
    .execute(pool)
    .await
    .unwrap();
    for (constraint, sql) in [
        ("item_pkey", "insert into item (sku, name, unit_price, currency) values ('A', 'a', 1, 'EUR')"),
        ("item_sku_well_formed", "insert into item (sku, name, unit_price, currency) values ('a b', 'a', 1, 'EUR')"),
        ("item_name_length", "update item set name = ''"),
        ("item_price_not_negative", "update item set unit_price = -1"),
        ("item_currency_is_iso_4217", "update item set currency = 'eur'"),
        ("item_version_positive", "update item set version = 0"),
        ("stock_sku_fkey", "insert into stock (sku) values ('Z')"),
        ("stock_on_hand_not_negative", "update stock set on_hand = on_hand - 6"),
        ("stock_limit", "update stock set on_hand = 1000000000001 - reserved"),
        ("stock_reserved_not_negative", "update stock set reserved = -1"),
        ("reservation_status_known", "update reservation set status = 'lost', closed_at = now()"),
        ("reservation_closed_iff_ended", "update reservation set status = 'released'"),
        (
            "reservation_one_per_order",
            "insert into reservation (id, order_id) select gen_random_uuid(), order_id from reservation",
        ),
        ("reservation_line_sku_fkey", "insert into reservation_line select id, 'B', 1 from reservation"),
        ("reservation_line_quantity_positive", "insert into reservation_line select id, 'A', 0 from reservation"),
        (
            "stock_movement_kind_known",
            "insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reservation_id)
             select 'A', 'lost', -1, 0, id from reservation",
        ),
        (
            "stock_movement_direction",
            "insert into stock_movement (sku, kind, on_hand_delta, reserved_delta, reservation_id)
             select 'A', 'reserved', -1, 2, id from reservation",
        ),
        (
            "stock_movement_reason_iff_adjusted",
            "insert into stock_movement (sku, kind, on_hand_delta, reserved_delta) values ('A', 'adjusted', 1, 0)",
        ),
        (
            "stock_movement_reservation_iff_not_adjusted",
            "insert into stock_movement (sku, kind, on_hand_delta, reserved_delta) values ('A', 'reserved', -1, 1)",
        ),
        ("stock_movement_is_append_only", "update stock_movement set reason = 'other'"),
        ("stock_movement_is_append_only", "delete from stock_movement"),
        ("stock_movement_is_append_only", "truncate stock_movement"),
    ] {
        let error = sqlx::query(sql).execute(pool).await.expect_err(sql);
        let named = error.as_database_error().and_then(|error| error.constraint());
        assert_eq!(named, Some(constraint), "{sql}: {error}");
    }
}

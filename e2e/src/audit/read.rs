//! Reads the facts: one statement per table and database, and every topic to its end.

use super::facts::*;
use crate::topics;
use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection, Row, postgres::PgRow};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// The places of the facts: the databases' URLs, and the brokers.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The URL of order-svc's database.
    pub orders: String,
    /// The URL of payment-svc's database.
    pub payments: String,
    /// The URL of inventory-svc's database.
    pub inventory: String,
    /// The URL of the simulated provider's database.
    pub gateway: String,
    /// The addresses of Kafka's brokers.
    pub brokers: String,
}

impl Sources {
    /// Reads everything. The system should be at rest: what moves meanwhile looks like a contradiction.
    pub async fn read(&self) -> Result<Facts> {
        let mut facts = self.read_databases().await?;
        facts.records = topics::read_all(&self.brokers).await?;
        facts.lag = topics::lag(&self.brokers).await?;
        Ok(facts)
    }

    /// Reads the rows of the databases.
    pub async fn read_databases(&self) -> Result<Facts> {
        let mut facts = Facts::default();
        let at = |url: &str| format!("cannot read {url}");
        read_orders(&mut facts, &self.orders).await.with_context(|| at(&self.orders))?;
        read_payments(&mut facts, &self.payments).await.with_context(|| at(&self.payments))?;
        read_inventory(&mut facts, &self.inventory).await.with_context(|| at(&self.inventory))?;
        read_gateway(&mut facts, &self.gateway).await.with_context(|| at(&self.gateway))?;
        let services = [("orders", &self.orders), ("payments", &self.payments), ("inventory", &self.inventory)];
        for (name, url) in services {
            facts.databases.insert(name.to_owned(), read_messaging(url).await.with_context(|| at(url))?);
        }
        Ok(facts)
    }
}

impl Sources {
    /// The rows that the databases have of one order, for the reader that has to find out what went wrong.
    pub async fn story(&self, order: Uuid) -> Result<String> {
        let id = order.to_string();
        let questions = [
            (&self.orders, "select to_jsonb(e) from saga_event e where saga_id::text = $1 order by revision"),
            (&self.payments, "select to_jsonb(f) from participant_fence f where saga_id::text = $1"),
            (&self.payments, "select to_jsonb(i) from participant_intent i where saga_id::text = $1"),
            (&self.payments, "select to_jsonb(l) from ledger_entry l where order_id::text = $1 order by id"),
            (&self.inventory, "select to_jsonb(f) from participant_fence f where saga_id::text = $1"),
            (&self.gateway, r#"select to_jsonb(a) from gateway_authorization a where "order" = $1"#),
            (
                &self.gateway,
                r#"select to_jsonb(m) from gateway_movement m join gateway_authorization a using (reference)
                    where a."order" = $1 order by m.id"#,
            ),
        ];
        let mut lines = Vec::new();
        for (url, sql) in questions {
            let db = &mut PgConnection::connect(url).await?;
            let rows: Vec<serde_json::Value> = sqlx::query_scalar(sql).bind(&id).fetch_all(db).await?;
            lines.extend(rows.iter().map(ToString::to_string));
        }
        Ok(lines.join("\n"))
    }
}

async fn read_orders(facts: &mut Facts, url: &str) -> sqlx::Result<()> {
    let db = &mut PgConnection::connect(url).await?;
    let orders: Vec<(Uuid, String, i64, String, i64)> =
        sqlx::query_as("select id, status, total, currency, version from orders").fetch_all(&mut *db).await?;
    for (id, status, total, currency, version) in orders {
        let order = OrderFact {
            status,
            total,
            currency,
            version,
            lines: BTreeMap::new(),
            sum_of_lines: 0,
            history: Vec::new(),
        };
        facts.orders.insert(id, order);
    }
    let lines: Vec<(Uuid, String, i64, i64)> =
        sqlx::query_as("select order_id, sku, quantity, unit_price from order_line").fetch_all(&mut *db).await?;
    for (id, sku, quantity, price) in lines {
        if let Some(order) = facts.orders.get_mut(&id) {
            order.lines.insert(sku, quantity);
            order.sum_of_lines += quantity * price;
        }
    }
    let history: Vec<(Uuid, i64, Option<String>, String)> = sqlx::query_as(
        "select order_id, sequence, previous, status from order_status_history order by order_id, sequence",
    )
    .fetch_all(&mut *db)
    .await?;
    for (id, sequence, previous, status) in history {
        if let Some(order) = facts.orders.get_mut(&id) {
            order.history.push((sequence, previous, status));
        }
    }
    let keys: Vec<(String, String)> =
        sqlx::query_as("select key, location from idempotency_answer where location is not null")
            .fetch_all(&mut *db)
            .await?;
    let order_of = |location: &str| location.rsplit('/').next().and_then(|id| id.parse().ok());
    facts.keys = keys.into_iter().filter_map(|(key, location)| Some((key, order_of(&location)?))).collect();
    read_sagas(facts, db).await
}

async fn read_sagas(facts: &mut Facts, db: &mut PgConnection) -> sqlx::Result<()> {
    let sagas: Vec<(Uuid, String, i32)> =
        sqlx::query_as("select saga_id, status, revision from saga").fetch_all(&mut *db).await?;
    let sagas = sagas.into_iter().map(|(id, status, revision)| (id, SagaFact { status, revision, log: Vec::new() }));
    facts.sagas = sagas.collect();
    let log: Vec<(Uuid, i32, String)> =
        sqlx::query_as("select saga_id, revision, kind from saga_event order by saga_id, revision")
            .fetch_all(&mut *db)
            .await?;
    for (id, revision, kind) in log {
        if let Some(saga) = facts.sagas.get_mut(&id) {
            saga.log.push((revision, kind));
        }
    }
    let due: Vec<(Uuid, Option<OffsetDateTime>)> =
        sqlx::query_as("select saga_id, due_at from saga_due").fetch_all(&mut *db).await?;
    facts.due = due.into_iter().collect();
    facts.undecided = sqlx::query_scalar("select saga_id from saga_undecided").fetch_all(&mut *db).await?;
    facts.now = Some(sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut *db).await?);
    Ok(())
}

async fn read_payments(facts: &mut Facts, url: &str) -> sqlx::Result<()> {
    let db = &mut PgConnection::connect(url).await?;
    let entries: Vec<(Uuid, String, String, i64, String)> =
        sqlx::query_as("select order_id, movement, account, amount, currency from ledger_entry order by id")
            .fetch_all(&mut *db)
            .await?;
    let entries = entries.into_iter();
    facts.payments = entries
        .map(|(order, movement, account, amount, currency)| LedgerEntry { order, movement, account, amount, currency })
        .collect();
    let balances: Vec<(Uuid, i64, i64, i64)> =
        sqlx::query_as("select order_id, held, captured, refunded from payment").fetch_all(&mut *db).await?;
    facts.balances =
        balances.into_iter().map(|(id, held, captured, refunded)| (id, [held, captured, refunded])).collect();
    Ok(())
}

async fn read_gateway(facts: &mut Facts, url: &str) -> sqlx::Result<()> {
    let db = &mut PgConnection::connect(url).await?;
    let authorization = |row: &PgRow| {
        let balance = Balance {
            authorized: row.try_get("amount")?,
            voided: row.try_get("voided")?,
            captured: row.try_get("captured")?,
            refunded: row.try_get("refunded")?,
        };
        let (reference, order) = (row.try_get("reference")?, row.try_get("order")?);
        Ok(Authorization { reference, order, currency: row.try_get("currency")?, balance, held: row.try_get("held")? })
    };
    let sql =
        r#"select reference, "order", currency, amount, voided, captured, refunded, held from gateway_authorization"#;
    facts.authorizations = all(db, sql, authorization).await?;
    let movements: Vec<(String, String, String, i64)> =
        sqlx::query_as("select reference, key, kind, amount from gateway_movement order by id")
            .fetch_all(&mut *db)
            .await?;
    let movements = movements.into_iter();
    facts.movements =
        movements.map(|(reference, key, kind, amount)| GatewayMovement { reference, key, kind, amount }).collect();
    Ok(())
}

async fn read_inventory(facts: &mut Facts, url: &str) -> sqlx::Result<()> {
    let db = &mut PgConnection::connect(url).await?;
    let stock: Vec<(String, i64, i64)> =
        sqlx::query_as("select sku, on_hand, reserved from stock").fetch_all(&mut *db).await?;
    facts.stock = stock.into_iter().map(|(sku, on_hand, reserved)| (sku, Stock { on_hand, reserved })).collect();
    let movements: Vec<(String, String, i64, i64, Option<Uuid>)> = sqlx::query_as(
        "select sku, kind, on_hand_delta, reserved_delta, reservation_id from stock_movement order by id",
    )
    .fetch_all(&mut *db)
    .await?;
    let movements = movements.into_iter();
    facts.stock_movements = movements
        .map(|(sku, kind, on_hand, reserved, reservation)| StockMovement { sku, kind, on_hand, reserved, reservation })
        .collect();
    let reservations: Vec<(Uuid, Uuid, String)> =
        sqlx::query_as("select id, order_id, status from reservation").fetch_all(&mut *db).await?;
    let mut by_id: BTreeMap<Uuid, Reservation> = BTreeMap::new();
    for (id, order, status) in reservations {
        by_id.insert(id, Reservation { id, order, status, lines: BTreeMap::new() });
    }
    let lines: Vec<(Uuid, String, i64)> =
        sqlx::query_as("select reservation_id, sku, quantity from reservation_line").fetch_all(&mut *db).await?;
    for (id, sku, quantity) in lines {
        if let Some(reservation) = by_id.get_mut(&id) {
            reservation.lines.insert(sku, quantity);
        }
    }
    facts.reservations = by_id.into_values().collect();
    Ok(())
}

async fn read_messaging(url: &str) -> sqlx::Result<Messaging> {
    let db = &mut PgConnection::connect(url).await?;
    let mut found = Messaging::default();
    let row = |row: &PgRow| {
        let (message, topic, key) = (row.try_get("message_id")?, row.try_get("topic")?, row.try_get("key")?);
        let (kind, payload) = (row.try_get("type")?, row.try_get("payload")?);
        Ok((row.try_get("id")?, OutboxRow { message, topic, key, kind, payload }))
    };
    let outbox = all(db, "select id, message_id, topic, key, type, payload from outbox", row).await?;
    found.outbox = outbox.into_iter().collect();
    let parked: Vec<(i64, String)> = sqlx::query_as("select id, status from outbox_parked").fetch_all(&mut *db).await?;
    found.parked = parked.into_iter().collect();
    found.paused = sqlx::query_as("select topic, cause from outbox_pause").fetch_all(&mut *db).await?;
    let actions: Vec<(String, i64)> =
        sqlx::query_as("select action, count(*) from outbox_audit group by action").fetch_all(&mut *db).await?;
    found.operator_actions =
        actions.into_iter().map(|(action, n)| (action, usize::try_from(n).unwrap_or_default())).collect();
    let parked_record = |row: &PgRow| {
        Ok(ParkedRecord {
            consumer: row.try_get("consumer")?,
            line: (row.try_get("topic")?, row.try_get("partition")?, row.try_get("lane")?),
            offset: row.try_get("record_offset")?,
            next_attempt_at: row.try_get("next_attempt_at")?,
            reason: row.try_get("reason")?,
        })
    };
    let sql = "select consumer, topic, partition, lane, record_offset, next_attempt_at, reason
                 from inbox_parked
                order by topic, partition, record_offset";
    found.parked_records = all(db, sql, parked_record).await?;
    let intents: Vec<(Uuid, String, String, String, OffsetDateTime)> =
        sqlx::query_as("select saga_id, step, op, state, due_at from participant_intent").fetch_all(&mut *db).await?;
    found.intents = intents
        .into_iter()
        .map(|(saga, step, op, state, due_at)| IntentFact { saga, step, op, state, due_at })
        .collect();
    found.open_fences = sqlx::query_as(
        "select saga_id, step, run_state, undo_state
           from participant_fence
          where run_state in ('open', 'calling', 'in_doubt') and undo_state <> 'done'
             or undo_state in ('open', 'waiting', 'calling', 'in_doubt')",
    )
    .fetch_all(&mut *db)
    .await?;
    Ok(found)
}

async fn all<T>(
    db: &mut PgConnection,
    sql: &'static str,
    of: impl Fn(&PgRow) -> sqlx::Result<T>,
) -> sqlx::Result<Vec<T>> {
    sqlx::query(sql).fetch_all(db).await?.iter().map(of).collect()
}

//! The audit: one row per action, with its actor and reason, in the transaction that performs it.

use saga_core::{http::Role, outbox::Tx};
use serde_json::Value;

/// Writes a row of the audit.
pub(super) async fn write_in(
    tx: &mut Tx<'_>,
    outbox: &str,
    actor: Role,
    action: &str,
    reason: &str,
    detail: &Value,
) -> Result<(), sqlx::Error> {
    sqlx::query("insert into outbox_audit (outbox, actor, action, reason, detail) values ($1, $2, $3, $4, $5)")
        .bind(outbox)
        .bind(actor.as_str())
        .bind(action)
        .bind(reason)
        .bind(detail)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

//! What a claim came to, in the transaction that settles it: the records of the effect's own code, the fence, the reply.
//! When the process dies here, nothing was written, and the next claim calls the provider again under the same key.

use super::super::{
    batch,
    entry::{CommandEntry, Settlement, StoredIntent},
    fence::{Fence, FenceKey},
    queue::ClaimedIntent,
    store,
    unsettled::Unsettled,
};
use crate::{command::Outcome, consumer::HandleError, outbox::Tx};
use serde_json::Value;
use sqlx::Acquire;
use std::collections::HashMap;

/// Writes the outcome of a claim: its fence, and the reply.
pub(super) async fn write_in(
    tx: &mut Tx<'_>,
    claim: &ClaimedIntent,
    fences: &HashMap<FenceKey, Fence>,
    outcome: Outcome,
    payload: Vec<u8>,
) -> Result<(), Unsettled> {
    let reply = batch::reply(&claim.kind, &claim.intent.cx, &claim.trace, outcome, payload);
    // An older build took commands without a valid reply topic. As an error, it would call each of them without an end.
    let unsendable = reply.validate().inspect_err(|error| {
        tracing::error!(command = %claim.intent.cx.saga.command, saga = %claim.key.saga, kind = claim.kind, %error,
            outcome = outcome.as_str(), "an answer cannot be sent: it stands in the fence alone");
    });
    let replies = if unsendable.is_ok() { vec![reply] } else { Vec::new() };
    Ok(store::write_fences_in(tx, fences, &replies).await.map_err(HandleError::from)?)
}

/// Records under a savepoint, so that `Failed` leaves no writes.
pub(super) async fn record_in(
    tx: &mut Tx<'_>,
    entry: &dyn CommandEntry,
    intent: StoredIntent,
    answer: Value,
) -> Result<Settlement, HandleError> {
    let mut savepoint = tx.begin().await?;
    let settled = entry.record(&mut savepoint, intent, answer).await?;
    if matches!(settled, Settlement::Failed(_)) {
        savepoint.rollback().await?;
    } else {
        savepoint.commit().await?;
    }
    Ok(settled)
}

//! What each command does: prepared in the batch's transaction, performed at the gateway, recorded with the ledger.
//!
//! | command | effect |
//! |---|---|
//! | [`authorize`] | hold the money; undone by [`void`] |
//! | [`void`] | let it go, whether or not it was ever held |
//! | [`capture`] | take it: the order saga's pivot |
//! | [`refund`] | give it back |
//!
//! An answer of another amount or currency than was asked for settles nothing. It is put on record beside what was
//! asked (`provider`), the command fails, and the payment stays in doubt.
//!
//! When the process dies between the call and its record, the intent is still there. The participant asks the gateway
//! again under the command's id and gets the same answer.

pub mod authorize;
pub mod capture;
mod provider;
pub mod refund;
pub mod void;

use crate::{
    domain::{Event, Payment},
    gateway::PaymentGateway,
    store,
};
use anyhow::Context;
use contracts::{
    OrderId,
    payments::{AuthorizePayment, CapturePayment, RefundPayment, VoidPayment},
    topics,
};
use provider::Provider;
use saga_core::{id::CommandId, outbox::Tx, participant::Participant};
use sqlx::PgPool;
use std::sync::Arc;

/// The payments' participant, which answers `payments.commands`. Answers that differ are put on record in `pool`.
pub fn participant(name: &'static str, gateway: Arc<dyn PaymentGateway>, pool: PgPool) -> Participant {
    let provider = Provider::new(gateway, pool);
    Participant::new(name)
        .replies_to(topics::REPLIES)
        .takes_commands_of(topics::COMMAND_SOURCES)
        .external::<AuthorizePayment>(authorize::Authorize(provider.clone()))
        .external_undo::<AuthorizePayment, VoidPayment>(void::Void(provider.clone()))
        .external::<CapturePayment>(capture::Capture(provider.clone()))
        .external::<RefundPayment>(refund::Refund(provider))
}

/// Applies `event` to the order's payment, and saves the payment and its movements.
async fn apply_in(tx: &mut Tx<'_>, payment: Payment, command: CommandId, event: Event) -> anyhow::Result<()> {
    let (payment, movements) = payment.apply(event)?;
    store::save_in(tx, &payment, command, &movements).await?;
    Ok(())
}

async fn lock_in(tx: &mut Tx<'_>, order: OrderId) -> anyhow::Result<Payment> {
    store::lock_in(tx, order)
        .await?
        .with_context(|| format!("the payment of order {order} was there when it was prepared"))
}

/// The reference in a `Done` of the gateway, which names what it did.
fn reference(reference: Option<String>) -> anyhow::Result<String> {
    reference.context("the gateway did it and gave no reference")
}

//! What each command does: prepared in the batch's transaction, performed at the gateway, recorded with the ledger.
//!
//! | command | effect |
//! |---|---|
//! | [`authorize`] | hold the money; undone by [`void`] |
//! | [`void`] | let it go, whether or not it was ever held |
//! | [`capture`] | take it: the order saga's pivot |
//! | [`refund`] | give it back |
//!
//! When the process dies between the call and its record, the intent is still there: the gateway is asked again under
//! the command's id and gives the same answer.

pub mod authorize;
pub mod capture;
pub mod refund;
pub mod void;

use crate::{
    domain::{Event, Payment},
    gateway::{Answer, PaymentGateway, Request},
    store,
};
use anyhow::Context;
use contracts::{
    OrderId,
    payments::{AuthorizePayment, CapturePayment, RefundPayment, VoidPayment},
};
use saga_core::{
    id::CommandId,
    outbox::Tx,
    participant::{CommandContext, Participant, Performed},
};
use std::sync::Arc;

/// The payments' participant: what `payments.commands` is answered by.
pub fn participant(name: &'static str, gateway: Arc<dyn PaymentGateway>) -> Participant {
    Participant::new(name)
        .external::<AuthorizePayment>(authorize::Authorize(gateway.clone()))
        .external_undo::<AuthorizePayment, VoidPayment>(void::Void(gateway.clone()))
        .external::<CapturePayment>(capture::Capture(gateway.clone()))
        .external::<RefundPayment>(refund::Refund(gateway))
}

/// Asks the gateway under the command's id.
async fn ask(gateway: &dyn PaymentGateway, cx: &CommandContext, request: &Request) -> Performed<Answer> {
    match gateway.perform(cx.idempotency_key(), request).await {
        Ok(answer) => Performed::Answered(answer),
        Err(doubt) => Performed::InDoubt(doubt.to_string()),
    }
}

/// Applies `event` to the order's payment and writes what follows.
async fn happened(tx: &mut Tx<'_>, payment: Payment, command: CommandId, event: Event) -> anyhow::Result<()> {
    let (payment, movements) = payment.apply(event)?;
    store::save(tx, &payment, command, &movements).await?;
    Ok(())
}

async fn locked(tx: &mut Tx<'_>, order: OrderId) -> anyhow::Result<Payment> {
    store::lock(tx, order)
        .await?
        .with_context(|| format!("the payment of order {order} was there when it was prepared"))
}

/// A `Done` of the gateway names what it did.
fn reference(reference: Option<String>) -> anyhow::Result<String> {
    reference.context("the gateway did it and gave no reference")
}

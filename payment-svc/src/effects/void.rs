//! Let go of what an authorization held, or may have held.
//!
//! The gateway is asked by the authorization's idempotency key, not by its reference: so it is safe where nobody knows
//! whether the authorization ever came, and keeps one that is still under way from holding money later.

use super::{ask, happened, locked};
use crate::{
    domain::{Event, Status},
    gateway::{Answer, PaymentGateway, Request},
};
use anyhow::Context;
use async_trait::async_trait;
use contracts::payments::{AuthorizePayment, Authorized, VoidPayment};
use saga_core::{
    command::Done,
    id::CommandId,
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalUndo, Intent, Performed, Prepare, Ran},
};
use std::sync::Arc;

pub(super) struct Void(pub(super) Arc<dyn PaymentGateway>);

#[async_trait]
impl ExternalUndo<AuthorizePayment, VoidPayment> for Void {
    /// The key of the authorization.
    type Prepared = CommandId;
    type Answer = Answer;

    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &VoidPayment,
        _ran: Ran<Authorized>,
    ) -> anyhow::Result<Prepare<VoidPayment, CommandId>> {
        let authorize_key = cx.undoes.context("an undo that runs knows what it undoes")?;
        let payment = locked(tx, command.order).await?;
        if payment.authorize_key == authorize_key && matches!(payment.status, Status::Captured { .. }) {
            return Ok(Prepare::Decided(Decision::Failed("the payment is captured: refund it instead".into())));
        }
        Ok(Prepare::Call(authorize_key))
    }

    async fn perform(&self, intent: &Intent<VoidPayment, CommandId>) -> Performed<Answer> {
        ask(&*self.0, &intent.cx, &Request::Void { authorization_key: intent.prepared }).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<VoidPayment, CommandId>,
        answer: Answer,
    ) -> anyhow::Result<Decision<VoidPayment>> {
        let (reference, amount) = match answer {
            Answer::Done { reference, amount } => (reference, amount),
            Answer::Refused { code } => {
                return Ok(Decision::Failed(format!("the gateway does not let go of the money: {code}")));
            }
        };
        let payment = locked(tx, intent.command.order).await?;
        // A payment that was tried anew since is another authorization's.
        if payment.authorize_key == intent.prepared {
            let released = reference.filter(|_| amount.is_some());
            happened(tx, payment, intent.cx.idempotency_key(), Event::Voided { released }).await?;
        }
        Ok(Decision::Done(Done {}))
    }
}

//! The effect of `RefundPayment`: give back what was captured, all of it or a part.

use super::{Provider, happened, locked, reference};
use crate::{
    domain::{Event, Refusal},
    gateway::{Answer, Request},
    store,
};
use async_trait::async_trait;
use contracts::payments::{RefundPayment, RefundRefused, Refunded};
use saga_core::{
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalEffect, Intent, Performed, Prepare},
};

pub(super) struct Refund(pub(super) Provider);

#[async_trait]
impl ExternalEffect<RefundPayment> for Refund {
    /// The gateway's reference of the authorization.
    type Prepared = String;
    type Answer = Answer;

    /// Sets the amount aside, so that refunds that are under way side by side never give back more than was captured.
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &RefundPayment,
    ) -> anyhow::Result<Prepare<RefundPayment, String>> {
        let payment = store::lock(tx, command.order).await?;
        let authorization =
            match payment.as_ref().ok_or(Refusal::NotCaptured).and_then(|p| p.refundable(command.amount)) {
                Ok(authorization) => authorization.to_owned(),
                Err(refusal) => {
                    let reason = refusal.reason().into();
                    return Ok(Prepare::Decided(Decision::Rejected(RefundRefused { reason })));
                }
            };
        if let Some(payment) = payment {
            let event = Event::RefundBegun { amount: command.amount.amount };
            happened(tx, payment, cx.idempotency_key(), event).await?;
        }
        Ok(Prepare::Call(authorization))
    }

    async fn perform(&self, intent: &Intent<RefundPayment, String>) -> Performed<Answer> {
        let request = Request::Refund { authorization: intent.prepared.clone(), amount: intent.command.amount };
        self.0.ask(&intent.cx, intent.command.order, &request, intent.command.amount).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<RefundPayment, String>,
        answer: Answer,
    ) -> anyhow::Result<Decision<RefundPayment>> {
        let payment = locked(tx, intent.command.order).await?;
        let amount = intent.command.amount;
        let command = intent.cx.idempotency_key();
        match answer {
            Answer::Done { reference: refund, .. } => {
                let refund = reference(refund)?;
                let event = Event::Refunded { refund: refund.clone(), amount: amount.amount };
                happened(tx, payment, command, event).await?;
                Ok(Decision::Done(Refunded { refund, amount }))
            }
            Answer::Refused { code } => {
                happened(tx, payment, command, Event::RefundRefused { amount: amount.amount }).await?;
                Ok(Decision::Rejected(RefundRefused { reason: code }))
            }
        }
    }
}

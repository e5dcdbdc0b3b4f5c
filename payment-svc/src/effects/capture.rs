//! The effect of `CapturePayment`: take the money that is held.

use super::{Provider, happened, locked, reference};
use crate::{
    domain::{Event, Refusal},
    gateway::{Answer, Request},
    store,
};
use async_trait::async_trait;
use contracts::payments::{CapturePayment, CaptureRefused, Captured};
use saga_core::{
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalEffect, Intent, Performed, Prepare},
};

pub(super) struct Capture(pub(super) Provider);

#[async_trait]
impl ExternalEffect<CapturePayment> for Capture {
    /// The gateway's reference of the authorization.
    type Prepared = String;
    type Answer = Answer;

    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        _cx: &CommandContext,
        command: &CapturePayment,
    ) -> anyhow::Result<Prepare<CapturePayment, String>> {
        let payment = store::lock(tx, command.order).await?;
        let authorization = payment.as_ref().ok_or(Refusal::NotAuthorized).and_then(|p| p.capturable(command.amount));
        Ok(match authorization {
            Ok(authorization) => Prepare::Call(authorization.to_owned()),
            Err(refusal) => Prepare::Decided(Decision::Rejected(CaptureRefused { reason: refusal.reason().into() })),
        })
    }

    async fn perform(&self, intent: &Intent<CapturePayment, String>) -> Performed<Answer> {
        let request = Request::Capture { authorization: intent.prepared.clone(), amount: intent.command.amount };
        self.0.ask(&intent.cx, intent.command.order, &request, intent.command.amount).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<CapturePayment, String>,
        answer: Answer,
    ) -> anyhow::Result<Decision<CapturePayment>> {
        match answer {
            Answer::Done { reference: capture, .. } => {
                let capture = reference(capture)?;
                let payment = locked(tx, intent.command.order).await?;
                let event = Event::Captured { capture: capture.clone() };
                happened(tx, payment, intent.cx.idempotency_key(), event).await?;
                Ok(Decision::Done(Captured { capture, amount: intent.command.amount }))
            }
            Answer::Refused { code } => Ok(Decision::Rejected(CaptureRefused { reason: code })),
        }
    }
}

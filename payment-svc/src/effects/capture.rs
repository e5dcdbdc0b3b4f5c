//! The effect of `CapturePayment`: take the money that is held.
//!
//! A refusal says that certainly nothing was captured. A row that is absent says no such thing: it may be lost (an
//! asynchronous failover, a restore) while the gateway has taken the money.

use super::{Provider, apply_in, lock_in, reference};
use crate::{
    domain::{Event, MovementKind, Status},
    gateway::{GatewayAnswer, Request},
    store,
};
use async_trait::async_trait;
use contracts::payments::{CapturePayment, CaptureRefused, Captured};
use saga_core::{
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalEffect, Intent, Performed, Prepare},
};

/// The answer to a command that follows an authorization, where no authorization is on record.
const NOT_ON_RECORD: &str = "this service has no record of an authorization of this order's payment, although one was \
    answered: rows were lost, or the orchestrator asks too early; compare the payment with the gateway's books";

pub(super) struct Capture(pub(super) Provider);

#[async_trait]
impl ExternalEffect<CapturePayment> for Capture {
    /// The gateway's reference of the authorization.
    type Prepared = String;
    type Answer = GatewayAnswer;

    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &CapturePayment,
    ) -> anyhow::Result<Prepare<CapturePayment, String>> {
        let amount = command.amount;
        let payment = match store::lock_in(tx, command.order).await? {
            Some(payment) if payment.status != Status::Authorizing => payment,
            _ => return Ok(Prepare::Decided(Decision::Failed(NOT_ON_RECORD.into()))),
        };
        let refusal = match payment.capturable(amount) {
            Ok(authorization) => return Ok(Prepare::Call(authorization.to_owned())),
            Err(refusal) => refusal,
        };
        let captured =
            store::entered_reference_in(tx, command.order, cx.idempotency_key(), MovementKind::Capture).await?;
        Ok(match captured {
            Some(capture) => Prepare::Decided(Decision::Done(Captured { capture, amount })),
            None => Prepare::Decided(Decision::Rejected(CaptureRefused { reason: refusal.reason().into() })),
        })
    }

    async fn perform(&self, intent: &Intent<CapturePayment, String>) -> Performed<GatewayAnswer> {
        let request = Request::Capture { authorization: intent.prepared.clone(), amount: intent.command.amount };
        self.0.ask(&intent.cx, intent.command.order, &request, intent.command.amount).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<CapturePayment, String>,
        answer: GatewayAnswer,
    ) -> anyhow::Result<Decision<CapturePayment>> {
        match answer {
            GatewayAnswer::Done { reference: capture, .. } => {
                let capture = reference(capture)?;
                let payment = lock_in(tx, intent.command.order).await?;
                let event = Event::Captured { capture: capture.clone() };
                apply_in(tx, payment, intent.cx.idempotency_key(), event).await?;
                Ok(Decision::Done(Captured { capture, amount: intent.command.amount }))
            }
            GatewayAnswer::Refused { code } => Ok(Decision::Rejected(CaptureRefused { reason: code })),
        }
    }
}

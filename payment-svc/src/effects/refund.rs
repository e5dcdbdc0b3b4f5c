//! The effect of `RefundPayment`: give back what was captured, all of it or a part.
//!
//! A refusal says that certainly nothing was given back by this command. So a row that is absent, or older than the
//! capture, is no refusal: rows may be lost. Neither is an amount that only a refund under way stands against: that
//! refund may be this command's own. (What a lost refund has set aside stays so, until an operator compares the books.)

use super::{Provider, apply_in, lock_in, reference};
use crate::{
    domain::{Event, MovementKind, Refusal, Status},
    gateway::{GatewayAnswer, Request},
    store,
};
use async_trait::async_trait;
use contracts::payments::{RefundPayment, RefundRefused, Refunded};
use saga_core::{
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalEffect, Intent, Performed, Prepare},
};

/// The answer to a refund of a payment that is not on record.
const NOT_ON_RECORD: &str = "this service has no record of a capture of this order's payment: rows were lost, or nothing \
    was ever captured; compare the payment with the gateway's books";

/// The answer to a refund that a refund under way leaves no room for.
const UNDER_WAY: &str = "refunds under way leave no room for this one: ask again when they are answered; if none is, \
    rows were lost: compare the payment with the gateway's books";

pub(super) struct Refund(pub(super) Provider);

#[async_trait]
impl ExternalEffect<RefundPayment> for Refund {
    /// The gateway's reference of the authorization.
    type Prepared = String;
    type Answer = GatewayAnswer;

    /// Sets the amount aside, so that refunds that are under way side by side never give back more than was captured.
    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &RefundPayment,
    ) -> anyhow::Result<Prepare<RefundPayment, String>> {
        let (amount, key) = (command.amount, cx.idempotency_key());
        let payment = match store::lock_in(tx, command.order).await? {
            Some(payment) if !matches!(payment.status, Status::Authorizing | Status::Authorized { .. }) => payment,
            _ => return Ok(Prepare::Decided(Decision::Failed(NOT_ON_RECORD.into()))),
        };
        if let Some(refund) = store::entered_reference_in(tx, command.order, key, MovementKind::Refund).await? {
            return Ok(Prepare::Decided(Decision::Done(Refunded { refund, amount })));
        }
        Ok(match payment.refundable(amount).map(str::to_owned) {
            Ok(authorization) => {
                apply_in(tx, payment, key, Event::RefundBegun { amount: amount.amount }).await?;
                Prepare::Call(authorization)
            }
            Err(Refusal::RefundUnderWay) => Prepare::Decided(Decision::Failed(UNDER_WAY.into())),
            Err(refusal) => Prepare::Decided(Decision::Rejected(RefundRefused { reason: refusal.reason().into() })),
        })
    }

    async fn perform(&self, intent: &Intent<RefundPayment, String>) -> Performed<GatewayAnswer> {
        let request = Request::Refund { authorization: intent.prepared.clone(), amount: intent.command.amount };
        self.0.ask(&intent.cx, intent.command.order, &request, intent.command.amount).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<RefundPayment, String>,
        answer: GatewayAnswer,
    ) -> anyhow::Result<Decision<RefundPayment>> {
        let payment = lock_in(tx, intent.command.order).await?;
        let amount = intent.command.amount;
        let command = intent.cx.idempotency_key();
        match answer {
            GatewayAnswer::Done { reference: refund, .. } => {
                let refund = reference(refund)?;
                let event = Event::Refunded { refund: refund.clone(), amount: amount.amount };
                apply_in(tx, payment, command, event).await?;
                Ok(Decision::Done(Refunded { refund, amount }))
            }
            GatewayAnswer::Refused { code } => {
                apply_in(tx, payment, command, Event::RefundRefused { amount: amount.amount }).await?;
                Ok(Decision::Rejected(RefundRefused { reason: code }))
            }
        }
    }
}

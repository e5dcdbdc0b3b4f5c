//! The effect of `AuthorizePayment`: hold the money.

use super::{Provider, apply_in, lock_in, reference};
use crate::{
    domain::{Event, Payment, Refusal, Status},
    gateway::{GatewayAnswer, Request},
    store,
};
use async_trait::async_trait;
use contracts::payments::{AuthorizePayment, Authorized, Declined};
use saga_core::{
    card::holds_a_card_number,
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalEffect, Intent, Performed, Prepare},
};

/// The longest customer or token, in bytes; the gateway and the database take as much.
const MAX_TEXT: usize = 200;

pub(super) struct Authorize(pub(super) Provider);

#[async_trait]
impl ExternalEffect<AuthorizePayment> for Authorize {
    type Prepared = ();
    type Answer = GatewayAnswer;

    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &AuthorizePayment,
    ) -> anyhow::Result<Prepare<AuthorizePayment, ()>> {
        if let Some(refusal) = objection(command) {
            return Ok(refused(refusal));
        }
        let payment = Payment {
            order: command.order,
            customer: command.customer.clone(),
            amount: command.amount,
            authorize_key: cx.idempotency_key(),
            status: Status::Authorizing,
        };
        if [&command.customer, &command.method].into_iter().any(|text| holds_a_card_number(text)) {
            // An older build called the provider for such a command. Its fence may be lost, and a refusal would mean
            // that nothing happened.
            let own = store::lock_in(tx, command.order).await?;
            let own = own.filter(|found| found.authorize_key == payment.authorize_key);
            return Ok(own.map_or_else(|| refused(Refusal::CardNumber), again));
        }
        if store::insert_in(tx, &payment).await? {
            return Ok(Prepare::Call(()));
        }
        let found = lock_in(tx, command.order).await?;
        if found.authorize_key == payment.authorize_key {
            return Ok(again(found));
        }
        if found.may_authorize_again() {
            store::save_in(tx, &payment, cx.idempotency_key(), &[]).await?;
            return Ok(Prepare::Call(()));
        }
        Ok(refused(Refusal::AlreadyPaid))
    }

    async fn perform(&self, intent: &Intent<AuthorizePayment, ()>) -> Performed<GatewayAnswer> {
        let AuthorizePayment { order, customer, amount, method } = &intent.command;
        let request = Request::Authorize {
            order: order.to_string(),
            customer: customer.clone(),
            amount: *amount,
            method: method.clone(),
        };
        self.0.ask(&intent.cx, intent.command.order, &request, intent.command.amount).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<AuthorizePayment, ()>,
        answer: GatewayAnswer,
    ) -> anyhow::Result<Decision<AuthorizePayment>> {
        let payment = lock_in(tx, intent.command.order).await?;
        let command = intent.cx.idempotency_key();
        match answer {
            GatewayAnswer::Done { reference: authorization, .. } => {
                let authorization = reference(authorization)?;
                apply_in(tx, payment, command, Event::Authorized { authorization: authorization.clone() }).await?;
                Ok(Decision::Done(Authorized { authorization, amount: intent.command.amount }))
            }
            GatewayAnswer::Refused { code } => {
                apply_in(tx, payment, command, Event::Declined { reason: code.clone() }).await?;
                Ok(Decision::Rejected(Declined { reason: code }))
            }
        }
    }
}

/// Answers for this command's own payment, whose fence was lost. A refusal would mean that nothing happened.
fn again(payment: Payment) -> Prepare<AuthorizePayment, ()> {
    match payment.status {
        Status::Authorizing => Prepare::Call(()),
        Status::Authorized { authorization } | Status::Captured { authorization, .. } => {
            Prepare::Decided(Decision::Done(Authorized { authorization, amount: payment.amount }))
        }
        Status::Declined { reason } => Prepare::Decided(Decision::Rejected(Declined { reason })),
        Status::Voided => Prepare::Decided(Decision::Rejected(Declined { reason: "voided".into() })),
    }
}

fn objection(command: &AuthorizePayment) -> Option<Refusal> {
    let sound = |text: &str| !text.is_empty() && text.len() <= MAX_TEXT && !text.contains('\0');
    if command.amount.amount <= 0 {
        Some(Refusal::InvalidAmount)
    } else if !sound(&command.customer) || !sound(&command.method) {
        Some(Refusal::InvalidText)
    } else {
        None
    }
}

fn refused(refusal: Refusal) -> Prepare<AuthorizePayment, ()> {
    Prepare::Decided(Decision::Rejected(Declined { reason: refusal.reason().into() }))
}

//! Let go of what an authorization held, or may have held.
//!
//! The effect asks the gateway by the authorization's idempotency key, not by its reference. So it is safe where it is
//! not known whether the authorization ever came. It also keeps one that is still under way from holding money later.
//! It needs no row of ours: after an asynchronous failover the payment may be lost while the gateway holds its money.
//! Money that the gateway then lets go is entered in the ledger all the same: otherwise the ledger would differ from
//! the gateway's.

use super::{Provider, apply_in};
use crate::{
    domain::{Event, Movement, Payment, Released, Status},
    gateway::GatewayAnswer,
    store,
};
use anyhow::{Context, ensure};
use async_trait::async_trait;
use contracts::payments::{AuthorizePayment, Authorized, VoidPayment};
use saga_core::{
    command::{Done, Happened},
    id::CommandId,
    outbox::Tx,
    participant::{CommandContext, Decision, ExternalUndo, Intent, Performed, Prepare},
};

pub(super) struct Void(pub(super) Provider);

#[async_trait]
impl ExternalUndo<AuthorizePayment, VoidPayment> for Void {
    /// The idempotency key of the authorization.
    type Prepared = CommandId;
    type Answer = GatewayAnswer;

    async fn prepare(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: &VoidPayment,
        _happened: Happened<Authorized>,
    ) -> anyhow::Result<Prepare<VoidPayment, CommandId>> {
        let authorize_key = cx.undoes.context("an undo that runs knows what it undoes")?;
        let payment = store::lock_in(tx, command.order).await?.filter(|payment| payment.authorize_key == authorize_key);
        if payment.is_some_and(|payment| matches!(payment.status, Status::Captured { .. })) {
            return Ok(Prepare::Decided(Decision::Failed("the payment is captured: refund it instead".into())));
        }
        Ok(Prepare::Call(authorize_key))
    }

    async fn perform(&self, intent: &Intent<VoidPayment, CommandId>) -> Performed<GatewayAnswer> {
        self.0.ask_to_void(&intent.cx, intent.command.order, intent.prepared).await
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<VoidPayment, CommandId>,
        answer: GatewayAnswer,
    ) -> anyhow::Result<Decision<VoidPayment>> {
        let (reference, amount) = match answer {
            GatewayAnswer::Done { reference, amount } => (reference, amount),
            GatewayAnswer::Refused { code } => {
                return Ok(Decision::Failed(format!("the gateway does not let go of the money: {code}")));
            }
        };
        let released = reference.zip(amount).map(|(reference, amount)| Released { reference, amount });
        let (order, command) = (intent.command.order, intent.cx.idempotency_key());
        match store::lock_in(tx, order).await? {
            // The void's record was lost after it was entered here; the gateway repeats its answer.
            Some(payment) if payment.authorize_key == intent.prepared && payment.status == Status::Voided => {}
            Some(payment) if payment.authorize_key == intent.prepared => {
                apply_in(tx, payment, command, Event::Voided { released }).await?;
            }
            // No row is of this authorization: it was lost, or a payment that was tried anew has its place.
            found => {
                if let Some(released) = released {
                    tracing::warn!(%order, reference = released.reference, "the gateway held money that this database has no record of, and \
                        let it go; rows were lost: compare the ledger with the gateway's");
                    enter_lost_in(tx, found, &intent, &released).await?;
                }
            }
        }
        Ok(Decision::Done(Done {}))
    }
}

/// Enters the money of an authorization that no row is of, which the gateway held and let go.
async fn enter_lost_in(
    tx: &mut Tx<'_>,
    found: Option<Payment>,
    intent: &Intent<VoidPayment, CommandId>,
    released: &Released,
) -> anyhow::Result<()> {
    let payment = match found {
        Some(payment) => payment,
        None => {
            let payment = Payment::lost(intent.command.order, released.amount, intent.prepared);
            ensure!(store::insert_in(tx, &payment).await?, "a payment was made meanwhile");
            payment
        }
    };
    let movements = Movement::held_and_let_go(released);
    store::save_in(tx, &payment, intent.cx.idempotency_key(), &movements).await?;
    Ok(())
}

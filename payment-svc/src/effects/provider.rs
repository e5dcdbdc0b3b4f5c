//! The provider as the effects ask it: under the command's id, and with the amount that an answer has to agree with.

use crate::{
    gateway::{Doubt, GatewayAnswer, PaymentGateway, Request},
    store::{self, Difference},
};
use contracts::{OrderId, money::Money};
use saga_core::{
    command::{Failed, Why},
    id::CommandId,
    participant::{CommandContext, Performed},
    transaction::Bound,
};
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};

/// The bound of the database's work beside a call: it is part of the time that the call may take.
const DATABASE_BOUND: Bound = Bound::new(Duration::from_millis(900));

/// The pause before a question that the database prevented is asked again.
const DATABASE_PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Provider {
    gateway: Arc<dyn PaymentGateway>,
    pool: PgPool,
}

impl Provider {
    pub(super) fn new(gateway: Arc<dyn PaymentGateway>, pool: PgPool) -> Self {
        Self { gateway, pool }
    }

    /// Asks the gateway under the command's id to move `asked`. An answer of another amount or currency is put on
    /// record, and settles nothing.
    pub(super) async fn ask(
        &self,
        cx: &CommandContext,
        order: OrderId,
        request: &Request,
        asked: Money,
    ) -> Performed<GatewayAnswer> {
        self.ask_for(cx, order, request, &[asked]).await
    }

    /// Asks the gateway to let go of what is, or may be, held under `authorize_key`. Where the authorization itself was
    /// answered with another amount, the gateway may let go of that. Without a record of the payment, any answer is
    /// right.
    pub(super) async fn ask_to_void(
        &self,
        cx: &CommandContext,
        order: OrderId,
        authorize_key: CommandId,
    ) -> Performed<GatewayAnswer> {
        match store::may_be_held(&self.pool, DATABASE_BOUND, order, authorize_key).await {
            Ok(held) => self.ask_for(cx, order, &Request::Void { authorization_key: authorize_key }, &held).await,
            Err(error) => Performed::NotMade {
                reason: format!("what is held could not be read: {error}"),
                again_after: DATABASE_PAUSE,
            },
        }
    }

    /// Accepts an answer of any amount in `right`, whose first was asked for; of any amount at all where `right` is
    /// empty.
    async fn ask_for(
        &self,
        cx: &CommandContext,
        order: OrderId,
        request: &Request,
        right: &[Money],
    ) -> Performed<GatewayAnswer> {
        let answer = match self.gateway.perform(cx.idempotency_key(), request).await {
            Ok(answer) => answer,
            Err(doubt @ Doubt::CircuitOpen { again_after, .. }) => {
                return Performed::NotMade { reason: doubt.to_string(), again_after };
            }
            Err(doubt @ Doubt::NotLetIn) => return Performed::NotLetIn { reason: doubt.to_string() },
            Err(doubt) => return Performed::InDoubt(doubt.into()),
        };
        match (&answer, right.first()) {
            (GatewayAnswer::Done { reference, amount: Some(answered) }, Some(&asked)) if !right.contains(answered) => {
                let difference = Difference {
                    order,
                    command: cx.idempotency_key(),
                    movement: request.operation().name(),
                    asked,
                    answered: *answered,
                    reference: reference.clone().unwrap_or_default(),
                };
                self.differs(difference).await
            }
            _ => Performed::Answered(answer),
        }
    }

    async fn differs(&self, difference: Difference) -> Performed<GatewayAnswer> {
        let reason = difference.reason();
        metrics::counter!("payment_differences_total", "operation" => difference.movement).increment(1);
        tracing::error!(order = %difference.order, command = %difference.command, reference = difference.reference,
            "{reason}: the payment is in doubt; compare it with the gateway's books");
        match store::record_difference(&self.pool, DATABASE_BOUND, &difference).await {
            Ok(()) => Performed::Contradiction(reason),
            // The answer is not on record yet: asked again, the gateway repeats it.
            Err(error) => {
                let reason = format!("{reason}, which could not be put on record: {error}");
                Performed::InDoubt(Failed::new(Why::Contradiction, &reason))
            }
        }
    }
}

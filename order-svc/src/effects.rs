//! The order saga's effects on orders: open, confirm, cancel, in the transaction in which the engine takes the step.
//!
//! Invariant: an order's status and its saga move together or not at all. When the process dies here, neither moved,
//! and the reply that moved them is read again.

use crate::{
    domain::{CancelReason, PlacedOrder, StatusChange},
    order_saga::step,
    store::{self, StoreError},
};
use async_trait::async_trait;
use contracts::OrderId;
use saga_core::{
    clock,
    outbox::{AppendError, Tx},
    saga::{
        Failure, FailureKind,
        local::{LocalCall, LocalEffect, LocalError},
    },
};
use serde::Deserialize;

/// Writes the order: its lines, the first row of its history, and `OrderPlaced`.
#[derive(Debug, Clone, Copy)]
pub struct OpenOrder;

/// Confirms the order: the money is taken.
#[derive(Debug, Clone, Copy)]
pub struct ConfirmOrder;

/// Sets the order to cancelling, with the saga's reason: the saga has begun to undo it.
#[derive(Debug, Clone, Copy)]
pub struct OrderTurned;

/// Sets the order to cancelled, with the saga's reason: everything else is undone.
#[derive(Debug, Clone, Copy)]
pub struct CancelOrder;

#[async_trait]
impl LocalEffect for OpenOrder {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        let order = PlacedOrder::deserialize(call.input).map_err(anyhow::Error::from)?;
        Ok(store::insert_in(tx, &order).await?)
    }
}

#[async_trait]
impl LocalEffect for ConfirmOrder {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        self.run_many(tx, std::slice::from_ref(call)).await
    }

    async fn run_many(&self, tx: &mut Tx<'_>, calls: &[LocalCall<'_>]) -> Result<(), LocalError> {
        change_in(tx, calls, |_| StatusChange::Confirm).await
    }
}

#[async_trait]
impl LocalEffect for CancelOrder {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        self.run_many(tx, std::slice::from_ref(call)).await
    }

    async fn run_many(&self, tx: &mut Tx<'_>, calls: &[LocalCall<'_>]) -> Result<(), LocalError> {
        cancel_in(tx, calls, StatusChange::Cancel).await
    }
}

#[async_trait]
impl LocalEffect for OrderTurned {
    async fn run(&self, tx: &mut Tx<'_>, call: &LocalCall<'_>) -> Result<(), LocalError> {
        self.run_many(tx, std::slice::from_ref(call)).await
    }

    async fn run_many(&self, tx: &mut Tx<'_>, calls: &[LocalCall<'_>]) -> Result<(), LocalError> {
        cancel_in(tx, calls, StatusChange::RequestCancel).await
    }
}

async fn cancel_in(
    tx: &mut Tx<'_>,
    calls: &[LocalCall<'_>],
    to: fn(CancelReason) -> StatusChange,
) -> Result<(), LocalError> {
    change_in(tx, calls, |call| to(call.failure.map_or(CancelReason::Failed, reason_of))).await?;
    let why = |call: &LocalCall<'_>| Some((OrderId(call.saga.0), call.failure?.why?.as_str()));
    let causes: Vec<_> = calls.iter().filter_map(why).collect();
    Ok(store::note_causes_in(tx, &causes).await?)
}

async fn change_in(
    tx: &mut Tx<'_>,
    calls: &[LocalCall<'_>],
    to: impl Fn(&LocalCall<'_>) -> StatusChange + Send,
) -> Result<(), LocalError> {
    let changes: Vec<_> = calls.iter().map(|call| (OrderId(call.saga.0), to(call))).collect();
    Ok(store::change_in(tx, &changes, clock::now()).await?)
}

/// The reason that the customer gets for a saga's failure. The reasons are few and stable; the details are in the saga.
pub fn reason_of(failure: &Failure) -> CancelReason {
    match failure.kind {
        FailureKind::Rejected => match failure.step.as_str() {
            step::AUTHORIZE => CancelReason::PaymentDeclined,
            step::RESERVE => CancelReason::OutOfStock,
            step::CAPTURE => CancelReason::PaymentNotCaptured,
            _ => CancelReason::Failed,
        },
        FailureKind::Cancelled => match failure.reason.as_deref().map(str::parse) {
            Some(Ok(CancelReason::CancelledByCustomer)) => CancelReason::CancelledByCustomer,
            // Any other caller cancels a saga at the inspection, with a reason in words of its own.
            _ => CancelReason::CancelledByOperator,
        },
        FailureKind::Deadline => CancelReason::TimedOut,
        FailureKind::Failed => CancelReason::Failed,
    }
}

impl From<StoreError> for LocalError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Database(error) => Self::Database(error),
            StoreError::Append(AppendError::Database(error)) => Self::Database(error),
            error @ (StoreError::NotAllowed { .. }
            | StoreError::Unknown(_)
            | StoreError::Encode(_)
            | StoreError::Append(_)) => Self::Failed(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(step: &str, kind: FailureKind, reason: Option<&str>) -> Failure {
        Failure { step: step.into(), kind, rejection: None, reason: reason.map(ToOwned::to_owned), why: None }
    }

    #[test]
    fn the_reason_is_derived_from_what_the_saga_knows() {
        let customer = CancelReason::CancelledByCustomer.as_str();
        let cases = [
            (failure(step::AUTHORIZE, FailureKind::Rejected, None), CancelReason::PaymentDeclined),
            (failure(step::RESERVE, FailureKind::Rejected, None), CancelReason::OutOfStock),
            (failure(step::CAPTURE, FailureKind::Rejected, None), CancelReason::PaymentNotCaptured),
            (failure(step::RESERVE, FailureKind::Cancelled, Some(customer)), CancelReason::CancelledByCustomer),
            (failure(step::RESERVE, FailureKind::Cancelled, Some("ticket 4711")), CancelReason::CancelledByOperator),
            (failure(step::RESERVE, FailureKind::Cancelled, None), CancelReason::CancelledByOperator),
            (failure(step::AUTHORIZE, FailureKind::Deadline, None), CancelReason::TimedOut),
            (failure(step::AUTHORIZE, FailureKind::Failed, Some("out_of_stock")), CancelReason::Failed),
        ];
        for (failure, reason) in cases {
            assert_eq!(reason_of(&failure), reason, "{failure:?}");
        }
    }
}

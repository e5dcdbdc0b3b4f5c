//! The operations on orders: place one, cancel one, wait for one. HTTP is one caller; tests are another.
//!
//! Invariant: an order, its history, its event, its saga and the saga's first command are one transaction. When the
//! process dies before the commit there is nothing; after it, the saga goes on by itself, here or in another replica.

use crate::{
    catalogue,
    domain::{BadField, CancelReason, NewOrder, Order, PlacedOrder, StatusName, pricing},
    effects::{CancelOrder, ConfirmOrder, OpenOrder, OrderTurned},
    live::{LiveOrders, Purpose},
    order_saga::{local, order_saga},
    store::{self, StoreError},
};
use contracts::{
    OrderId,
    topics::{ORDERS_REPLIES, REPLY_SOURCES},
};
use saga_core::{
    http::{IfMatch, REQUEST_MAX, count_refused},
    id::SagaId,
    outbox::Tx,
    saga::{CancelError, Cancelled, Engine, EngineErrors, Saga, StartError},
    transaction::Transaction,
};
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

/// The end of the entity tag of an order that waits for an operator, behind its version.
pub const STUCK: &str = "-stuck";

/// Everything that the operations need. Cheap to clone.
#[derive(Clone)]
pub struct Orders {
    /// The pool of the orders' database.
    pub pool: PgPool,
    /// The engine that runs the orders' sagas.
    pub engine: Arc<Engine>,
    /// The clients that wait for orders.
    pub live: Arc<LiveOrders>,
    saga: Saga<PlacedOrder>,
}

/// Why an order was not placed.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The order cannot be sold like this; the fields that are wrong.
    #[error("{} fields are wrong", .0.len())]
    Refused(Vec<BadField>),
    /// The order's saga did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

/// The outcome of a cancellation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CancelOutcome {
    /// The order is being cancelled, by this request or an earlier one, or it is cancelled already.
    Cancelled(Box<Order>),
    /// The money is being taken, or was: the order can only be confirmed.
    TooLate(Box<Order>),
    /// The order is not at the version that the caller saw; nothing was done.
    Stale,
    /// There is no such order.
    Unknown,
}

/// Why a cancellation was not decided.
#[derive(Debug, thiserror::Error)]
pub enum CancelOrderError {
    /// The engine could not decide about the saga.
    #[error(transparent)]
    Saga(#[from] CancelError),
    /// The order could not be changed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The order exists, and its saga does not.
    #[error("order {0} has no saga")]
    NoSaga(OrderId),
}

impl Orders {
    /// Binds the order saga and its effects together.
    pub fn new(pool: PgPool) -> Result<Self, EngineErrors> {
        Self::taking_replies_of(Vec::new(), pool)
    }

    /// Binds them like [`Orders::new`], with sources whose replies are taken beside those of the platform's
    /// participants.
    pub fn taking_replies_of(more: Vec<String>, pool: PgPool) -> Result<Self, EngineErrors> {
        let saga = order_saga();
        let engine = Engine::builder(pool.clone(), &ORDERS_REPLIES)
            .takes_replies_of(REPLY_SOURCES)
            .takes_replies_of(more)
            .define(&saga)
            .local(local::OPEN, OpenOrder)
            .local(local::CANCEL, CancelOrder)
            .local(local::CONFIRM, ConfirmOrder)
            .turned(saga.name(), OrderTurned)
            .build()?;
        let live = LiveOrders::new(pool.clone());
        Ok(Self { pool, engine, live, saga })
    }

    /// Prices an order and starts its saga, which opens the order, in the caller's transaction.
    pub async fn place_in(
        &self,
        tx: &mut Tx<'_>,
        order: NewOrder,
        now: OffsetDateTime,
    ) -> Result<PlacedOrder, PlaceError> {
        let skus: Vec<_> = order.lines.iter().map(|line| line.sku.as_str()).collect();
        let prices = catalogue::prices(&mut **tx, &skus).await?;
        let (lines, total) = pricing::price(&order, &prices).map_err(PlaceError::Refused)?;
        let NewOrder { customer, payment_method, .. } = order;
        let saga = SagaId::new();
        let order = PlacedOrder { id: OrderId(saga.0), customer, lines, total, payment_method, placed_at: now };
        self.engine.start_in(tx, saga, &self.saga, &order, &saga.to_string()).await?;
        Ok(order)
    }

    /// Cancels an order for its customer, if it is not too late. Asking again changes nothing. With `seen`, only if the
    /// order is at a version that it allows.
    pub async fn cancel(&self, order: OrderId, seen: Option<&IfMatch>) -> Result<CancelOutcome, CancelOrderError> {
        if store::find(&self.pool, order).await.map_err(StoreError::from)?.is_none() {
            return Ok(CancelOutcome::Unknown);
        }
        let mut tx = Transaction::begin(&self.pool, REQUEST_MAX).await.map_err(StoreError::from)?;
        let saga = SagaId(order.0);
        if let Some(seen) = seen {
            // The saga's row is locked first, as everywhere. Then no other transaction changes the order.
            self.engine.lock_in(&mut tx, saga).await.map_err(StoreError::from)?;
            let (_, version) = store::status_for_update_in(&mut tx, order).await?;
            if !seen.allows(&version.to_string()) && !seen.allows(&format!("{version}{STUCK}")) {
                tx.rollback().await.map_err(StoreError::from)?;
                return Ok(CancelOutcome::Stale);
            }
        }
        // The engine decides about the saga, and the saga's effects change the order.
        let verdict = self.engine.cancel_in(&mut tx, saga, CancelReason::CancelledByCustomer.as_str()).await?;
        let found = store::find(&mut **tx, order).await.map_err(StoreError::from)?;
        tx.commit().await.map_err(StoreError::from)?;
        self.live.nudge();
        let Some(found) = found.map(Box::new) else { return Ok(CancelOutcome::Unknown) };
        match verdict {
            Cancelled::Accepted | Cancelled::AlreadyCancelling => Ok(CancelOutcome::Cancelled(found)),
            Cancelled::TooLate => Ok(CancelOutcome::TooLate(found)),
            Cancelled::Finished if found.status.name() == StatusName::Cancelled => Ok(CancelOutcome::Cancelled(found)),
            Cancelled::Finished => Ok(CancelOutcome::TooLate(found)),
            Cancelled::Unknown => Err(CancelOrderError::NoSaga(order)),
        }
    }

    /// Waits until an order has come to its end, for `patience` at most and not longer than `token`; returns the order
    /// as it is then. `None` when too many requests wait already, or there is no such order.
    pub async fn settle(
        &self,
        order: OrderId,
        version: i64,
        patience: Duration,
        token: &CancellationToken,
    ) -> Result<Option<Order>, sqlx::Error> {
        let Ok(mut versions) = self.live.watch(order, version, Purpose::Wait) else {
            count_refused("wait");
            return Ok(None);
        };
        let settled = async {
            loop {
                match store::find(&self.pool, order).await? {
                    Some(order) if order.status.name().is_terminal() => return Ok(Some(order)),
                    Some(_) => {}
                    None => return Ok(None),
                }
                if versions.changed().await.is_none() {
                    return Ok(None);
                }
            }
        };
        tokio::select! {
            settled = settled => return settled,
            () = tokio::time::sleep(patience) => {}
            () = token.cancelled() => {}
        }
        store::find(&self.pool, order).await
    }
}

//! The order saga: the whole business of an order, from top to bottom.

use crate::domain::PlacedOrder;
use contracts::{
    inventory::{CommitStock, ReleaseStock, ReserveStock},
    payments::{AuthorizePayment, CapturePayment, VoidPayment},
};
use saga_core::saga::{Saga, saga};

/// The local effects: what the saga does to the order itself, in the engine's transaction.
pub mod local {
    /// Writes the order, as pending.
    pub const OPEN: &str = "open-order";
    /// Cancels the order: the undo of [`OPEN`].
    pub const CANCEL: &str = "cancel-order";
    /// Confirms the order.
    pub const CONFIRM: &str = "confirm-order";
}

/// The names of the steps. An order's reason for being cancelled is derived from the names of those that can be
/// refused.
pub mod step {
    /// Holds the money. The gateway may decline.
    pub const AUTHORIZE: &str = "authorize-payment";
    /// Puts the stock aside. There may not be enough.
    pub const RESERVE: &str = "reserve-stock";
    /// Takes the money: the pivot. The gateway may have let go of the money.
    pub const CAPTURE: &str = "capture-payment";
    /// Lets the stock leave. It cannot be refused.
    pub const COMMIT: &str = "commit-stock";
}

/// The saga's steps: open the order; hold the money; put the stock aside; take the money; confirm the order; let the
/// stock leave the house. Once the money is taken there is no way back. If a step is refused before that, the engine
/// undoes the steps before it in reverse order. It undoes a step whether it is known to have happened or only might
/// have.
pub fn order_saga() -> Saga<PlacedOrder> {
    saga::<PlacedOrder>("order", 1)
        .local_with_undo(local::OPEN, local::CANCEL)
        .step(step::AUTHORIZE, |order, ()| AuthorizePayment {
            order: order.id,
            customer: order.customer.to_string(),
            amount: order.total,
            method: order.payment_method.as_str().to_owned(),
        })
        .undo(|order, (), _happened| VoidPayment { order: order.id })
        .step(step::RESERVE, |order, (_held,)| ReserveStock { order: order.id, lines: order.unpriced_lines() })
        .undo(|order, (_held,), _happened| ReleaseStock { order: order.id })
        .pivot(step::CAPTURE, |order, (held, _reserved)| CapturePayment { order: order.id, amount: held.amount })
        .local(local::CONFIRM)
        .then(step::COMMIT, |order, (_held, _reserved, _captured)| CommitStock { order: order.id })
        .build()
}

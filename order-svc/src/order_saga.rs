//! The order saga: the whole business of an order, from top to bottom.

use crate::domain::PlaceOrder;
use contracts::{
    inventory::{CommitStock, ReleaseStock, ReserveStock},
    payments::{AuthorizePayment, CapturePayment, VoidPayment},
};
use saga_core::saga::{Saga, saga};

/// Local effects: what the saga does to the order itself, in the engine's transaction.
pub mod local {
    /// Writes the order: pending.
    pub const OPEN: &str = "open-order";
    /// Its undo: cancelled.
    pub const CANCEL: &str = "cancel-order";
    /// Confirmed.
    pub const CONFIRM: &str = "confirm-order";
}

/// Steps that can be refused; an order's reason for being cancelled is derived from their names.
pub mod step {
    /// The gateway may decline.
    pub const AUTHORIZE: &str = "authorize-payment";
    /// There may not be enough.
    pub const RESERVE: &str = "reserve-stock";
    /// The pivot. The gateway may have let go of the money.
    pub const CAPTURE: &str = "capture-payment";
    /// Cannot be refused.
    pub const COMMIT: &str = "commit-stock";
}

/// Open the order; hold the money; put the stock aside; take the money, and from here on there is no way back; confirm
/// the order; let the stock leave the house. If anything is refused before the money is taken, what was done is undone
/// in reverse order, whether it is known to have happened or only might have.
pub fn order_saga() -> Saga<PlaceOrder> {
    saga::<PlaceOrder>("order", 1)
        .local_with_undo(local::OPEN, local::CANCEL)
        .step(step::AUTHORIZE, |order, ()| AuthorizePayment {
            order: order.order,
            customer: order.customer.to_string(),
            amount: order.total,
            method: order.payment_method.as_str().to_owned(),
        })
        .undo(|order, (), _happened| VoidPayment { order: order.order })
        .step(step::RESERVE, |order, (_held,)| ReserveStock { order: order.order, lines: order.unpriced_lines() })
        .undo(|order, (_held,), _happened| ReleaseStock { order: order.order })
        .pivot(step::CAPTURE, |order, (held, _reserved)| CapturePayment { order: order.order, amount: held.amount })
        .local(local::CONFIRM)
        .then(step::COMMIT, |order, (_held, _reserved, _captured)| CommitStock { order: order.order })
        .build()
}

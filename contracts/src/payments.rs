//! The commands of `payment-svc`, and its answers. The order's id identifies a payment.

use crate::{OrderId, money::Money, topics};
use saga_core::{
    command::{Command, Done, Never},
    topic::Topic,
};
use serde::{Deserialize, Serialize};

/// Hold the money: nothing is taken yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorizePayment {
    /// The order that is paid.
    pub order: OrderId,
    /// The id of the customer that pays.
    pub customer: String,
    /// The amount to hold.
    pub amount: Money,
    /// The gateway's token of the customer's means of payment.
    pub method: String,
}

/// The money is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorized {
    /// The gateway's reference of the authorization.
    pub authorization: String,
    /// The amount that is held.
    pub amount: Money,
}

/// The gateway declined; nothing is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declined {
    /// The gateway's reason, for example `insufficient_funds`.
    pub reason: String,
}

impl Command for AuthorizePayment {
    const TYPE: &'static str = "payments.authorize.v1";
    const TOPIC: &'static Topic = &topics::PAYMENTS_COMMANDS;
    type Reply = Authorized;
    type Rejection = Declined;
}

/// Let go of what [`AuthorizePayment`] held, whether or not it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoidPayment {
    /// The order whose payment is voided.
    pub order: OrderId,
}

impl Command for VoidPayment {
    const TYPE: &'static str = "payments.void.v1";
    const TOPIC: &'static Topic = &topics::PAYMENTS_COMMANDS;
    type Reply = Done;
    type Rejection = Never;
}

/// Take the money that is held: the order saga's pivot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturePayment {
    /// The order that is paid.
    pub order: OrderId,
    /// The amount to take; the authorized amount.
    pub amount: Money,
}

/// The money is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// The gateway's reference of the capture.
    pub capture: String,
    /// The amount that was taken.
    pub amount: Money,
}

/// The gateway refuses to hand out what it held (it expired, for example); nothing was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRefused {
    /// The gateway's reason.
    pub reason: String,
}

impl Command for CapturePayment {
    const TYPE: &'static str = "payments.capture.v1";
    const TOPIC: &'static Topic = &topics::PAYMENTS_COMMANDS;
    type Reply = Captured;
    type Rejection = CaptureRefused;
}

/// Give back what was captured, all of it or a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefundPayment {
    /// The order whose payment is given back.
    pub order: OrderId,
    /// The amount to give back.
    pub amount: Money,
}

/// The money is given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refunded {
    /// The gateway's reference of the refund.
    pub refund: String,
    /// The amount that was given back.
    pub amount: Money,
}

/// The refund is more than was captured, or nothing was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefundRefused {
    /// The reason, in words.
    pub reason: String,
}

impl Command for RefundPayment {
    const TYPE: &'static str = "payments.refund.v1";
    const TOPIC: &'static Topic = &topics::PAYMENTS_COMMANDS;
    type Reply = Refunded;
    type Rejection = RefundRefused;
}

//! A payment: what may become of it, and which movements of money that means. Pure.
//!
//! ```text
//!   authorizing ─┬─► authorized ─┬─► captured (refunds, in parts, up to what was captured)
//!        ▲       │               └─► voided
//!        │       ├─► declined ──┐
//!        │       └─► voided ────┤   (an authorization that was in doubt)
//!        └──────────────────────┘   tried anew
//! ```

use contracts::{OrderId, money::Money};
use saga_core::id::CommandId;

/// A payment, known by its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    /// The order that is paid.
    pub order: OrderId,
    /// The paying customer; empty where the row was lost and only the gateway knew of the payment.
    pub customer: String,
    /// The amount to pay, with its currency.
    pub amount: Money,
    /// The command that the present authorization belongs to; its id is the idempotency key at the gateway.
    pub authorize_key: CommandId,
    /// The state of the payment, with the gateway's references.
    pub status: Status,
}

/// The state of a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The gateway is being asked; it may hold the money.
    Authorizing,
    /// The money is held.
    Authorized {
        /// The gateway's reference of the authorization.
        authorization: String,
    },
    /// The gateway refused; nothing is held.
    Declined {
        /// The code of the gateway's refusal.
        reason: String,
    },
    /// The gateway has taken the money.
    Captured {
        /// The gateway's reference of the authorization.
        authorization: String,
        /// The gateway's reference of the capture.
        capture: String,
        /// Minor units that were given back.
        refunded: i64,
        /// Minor units that are being given back: asked for, not answered.
        refunding: i64,
    },
    /// Nothing is held, and nothing will be.
    Voided,
}

/// Something that happened to a payment, for certain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The gateway holds the money.
    Authorized {
        /// The gateway's reference of the authorization.
        authorization: String,
    },
    /// The gateway refused.
    Declined {
        /// The code of the gateway's refusal.
        reason: String,
    },
    /// The gateway holds nothing (any more). `released` is money of an authorization that the service had not heard of.
    Voided {
        /// The money that the gateway let go, if it held any.
        released: Option<Released>,
    },
    /// The gateway took the money.
    Captured {
        /// The gateway's reference of the capture.
        capture: String,
    },
    /// A refund is being asked for.
    RefundBegun {
        /// Minor units that are asked for.
        amount: i64,
    },
    /// The gateway gave the money back.
    Refunded {
        /// The gateway's reference of the refund.
        refund: String,
        /// Minor units that were given back.
        amount: i64,
    },
    /// The gateway did not give the money back.
    RefundRefused {
        /// Minor units that were asked for.
        amount: i64,
    },
}

/// Money that the gateway held and let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// The gateway's reference of the authorization.
    pub reference: String,
    /// The amount that was let go. It may be another than was asked for, if the gateway answered the authorization with
    /// it, too.
    pub amount: Money,
}

/// The accounts of the ledger, by where the money is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Account {
    /// The money is the customer's.
    Customer,
    /// The money is held at the gateway.
    Held,
    /// The money is the merchant's.
    Merchant,
}

/// The kinds of movements of money.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MovementKind {
    /// From customer to held.
    Authorize,
    /// From held back to the customer.
    Void,
    /// From held to the merchant.
    Capture,
    /// From the merchant back to the customer.
    Refund,
}

/// Money that moves from one account to another: two ledger entries that add up to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Movement {
    /// The kind, which decides the two accounts.
    pub kind: MovementKind,
    /// The amount, positive, with its currency.
    pub amount: Money,
    /// The gateway's reference of the operation.
    pub reference: String,
}

impl Movement {
    /// The movements of money that was held without the service knowing: both enter when it is let go.
    pub fn held_and_let_go(released: &Released) -> [Self; 2] {
        let both = [MovementKind::Authorize, MovementKind::Void];
        both.map(|kind| Self { kind, amount: released.amount, reference: released.reference.clone() })
    }
}

/// A move that the payment's graph does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a payment that is {status} cannot become {event:?}")]
pub struct IllegalMove {
    /// The name of the payment's status.
    pub status: &'static str,
    /// The event that was to happen.
    pub event: Event,
}

/// Why a command is refused without asking the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The amount is zero or negative.
    InvalidAmount,
    /// A text is empty, too long, or holds a NUL.
    InvalidText,
    /// A text holds what looks like a card number, which is not kept.
    CardNumber,
    /// The order has a payment that is under way or done.
    AlreadyPaid,
    /// There is no payment that is authorized.
    NotAuthorized,
    /// The amount or currency is another than was authorized.
    AmountDiffers,
    /// Nothing of the payment was captured.
    NotCaptured,
    /// The amount is more than what was captured and not given back.
    AmountTooLarge,
    /// The amount is more than what refunds under way leave.
    RefundUnderWay,
}

impl Payment {
    /// A payment whose row was lost and whose money the gateway has let go: all that is known comes from the gateway.
    pub fn lost(order: OrderId, amount: Money, authorize_key: CommandId) -> Self {
        Self { order, customer: String::new(), amount, authorize_key, status: Status::Voided }
    }

    /// Applies `event`, which happened: returns the payment's next state, and the money that moved.
    pub fn apply(mut self, event: Event) -> Result<(Self, Vec<Movement>), IllegalMove> {
        let total = self.amount.amount;
        let status = self.status.name();
        let money = self.amount;
        let moved = |kind, amount, reference: &str| {
            let amount = Money { amount, ..money };
            Movement { kind, amount, reference: reference.to_owned() }
        };
        let (status, movements) = match (self.status, event) {
            (Status::Authorizing, Event::Authorized { authorization }) => {
                let movement = moved(MovementKind::Authorize, total, &authorization);
                (Status::Authorized { authorization }, vec![movement])
            }
            (Status::Authorizing, Event::Declined { reason }) => (Status::Declined { reason }, vec![]),
            (Status::Authorizing, Event::Voided { released: Some(released) }) => {
                (Status::Voided, Movement::held_and_let_go(&released).to_vec())
            }
            (Status::Authorizing | Status::Declined { .. } | Status::Voided, Event::Voided { released: None }) => {
                (Status::Voided, vec![])
            }
            (Status::Authorized { authorization }, Event::Voided { .. }) => {
                (Status::Voided, vec![moved(MovementKind::Void, total, &authorization)])
            }
            (Status::Authorized { authorization }, Event::Captured { capture }) => {
                let movement = moved(MovementKind::Capture, total, &capture);
                (Status::Captured { authorization, capture, refunded: 0, refunding: 0 }, vec![movement])
            }
            (Status::Captured { authorization, capture, refunded, refunding }, Event::RefundBegun { amount })
                if amount > 0 && amount <= total - refunded - refunding =>
            {
                (Status::Captured { authorization, capture, refunded, refunding: refunding + amount }, vec![])
            }
            (Status::Captured { authorization, capture, refunded, refunding }, Event::Refunded { refund, amount })
                if amount > 0 && amount <= refunding =>
            {
                let movement = moved(MovementKind::Refund, amount, &refund);
                let (refunded, refunding) = (refunded + amount, refunding - amount);
                (Status::Captured { authorization, capture, refunded, refunding }, vec![movement])
            }
            (Status::Captured { authorization, capture, refunded, refunding }, Event::RefundRefused { amount })
                if amount > 0 && amount <= refunding =>
            {
                (Status::Captured { authorization, capture, refunded, refunding: refunding - amount }, vec![])
            }
            (_, event) => return Err(IllegalMove { status, event }),
        };
        self.status = status;
        Ok((self, movements))
    }

    /// Whether a new authorization may begin on this payment.
    pub fn may_authorize_again(&self) -> bool {
        matches!(self.status, Status::Declined { .. } | Status::Voided)
    }

    /// The authorization of which `amount` can be captured.
    pub fn capturable(&self, amount: Money) -> Result<&str, Refusal> {
        match &self.status {
            Status::Authorized { authorization } if amount == self.amount => Ok(authorization),
            Status::Authorized { .. } => Err(Refusal::AmountDiffers),
            _ => Err(Refusal::NotAuthorized),
        }
    }

    /// The authorization of whose capture `amount` can be given back.
    pub fn refundable(&self, amount: Money) -> Result<&str, Refusal> {
        match &self.status {
            Status::Captured { .. } if amount.amount <= 0 => Err(Refusal::InvalidAmount),
            Status::Captured { .. } if amount.currency != self.amount.currency => Err(Refusal::AmountDiffers),
            Status::Captured { authorization, refunded, refunding, .. }
                if amount.amount <= self.amount.amount - refunded - refunding =>
            {
                Ok(authorization)
            }
            Status::Captured { refunded, .. } if amount.amount <= self.amount.amount - refunded => {
                Err(Refusal::RefundUnderWay)
            }
            Status::Captured { .. } => Err(Refusal::AmountTooLarge),
            _ => Err(Refusal::NotCaptured),
        }
    }
}

impl Status {
    /// The name under which the status is stored and shown.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Authorizing => "authorizing",
            Self::Authorized { .. } => "authorized",
            Self::Declined { .. } => "declined",
            Self::Captured { .. } => "captured",
            Self::Voided => "voided",
        }
    }
}

impl Refusal {
    /// The name of the refusal in a reply.
    pub fn reason(self) -> &'static str {
        match self {
            Self::InvalidAmount => "invalid_amount",
            Self::InvalidText => "invalid_text",
            Self::CardNumber => "card_number",
            Self::AlreadyPaid => "already_paid",
            Self::NotAuthorized => "not_authorized",
            Self::AmountDiffers => "amount_differs",
            Self::NotCaptured => "not_captured",
            Self::AmountTooLarge => "amount_too_large",
            Self::RefundUnderWay => "refund_under_way",
        }
    }
}

impl MovementKind {
    /// The name under which the kind is stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorize => "authorize",
            Self::Void => "void",
            Self::Capture => "capture",
            Self::Refund => "refund",
        }
    }

    /// The account that the money leaves, and the one that it reaches.
    pub fn accounts(self) -> (Account, Account) {
        match self {
            Self::Authorize => (Account::Customer, Account::Held),
            Self::Void => (Account::Held, Account::Customer),
            Self::Capture => (Account::Held, Account::Merchant),
            Self::Refund => (Account::Merchant, Account::Customer),
        }
    }
}

impl Account {
    /// The name under which the account is stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Customer => "customer",
            Self::Held => "held",
            Self::Merchant => "merchant",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payment() -> Payment {
        Payment {
            order: OrderId(uuid::Uuid::nil()),
            customer: "alice".into(),
            amount: Money { amount: 100, currency: "EUR".parse().unwrap() },
            authorize_key: CommandId(uuid::Uuid::nil()),
            status: Status::Authorizing,
        }
    }

    fn released(amount: i64, currency: &str) -> Released {
        Released { reference: "a".into(), amount: Money { amount, currency: currency.parse().unwrap() } }
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Authorized { authorization: "a".into() }),
            Just(Event::Declined { reason: "r".into() }),
            Just(Event::Voided { released: None }),
            Just(Event::Voided { released: Some(released(100, "EUR")) }),
            Just(Event::Voided { released: Some(released(99, "USD")) }),
            Just(Event::Captured { capture: "c".into() }),
            (-5_i64..120).prop_map(|amount| Event::RefundBegun { amount }),
            (-5_i64..120).prop_map(|amount| Event::Refunded { refund: "f".into(), amount }),
            (-5_i64..120).prop_map(|amount| Event::RefundRefused { amount }),
        ]
    }

    proptest! {
        #[test]
        fn the_movements_explain_the_state_whatever_happens(events in prop::collection::vec(event(), 0..40)) {
            let mut payment = payment();
            let (mut held, mut merchant) = (0, 0);
            for event in events {
                let Ok((next, movements)) = payment.clone().apply(event) else { continue };
                payment = next;
                for Movement { kind, amount: Money { amount, .. }, .. } in movements {
                    let (from, to) = kind.accounts();
                    for (account, amount) in [(from, -amount), (to, amount)] {
                        match account {
                            Account::Held => held += amount,
                            Account::Merchant => merchant += amount,
                            Account::Customer => {}
                        }
                    }
                }
                let (expected_held, expected_merchant) = match &payment.status {
                    Status::Authorized { .. } => (100, 0),
                    Status::Captured { refunded, refunding, .. } => {
                        prop_assert!(*refunded >= 0 && *refunding >= 0 && refunded + refunding <= 100);
                        (0, 100 - refunded)
                    }
                    _ => (0, 0),
                };
                prop_assert_eq!((held, merchant), (expected_held, expected_merchant));
            }
        }
    }

    #[test]
    fn a_move_that_is_not_in_the_graph_is_an_error_that_names_both() {
        let error = payment().apply(Event::Captured { capture: "c".into() }).unwrap_err();
        assert_eq!((error.status, error.event), ("authorizing", Event::Captured { capture: "c".into() }));
    }
}

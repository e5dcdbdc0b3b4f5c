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
    /// How much.
    pub amount: Money,
    /// The command that the present authorization belongs to; its idempotency key at the gateway.
    pub authorize_key: CommandId,
    /// How far it is.
    pub status: Status,
}

/// How far a payment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The gateway is being asked.
    Authorizing,
    /// The money is held.
    Authorized {
        /// The gateway's reference.
        authorization: String,
    },
    /// The gateway said no; nothing is held.
    Declined {
        /// Its reason.
        reason: String,
    },
    /// The money is ours.
    Captured {
        /// The gateway's reference of the authorization.
        authorization: String,
        /// The gateway's reference of the capture.
        capture: String,
        /// What was given back.
        refunded: i64,
        /// What is being given back: asked for, not answered.
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
        /// Its reference.
        authorization: String,
    },
    /// The gateway said no.
    Declined {
        /// Its reason.
        reason: String,
    },
    /// The gateway holds nothing (any more). `released` tells of money whose authorization nobody had heard of.
    Voided {
        /// What it let go, if it held something.
        released: Option<Released>,
    },
    /// The gateway took the money.
    Captured {
        /// Its reference.
        capture: String,
    },
    /// A refund is being asked for.
    RefundBegun {
        /// How much.
        amount: i64,
    },
    /// The gateway gave it back.
    Refunded {
        /// Its reference.
        refund: String,
        /// How much.
        amount: i64,
    },
    /// The gateway did not give it back.
    RefundRefused {
        /// How much was asked for.
        amount: i64,
    },
}

/// What the gateway held and let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// Its reference.
    pub reference: String,
    /// How much. It may be another amount than was asked for, if the gateway said so of the authorization, too.
    pub amount: Money,
}

/// Where money is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Account {
    /// The customer's.
    Customer,
    /// Held at the gateway.
    Held,
    /// Ours.
    Merchant,
}

/// Why money moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MovementKind {
    /// Customer to held.
    Authorize,
    /// Held to customer.
    Void,
    /// Held to merchant.
    Capture,
    /// Merchant to customer.
    Refund,
}

/// Money that moves from one account to another: two ledger entries that add up to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Movement {
    /// Why.
    pub kind: MovementKind,
    /// How much, positive.
    pub amount: Money,
    /// The gateway's reference.
    pub reference: String,
}

impl Movement {
    /// It was held, and nobody here had heard of it: both movements enter when it is let go.
    pub fn held_and_let_go(released: &Released) -> [Self; 2] {
        let both = [MovementKind::Authorize, MovementKind::Void];
        both.map(|kind| Self { kind, amount: released.amount, reference: released.reference.clone() })
    }
}

/// A move that the payment's graph does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a payment that is {status} cannot become {event:?}")]
pub struct IllegalMove {
    /// The payment's status.
    pub status: &'static str,
    /// What was to happen.
    pub event: Event,
}

/// Why a command is refused without asking the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The amount is zero or negative.
    InvalidAmount,
    /// A text is empty, too long, or holds a NUL.
    InvalidText,
    /// The order has a payment that is under way or done.
    AlreadyPaid,
    /// There is no payment that is authorized.
    NotAuthorized,
    /// Another amount or currency than was authorized.
    AmountDiffers,
    /// Nothing was captured.
    NotCaptured,
    /// More than what was captured and not given back.
    AmountTooLarge,
}

impl Payment {
    /// A payment whose row was lost and whose money the gateway has let go: all that is known comes from the gateway.
    pub fn lost(order: OrderId, amount: Money, authorize_key: CommandId) -> Self {
        Self { order, customer: String::new(), amount, authorize_key, status: Status::Voided }
    }

    /// What happened, happens to the payment: its next state, and the money that moved.
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

    /// The authorization that `amount` can be captured of.
    pub fn capturable(&self, amount: Money) -> Result<&str, Refusal> {
        match &self.status {
            Status::Authorized { authorization } if amount == self.amount => Ok(authorization),
            Status::Authorized { .. } => Err(Refusal::AmountDiffers),
            _ => Err(Refusal::NotAuthorized),
        }
    }

    /// The authorization whose capture `amount` can be given back of.
    pub fn refundable(&self, amount: Money) -> Result<&str, Refusal> {
        match &self.status {
            Status::Captured { .. } if amount.amount <= 0 => Err(Refusal::InvalidAmount),
            Status::Captured { .. } if amount.currency != self.amount.currency => Err(Refusal::AmountDiffers),
            Status::Captured { authorization, refunded, refunding, .. }
                if amount.amount <= self.amount.amount - refunded - refunding =>
            {
                Ok(authorization)
            }
            Status::Captured { .. } => Err(Refusal::AmountTooLarge),
            _ => Err(Refusal::NotCaptured),
        }
    }
}

impl Status {
    /// As it is stored and shown.
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
    /// As it stands in a reply.
    pub fn reason(self) -> &'static str {
        match self {
            Self::InvalidAmount => "invalid_amount",
            Self::InvalidText => "invalid_text",
            Self::AlreadyPaid => "already_paid",
            Self::NotAuthorized => "not_authorized",
            Self::AmountDiffers => "amount_differs",
            Self::NotCaptured => "not_captured",
            Self::AmountTooLarge => "amount_too_large",
        }
    }
}

impl MovementKind {
    /// As it is stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorize => "authorize",
            Self::Void => "void",
            Self::Capture => "capture",
            Self::Refund => "refund",
        }
    }

    /// From which account to which.
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
    /// As it is stored and shown.
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

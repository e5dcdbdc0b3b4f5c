//! The status of an order, and the only way in which it changes: [`OrderStatus::transition`].
//!
//! ```text
//!   pending ──► confirmed
//!      │
//!      ├──────────────► cancelled
//!      ▼                    ▲
//!   cancelling ─────────────┘
//! ```
//!
//! `cancelling` is a promise: the saga has accepted a cancellation before its pivot, so the order can no longer be
//! confirmed. The database holds the same graph as a constraint of `order_status_history`; a test compares the two.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use time::OffsetDateTime;

/// The status of an order, with the data that belongs to it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderStatus {
    /// The order is placed; its saga runs.
    Pending,
    /// The order is paid; nothing will undo it.
    Confirmed {
        /// When the order was confirmed.
        at: OffsetDateTime,
    },
    /// The order was cancelled in time; what was done is being undone.
    Cancelling {
        /// Why the order is being cancelled.
        reason: CancelReason,
    },
    /// The order came to nothing, and everything that was done for it is undone.
    Cancelled {
        /// Why the order was cancelled.
        reason: CancelReason,
        /// When the order was cancelled.
        at: OffsetDateTime,
    },
}

/// A change that can happen to an order after it was placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusChange {
    /// The pivot succeeded: the order is confirmed.
    Confirm,
    /// The saga accepted a cancellation.
    RequestCancel(CancelReason),
    /// Everything that was done is undone.
    Cancel(CancelReason),
}

/// A change that the graph does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an order that is {from} cannot become {to}")]
pub struct NotAllowed {
    /// The status that the order has.
    pub from: StatusName,
    /// The status that the order should have got.
    pub to: StatusName,
}

impl OrderStatus {
    /// The declared graph: `transition` allows these changes and no others.
    pub const GRAPH: [(StatusName, StatusName); 4] = [
        (StatusName::Pending, StatusName::Confirmed),
        (StatusName::Pending, StatusName::Cancelling),
        (StatusName::Pending, StatusName::Cancelled),
        (StatusName::Cancelling, StatusName::Cancelled),
    ];

    /// The status to which `change` leads from this one.
    pub fn transition(self, change: StatusChange, now: OffsetDateTime) -> Result<Self, NotAllowed> {
        match (self, change) {
            (Self::Pending, StatusChange::Confirm) => Ok(Self::Confirmed { at: now }),
            (Self::Pending, StatusChange::RequestCancel(reason)) => Ok(Self::Cancelling { reason }),
            (Self::Pending | Self::Cancelling { .. }, StatusChange::Cancel(reason)) => {
                Ok(Self::Cancelled { reason, at: now })
            }
            (
                Self::Confirmed { .. } | Self::Cancelled { .. } | Self::Cancelling { .. },
                StatusChange::Confirm | StatusChange::RequestCancel(_),
            )
            | (Self::Confirmed { .. } | Self::Cancelled { .. }, StatusChange::Cancel(_)) => {
                Err(NotAllowed { from: self.name(), to: change.leads_to() })
            }
        }
    }

    /// The status without its data.
    pub fn name(self) -> StatusName {
        match self {
            Self::Pending => StatusName::Pending,
            Self::Confirmed { .. } => StatusName::Confirmed,
            Self::Cancelling { .. } => StatusName::Cancelling,
            Self::Cancelled { .. } => StatusName::Cancelled,
        }
    }

    /// Why the order is being or was cancelled; `None` otherwise.
    pub fn reason(self) -> Option<CancelReason> {
        match self {
            Self::Pending | Self::Confirmed { .. } => None,
            Self::Cancelling { reason } | Self::Cancelled { reason, .. } => Some(reason),
        }
    }

    /// When the order was confirmed or cancelled; `None` before.
    pub fn closed_at(self) -> Option<OffsetDateTime> {
        match self {
            Self::Pending | Self::Cancelling { .. } => None,
            Self::Confirmed { at } | Self::Cancelled { at, .. } => Some(at),
        }
    }

    /// Puts a status together from its columns; `None` when they contradict each other (a constraint forbids it).
    pub fn from_parts(
        name: StatusName,
        reason: Option<CancelReason>,
        closed_at: Option<OffsetDateTime>,
    ) -> Option<Self> {
        match (name, reason, closed_at) {
            (StatusName::Pending, None, None) => Some(Self::Pending),
            (StatusName::Confirmed, None, Some(at)) => Some(Self::Confirmed { at }),
            (StatusName::Cancelling, Some(reason), None) => Some(Self::Cancelling { reason }),
            (StatusName::Cancelled, Some(reason), Some(at)) => Some(Self::Cancelled { reason, at }),
            _ => None,
        }
    }
}

impl StatusChange {
    /// The status to which the change leads.
    pub fn leads_to(self) -> StatusName {
        match self {
            Self::Confirm => StatusName::Confirmed,
            Self::RequestCancel(_) => StatusName::Cancelling,
            Self::Cancel(_) => StatusName::Cancelled,
        }
    }
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $error:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        #[doc = concat!("Not a ", stringify!($name), ".")]
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        #[error("expected one of {}", $name::ALL.map($name::as_str).join(", "))]
        pub struct $error;

        impl $name {
            /// All values, in the order of their declaration.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$variant),+];

            /// The name in the database and in JSON.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = $error;
            fn from_str(text: &str) -> Result<Self, $error> {
                match text { $($text => Ok(Self::$variant),)+ _ => Err($error) }
            }
        }
    };
}

named! {
    /// A status without its data.
    StatusName, UnknownStatus {
        /// Placed; its saga runs.
        Pending = "pending",
        /// Paid; nothing will undo it.
        Confirmed = "confirmed",
        /// Cancelled in time; being undone.
        Cancelling = "cancelling",
        /// It came to nothing.
        Cancelled = "cancelled",
    }
}

named! {
    /// Why an order came to nothing.
    CancelReason, UnknownReason {
        /// The gateway said no.
        PaymentDeclined = "payment_declined",
        /// Not enough of something.
        OutOfStock = "out_of_stock",
        /// The gateway would not hand out what it held.
        PaymentNotCaptured = "payment_not_captured",
        /// The customer changed their mind in time.
        CancelledByCustomer = "cancelled_by_customer",
        /// An operator cancelled the saga.
        CancelledByOperator = "cancelled_by_operator",
        /// A step did not answer before its deadline.
        TimedOut = "timed_out",
        /// A step failed for good, for a reason of its own.
        Failed = "failed",
    }
}

impl StatusName {
    /// Whether nothing leads out of the status.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Confirmed | Self::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn changes() -> impl Strategy<Value = StatusChange> {
        prop_oneof![
            Just(StatusChange::Confirm),
            proptest::sample::select(&CancelReason::ALL[..]).prop_map(StatusChange::RequestCancel),
            proptest::sample::select(&CancelReason::ALL[..]).prop_map(StatusChange::Cancel),
        ]
    }

    #[test]
    fn transition_allows_the_declared_graph_and_nothing_else() {
        let now = OffsetDateTime::UNIX_EPOCH;
        let reason = CancelReason::OutOfStock;
        let statuses = [
            OrderStatus::Pending,
            OrderStatus::Confirmed { at: now },
            OrderStatus::Cancelling { reason },
            OrderStatus::Cancelled { reason, at: now },
        ];
        let mut allowed = BTreeSet::new();
        for from in statuses {
            for change in [StatusChange::Confirm, StatusChange::RequestCancel(reason), StatusChange::Cancel(reason)] {
                match from.transition(change, now) {
                    Ok(to) => {
                        assert_eq!(to.name(), change.leads_to());
                        allowed.insert((from.name(), to.name()));
                    }
                    Err(error) => assert_eq!(error, NotAllowed { from: from.name(), to: change.leads_to() }),
                }
            }
        }
        assert_eq!(allowed, BTreeSet::from(OrderStatus::GRAPH));
    }

    #[test]
    fn nothing_leads_out_of_a_terminal_status_and_something_out_of_every_other() {
        for status in StatusName::ALL {
            let leaves = OrderStatus::GRAPH.iter().any(|(from, _)| *from == status);
            assert_eq!(leaves, !status.is_terminal(), "{status}");
        }
    }

    #[test]
    fn names_in_json_are_the_names_in_the_database() {
        for status in StatusName::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
            assert_eq!(status.as_str().parse(), Ok(status));
        }
        for reason in CancelReason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
    }

    proptest! {
        #[test]
        fn any_sequence_of_changes_walks_the_graph_and_survives_the_columns(changes in prop::collection::vec(changes(), 0..8)) {
            let mut status = OrderStatus::Pending;
            for (second, change) in (1i64..).zip(changes) {
                let now = OffsetDateTime::from_unix_timestamp(second).unwrap();
                if let Ok(next) = status.transition(change, now) {
                    prop_assert!(OrderStatus::GRAPH.contains(&(status.name(), next.name())));
                    status = next;
                }
                let again = OrderStatus::from_parts(status.name(), status.reason(), status.closed_at());
                prop_assert_eq!(again, Some(status));
                prop_assert_eq!(status.closed_at().is_some(), status.name().is_terminal());
            }
        }
    }
}

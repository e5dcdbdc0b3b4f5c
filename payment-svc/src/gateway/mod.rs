//! The port to the payment provider: what we ask it, and what its answers mean.
//!
//! An answer is *certain* (done, or refused and nothing moved) or there is *doubt*: no answer in time, a 5xx, a lost
//! connection, an answer that cannot be believed (`answer`). Doubt is never taken for a refusal. Every request carries a key
//! under which the provider performs it once, so that doubt is resolved by asking again. A call that an open circuit keeps from
//! being made ([`breaker`]) is in no doubt.

mod answer;
pub mod breaker;
pub mod guarded;
pub mod http;

use async_trait::async_trait;
use contracts::money::Money;
use saga_core::{
    command::{Failed, Why},
    id::CommandId,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub use guarded::Guarded;
pub use http::HttpGateway;

/// A request to the provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Hold money.
    Authorize {
        /// For which order.
        order: String,
        /// Whose.
        customer: String,
        /// How much.
        amount: Money,
        /// The provider's token of the means of payment.
        method: String,
    },
    /// Let go of what was, or will ever be, authorized under a key.
    Void {
        /// The key of the authorization.
        authorization_key: CommandId,
    },
    /// Take what is held.
    Capture {
        /// The provider's reference of the authorization.
        authorization: String,
        /// How much.
        amount: Money,
    },
    /// Give back what was taken.
    Refund {
        /// The provider's reference of the authorization.
        authorization: String,
        /// How much.
        amount: Money,
    },
}

/// What the provider is asked to do; each has a circuit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// [`Request::Authorize`].
    Authorize,
    /// [`Request::Void`].
    Void,
    /// [`Request::Capture`].
    Capture,
    /// [`Request::Refund`].
    Refund,
}

impl Operation {
    /// All, each at its place.
    pub const ALL: [Self; 4] = [Self::Authorize, Self::Void, Self::Capture, Self::Refund];

    /// For metrics, logs and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorize => "authorize",
            Self::Void => "void",
            Self::Capture => "capture",
            Self::Refund => "refund",
        }
    }
}

impl Request {
    /// Which operation it is.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Authorize { .. } => Operation::Authorize,
            Self::Void { .. } => Operation::Void,
            Self::Capture { .. } => Operation::Capture,
            Self::Refund { .. } => Operation::Refund,
        }
    }
}

/// A certain answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done {
        /// The provider's reference; a void that found nothing has none.
        reference: Option<String>,
        /// How much; a void that found nothing to let go of has none.
        amount: Option<Money>,
    },
    /// Certainly no money moved.
    Refused {
        /// The provider's code, for example `insufficient_funds`.
        code: String,
    },
}

/// No certain answer: it may have happened.
#[derive(Debug, thiserror::Error)]
pub enum Doubt {
    /// No answer in time.
    #[error("the gateway did not answer in time")]
    Timeout,
    /// No connection, or it was lost.
    #[error("the connection to the gateway failed: {0}")]
    Connection(String),
    /// An answer that says neither yes nor no.
    #[error("the gateway answered {status}")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// The provider does not let us in: nobody's payment, and an operator has to act.
    #[error("the gateway does not let payment-svc in (it answered 401): set GATEWAY_TOKEN to a token that it takes")]
    NotLetIn,
    /// An answer that cannot be read.
    #[error("the gateway's answer cannot be read: {0}")]
    Unreadable(String),
    /// Not asked, so nothing is in doubt: the provider is away.
    #[error("the gateway was not asked: it is away, and the circuit of {operation} is open")]
    CircuitOpen {
        /// Whose circuit.
        operation: &'static str,
        /// When to come again.
        again_after: Duration,
    },
}

impl From<Doubt> for Failed {
    fn from(doubt: Doubt) -> Self {
        let why = match &doubt {
            Doubt::Timeout | Doubt::Connection(_) | Doubt::CircuitOpen { .. } => Why::Unreachable,
            Doubt::Status { .. } | Doubt::NotLetIn => Why::Faulty,
            Doubt::Unreadable(_) => Why::Unreadable,
        };
        Self::new(why, &doubt.to_string())
    }
}

impl Doubt {
    /// Whether asking again soon may help, and harms nobody.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Status { status } => *status >= 500,
            Self::Timeout | Self::NotLetIn | Self::Unreadable(_) | Self::CircuitOpen { .. } => false,
        }
    }

    /// Whether the provider may be away for everybody, which the breaker counts. Whatever else it says, it is there.
    pub(crate) fn is_away(&self) -> bool {
        match self {
            Self::Timeout | Self::Connection(_) | Self::NotLetIn => true,
            Self::Status { status } => matches!(status, 403 | 429 | 502..=504),
            Self::Unreadable(_) | Self::CircuitOpen { .. } => false,
        }
    }
}

/// A payment provider, or what stands before one: [`HttpGateway`] speaks to it, [`Guarded`] retries and breaks.
#[async_trait]
pub trait PaymentGateway: Send + Sync + 'static {
    /// Performs `request` once per `key`, however often it is called.
    async fn perform(&self, key: CommandId, request: &Request) -> Result<Answer, Doubt>;
}

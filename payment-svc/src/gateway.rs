//! The port to the payment provider: what the service asks it, and what its answers mean.
//!
//! An answer is *certain* (done, or refused and nothing moved), or there is *doubt*. Doubt is no answer in time, a 5xx,
//! a lost connection, an answer that cannot be believed (`answer`). Doubt is never taken for a refusal. Every request
//! carries a key under which the provider performs it once, so that doubt is resolved by asking again. A call that an
//! open circuit keeps from being made ([`breaker`]) is in no doubt.

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
    /// Hold money of the customer.
    Authorize {
        /// The order's id, as text.
        order: String,
        /// The paying customer's id.
        customer: String,
        /// The amount to hold, with its currency.
        amount: Money,
        /// The provider's token of the means of payment.
        method: String,
    },
    /// Let go of what was, or will ever be, authorized under a key.
    Void {
        /// The key of the authorization.
        authorization_key: CommandId,
    },
    /// Take the money that is held.
    Capture {
        /// The provider's reference of the authorization.
        authorization: String,
        /// The amount to take, with its currency.
        amount: Money,
    },
    /// Give back money that was taken.
    Refund {
        /// The provider's reference of the authorization.
        authorization: String,
        /// The amount to give back, with its currency.
        amount: Money,
    },
}

/// The operations of the provider; each has a circuit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The operation of [`Request::Authorize`].
    Authorize,
    /// The operation of [`Request::Void`].
    Void,
    /// The operation of [`Request::Capture`].
    Capture,
    /// The operation of [`Request::Refund`].
    Refund,
}

impl Operation {
    /// All operations, each at the index of its circuit.
    pub const ALL: [Self; 4] = [Self::Authorize, Self::Void, Self::Capture, Self::Refund];

    /// The name in metrics, logs and records.
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
    /// The operation that the request asks for.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Authorize { .. } => Operation::Authorize,
            Self::Void { .. } => Operation::Void,
            Self::Capture { .. } => Operation::Capture,
            Self::Refund { .. } => Operation::Refund,
        }
    }
}

/// An answer after which nothing is in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GatewayAnswer {
    /// The request is done, now or before under the same key.
    Done {
        /// The provider's reference; `None` for a void that found nothing.
        reference: Option<String>,
        /// The amount that was moved; `None` for a void that found nothing to let go of.
        amount: Option<Money>,
    },
    /// Certainly no money moved.
    Refused {
        /// The provider's code, for example `insufficient_funds`.
        code: String,
    },
}

/// The lack of a certain answer: the request may have been performed.
#[derive(Debug, thiserror::Error)]
pub enum Doubt {
    /// The provider gave no answer in time.
    #[error("the gateway did not answer in time")]
    Timeout,
    /// There was no connection, or it was lost.
    #[error("the connection to the gateway failed: {0}")]
    Connection(String),
    /// The answer says neither yes nor no.
    #[error("the gateway answered {status}")]
    Status {
        /// The HTTP status of the answer.
        status: u16,
    },
    /// The provider does not let the service in. It is not the fault of a payment, and an operator has to act.
    #[error("the gateway does not let payment-svc in (it answered 401): set GATEWAY_TOKEN to a token that it takes")]
    NotLetIn,
    /// The answer cannot be read.
    #[error("the gateway's answer cannot be read: {0}")]
    Unreadable(String),
    /// The provider was not asked, so nothing is in doubt: it is away.
    #[error("the gateway was not asked: it is away, and the circuit of {operation} is open")]
    CircuitOpen {
        /// The name of the operation whose circuit is open.
        operation: &'static str,
        /// How long to wait before the next try.
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
    /// Whether asking again soon may help, and does no harm.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Status { status } => *status >= 500,
            Self::Timeout | Self::NotLetIn | Self::Unreadable(_) | Self::CircuitOpen { .. } => false,
        }
    }

    /// Whether the provider may be away for all payments, which the breaker counts. With any other answer it is there.
    pub(crate) fn is_away(&self) -> bool {
        match self {
            Self::Timeout | Self::Connection(_) | Self::NotLetIn => true,
            Self::Status { status } => matches!(status, 403 | 429 | 502..=504),
            Self::Unreadable(_) | Self::CircuitOpen { .. } => false,
        }
    }
}

/// A payment provider, or a layer before one: [`HttpGateway`] calls it, [`Guarded`] retries and breaks.
#[async_trait]
pub trait PaymentGateway: Send + Sync + 'static {
    /// Performs `request` once per `key`, however often this is called.
    async fn perform(&self, key: CommandId, request: &Request) -> Result<GatewayAnswer, Doubt>;
}

//! Why an external effect's intent was not settled, and what that means for it.
//!
//! Nothing was committed: a worker of this process or another claims the intent again, and calls the provider again
//! under the same idempotency key.

use super::queue::Claimed;
use crate::{
    consumer::HandleError,
    error_class::{ErrorClass, classify, classify_chain, in_words},
    part::Cause,
};

/// Why an intent was not settled.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unsettled {
    #[error("{}", in_words(.0))]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Handle(#[from] HandleError),
    /// A test's simulated fault.
    #[cfg(feature = "testkit")]
    #[error(transparent)]
    Injected(#[from] crate::testkit::failpoints::Injected),
}

impl Unsettled {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::Database(error) | Self::Handle(HandleError::Database(error)) => classify(error),
            Self::Handle(HandleError::Failed(error)) => classify_chain(error.as_ref()).unwrap_or(ErrorClass::Own),
            Self::Handle(HandleError::Again) => ErrorClass::Passing,
            Self::Handle(_) => ErrorClass::Own,
            #[cfg(feature = "testkit")]
            Self::Injected(_) => ErrorClass::Own,
        }
    }

    /// Logs the error. In an outage of the database every call under way ends here, so such errors are at debug level:
    /// the outage is logged once, elsewhere.
    pub(super) fn tell(&self, claim: &Claimed, what: &str) {
        let (command, saga, kind) = (claim.intent.cx.saga.command, claim.key.saga, &claim.kind);
        if self.class() == ErrorClass::Passing {
            tracing::debug!(%command, %saga, kind, error = %self, "{what}");
        } else {
            tracing::warn!(%command, %saga, kind, error = %self, "{what}");
        }
    }

    /// The cause, for an operator to set right.
    pub(super) fn cause(&self) -> Cause {
        let error = match self {
            Self::Database(error) | Self::Handle(HandleError::Database(error)) => Some(error),
            Self::Handle(HandleError::Failed(error)) => error.chain().find_map(|cause| cause.downcast_ref()),
            _ => None,
        };
        error.map_or(Cause::DatabaseMisconfigured, Cause::of)
    }

    /// Whether a test wants the process to look dead: then the claim must run out.
    pub(super) fn is_crash(&self) -> bool {
        match self {
            Self::Database(_) | Self::Handle(_) => false,
            #[cfg(feature = "testkit")]
            Self::Injected(injected) => injected.0 == crate::testkit::failpoints::Fault::Crash,
        }
    }
}

//! Why an external effect's intent was not settled, and what that means for it.
//!
//! Nothing was committed: a worker of this process or another claims the intent again, and calls the provider again
//! under the same idempotency key.

use super::{queue::ClaimedIntent, store::UnreadableFence};
use crate::{
    consumer::HandleError,
    error_class::{ErrorClass, Found, classify, in_words},
    part::Cause,
};
use std::time::Duration;

/// Pause after an answer that cannot be taken, because a later build wrote the command's fence. That build may run again
/// and take it meanwhile.
pub(super) const LATER_BUILD_PAUSE: Duration = Duration::from_secs(60);

/// Pause after a call that the provider did not let in: until an operator has acted, each further call is in vain.
pub(super) const NOT_LET_IN_PAUSE: Duration = Duration::from_secs(3);

/// Why an intent was not settled.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unsettled {
    #[error("{}", in_words(.0))]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Handle(#[from] HandleError),
    /// The effect's own code took longer in its transaction than it may.
    #[error("the effect's own code takes too long in its transaction: {0}")]
    Slow(String),
    /// A test's simulated fault.
    #[cfg(feature = "testkit")]
    #[error(transparent)]
    Injected(#[from] crate::testkit::failpoints::Injected),
}

impl Unsettled {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::Database(error) => classify(error),
            Self::Handle(error) => error.class(),
            Self::Slow(_) => ErrorClass::Own,
            #[cfg(feature = "testkit")]
            Self::Injected(_) => ErrorClass::Own,
        }
    }

    /// Whether the fence is in a state that a later build wrote.
    pub(super) fn is_of_a_later_build(&self) -> bool {
        matches!(self, Self::Handle(HandleError::Failed(error)) if error.is::<UnreadableFence>())
    }

    /// Logs the error. In an outage of the database every call under way ends here, so such errors are at debug level:
    /// the outage is logged once, elsewhere.
    pub(super) fn tell(&self, claim: &ClaimedIntent, what: &str) {
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
            Self::Database(error) => Some(Found::Error(error)),
            Self::Handle(error) => error.database(),
            Self::Slow(_) => None,
            #[cfg(feature = "testkit")]
            Self::Injected(_) => None,
        };
        error.map_or(Cause::DatabaseMisconfigured, Cause::of_found)
    }

    /// Whether a test wants the process to look dead: then the claim must run out.
    pub(super) fn is_crash(&self) -> bool {
        match self {
            Self::Database(_) | Self::Handle(_) | Self::Slow(_) => false,
            #[cfg(feature = "testkit")]
            Self::Injected(injected) => injected.0 == crate::testkit::failpoints::Fault::Crash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::MessageId, outbox::AppendError};

    #[test]
    fn an_error_that_names_its_message_has_the_class_of_what_is_within() {
        let lost = || sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        let of = |error: HandleError| Unsettled::Handle(error.of(MessageId::new()));
        for error in
            [lost().into(), HandleError::Failed(anyhow::Error::from(AppendError::from(lost())).context("no stock"))]
        {
            let unsettled = of(error);
            assert_eq!(
                (unsettled.class(), unsettled.cause()),
                (ErrorClass::Passing, Cause::DatabaseAway),
                "{unsettled}"
            );
        }
        assert_eq!(of(sqlx::Error::Protocol("half a message".into()).into()).class(), ErrorClass::Stale);
        assert_eq!(of(anyhow::anyhow!("no such payment").into()).class(), ErrorClass::Own);
    }
}

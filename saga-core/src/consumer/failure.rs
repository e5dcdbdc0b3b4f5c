//! What went wrong, and whose fault it is.
//!
//! The line that everything hangs on: what will pass by itself (a deadlock, a lost connection, a server that restarts)
//! is repeated and counted nowhere, however long it takes; anything else is the record's own fault until proven
//! otherwise, and counted.

use super::HandleError;
use crate::{error_class, outbox::AppendError};
use std::borrow::Cow;

/// Why a transaction did not commit.
#[derive(Debug)]
pub(super) enum Failure {
    /// It will pass; the text is for the log.
    Passing(String),
    /// The handler wants the same once more, at once.
    Again,
    /// There is no inbox partition for a message that ought to have one.
    Unprepared,
    /// It is the record's fault.
    Fault(Fault),
    /// A test let us die here.
    #[cfg(feature = "testkit")]
    Crash,
}

/// A record's own fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// What kind, in one word, for dashboards and dead letters.
    pub(super) class: Cow<'static, str>,
    /// In words.
    pub(super) reason: String,
    /// Whether trying again could help.
    pub(super) retry: Retry,
}

/// Whether trying again could help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// Perhaps.
    Possible,
    /// It cannot.
    Pointless,
}

impl Fault {
    pub(super) fn new(class: impl Into<Cow<'static, str>>, reason: &str, retry: Retry) -> Self {
        Self { class: class.into(), reason: crate::reason::reason(reason), retry }
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        if passes(&error) {
            return Self::Passing(error.to_string());
        }
        let code = error.as_database_error().and_then(|error| error.code());
        match (code.as_deref(), error.as_database_error().and_then(|error| error.table())) {
            // check_violation without a constraint: "no partition of relation found for row".
            (Some("23514"), Some("inbox")) => Self::Unprepared,
            (Some(code), _) => Self::Fault(Fault::new(format!("database-{code}"), &error.to_string(), Retry::Possible)),
            (None, _) => Self::Fault(Fault::new("database", &error.to_string(), Retry::Possible)),
        }
    }
}

impl From<HandleError> for Failure {
    fn from(error: HandleError) -> Self {
        match error {
            HandleError::Database(error) => error.into(),
            HandleError::Poison(reason) => Self::Fault(Fault::new("poison", &reason, Retry::Pointless)),
            HandleError::Again => Self::Again,
            // A test's handler lets the process die by handing on what a fail point would have said.
            #[cfg(feature = "testkit")]
            HandleError::Failed(error) if error.is::<crate::testkit::failpoints::Injected>() => {
                error.downcast::<crate::testkit::failpoints::Injected>().map_or(Self::Crash, Self::from)
            }
            HandleError::Failed(error) => {
                let reason = format!("{error:#}");
                if wraps_what_passes(&error) {
                    Self::Passing(reason)
                } else {
                    Self::Fault(Fault::new("failed", &reason, Retry::Possible))
                }
            }
        }
    }
}

impl HandleError {
    /// Whether it is the record's own fault, so far: not what passes by itself, nor what a test injects.
    pub(crate) fn is_fault(&self) -> bool {
        match self {
            Self::Database(error) => !passes(error),
            Self::Poison(_) => true,
            Self::Again => false,
            #[cfg(feature = "testkit")]
            Self::Failed(error) if error.is::<crate::testkit::failpoints::Injected>() => false,
            Self::Failed(error) => !wraps_what_passes(error),
        }
    }
}

/// A handler may wrap the database's errors in words of its own.
fn wraps_what_passes(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<sqlx::Error>()).any(passes)
}

impl From<AppendError> for Failure {
    fn from(error: AppendError) -> Self {
        HandleError::from(error).into()
    }
}

#[cfg(feature = "testkit")]
impl From<crate::testkit::failpoints::Injected> for Failure {
    fn from(injected: crate::testkit::failpoints::Injected) -> Self {
        use crate::testkit::failpoints::Fault as Kind;
        match injected.0 {
            Kind::Crash | Kind::Kill => Self::Crash,
            Kind::Outage => Self::Passing(injected.to_string()),
            Kind::Error => Self::Fault(Fault::new("failed", &injected.to_string(), Retry::Possible)),
        }
    }
}

/// Whether the database's answer says nothing about the record: the same will do another time.
fn passes(error: &sqlx::Error) -> bool {
    if error_class::is_outage(error) || error_class::is_conflict(error) {
        return true;
    }
    match error {
        sqlx::Error::Tls(_) | sqlx::Error::BeginFailed => true,
        // A lock that was not to be had in time; the server's own troubles (58: I/O, a file).
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code == "55P03" || code.starts_with("58")),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_recognised_under_a_handlers_own_words() {
        let lost = || sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert!(matches!(Failure::from(lost()), Failure::Passing(_)));
        let wrapped = anyhow::Error::from(lost()).context("could not read the stock");
        assert!(matches!(Failure::from(HandleError::Failed(wrapped)), Failure::Passing(_)));
        let own = anyhow::anyhow!("the shelf is gone");
        assert!(matches!(
            Failure::from(HandleError::Failed(own)),
            Failure::Fault(Fault { retry: Retry::Possible, .. })
        ));
        let poison = HandleError::Poison("unknown version".into());
        assert!(matches!(Failure::from(poison), Failure::Fault(Fault { retry: Retry::Pointless, .. })));
    }
}

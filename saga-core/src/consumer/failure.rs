//! What went wrong, and whose fault it is.
//!
//! `error_class` draws the line that everything hangs on. Some errors pass by themselves (a deadlock, a lost
//! connection, a server that restarts), some are stale, and some an operator has to set right. All these are repeated
//! and counted nowhere, however long that takes. Any other error is the fault of a record, and counted. So is a handler
//! that needs longer than its bounds: smaller batches show which records take so long.
//!
//! A wait for a lock is no fault of the record: another transaction holds the lock. The record is set aside like one at
//! fault, so that the others flow. But no attempt is spent, and the record is never given up for that.

use super::{HandleError, Unfit};
use crate::{
    error_class::{ErrorClass, Found, classify, find, in_words, lock_wait},
    id::MessageId,
    outbox::AppendError,
    part::Cause,
    reason::chain,
};
use std::{borrow::Cow, time::Duration};

/// Why a transaction did not commit.
#[derive(Debug)]
pub(super) enum AttemptFailure {
    /// The error will pass; the text is for the log.
    Passing(Cause, String),
    /// The connection cannot be used any more, though another one can.
    Stale(Cause, String),
    /// Nothing works until an operator sets the cause right.
    Configuration(Cause, String),
    /// The pool had no connection in time: others use all of them, or the database is away.
    NoConnection,
    /// The handler wants the same once more, at once.
    Again,
    /// There is no inbox partition for a message that ought to have one.
    Unprepared,
    /// The connection was lost while the handler had it, and the handler had it for longer than the server lets a
    /// transaction be silent. Either the handler was silent, or the database went away.
    Silent(RecordFault),
    /// The error is the record's fault.
    Fault(RecordFault),
    /// A test let us die here.
    #[cfg(feature = "testkit")]
    Crash,
}

/// A record's own fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RecordFault {
    /// The kind of fault, in one word, for dashboards and dead letters.
    pub(super) class: Cow<'static, str>,
    /// What was wrong, in words.
    pub(super) reason: String,
    /// What helps against the fault.
    pub(super) remedy: Remedy,
    /// The message whose fault it is, where the handler names it.
    pub(super) culprit: Option<MessageId>,
    /// Other messages of the batch that can never be handled either.
    pub(super) others: Vec<Unfit>,
}

/// What helps against a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Another attempt may help.
    Retry,
    /// A smaller batch; for a single record, perhaps another attempt.
    Smaller,
    /// To wait until another transaction lets go of a lock: apart from the others, and without an end.
    Wait,
    /// Nothing helps: the record is given up.
    Nothing,
}

/// The class of a message that its handler called poison.
pub(super) const POISON: &str = "poison";

/// The class of a record that waits for a lock, as it stands in `inbox_parked`.
pub(super) const LOCKED: &str = "locked";

/// The class of a row of `inbox_parked` that this build cannot read.
pub(super) const UNREADABLE: &str = "unreadable";

impl RecordFault {
    pub(super) fn new(class: impl Into<Cow<'static, str>>, reason: &str, remedy: Remedy) -> Self {
        Self { class: class.into(), reason: crate::reason::reason(reason), remedy, culprit: None, others: Vec::new() }
    }

    /// The fault of the first of several messages that can never be handled, with the others.
    fn several(first: &Unfit, others: &[Unfit]) -> Self {
        Self { others: others.to_vec(), ..Self::unfit(first) }
    }

    /// The fault of a message that can never be handled.
    pub(super) fn unfit(Unfit { message, class, reason }: &Unfit) -> Self {
        Self::new(*class, reason, Remedy::Nothing).of(Some(*message))
    }

    /// The fault of an attempt that did not end within `bound`.
    pub(super) fn timed_out(bound: Duration) -> Self {
        let reason = format!("the attempt took longer than `attempt_timeout`, {bound:?}");
        Self::new("timed-out", &reason, Remedy::Smaller)
    }

    /// The server ended the connection, because the handler sent nothing on it for longer than `bound`.
    fn silent(bound: Duration, error: &str) -> Self {
        let reason = format!(
            "the handler was silent on its connection for longer than `idle_in_transaction_session_timeout`, {bound:?}: {error}"
        );
        Self::new("silent", &reason, Remedy::Smaller)
    }

    /// The fault of a handler that waits for a lock.
    fn locked(answer: &str) -> Self {
        let reason = format!("waits for a lock that another transaction holds: {answer}");
        Self::new(LOCKED, &reason, Remedy::Wait)
    }

    /// Whether its record is given up after attempt number `attempt` of `attempts`.
    pub(super) fn gives_up(&self, attempt: u32, attempts: u32) -> bool {
        match self.remedy {
            Remedy::Nothing => true,
            Remedy::Retry | Remedy::Smaller => attempt >= attempts,
            Remedy::Wait => false,
        }
    }

    fn of(self, culprit: Option<MessageId>) -> Self {
        Self { culprit, ..self }
    }
}

impl From<sqlx::Error> for AttemptFailure {
    fn from(error: sqlx::Error) -> Self {
        let database = error.as_database_error();
        // check_violation without a constraint: "no partition of relation found for row".
        if database.is_some_and(|error| error.code().as_deref() == Some("23514") && error.table() == Some("inbox")) {
            return Self::Unprepared;
        }
        let class = database
            .and_then(|error| error.code())
            .map_or_else(|| "database".into(), |code| format!("database-{code}"));
        let reason = in_words(&error);
        let own = || Self::Fault(RecordFault::new(class, &reason, Remedy::Retry));
        Self::not_own(classify(&error), || Cause::of(&error), &reason).unwrap_or_else(own)
    }
}

impl From<HandleError> for AttemptFailure {
    fn from(error: HandleError) -> Self {
        let (culprit, error) = error.parts();
        let failure = match error {
            HandleError::Database(error) => error.into(),
            HandleError::Poison(reason) => Self::Fault(RecordFault::new(POISON, &reason, Remedy::Nothing)),
            HandleError::Several(unfit) => match unfit.split_first() {
                Some((first, others)) => Self::Fault(RecordFault::several(first, others)),
                None => Self::Again,
            },
            HandleError::Again | HandleError::Of { .. } => Self::Again,
            // A test's handler lets the process die by handing on what a fail point would have said.
            #[cfg(feature = "testkit")]
            HandleError::Failed(error) if error.is::<crate::testkit::failpoints::Injected>() => {
                error.downcast::<crate::testkit::failpoints::Injected>().map_or(Self::Crash, Self::from)
            }
            // A handler may wrap the database's errors in words of its own.
            HandleError::Failed(error) => {
                let database = find(error.as_ref());
                let cure = database.and_then(Found::cure).map(|cure| format!("; {cure}")).unwrap_or_default();
                let reason = format!("{}{cure}", chain(&error));
                let failure =
                    database.and_then(|error| Self::not_own(error.class(), || Cause::of_found(error), &reason));
                failure.unwrap_or_else(|| Self::Fault(RecordFault::new("failed", &reason, Remedy::Retry)))
            }
        };
        match failure {
            Self::Fault(fault) if culprit.is_some() => Self::Fault(fault.of(culprit)),
            other => other,
        }
    }
}

impl HandleError {
    /// Whether the error is the record's own fault, so far: not what passes by itself, nor what a test injects.
    pub(crate) fn is_fault(&self) -> bool {
        match self {
            Self::Of { error, .. } => error.is_fault(),
            #[cfg(feature = "testkit")]
            Self::Failed(error) if error.is::<crate::testkit::failpoints::Injected>() => false,
            _ => self.class() == ErrorClass::Own,
        }
    }

    /// The class of the error, whichever message it names and however the handler has wrapped it.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::Again => ErrorClass::Passing,
            _ => self.database().map_or(ErrorClass::Own, Found::class),
        }
    }

    /// Puts back the name that [`HandleError::parts`] took from the error.
    fn named(self, message: Option<MessageId>) -> Self {
        match message {
            Some(message) => self.of(message),
            None => self,
        }
    }

    /// PostgreSQL's message about a lock that was not to be had, however the handler has wrapped it.
    fn lock_wait(&self) -> Option<String> {
        match self {
            Self::Database(error) => lock_wait(error),
            Self::Failed(error) => lock_wait(error.as_ref()),
            Self::Of { error, .. } => error.lock_wait(),
            Self::Poison(_) | Self::Several(_) | Self::Again => None,
        }
    }

    /// Whether PostgreSQL ended the statement or the transaction for its length, or for its silence.
    pub(crate) fn ran_out_of_time(&self) -> bool {
        let code = self.database().and_then(Found::code);
        matches!(code.as_deref(), Some("57014" | "25P03" | "25P04"))
    }

    /// Whether PostgreSQL ended the whole transaction for its length, and not one statement or a silence.
    pub(crate) fn is_of_its_transaction(&self) -> bool {
        self.database().and_then(Found::code).as_deref() == Some("25P04")
    }

    /// The database's error behind this one, however the handler has wrapped it.
    pub(crate) fn database(&self) -> Option<Found<'_>> {
        match self {
            Self::Database(error) => Some(Found::Error(error)),
            Self::Failed(error) => find(error.as_ref()),
            Self::Of { error, .. } => error.database(),
            Self::Poison(_) | Self::Several(_) | Self::Again => None,
        }
    }
}

impl AttemptFailure {
    /// The failure of an error class that is no fault of a record; `None` for the others.
    fn not_own(class: ErrorClass, cause: impl FnOnce() -> Cause, reason: &str) -> Option<Self> {
        match class {
            ErrorClass::Passing => Some(Self::Passing(cause(), reason.to_owned())),
            ErrorClass::Stale => Some(Self::Stale(cause(), reason.to_owned())),
            ErrorClass::Configuration => Some(Self::Configuration(cause(), reason.to_owned())),
            ErrorClass::Own => None,
        }
    }

    /// The failure of a transaction that did not begin.
    pub(super) fn of_begin(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::PoolTimedOut => Self::NoConnection,
            error => error.into(),
        }
    }

    /// The failure of a handler that had its connection for `taken`, where the server lets a transaction be silent for
    /// `silence`.
    pub(super) fn of_handler(error: HandleError, taken: Duration, silence: Duration) -> Self {
        let (culprit, error) = error.parts();
        let fault = |fault: RecordFault| Self::Fault(fault.of(culprit));
        if let Some(answer) = error.lock_wait() {
            return fault(RecordFault::locked(&answer));
        }
        let Some(database) = error.database() else { return error.named(culprit).into() };
        match database.code().as_deref() {
            // The server gave up the statement or the transaction. That was after our bound, if the runtime was kept
            // from giving up before, or after a bound that the handler has set.
            Some("57014" | "25P04") => fault(RecordFault::new("timed-out", &error.to_string(), Remedy::Smaller)),
            // idle_in_transaction_session_timeout.
            Some("25P03") => fault(RecordFault::silent(silence, &error.to_string())),
            None if database.is_lost() && taken >= silence => {
                Self::Silent(RecordFault::silent(silence, &error.to_string()))
            }
            _ => error.named(culprit).into(),
        }
    }
}

impl From<AppendError> for AttemptFailure {
    fn from(error: AppendError) -> Self {
        HandleError::from(error).into()
    }
}

#[cfg(feature = "testkit")]
impl From<crate::testkit::failpoints::Injected> for AttemptFailure {
    fn from(injected: crate::testkit::failpoints::Injected) -> Self {
        use crate::testkit::failpoints::Fault as Kind;
        match injected.0 {
            Kind::Crash | Kind::Kill => Self::Crash,
            Kind::Outage => Self::Passing(Cause::DatabaseAway, injected.to_string()),
            Kind::Error => Self::Fault(RecordFault::new("failed", &injected.to_string(), Remedy::Retry)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> sqlx::Error {
        sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    }

    fn remedy(error: HandleError) -> Option<(Remedy, Option<MessageId>)> {
        match AttemptFailure::from(error) {
            AttemptFailure::Fault(fault) => Some((fault.remedy, fault.culprit)),
            _ => None,
        }
    }

    #[test]
    fn an_outage_is_recognised_under_a_handlers_own_words() {
        let message = MessageId::new();
        assert!(matches!(AttemptFailure::from(lost()), AttemptFailure::Passing(..)));
        let wrapped = || HandleError::Failed(anyhow::Error::from(lost()).context("could not read the stock"));
        assert!(matches!(AttemptFailure::from(wrapped()), AttemptFailure::Passing(..)));
        assert!(matches!(AttemptFailure::from(wrapped().of(message)), AttemptFailure::Passing(..)));
        assert!(!wrapped().of(message).is_fault());
    }

    #[test]
    fn a_fault_knows_its_message_where_the_handler_names_it() {
        let message = MessageId::new();
        let own = || HandleError::Failed(anyhow::anyhow!("the shelf is gone"));
        assert_eq!(remedy(own()), Some((Remedy::Retry, None)));
        assert_eq!(remedy(own().of(message)), Some((Remedy::Retry, Some(message))));
        let poison = HandleError::Poison("no JSON".into()).of(message);
        assert_eq!(
            remedy(poison.of(MessageId::new())),
            Some((Remedy::Nothing, Some(message))),
            "the first name counts"
        );
    }

    #[test]
    fn only_a_wait_for_a_lock_is_never_given_up() {
        let fault = |remedy| RecordFault::new("test", "a reason", remedy);
        for (remedy, gives_up) in
            [(Remedy::Nothing, [true; 2]), (Remedy::Retry, [false, true]), (Remedy::Smaller, [false, true])]
        {
            assert_eq!([1, 8].map(|attempt| fault(remedy).gives_up(attempt, 8)), gives_up, "{remedy:?}");
        }
        assert!(!fault(Remedy::Wait).gives_up(1_000, 8));
    }

    #[test]
    fn a_lost_connection_is_a_silent_handler_only_where_that_was_possible() {
        let bound = Duration::from_secs(8);
        let after = |taken| AttemptFailure::of_handler(lost().into(), Duration::from_secs(taken), bound);
        assert!(matches!(after(7), AttemptFailure::Passing(..)));
        let AttemptFailure::Silent(fault) = after(9) else { panic!("it was possible") };
        assert!(fault.reason.contains("idle_in_transaction_session_timeout`, 8s"), "{}", fault.reason);
    }
}

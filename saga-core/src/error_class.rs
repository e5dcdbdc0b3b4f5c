//! What an error of PostgreSQL or Kafka means for the work that met it: the one classifier of all parts.
//!
//! | class | meaning | what the part does |
//! |---|---|---|
//! | [`Passing`](ErrorClass::Passing) | the same will work another time | repeats with back-off, counts nothing |
//! | [`Stale`](ErrorClass::Stale) | this connection is no longer good | replaces its connections ([`renew_connections`]), repeats, counts nothing |
//! | [`Configuration`](ErrorClass::Configuration) | an operator has to act | stops loudly, turns health red, gives nothing up |
//! | [`Own`](ErrorClass::Own) | this item is at fault | counts the attempt, parks, dead-letters |
//!
//! An unknown SQLSTATE is the item's own: its attempts are bounded, so that it cannot stop others for ever. An unknown
//! Kafka code is passing: librdkafka says explicitly when a record is refused.
//!
//! The module knows no other module but the clock. Nothing here survives the process.
//!
//! ```
//! use rdkafka::types::RDKafkaErrorCode;
//! use saga_core::error_class::{ErrorClass, classify, classify_kafka};
//!
//! assert_eq!(classify(&sqlx::Error::PoolTimedOut), ErrorClass::Passing);
//! assert_eq!(classify_kafka(RDKafkaErrorCode::TopicAuthorizationFailed), ErrorClass::Configuration);
//! ```

use crate::clock;
use rdkafka::types::RDKafkaErrorCode as Kafka;
use sqlx::{Error, error::DatabaseError, postgres::PgDatabaseError};
use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What an error means for the work that met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// A lost connection, a restart, a deadlock, a lock that was not to be had in time. Repeat; count nothing.
    Passing,
    /// The connection is no longer good: a plan for a table that has changed, a server that has become a standby.
    /// Replace the connection and repeat; count nothing.
    Stale,
    /// A missing table, a missing right, a wrong schema, a wrong password: every item would fail the same way. Stop
    /// this part loudly and give nothing up.
    Configuration,
    /// The item itself is at fault. Count the attempt.
    Own,
}

impl ErrorClass {
    /// Whether the same work is to be repeated without counting an attempt. True of all but [`ErrorClass::Own`].
    #[must_use]
    pub fn counts_nothing(self) -> bool {
        self != Self::Own
    }
}

/// The class of an error of sqlx.
#[must_use]
pub fn classify(error: &Error) -> ErrorClass {
    match error {
        Error::Io(_) | Error::PoolTimedOut | Error::PoolClosed | Error::WorkerCrashed | Error::BeginFailed => {
            ErrorClass::Passing
        }
        // A handshake that a restart cut looks like one that a wrong certificate ended.
        Error::Tls(_) => ErrorClass::Passing,
        // A cut connection may show itself as half a message.
        Error::Protocol(_) => ErrorClass::Stale,
        Error::Configuration(_)
        | Error::ColumnNotFound(_)
        | Error::ColumnIndexOutOfBounds { .. }
        | Error::TypeNotFound { .. } => ErrorClass::Configuration,
        Error::Database(error) => classify_answer(error.as_ref()),
        _ => ErrorClass::Own,
    }
}

/// The class of the database error within `error` or one of its causes, whatever types it is wrapped in; `None` if
/// there is none. A wrapper whose `source` skips the `sqlx::Error` itself (`#[error(transparent)]`) hides errors that
/// PostgreSQL did not send, such as a time-out of the pool: write `#[error("{0}")]` instead.
#[must_use]
pub fn classify_chain(error: &(dyn std::error::Error + 'static)) -> Option<ErrorClass> {
    Some(find(error)?.class())
}

/// PostgreSQL's message about a lock that could not be taken (55P03: `lock_timeout`, `nowait`), and where that was.
/// `None` when `error` and its causes are of another kind.
#[must_use]
pub fn lock_wait(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let answer = find(error)?.answer()?;
    if answer.code().as_deref() != Some("55P03") {
        return None;
    }
    let place = answer.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::r#where);
    Some(place.map_or_else(|| answer.message().to_owned(), |place| format!("{} ({place})", answer.message())))
}

/// The database's error in a chain of causes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found<'a> {
    Error(&'a Error),
    /// PostgreSQL's answer, where a wrapper hides the [`Error`] that brought it.
    Answer(&'a dyn DatabaseError),
}

impl<'a> Found<'a> {
    pub(crate) fn class(self) -> ErrorClass {
        match self {
            Self::Error(error) => classify(error),
            Self::Answer(answer) => classify_answer(answer),
        }
    }

    /// PostgreSQL's answer, if the error is one.
    pub(crate) fn answer(self) -> Option<&'a dyn DatabaseError> {
        match self {
            Self::Error(error) => error.as_database_error(),
            Self::Answer(answer) => Some(answer),
        }
    }

    /// The SQLSTATE of PostgreSQL's answer.
    pub(crate) fn code(self) -> Option<Cow<'a, str>> {
        self.answer()?.code()
    }

    /// Whether the connection was lost, so that there is no answer.
    pub(crate) fn is_lost(self) -> bool {
        matches!(self, Self::Error(Error::Io(_) | Error::Protocol(_)))
    }

    pub(crate) fn is_pool_full(self) -> bool {
        matches!(self, Self::Error(error) if is_pool_full(error))
    }

    /// What to do against the error, where PostgreSQL does not say it.
    pub(crate) fn cure(self) -> Option<&'static str> {
        match self.code()?.as_ref() {
            "25006" => Some(READ_ONLY),
            "55P03" => Some(LOCKED),
            _ => None,
        }
    }
}

pub(crate) fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<Found<'a>> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(error) = cause.downcast_ref::<Error>() {
            return Some(Found::Error(error));
        }
        if let Some(answer) = cause.downcast_ref::<Box<dyn DatabaseError>>() {
            return Some(Found::Answer(answer.as_ref()));
        }
        if let Some(answer) = cause.downcast_ref::<PgDatabaseError>() {
            return Some(Found::Answer(answer));
        }
        next = cause.source();
    }
    None
}

/// Whether `error` means that the database cannot be reached or cannot work now, so that nothing else will work either.
/// A full pool means nothing of the kind: [`is_pool_full`].
#[must_use]
pub fn is_outage(error: &Error) -> bool {
    match error {
        Error::PoolTimedOut => false,
        Error::Database(answer) => match answer.code().as_deref() {
            Some("25006" | "25P03" | "25P04") => true,
            Some(code) => code.starts_with("08") || code.starts_with("53") || code.starts_with("57P"),
            None => false,
        },
        Error::Protocol(_) => true,
        error => classify(error) == ErrorClass::Passing,
    }
}

/// Whether `error` means that this process uses all connections of the pool. sqlx returns the same when none can be
/// opened; [`transaction::connection`](crate::transaction::connection) and what begins there distinguish the two.
#[must_use]
pub fn is_pool_full(error: &Error) -> bool {
    matches!(error, Error::PoolTimedOut)
}

/// The text of `error` for the log; where sqlx's text does not say what to do, one that does.
#[must_use]
pub fn in_words(error: &Error) -> Cow<'static, str> {
    match cure(error) {
        _ if is_pool_full(error) => FULL.into(),
        Some(cure) => format!("{error}; {cure}").into(),
        None => error.to_string().into(),
    }
}

/// What to do against `error`, where PostgreSQL does not say it.
#[must_use]
pub fn cure(error: &Error) -> Option<&'static str> {
    Found::Error(error).cure()
}

const READ_ONLY: &str = "the database takes no writes: let this process connect to the primary, or reset \
                         default_transaction_read_only";

const LOCKED: &str =
    "another session holds the lock: pg_blocking_pids() says which, for each session in pg_stat_activity that waits";

const FULL: &str = "all connections of the pool are in use, and the database answers: let this process do less at once \
                    (slots, batches, requests), or give it a larger pool (of a service: DATABASE_MAX_CONNECTIONS)";

/// Whether `error` means that a concurrent transaction was in the way: the same, repeated at once, may work.
#[must_use]
pub fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Database(answer) if matches!(answer.code().as_deref(), Some("40001" | "40P01")))
}

fn classify_answer(answer: &dyn DatabaseError) -> ErrorClass {
    let routine = answer.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::routine);
    answer.code().map_or(ErrorClass::Own, |code| classify_sqlstate(&code, routine))
}

/// `routine` is PostgreSQL's function that raised the error.
fn classify_sqlstate(code: &str, routine: Option<&str>) -> ErrorClass {
    let class = code.get(..2).unwrap_or_default();
    match (code, class) {
        // "cached plan must not change result type": a column was added under a prepared statement.
        ("0A000", _) if routine == Some("RevalidateCachedQuery") => ErrorClass::Stale,
        // A prepared statement that the server no longer has, or has already: a pooler is in between, or `discard all`.
        ("26000" | "42P05", _) => ErrorClass::Stale,
        // The server has become a standby, or is not yet a primary.
        ("25006", _) => ErrorClass::Stale,
        // A feature that this server lacks; an index or a page that is damaged; a database or a schema that is not
        // there.
        ("0A000" | "XX001" | "XX002" | "55P02" | "3D000" | "3F000", _) => ErrorClass::Configuration,
        // 28: the role and its password. 42: tables, columns, functions, rights. F0: the server's configuration file.
        (_, "28" | "42" | "F0") => ErrorClass::Configuration,
        // The server ended a transaction that was silent or took too long.
        ("25P03" | "25P04", _) => ErrorClass::Passing,
        // 08: connection. 40: conflicts. 53: no resources. 55: locks, and databases that accept no connections for now.
        // 57: shutting down, starting up, cancelled. 58: I/O. 72: a snapshot that is too old.
        (_, "08" | "40" | "53" | "55" | "57" | "58" | "72") => ErrorClass::Passing,
        _ => ErrorClass::Own,
    }
}

/// The class of an error code of Kafka's or librdkafka's.
#[must_use]
pub fn classify_kafka(code: Kafka) -> ErrorClass {
    match code {
        // The record, or the name of its topic.
        Kafka::MessageSizeTooLarge
        | Kafka::MessageBatchTooLarge
        | Kafka::InvalidMessageSize
        | Kafka::InvalidMessage
        | Kafka::InvalidRecord
        | Kafka::InvalidTopic
        | Kafka::KeySerialization
        | Kafka::ValueSerialization
        | Kafka::KeyDeserialization
        | Kafka::ValueDeserialization
        | Kafka::InvalidType => ErrorClass::Own,
        // The client cannot go on; a new one can.
        Kafka::Fatal
        | Kafka::GaplessGuarantee
        | Kafka::State
        | Kafka::Inconsistent
        | Kafka::BrokerDestroy
        | Kafka::PurgeQueue
        | Kafka::PurgeInflight
        | Kafka::OutOfOrderSequenceNumber
        | Kafka::DuplicateSequenceNumber
        | Kafka::UnknownProducerId
        | Kafka::InvalidProducerEpoch
        | Kafka::InvalidProducerIdMapping
        | Kafka::InvalidTransactionalState
        | Kafka::TransactionCoordinatorFenced
        | Kafka::ProducerFenced
        | Kafka::Fenced
        | Kafka::FencedInstanceId => ErrorClass::Stale,
        code if is_identity(code) || is_setting(code) => ErrorClass::Configuration,
        // Among them `BadMessage`: an answer that cannot be read says nothing of the record, which a broker may have.
        _ => ErrorClass::Passing,
    }
}

/// Whether the code refuses this client as a whole: its identity, or its rights in the cluster or the group.
#[must_use]
pub fn is_identity(code: Kafka) -> bool {
    matches!(
        code,
        Kafka::GroupAuthorizationFailed
            | Kafka::ClusterAuthorizationFailed
            | Kafka::TransactionalIdAuthorizationFailed
            | Kafka::DelegationTokenAuthDisabled
            | Kafka::DelegationTokenNotFound
            | Kafka::DelegationTokenOwnerMismatch
            | Kafka::DelegationTokenRequestNotAllowed
            | Kafka::DelegationTokenAuthorizationFailed
            | Kafka::DelegationTokenExpired
            | Kafka::SaslAuthenticationFailed
            | Kafka::Authentication
            | Kafka::SSL
            | Kafka::UnsupportedSASLMechanism
            | Kafka::IllegalSASLState
            | Kafka::SecurityDisabled
            | Kafka::InvalidPrincipalType
            | Kafka::PrincipalDeserializationFailure
            | Kafka::UnacceptableCredential
    )
}

/// Whether the code is about a topic that is missing or forbidden, or about a setting of the topic, the brokers or this
/// client. A refused timestamp points to a wrong clock.
fn is_setting(code: Kafka) -> bool {
    matches!(
        code,
        Kafka::TopicAuthorizationFailed
            | Kafka::UnknownTopic
            | Kafka::UnknownTopicOrPartition
            | Kafka::UnknownPartition
            | Kafka::InvalidPartitions
            | Kafka::InvalidReplicationFactor
            | Kafka::InvalidReplicaAssignment
            | Kafka::InvalidRequiredAcks
            | Kafka::InvalidConfig
            | Kafka::InvalidArgument
            | Kafka::InvalidRequest
            | Kafka::InvalidGroupId
            | Kafka::InvalidSessionTimeout
            | Kafka::InvalidTransactionTimeout
            | Kafka::InvalidCommitOffsetSize
            | Kafka::OffsetMetadataTooLarge
            | Kafka::InconsistentGroupProtocol
            | Kafka::GroupMaxSizeReached
            // Nothing says where the group goes on.
            | Kafka::AutoOffsetReset
            | Kafka::LogTruncation
            | Kafka::UnknownProtocol
            | Kafka::UnsupportedAssignor
            | Kafka::UnsupportedVersion
            | Kafka::UnsupportedFeature
            | Kafka::UnsupportedForMessageFormat
            | Kafka::UnsupportedCompressionType
            | Kafka::NotConfigured
            | Kafka::NotImplemented
            | Kafka::LogDirNotFound
            | Kafka::TopicDeletionDisabled
            | Kafka::ResourceNotFound
            | Kafka::DuplicateResource
            | Kafka::PolicyViolation
            | Kafka::InvalidTimestamp
    )
}

/// When a part last found a connection stale.
static RENEWED: Mutex<Option<Instant>> = Mutex::new(None);

/// Has every pool of this process (`service::database::pool_options`) replace the connections that it has, one by one,
/// before they are used again. For [`ErrorClass::Stale`]: a changed table or a failover concerns all of them.
pub fn renew_connections() {
    *RENEWED.lock().unwrap_or_else(PoisonError::into_inner) = Some(clock::monotonic());
}

/// Whether a connection of this age was opened after the last [`renew_connections`].
pub(crate) fn is_current(age: Duration) -> bool {
    let renewed = *RENEWED.lock().unwrap_or_else(PoisonError::into_inner);
    renewed.is_none_or(|renewed| clock::monotonic().saturating_duration_since(renewed) > age)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ErrorClass::{Configuration, Own, Passing, Stale};
    use rdkafka::types::RDKafkaRespErr;

    /// Every SQLSTATE that the parts can meet.
    const SQLSTATES: &[(&str, ErrorClass)] = &[
        ("08000", Passing),
        ("08001", Passing),
        ("08003", Passing),
        ("08004", Passing),
        ("08006", Passing),
        ("08P01", Passing),
        ("0A000", Configuration),
        ("21000", Own),
        ("22001", Own),
        ("22003", Own),
        ("22007", Own),
        ("22012", Own),
        ("22021", Own),
        ("22023", Own),
        ("22P02", Own),
        ("22P05", Own),
        ("23000", Own),
        ("23502", Own),
        ("23503", Own),
        ("23505", Own),
        ("23514", Own),
        ("23P01", Own),
        ("25001", Own),
        ("25006", Stale),
        ("25P02", Own),
        ("25P03", Passing),
        ("25P04", Passing),
        ("26000", Stale),
        ("28000", Configuration),
        ("28P01", Configuration),
        ("3D000", Configuration),
        ("3F000", Configuration),
        ("40001", Passing),
        ("40003", Passing),
        ("40P01", Passing),
        ("42501", Configuration),
        ("42601", Configuration),
        ("42703", Configuration),
        ("42704", Configuration),
        ("42804", Configuration),
        ("42883", Configuration),
        ("42P01", Configuration),
        ("42P02", Configuration),
        ("42P05", Stale),
        ("42P10", Configuration),
        ("44000", Own),
        ("53000", Passing),
        ("53100", Passing),
        ("53200", Passing),
        ("53300", Passing),
        ("53400", Passing),
        ("54000", Own),
        ("54001", Own),
        ("55000", Passing),
        ("55006", Passing),
        ("55P02", Configuration),
        ("55P03", Passing),
        ("57000", Passing),
        ("57014", Passing),
        ("57P01", Passing),
        ("57P02", Passing),
        ("57P03", Passing),
        ("57P04", Passing),
        ("57P05", Passing),
        ("58000", Passing),
        ("58030", Passing),
        ("58P01", Passing),
        ("72000", Passing),
        ("F0000", Configuration),
        ("P0001", Own),
        ("P0002", Own),
        ("XX000", Own),
        ("XX001", Configuration),
        ("XX002", Configuration),
        ("ZZ999", Own),
    ];

    #[test]
    fn every_sqlstate_that_occurs_has_its_class() {
        for (code, class) in SQLSTATES {
            assert_eq!(classify_sqlstate(code, None), *class, "{code}");
        }
        assert_eq!(classify_sqlstate("0A000", Some("RevalidateCachedQuery")), Stale);
    }

    /// The codes of the client library that are the item's own.
    #[rustfmt::skip]
    const KAFKA_OWN: &[Kafka] = {
        use Kafka::*;
        &[
            MessageSizeTooLarge, MessageBatchTooLarge, InvalidMessageSize, InvalidMessage, InvalidRecord,
            InvalidTopic, KeySerialization, ValueSerialization, KeyDeserialization, ValueDeserialization,
            InvalidType,
        ]
    };

    /// The codes after which only a new client can go on.
    #[rustfmt::skip]
    const KAFKA_STALE: &[Kafka] = {
        use Kafka::*;
        &[
            Fatal, GaplessGuarantee, State, Inconsistent, BrokerDestroy, PurgeQueue, PurgeInflight,
            OutOfOrderSequenceNumber, DuplicateSequenceNumber, UnknownProducerId, InvalidProducerEpoch,
            InvalidProducerIdMapping, InvalidTransactionalState, TransactionCoordinatorFenced, ProducerFenced,
            Fenced, FencedInstanceId,
        ]
    };

    /// The codes that an operator has to set right.
    #[rustfmt::skip]
    const KAFKA_CONFIGURATION: &[Kafka] = {
        use Kafka::*;
        &[
            GroupAuthorizationFailed, ClusterAuthorizationFailed, TransactionalIdAuthorizationFailed,
            DelegationTokenAuthDisabled, DelegationTokenNotFound, DelegationTokenOwnerMismatch,
            DelegationTokenRequestNotAllowed, DelegationTokenAuthorizationFailed, DelegationTokenExpired,
            SaslAuthenticationFailed, Authentication, SSL, UnsupportedSASLMechanism, IllegalSASLState,
            SecurityDisabled, InvalidPrincipalType, PrincipalDeserializationFailure, UnacceptableCredential,
            TopicAuthorizationFailed, UnknownTopic, UnknownTopicOrPartition, UnknownPartition, InvalidPartitions,
            InvalidReplicationFactor, InvalidReplicaAssignment, InvalidRequiredAcks, InvalidConfig, InvalidArgument,
            InvalidRequest, InvalidGroupId, InvalidSessionTimeout, InvalidTransactionTimeout,
            InvalidCommitOffsetSize, OffsetMetadataTooLarge, InconsistentGroupProtocol, GroupMaxSizeReached,
            AutoOffsetReset, LogTruncation, UnknownProtocol, UnsupportedAssignor, UnsupportedVersion,
            UnsupportedFeature, UnsupportedForMessageFormat, UnsupportedCompressionType, NotConfigured,
            NotImplemented, LogDirNotFound, TopicDeletionDisabled, ResourceNotFound, DuplicateResource,
            PolicyViolation, InvalidTimestamp,
        ]
    };

    /// The codes that pass, and those that no part of this system can meet.
    #[rustfmt::skip]
    const KAFKA_PASSING: &[Kafka] = {
        use Kafka::*;
        &[
            BadMessage, BadCompression, Fail, BrokerTransportFailure, CriticalSystemResource, Resolve,
            MessageTimedOut, PartitionEOF, FileSystem, AllBrokersDown, OperationTimedOut, QueueFull, ISRInsufficient,
            NodeUpdate, WaitingForCoordinator, UnknownGroup, InProgress, PreviousInProgress, ExistingSubscription,
            AssignPartitions, RevokePartitions, Conflict, NoOffset, Outdated, TimedOutQueue, WaitCache, Interrupted,
            Partial, ReadOnly, NoEnt, Underflow, Retry, PollExceeded, UnknownBroker, Application, AssignmentLost,
            Noop, InvalidDifferentRecord, DestroyBroker, Unknown, NoError, OffsetOutOfRange, LeaderNotAvailable,
            NotLeaderForPartition, RequestTimedOut, BrokerNotAvailable, ReplicaNotAvailable, StaleControllerEpoch,
            NetworkException, CoordinatorLoadInProgress, CoordinatorNotAvailable, NotCoordinator, NotEnoughReplicas,
            NotEnoughReplicasAfterAppend, IllegalGeneration, UnknownMemberId, RebalanceInProgress,
            TopicAlreadyExists, NotController, ConcurrentTransactions, OperationNotAttempted, KafkaStorageError,
            ReassignmentInProgress, NonEmptyGroup, GroupIdNotFound, FetchSessionIdNotFound, InvalidFetchSessionEpoch,
            ListenerNotFound, FencedLeaderEpoch, UnknownLeaderEpoch, StaleBrokerEpoch, OffsetNotAvailable,
            MemberIdRequired, PreferredLeaderNotAvailable, EligibleLeadersNotAvailable, ElectionNotNeeded,
            NoReassignmentInProgress, GroupSubscribedToTopic, UnstableOffsetCommit, ThrottlingQuotaExceeded,
            InconsistentVoterSet, InvalidUpdateVersion, FeatureUpdateFailed, UnknownTopicId, FencedMemberEpoch,
            UnreleasedInstanceId, StaleMemberEpoch, UnknownSubscriptionId, TelemetryTooLarge, RebootstrapRequired,
        ]
    };

    /// The codes of the client library, which gives them numbers. The ends of its ranges are no codes.
    fn kafka_codes() -> impl Iterator<Item = Kafka> {
        let known = (-300..=300).filter_map(|number| RDKafkaRespErr::try_from(number).ok());
        known.map(Kafka::from).filter(|code| !matches!(code, Kafka::Begin | Kafka::End | Kafka::EndAll))
    }

    #[test]
    fn every_kafka_code_of_the_client_library_has_its_class() {
        assert!(kafka_codes().count() > 150, "the library still gives its codes these numbers");
        for code in kafka_codes() {
            let table = [
                (Own, KAFKA_OWN),
                (Stale, KAFKA_STALE),
                (Configuration, KAFKA_CONFIGURATION),
                (Passing, KAFKA_PASSING),
            ];
            let rows: Vec<_> = table.iter().filter(|(_, codes)| codes.contains(&code)).map(|row| row.0).collect();
            assert_eq!(rows, [classify_kafka(code)], "the rows of {code:?}, and its class");
        }
    }

    #[test]
    fn what_sqlx_says_itself_has_its_class() {
        let io = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(classify(&Error::Io(io())), Passing);
        assert_eq!(classify(&Error::PoolTimedOut), Passing);
        assert!(!is_outage(&Error::PoolTimedOut) && in_words(&Error::PoolTimedOut).contains("a larger pool"));
        assert_eq!(classify(&Error::Protocol("half a message".into())), Stale);
        assert_eq!(classify(&Error::ColumnNotFound("total".into())), Configuration);
        assert_eq!(classify(&Error::RowNotFound), Own);
        assert_eq!(classify(&Error::InvalidArgument("too long".into())), Own);
    }

    #[test]
    fn a_database_error_is_found_under_words_of_others() {
        #[derive(Debug, thiserror::Error)]
        #[error("the stock cannot be read")]
        struct Wrapped(#[source] Error);

        let lost = || Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert_eq!(classify_chain(&Wrapped(lost())), Some(Passing));
        let deeper = anyhow::Error::from(Wrapped(lost())).context("the order cannot be placed");
        assert_eq!(classify_chain(deeper.as_ref()), Some(Passing));
        assert_eq!(classify_chain(&std::fmt::Error), None);
    }

    #[test]
    fn connections_opened_before_a_renewal_are_replaced() {
        renew_connections();
        assert!(!is_current(Duration::from_secs(3600)));
    }
}

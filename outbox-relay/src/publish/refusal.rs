//! The meaning of a refusal: whether it is about the row, about its topic, or about neither.

use crate::record::pause::PauseCause;
use rdkafka::types::RDKafkaErrorCode as Code;
use saga_core::error_class::{ErrorClass, classify_kafka, is_identity};

/// How many topics of one outbox may be set apart because they are missing or forbidden. A real topic is missing
/// because a deployment is not finished, and there are few of those. Invented names have no end.
pub(crate) const MOST_ABSENT: usize = 128;

/// What the relay does after a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Kafka will refuse this row for ever: it is parked.
    Row,
    /// No row of its topic can be published now: the topic is paused.
    Topic(PauseCause),
    /// The refusal is not about the row: it is sent again.
    Transient,
}

impl Refusal {
    pub(crate) fn of(code: Code) -> Self {
        match code {
            Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
                Self::Topic(PauseCause::Missing)
            }
            Code::TopicAuthorizationFailed => Self::Topic(PauseCause::Forbidden),
            // A refused timestamp, above all, is a clock's fault and not the row's.
            code if classify_kafka(code) == ErrorClass::Own => Self::Row,
            _ => Self::Transient,
        }
    }
}

/// Whether the code is the whole cluster's or the producer's: it is not about the topic whose row met it.
pub(crate) fn is_of_all_topics(code: Code) -> bool {
    matches!(classify_kafka(code), ErrorClass::Stale | ErrorClass::Passing)
        || is_identity(code)
        || matches!(
            code,
            Code::InvalidRequiredAcks
                | Code::InvalidRequest
                | Code::UnsupportedVersion
                | Code::UnsupportedFeature
                | Code::UnknownProtocol
                | Code::NotConfigured
                | Code::NotImplemented
        )
}

/// The reason for parking a row without sending it.
pub(crate) fn too_large(size: usize, limit: usize) -> String {
    format!("the record has {size} bytes, and the topic takes {limit} (max.message.bytes)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::types::RDKafkaRespErr;

    /// The codes that park the row.
    #[rustfmt::skip]
    const OF_THE_ROW: &[Code] = {
        use Code::*;
        &[
            MessageSizeTooLarge, MessageBatchTooLarge, InvalidMessageSize, InvalidMessage, InvalidRecord, InvalidType,
            KeySerialization, ValueSerialization, KeyDeserialization, ValueDeserialization,
            // Kafka's own topics exist and take nothing: a wait for them would never end.
            InvalidTopic,
        ]
    };

    /// The codes after which a topic waits until it is there, or until this client may write to it.
    const ABSENT: &[(Code, PauseCause)] = &[
        (Code::UnknownTopic, PauseCause::Missing),
        (Code::UnknownTopicOrPartition, PauseCause::Missing),
        (Code::UnknownPartition, PauseCause::Missing),
        (Code::TopicAuthorizationFailed, PauseCause::Forbidden),
    ];

    /// The codes that set a topic apart when they come again and again, so that no other topic waits with it. Those
    /// that no answer to a producer has are here, too: to set a topic apart in vain costs little.
    #[rustfmt::skip]
    const OF_THE_TOPIC: &[Code] = {
        use Code::*;
        &[
            InvalidTimestamp, PolicyViolation, InvalidConfig, InvalidArgument, UnsupportedForMessageFormat,
            UnsupportedCompressionType, InvalidPartitions, InvalidReplicationFactor, InvalidReplicaAssignment,
            InvalidGroupId, InvalidSessionTimeout, InvalidTransactionTimeout, InvalidCommitOffsetSize,
            OffsetMetadataTooLarge, InconsistentGroupProtocol, GroupMaxSizeReached, UnsupportedAssignor, AutoOffsetReset,
            LogTruncation, LogDirNotFound, TopicDeletionDisabled, ResourceNotFound, DuplicateResource,
        ]
    };

    /// Of the codes that an operator has to set right, those of the cluster: to set topics apart would hide them.
    #[rustfmt::skip]
    const OF_THE_CLUSTER: &[Code] = {
        use Code::*;
        &[
            ClusterAuthorizationFailed, TransactionalIdAuthorizationFailed, GroupAuthorizationFailed,
            SaslAuthenticationFailed, Authentication, SSL, UnsupportedSASLMechanism, IllegalSASLState, SecurityDisabled,
            DelegationTokenAuthDisabled, DelegationTokenNotFound, DelegationTokenOwnerMismatch,
            DelegationTokenRequestNotAllowed, DelegationTokenAuthorizationFailed, DelegationTokenExpired,
            InvalidPrincipalType, PrincipalDeserializationFailure, UnacceptableCredential,
            InvalidRequiredAcks, InvalidRequest, UnsupportedVersion, UnsupportedFeature, UnknownProtocol, NotConfigured,
            NotImplemented,
        ]
    };

    #[test]
    fn every_code_is_the_rows_the_topics_the_clusters_or_passes() {
        let codes = (-300..=300).filter_map(|number| RDKafkaRespErr::try_from(number).ok()).map(Code::from);
        let mut rows = 0;
        for code in codes {
            let absence = ABSENT.iter().find(|row| row.0 == code).map(|row| row.1);
            let (refusal, of_all) = match absence {
                Some(cause) => (Refusal::Topic(cause), false),
                None if OF_THE_ROW.contains(&code) => (Refusal::Row, false),
                None if OF_THE_TOPIC.contains(&code) => (Refusal::Transient, false),
                // What passes, or is cured by a new producer, is no topic's either.
                None => (Refusal::Transient, true),
            };
            assert_eq!((Refusal::of(code), is_of_all_topics(code)), (refusal, of_all), "{code:?}");
            let listed = [OF_THE_ROW, OF_THE_TOPIC, OF_THE_CLUSTER].iter().any(|list| list.contains(&code));
            let cured_by_hand = matches!(classify_kafka(code), ErrorClass::Own | ErrorClass::Configuration);
            assert_eq!(listed || absence.is_some(), cured_by_hand, "{code:?} has a row");
            rows += usize::from(cured_by_hand);
        }
        assert_eq!(rows, OF_THE_ROW.len() + ABSENT.len() + OF_THE_TOPIC.len() + OF_THE_CLUSTER.len());
    }

    #[test]
    fn what_a_broker_may_have_taken_all_the_same_is_not_refused() {
        let doubtful = [
            Code::BadMessage,
            Code::Fatal,
            Code::GaplessGuarantee,
            Code::OutOfOrderSequenceNumber,
            Code::PurgeQueue,
            Code::PurgeInflight,
            Code::MessageTimedOut,
            Code::RequestTimedOut,
            Code::OperationTimedOut,
            Code::NotEnoughReplicasAfterAppend,
            Code::BrokerTransportFailure,
        ];
        for code in doubtful {
            assert_eq!(Refusal::of(code), Refusal::Transient, "{code}");
        }
    }

    #[test]
    fn a_record_that_is_too_large_is_parked_with_both_sizes() {
        assert_eq!(
            too_large(2_000_000, 1_048_588),
            "the record has 2000000 bytes, and the topic takes 1048588 (max.message.bytes)"
        );
    }
}

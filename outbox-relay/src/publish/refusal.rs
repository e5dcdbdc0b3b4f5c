//! The meaning of a refusal: whether it is about the row, about its topic, or about neither.

use crate::record::pause::PauseCause;
use rdkafka::types::RDKafkaErrorCode as Code;
use saga_core::error_class::{ErrorClass, classify_kafka};

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
            // This is a batch of one record: no smaller one can be sent.
            Code::MessageBatchTooLarge => Self::Row,
            // A refused timestamp, above all, is a clock's fault and not the row's.
            code if classify_kafka(code) == ErrorClass::Own => Self::Row,
            _ => Self::Transient,
        }
    }
}

/// Whether the code is the whole cluster's or the producer's: it is not about the topic whose row met it.
pub(crate) fn is_of_all_topics(code: Code) -> bool {
    matches!(classify_kafka(code), ErrorClass::Stale | ErrorClass::Passing)
        || matches!(
            code,
            Code::ClusterAuthorizationFailed
                | Code::TransactionalIdAuthorizationFailed
                | Code::SaslAuthenticationFailed
                | Code::Authentication
                | Code::InvalidRequiredAcks
                | Code::UnsupportedVersion
        )
}

/// The reason for parking a row without sending it.
pub(crate) fn too_large(size: usize, limit: usize) -> String {
    format!("the record has {size} bytes, and the topic takes {limit} (max.message.bytes)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_timestamp_is_a_clocks_fault_and_not_the_rows() {
        assert_eq!(Refusal::of(Code::InvalidTimestamp), Refusal::Transient);
        assert_eq!(Refusal::of(Code::MessageSizeTooLarge), Refusal::Row);
        assert_eq!(Refusal::of(Code::UnknownTopicOrPartition), Refusal::Topic(PauseCause::Missing));
        // Kafka's own topics exist and take nothing: a wait for them would never end.
        assert_eq!(Refusal::of(Code::InvalidTopic), Refusal::Row);
    }

    #[test]
    fn what_a_broker_may_have_taken_all_the_same_is_not_refused() {
        let doubtful = [
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
}

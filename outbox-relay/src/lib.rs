//! Publishes committed outbox rows to Kafka, in order, and repairs what could not be published.

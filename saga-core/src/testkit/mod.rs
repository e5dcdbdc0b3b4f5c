//! What tests need: real databases and topics with random names, fault injection, waiting without sleeping.
//!
//! Everything here talks to a real PostgreSQL (`DATABASE_URL`) and a real Apache Kafka (`KAFKA_BROKERS`); there is no
//! stand-in for either. A test owns what it creates and removes it when it ends, so that all tests share two servers.

pub mod database;
pub mod explorer;
pub mod failpoints;
pub mod kafka;
mod waiting;

pub use crate::service::Migrations;
pub use database::TestDatabase;
pub use failpoints::FailPoint;
pub use kafka::{Record, TestTopic, brokers, create_topic, produce, read_to_end};
pub use waiting::eventually;

/// `prefix` with a random suffix: for databases, topics, groups and fail point scopes.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", &uuid::Uuid::new_v4().simple().to_string()[..12])
}

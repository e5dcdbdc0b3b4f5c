//! The consumer runtime, on a real PostgreSQL and a real Kafka.

mod crashes;
mod delivery;
mod failures;
mod support;

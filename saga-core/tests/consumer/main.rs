//! The consumer runtime, on a real PostgreSQL and a real Kafka.

mod adversity;
mod crashes;
mod delivery;
mod failures;
mod letters;
mod outages;
mod setup;
mod slow;
mod topics;

mod support;

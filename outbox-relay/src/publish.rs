//! Publishing: pages to Kafka, in order, many rows in flight.
//!
//! | module | what it is |
//! |---|---|
//! | `kafka_record`, `producer` | a row as a record; the producer |
//! | `flight`, `in_flight` | a page on its way; all that is on its way, and what Kafka acknowledged |
//! | `refusal` | what a refusal of Kafka's is about: the row, its topic, or neither |
//! | `shared`, `handover_requests` | what the streams share; their questions to each other |
//! | `session` | one producer's life in a stream: the fate of each row, sending, and how a topic comes back |
//! | `stream`, `set_apart` | the main stream; one for each topic that is set apart |
//! | `retry_producer`, `retry` | parked rows that an operator has tried again |
//!
//! Only an acknowledged row counts as published. When the process dies, the next owner sends again what was not recorded.

pub(crate) mod flight;
pub(crate) mod handover_requests;
pub(crate) mod in_flight;
pub(crate) mod kafka_record;
pub(crate) mod producer;
pub(crate) mod refusal;
pub(crate) mod retry;
pub(crate) mod retry_producer;
pub(crate) mod session;
pub(crate) mod set_apart;
pub(crate) mod shared;
pub(crate) mod stream;

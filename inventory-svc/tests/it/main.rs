//! inventory-svc against a real PostgreSQL and Kafka: its schema, its HTTP API, its commands, its processes.

mod bad_input;
mod commands;
mod consuming;
mod items;
mod process;
mod schema;
mod support;

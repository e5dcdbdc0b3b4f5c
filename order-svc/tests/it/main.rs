//! order-svc against a real PostgreSQL: its schema, its HTTP API, its saga's way, its live views.

mod bad_input;
mod catalogue;
mod live;
mod reads;
mod schema;
mod support;

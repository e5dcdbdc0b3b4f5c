//! order-svc against a real PostgreSQL: its schema, its HTTP API, its saga's way, its live views.

mod bad_input;
mod catalogue;
mod consuming;
mod explored;
mod forged;
mod hang_up;
mod live;
mod placing;
mod reads;
mod rebuild;
mod saga_in_doubt;
mod saga_way;
mod schema;
mod support;

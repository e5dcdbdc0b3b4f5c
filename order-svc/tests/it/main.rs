//! order-svc against a real PostgreSQL: its schema, its HTTP API, its saga's way, its live views.

mod schema;

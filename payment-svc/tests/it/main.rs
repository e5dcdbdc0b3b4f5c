//! Payments on a real PostgreSQL and against the real gateway simulator, a server of its own on a free port. Every
//! outcome, everything repeated, everything killed; and each time the money adds up on both sides.

mod api;
mod crashes;
mod gateway;
mod kafka;
mod lost;
mod migrate;
mod outcomes;
mod strange;
mod support;

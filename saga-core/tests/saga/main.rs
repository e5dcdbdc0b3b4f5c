//! The saga engine on a real PostgreSQL: what is decided is what is stored, sent and told.

mod crash;
mod effects;
mod forward;
mod ids;
mod inspection;
mod naming;
mod outage;
mod running;
mod starts;
mod support;
mod time;
mod trouble;
mod undo;
mod untrusted;

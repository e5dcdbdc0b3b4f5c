//! The saga engine on a real PostgreSQL: its decisions are what is stored, sent and reported.

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

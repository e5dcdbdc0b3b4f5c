//! Participants on a real PostgreSQL: whatever is repeated, reordered or killed, an effect happens once or not at all.

mod answers;
mod external;
mod local;
mod lost;
mod namespaces;
mod support;

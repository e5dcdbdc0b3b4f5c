//! What a server promises about power failures, and PostgreSQL's settings for it. Pure.
//!
//! A server that promises nothing may lose what it wrote when the machine dies, and loses nothing when a process does.

/// What a server promises about power failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It promises nothing: for tests, whose data is thrown away. A killed *process* loses nothing even so.
    Off,
    /// It promises everything, as in production: for data that people keep, and for benchmarks.
    On,
}

/// The settings that every PostgreSQL has here, with those of its promise.
pub(crate) fn settings(durability: Durability) -> Vec<&'static str> {
    let mut settings = vec![
        "listen_addresses=127.0.0.1",
        // Many test databases with a pool each share one server.
        "max_connections=600",
        // The outbox is tested with prepared transactions, too.
        "max_prepared_transactions=64",
        "log_line_prefix=%m [%p] %d %a ",
        "log_min_messages=warning",
        "deadlock_timeout=200ms",
    ];
    if durability == Durability::Off {
        settings.extend(["fsync=off", "full_page_writes=off", "max_wal_size=4GB"]);
    }
    settings
}

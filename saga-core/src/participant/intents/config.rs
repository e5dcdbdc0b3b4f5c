//! The settings of the intents' executor.

use std::time::Duration;

/// The limits of the intents' executor.
#[derive(Debug, Clone)]
pub struct IntentConfig {
    /// Calls in flight at once (default 32): bounds what a slow provider can tie up.
    pub concurrency: usize,
    /// The longest call (default 5 s). A call that takes longer is in doubt.
    pub call_timeout: Duration,
    /// How long a claim outlives the longest call (default 2 s); together they are how long the intents of a killed
    /// process wait.
    pub claim_margin: Duration,
    /// Calls until the command is answered `failed` and its effect stays in doubt (default 8). A resend starts anew.
    pub max_attempts: u32,
    /// The pause after the first call without an answer; it doubles with each further call.
    pub first_delay: Duration,
    /// The longest pause between two calls.
    pub max_delay: Duration,
    /// How often the executor looks for intents that this process did not announce, such as those of a process whose
    /// claim ran out.
    pub poll: Duration,
    /// The bound of each transaction, in this process and in the server (default 10 s). A transaction that takes longer
    /// is given up and repeated on another connection, without counting an attempt: a host that is gone closes no
    /// connection. The effect's own code in it has three quarters of that; code that takes longer is counted.
    pub database_timeout: Duration,
}

impl Default for IntentConfig {
    fn default() -> Self {
        Self {
            concurrency: 32,
            call_timeout: Duration::from_secs(5),
            claim_margin: Duration::from_secs(2),
            max_attempts: 8,
            first_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(10),
            poll: Duration::from_secs(1),
            database_timeout: Duration::from_secs(10),
        }
    }
}

impl IntentConfig {
    /// How long an intent waits after this many calls.
    pub(super) fn delay(&self, attempts: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(20);
        self.first_delay.saturating_mul(1 << doublings).min(self.max_delay)
    }
}

//! The limits of the intents' executor.

use std::time::Duration;

/// The limits of the intents' executor.
#[derive(Debug, Clone)]
pub struct IntentConfig {
    /// Calls in flight at once: bounds what a slow provider can tie up.
    pub concurrency: usize,
    /// Longest call. What takes longer is in doubt.
    pub call_timeout: Duration,
    /// How long a claim outlives the longest call; together they are how long the intents of a killed process wait.
    pub claim_margin: Duration,
    /// Calls until the command is answered `failed` and its effect stays in doubt. A resend starts anew.
    pub max_attempts: u32,
    /// Pause after the first call without an answer; doubles with each further one.
    pub first_delay: Duration,
    /// Longest pause between two calls.
    pub max_delay: Duration,
    /// How often to look for intents that nothing here announced (another process's, whose claim ran out).
    pub poll: Duration,
    /// Bound of each transaction, here and in the server. One that takes longer is given up and repeated on another
    /// connection, which counts nothing: a host that is gone closes nothing.
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
    /// How long an intent waits after so many calls.
    pub(super) fn delay(&self, attempts: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(20);
        self.first_delay.saturating_mul(1 << doublings).min(self.max_delay)
    }
}

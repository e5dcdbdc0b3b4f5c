//! Retries: how long to wait before the next attempt. The only user of `backoff`.
//!
//! Two kinds. *In process*: [`Backoff::delays`] is an endless sequence of waits for a loop that lives as long as the
//! process does. *Durable*: [`Backoff::delay`] is a pure function, and the time that follows from it is stored beside the
//! work. Any process alive at that time takes the work up; a process that dies in between loses nothing.
//!
//! ```
//! use saga_core::retry::Backoff;
//! use std::time::Duration;
//!
//! let policy = Backoff::doubling(Duration::from_secs(1), Duration::from_secs(60));
//! let waits: Vec<u64> = (1..=8).map(|attempt| policy.exact().delay(attempt, 0).as_secs()).collect();
//! assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
//!
//! // The seed, such as the id of the work, spreads by a fifth what failed together.
//! let first = policy.delay(1, 42);
//! assert!(first >= Duration::from_millis(800) && first <= Duration::from_millis(1200));
//! assert_eq!(first, policy.delay(1, 42), "equal seeds choose equally, in any process");
//! ```

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff as _};
use std::time::Duration;

/// Exponential back-off: `first`, then `factor` times as long each time, never longer than `max`, spread by `jitter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The wait after the first failure.
    pub first: Duration,
    /// How much longer each wait is than the one before; at least 1.
    pub factor: f64,
    /// The longest wait, before the jitter.
    pub max: Duration,
    /// 0 to 1: each wait is spread evenly over `1 - jitter` to `1 + jitter` of itself. So work that failed together
    /// does not come back together.
    pub jitter: f64,
}

impl Backoff {
    /// Doubling from `first` to `max`, spread by a fifth.
    #[must_use]
    pub const fn doubling(first: Duration, max: Duration) -> Self {
        Self { first, factor: 2.0, max, jitter: 0.2 }
    }

    /// The same policy without jitter: for work that fails alone.
    #[must_use]
    pub const fn exact(self) -> Self {
        Self { jitter: 0.0, ..self }
    }

    /// The waits of an in-process retry, endless; `.take(n)` limits the attempts.
    #[must_use]
    pub fn delays(&self) -> Delays {
        let inner = ExponentialBackoffBuilder::new()
            .with_initial_interval(self.first)
            .with_multiplier(self.factor.max(1.0))
            .with_max_interval(self.max)
            .with_randomization_factor(self.jitter.clamp(0.0, 1.0))
            .with_max_elapsed_time(None)
            .build();
        Delays { inner, max: self.max }
    }

    /// The wait after attempt number `attempt` (the first is 1) failed. Pure: `seed` chooses the point within the
    /// jitter, and equal seeds choose equally.
    #[must_use]
    pub fn delay(&self, attempt: u32, seed: u64) -> Duration {
        let exponent = f64::from(attempt.max(1) - 1);
        let exact = (self.first.as_secs_f64() * self.factor.max(1.0).powf(exponent)).min(self.max.as_secs_f64());
        // 53 bits are what a double holds exactly.
        #[allow(clippy::cast_precision_loss)]
        let unit = (mix(seed ^ u64::from(attempt)) >> 11) as f64 / (1_u64 << 53) as f64;
        let spread = 1.0 + self.jitter.clamp(0.0, 1.0) * (2.0 * unit - 1.0);
        Duration::try_from_secs_f64(exact * spread).unwrap_or(self.max)
    }
}

/// The waits of an in-process retry; see [`Backoff::delays`].
#[derive(Debug)]
pub struct Delays {
    inner: ExponentialBackoff,
    max: Duration,
}

impl Iterator for Delays {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.inner.next_backoff().unwrap_or(self.max))
    }
}

/// splitmix64: neighbouring seeds end up far apart.
fn mix(seed: u64) -> u64 {
    let a = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let b = (a ^ (a >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let c = (b ^ (b >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    c ^ (c >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Backoff = Backoff::doubling(Duration::from_millis(100), Duration::from_secs(10));

    #[test]
    fn without_jitter_the_waits_double_up_to_the_longest() {
        let exact = POLICY.exact();
        let millis: Vec<_> = (1..=9).map(|attempt| exact.delay(attempt, 7).as_millis()).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        let live: Vec<_> = exact.delays().take(9).map(|delay| delay.as_millis()).collect();
        assert_eq!(live, millis);
    }

    #[test]
    fn what_failed_together_does_not_come_back_together() {
        let spread: std::collections::BTreeSet<_> = (0..100).map(|seed| POLICY.delay(5, seed).as_micros()).collect();
        assert!(spread.len() > 90, "{}", spread.len());
    }

    proptest! {
        #[test]
        fn a_wait_stays_within_its_jitter_whatever_the_attempt(attempt: u32, seed: u64) {
            let delay = POLICY.delay(attempt, seed);
            prop_assert!(delay >= Duration::from_millis(80) && delay <= Duration::from_secs(12), "{delay:?}");
        }
    }
}

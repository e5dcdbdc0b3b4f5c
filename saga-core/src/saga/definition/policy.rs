//! How often and how fast a command is resent, or a local effect tried again. Pure: the jitter is derived from the
//! waiting saga, not drawn.

use crate::id::SagaId;
use std::time::Duration;

/// When a command is resent, or a local effect tried again, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The pause after the first attempt.
    pub first: Duration,
    /// The factor from each pause to the next; 0 counts as 1.
    pub factor: u32,
    /// The longest pause between two attempts.
    pub max: Duration,
    /// How many attempts there are in all; `None`: without end.
    pub attempts: Option<u32>,
}

impl RetryPolicy {
    /// For a step before the pivot: the engine can undo the saga instead, so it gives up early.
    pub const COMPENSABLE: Self = Self::exponential(5, Duration::from_millis(500), Duration::from_secs(30));
    /// For the pivot: when the engine gives up, an operator has to act, so it tries longer.
    pub const PIVOT: Self = Self::exponential(10, Duration::from_millis(500), Duration::from_secs(60));
    /// For a step after the pivot: there is no way back. After a day or so the saga is stuck until an operator acts.
    pub const RETRIABLE: Self = Self::exponential(300, Duration::from_millis(500), Duration::from_secs(300));
    /// For an undo: it has to be done. After half an hour or so the saga is stuck until an operator acts.
    pub const UNDO: Self = Self::exponential(15, Duration::from_millis(500), Duration::from_secs(300));

    /// For a local effect: what fails for a moment (a row that is not there yet) gets another seven seconds or so. Then
    /// the saga is stuck until an operator acts.
    pub const LOCAL: Self = Self::exponential(5, Duration::from_millis(500), Duration::from_secs(30));

    /// `attempts` in all, with pauses that double from `first` up to `max`.
    pub const fn exponential(attempts: u32, first: Duration, max: Duration) -> Self {
        Self { first, factor: 2, max, attempts: Some(attempts) }
    }

    /// Without a last attempt: the saga never becomes stuck on the step, so an alert has to watch its attempts.
    #[must_use]
    pub const fn forever(self) -> Self {
        Self { attempts: None, ..self }
    }

    /// Whether `tries` attempts were the last.
    pub fn is_exhausted(&self, tries: u32) -> bool {
        self.attempts.is_some_and(|attempts| tries >= attempts)
    }

    /// The pause after the `tries`-th attempt (from 1): exponential, with up to a quarter taken off, so that a thousand
    /// sagas that failed together do not come back together. The same saga, step and attempt always get the same pause.
    pub fn pause(&self, saga: SagaId, step: usize, tries: u32) -> Duration {
        let doublings = self.factor.max(1).saturating_pow(tries.saturating_sub(1).min(31));
        let pause = self.first.saturating_mul(doublings).min(self.max);
        let (high, low) = saga.0.as_u64_pair();
        let seed = high ^ low.rotate_left(17) ^ ((step as u64) << 32) ^ u64::from(tries);
        let quarter = u32::try_from(spread(seed) % 256).unwrap_or(0);
        pause - pause / 1024 * quarter
    }
}

/// The finaliser of `SplitMix64`: each bit of the seed moves half the bits of the result.
fn spread(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_participant_silent_for_ten_minutes_gets_a_command_a_dozen_times_at_most() {
        let (saga, patience) = (SagaId::new(), Duration::from_secs(30));
        for policy in [RetryPolicy::COMPENSABLE, RetryPolicy::PIVOT, RetryPolicy::RETRIABLE, RetryPolicy::UNDO] {
            let (mut sent, mut waited) = (1, patience);
            while waited < Duration::from_secs(600) && !policy.is_exhausted(sent) {
                waited += patience + policy.pause(saga, 0, sent);
                sent += 1;
            }
            assert!(sent <= 12, "{sent} times: {policy:?}");
        }
    }

    #[test]
    fn pauses_grow_to_the_cap_and_the_jitter_is_the_sagas_own() {
        let policy = RetryPolicy::exponential(10, Duration::from_secs(1), Duration::from_secs(60));
        let pauses = |saga: SagaId| [1, 2, 3, 4, 5, 6, 7, 8, 39].map(|tries| policy.pause(saga, 2, tries).as_millis());
        // At least three quarters of 1, 2, 4, 8, 16, 32, and from then on 60 seconds; and no more than that.
        let least = [750, 1_500, 3_000, 6_000, 12_000, 24_000, 45_000, 45_000, 45_000];
        let most = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000];
        for _ in 0..100 {
            let pauses = pauses(SagaId::new());
            for ((pause, least), most) in pauses.iter().zip(least).zip(most) {
                assert!((least..=most).contains(pause), "{pauses:?}");
            }
        }
        // One saga's pauses are the same in every process.
        let saga = SagaId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001));
        assert_eq!(pauses(saga), [962, 1_966, 3_457, 7_179, 15_375, 25_375, 54_023, 50_214, 49_804]);
        assert_ne!(policy.pause(saga, 2, 5), policy.pause(saga, 3, 5), "steps have a jitter of their own");
        let others: std::collections::BTreeSet<_> = (0..50).map(|_| policy.pause(SagaId::new(), 2, 5)).collect();
        assert!(others.len() > 20, "the jitter spreads sagas: {}", others.len());
    }
}

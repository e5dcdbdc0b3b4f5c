//! A circuit breaker for one operation of the provider: when the provider is away, few payments ask, until one is
//! answered.
//!
//! ```text
//!   closed ── no payment was answered for a while, and several payments were tried in vain meanwhile ──► open
//!      ▲                                                                                                  │
//!      └───────────────────────────────── any answer at all ──────────────────────────────────────────────┘
//! ```
//!
//! Invariant: the failure of one payment costs no other. An error that is one payment's own is repeated for that
//! payment again and again. It opens nothing as long as others are answered. Where it did open the circuit (no other
//! payment asked meanwhile), payments that have not failed yet may still try.
//!
//! The breaker is our own because existing ones count errors, not payments, and cut off all payments alike. It only
//! saves time and the provider: a payment that is turned away made no call and waits. When the process dies it is
//! closed again, which costs a few calls.

use saga_core::id::CommandId;
use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The most payments that are remembered to have failed. One that is forgotten may try once more.
const REMEMBERED_MAX: usize = 10_000;

/// When the circuit opens, and how often it is tried.
#[derive(Debug, Clone, Copy)]
pub struct BreakerConfig {
    /// How long no payment must have been answered before the circuit opens.
    pub silence: Duration,
    /// How many payments must have been tried in vain meanwhile.
    pub payments: usize,
    /// How often a payment that has failed may try while the circuit is open. Payments that have not may try ten times
    /// as often.
    pub try_every: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self { silence: Duration::from_secs(3), payments: 5, try_every: Duration::from_secs(1) }
    }
}

/// The circuit of one operation, which decides whether the provider may be asked.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Since when no payment has been answered, and the payments that tried meanwhile; `None`: the last try was
    /// answered.
    vain: Option<Vain>,
    /// When the circuit opened, and when the next payment may try; `None`: it is closed.
    open: Option<Open>,
}

#[derive(Debug)]
struct Vain {
    since: Instant,
    payments: HashSet<CommandId>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Instant,
    /// When a payment that has failed may try.
    again: Instant,
    /// When a payment that has not failed may try.
    fresh: Instant,
}

impl Breaker {
    /// Makes a closed circuit.
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: Mutex::default() }
    }

    /// Whether to ask for `payment` now; an admitted call reports by [`Breaker::answered`] or [`Breaker::in_vain`].
    ///
    /// # Errors
    /// How long to wait before the next try: the longer the circuit has been open, the longer.
    pub fn admits(&self, payment: CommandId, now: Instant) -> Result<(), Duration> {
        let mut state = self.state();
        let failed = state.vain.as_ref().is_some_and(|vain| vain.payments.contains(&payment));
        let Some(open) = &mut state.open else { return Ok(()) };
        let turn = if failed { &mut open.again } else { &mut open.fresh };
        if now >= *turn {
            // Should the call never report, another payment may try after that time.
            *turn = now + self.config.try_every;
            return Ok(());
        }
        let patience = now.saturating_duration_since(open.since) / 4;
        Err(patience.clamp(self.config.try_every / 10, self.config.try_every * 10))
    }

    /// Notes that the provider is there, whatever it answered; true when that closed the circuit.
    pub fn answered(&self) -> bool {
        let mut state = self.state();
        state.vain = None;
        state.open.take().is_some()
    }

    /// Notes that the provider was away for `payment`; true when that opened the circuit.
    pub fn in_vain(&self, payment: CommandId, now: Instant) -> bool {
        let mut state = self.state();
        let vain = state.vain.get_or_insert_with(|| Vain { since: now, payments: HashSet::new() });
        if vain.payments.len() < REMEMBERED_MAX {
            vain.payments.insert(payment);
        }
        let enough = vain.payments.len() >= self.config.payments;
        let silent = now.saturating_duration_since(vain.since) >= self.config.silence;
        let opens = enough && silent && state.open.is_none();
        if opens {
            state.open = Some(Open { since: now, again: now + self.config.try_every, fresh: now });
        } else if let Some(open) = &mut state.open {
            open.fresh = open.fresh.min(now + self.config.try_every / 10);
        }
        opens
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    const CONFIG: BreakerConfig =
        BreakerConfig { silence: Duration::from_secs(5), payments: 3, try_every: Duration::from_secs(1) };

    fn payment(n: u128) -> CommandId {
        CommandId(Uuid::from_u128(n))
    }

    /// A breaker, and a clock in milliseconds.
    fn breaker() -> (Breaker, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (Breaker::new(CONFIG), move |millis| start + Duration::from_millis(millis))
    }

    /// Opens a breaker by payments 1 to 3, at 5,000 ms.
    fn open() -> (Breaker, impl Fn(u64) -> Instant) {
        let (breaker, at) = breaker();
        assert!(!breaker.in_vain(payment(1), at(0)) && !breaker.in_vain(payment(2), at(2_000)));
        assert!(!breaker.in_vain(payment(3), at(4_999)), "not long enough");
        assert!(breaker.in_vain(payment(3), at(5_000)));
        (breaker, at)
    }

    #[test]
    fn errors_of_some_payments_open_nothing_while_another_is_answered() {
        let (breaker, at) = breaker();
        for second in 0..600 {
            for n in 0..50 {
                assert!(!breaker.in_vain(payment(n), at(second * 1_000 + 1)));
            }
            if second % 4 == 3 {
                assert!(!breaker.answered());
            }
            assert_eq!(breaker.admits(payment(7), at(second * 1_000 + 2)), Ok(()));
        }
    }

    #[test]
    fn one_payment_alone_opens_nothing_however_often_it_fails() {
        let (breaker, at) = breaker();
        for second in 0..600 {
            assert!(
                !breaker.in_vain(payment(1), at(second * 1_000)) && !breaker.in_vain(payment(2), at(second * 1_000))
            );
        }
    }

    #[test]
    fn an_hour_without_calls_is_no_silence() {
        let (breaker, at) = breaker();
        breaker.answered();
        for n in 0..50 {
            assert!(!breaker.in_vain(payment(n), at(3_600_000)));
        }
    }

    #[test]
    fn when_it_is_open_the_failed_try_one_at_a_time_until_one_is_answered() {
        let (breaker, at) = open();
        assert!(breaker.admits(payment(1), at(5_999)).is_err());
        assert_eq!(breaker.admits(payment(1), at(6_000)), Ok(()), "one may try");
        assert!(breaker.admits(payment(2), at(6_000)).is_err(), "and only one");
        assert!(!breaker.in_vain(payment(1), at(6_001)), "it is open already");
        assert!(breaker.admits(payment(2), at(6_999)).is_err());
        assert_eq!(breaker.admits(payment(2), at(7_000)), Ok(()), "also where the one before never reported");
        assert!(breaker.answered(), "it closes");
        assert_eq!((breaker.admits(payment(1), at(7_001)), breaker.admits(payment(2), at(7_001))), (Ok(()), Ok(())));
        assert!(!breaker.answered(), "it is closed");
        assert!(!breaker.in_vain(payment(1), at(7_002)), "and counts anew");
    }

    #[test]
    fn a_payment_that_never_failed_does_not_wait_for_those_that_did() {
        let (breaker, at) = open();
        assert_eq!(breaker.admits(payment(9), at(5_000)), Ok(()));
        assert!(breaker.admits(payment(8), at(5_000)).is_err(), "one at a time");
        assert!(!breaker.in_vain(payment(9), at(5_010)));
        assert!(breaker.admits(payment(8), at(5_109)).is_err());
        assert_eq!(breaker.admits(payment(8), at(5_110)), Ok(()));
        assert!(breaker.admits(payment(9), at(5_300)).is_err(), "it has failed by now");
    }

    #[test]
    fn the_longer_it_is_open_the_later_one_is_to_come_again() {
        let (breaker, at) = open();
        let wait = |millis| {
            let _tries = breaker.admits(payment(1), at(millis));
            breaker.admits(payment(2), at(millis)).unwrap_err()
        };
        assert_eq!(wait(5_001), Duration::from_millis(100));
        assert_eq!(wait(13_000), Duration::from_secs(2));
        assert_eq!(wait(3_600_000), Duration::from_secs(10));
    }
}

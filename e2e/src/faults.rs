//! Chance with a seed, processes that die at moments that it picks, time that flies, and a provider that gets well.

use crate::platform::{Platform, SETTLED_WITHIN};
use saga_core::testkit::{eventually, time_passes};
use stack::service::Service;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Reproducible chance: the seed is printed, and `E2E_SEED` sets it. (The moments are drawn again from the same seed;
/// what else the machine does at those moments is not.)
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// Takes the seed from `E2E_SEED`, or a new one, and prints it.
    ///
    /// # Panics
    /// When `E2E_SEED` is no number.
    pub fn new(what: &str) -> Self {
        let seed = match std::env::var("E2E_SEED") {
            Ok(seed) => seed.parse().expect("E2E_SEED is a number"),
            Err(_) => Uuid::new_v4().as_u64_pair().0,
        };
        println!("{what}: E2E_SEED={seed}");
        Self(seed)
    }

    /// A number below `end`: SplitMix64, which is enough to pick moments.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }

    /// A duration of `from` to `to` milliseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    /// One of `of`, at random.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = self.below(of.len() as u64);
        &of[usize::try_from(index).unwrap_or_default()]
    }
}

impl Platform {
    /// Kills (SIGKILL) one of `services` again and again, each time at a moment of chance, and starts it again, until
    /// `token` is cancelled. All of them run, and are ready, when this returns. Returns how often it killed.
    ///
    /// # Panics
    /// When a process does not come back.
    pub async fn kills(&self, services: &[Service], mut chance: Chance, token: CancellationToken) -> usize {
        let mut killed = 0;
        while !token.is_cancelled() {
            // This is no wait for a condition: the moment is the fault.
            tokio::time::sleep(chance.millis(50, 700)).await;
            let service = *chance.pick(services);
            let running = self.stack.service(service);
            running.process.kill();
            killed += 1;
            self.fault_fired(&format!("SIGKILL {service}"));
            tokio::time::sleep(chance.millis(0, 200)).await;
            running.start_again().await.unwrap_or_else(|error| panic!("{service} does not come back: {error}"));
        }
        killed
    }

    /// Lets every pause of the engine and of the provider's callers be over, again and again, until `done`.
    ///
    /// # Panics
    /// When that takes longer than [`SETTLED_WITHIN`].
    pub async fn time_flies_until(&self, done: impl AsyncFn() -> bool) {
        eventually(SETTLED_WITHIN, || async {
            time_passes(&self.orders).await;
            let mut payments = self.database("payments").await;
            let soon =
                "update participant_intent set due_at = clock_timestamp() where state = 'open' and claimed_by is null";
            sqlx::query(soon).execute(&mut payments).await.expect("the intents can be hurried");
            done().await.then_some(())
        })
        .await;
    }

    /// Lets the provider do what it is asked for an order's payment: its simulator goes by the token that it remembers.
    ///
    /// # Panics
    /// When the provider's database does not answer.
    pub async fn provider_is_well_for(&self, order: Uuid) {
        sqlx::query("update gateway_authorization set method = 'tok_visa' where \"order\" = $1")
            .bind(order.to_string())
            .execute(&mut self.database("gateway").await)
            .await
            .expect("the provider can be cured");
    }
}

//! Quick retries and a circuit per operation before a gateway. Every request is idempotent under its key, so all may be
//! retried. A call that is still in doubt afterwards is left to the durable schedule
//! ([`saga_core::participant::intents`]).
//!
//! | metric | what it says |
//! |---|---|
//! | `gateway_circuit_open{operation}` | 1 while the circuit is open |
//! | `gateway_circuit_opened_total{operation}` | how often it opened |
//! | `gateway_calls_not_made_total{operation}` | calls that waited for it |
//! | `gateway_request_duration_seconds{operation, result}` | calls that were made, quick retries among them |

use super::{
    Doubt, GatewayAnswer, Operation, PaymentGateway, Request,
    breaker::{Breaker, BreakerConfig},
};
use async_trait::async_trait;
use saga_core::{clock, id::CommandId, retry::Backoff};
use std::time::Duration;

/// The pauses of retries within one call: two, soon. A provider that needs longer is left to the durable schedule,
/// which holds no task.
const QUICK: Backoff = Backoff::doubling(Duration::from_millis(20), Duration::from_millis(100));
const QUICK_RETRIES: usize = 2;

/// A gateway behind quick retries and a circuit for each operation.
#[derive(Debug)]
pub struct Guarded<G> {
    inner: G,
    breakers: [Breaker; Operation::ALL.len()],
}

impl<G: PaymentGateway> Guarded<G> {
    /// Guards `inner` with a closed circuit for each operation.
    pub fn new(inner: G, config: BreakerConfig) -> Self {
        for operation in Operation::ALL {
            metrics::gauge!("gateway_circuit_open", "operation" => operation.name()).set(0);
        }
        Self { inner, breakers: Operation::ALL.map(|_| Breaker::new(config)) }
    }

    /// Makes one call, and reports to the circuit what it shows of the provider.
    async fn ask(&self, breaker: &Breaker, key: CommandId, request: &Request) -> Result<GatewayAnswer, Doubt> {
        let answer = self.inner.perform(key, request).await;
        let operation = request.operation().name();
        match &answer {
            Err(doubt) if doubt.is_away() => {
                if breaker.in_vain(key, clock::monotonic()) {
                    tracing::warn!(operation, error = %doubt, "the gateway is away: the circuit of this operation opens");
                    metrics::counter!("gateway_circuit_opened_total", "operation" => operation).increment(1);
                    metrics::gauge!("gateway_circuit_open", "operation" => operation).set(1);
                }
            }
            Ok(_) | Err(_) => {
                if breaker.answered() {
                    tracing::info!(operation, "the gateway answers: the circuit of this operation closes");
                    metrics::gauge!("gateway_circuit_open", "operation" => operation).set(0);
                }
            }
        }
        answer
    }

    /// Makes a call with quick retries; the measured time is that of the calls alone.
    async fn call(&self, breaker: &Breaker, key: CommandId, request: &Request) -> Result<GatewayAnswer, Doubt> {
        let mut pauses = QUICK.delays().take(QUICK_RETRIES);
        loop {
            match (self.ask(breaker, key, request).await, pauses.next()) {
                (Err(doubt), Some(pause)) if doubt.is_transient() => {
                    tokio::time::sleep(pause).await;
                    if breaker.admits(key, clock::monotonic()).is_err() {
                        return Err(doubt);
                    }
                }
                (answer, _) => return answer,
            }
        }
    }
}

#[async_trait]
impl<G: PaymentGateway> PaymentGateway for Guarded<G> {
    async fn perform(&self, key: CommandId, request: &Request) -> Result<GatewayAnswer, Doubt> {
        let operation = request.operation();
        let breaker = &self.breakers[operation as usize];
        let begun = clock::monotonic();
        if let Err(again_after) = breaker.admits(key, begun) {
            metrics::counter!("gateway_calls_not_made_total", "operation" => operation.name()).increment(1);
            return Err(Doubt::CircuitOpen { operation: operation.name(), again_after });
        }
        let answer = self.call(breaker, key, request).await;
        let result = match &answer {
            Ok(GatewayAnswer::Done { .. }) => "done",
            Ok(GatewayAnswer::Refused { .. }) => "refused",
            Err(_) => "in_doubt",
        };
        metrics::histogram!("gateway_request_duration_seconds", "operation" => operation.name(), "result" => result)
            .record(begun.elapsed().as_secs_f64());
        answer
    }
}

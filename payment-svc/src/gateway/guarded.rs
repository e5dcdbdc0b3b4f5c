//! Quick retries and a circuit breaker before a gateway. Every request is idempotent under its key, so all may be
//! retried; what is still in doubt afterwards is the durable schedule's ([`saga_core::participant::intents`]).

use super::{
    Answer, Doubt, PaymentGateway, Request,
    breaker::{Breaker, BreakerConfig},
};
use async_trait::async_trait;
use saga_core::{clock, id::CommandId, retry::Backoff};
use std::time::Duration;

/// Retries within one call: two, soon. A provider that needs longer is left to the durable schedule, which holds no task.
const QUICK: Backoff = Backoff::doubling(Duration::from_millis(20), Duration::from_millis(100));
const QUICK_RETRIES: usize = 2;

/// A gateway behind quick retries and a breaker.
#[derive(Debug)]
pub struct Guarded<G> {
    inner: G,
    breaker: Breaker,
}

impl<G: PaymentGateway> Guarded<G> {
    /// Guards `inner`.
    pub fn new(inner: G, breaker: BreakerConfig) -> Self {
        Self { inner, breaker: Breaker::new(breaker) }
    }

    async fn ask(&self, key: CommandId, request: &Request) -> Result<Answer, Doubt> {
        if !self.breaker.admits(clock::monotonic()) {
            return Err(Doubt::CircuitOpen);
        }
        let answer = self.inner.perform(key, request).await;
        match &answer {
            Err(doubt) if doubt.is_outage() => {
                if self.breaker.failed(clock::monotonic()) {
                    tracing::warn!(error = %doubt, "the circuit to the gateway opens");
                    metrics::counter!("gateway_circuit_opened_total").increment(1);
                }
            }
            _ => self.breaker.succeeded(),
        }
        answer
    }
}

#[async_trait]
impl<G: PaymentGateway> PaymentGateway for Guarded<G> {
    async fn perform(&self, key: CommandId, request: &Request) -> Result<Answer, Doubt> {
        let begun = clock::monotonic();
        let mut pauses = QUICK.delays().take(QUICK_RETRIES);
        let answer = loop {
            match (self.ask(key, request).await, pauses.next()) {
                (Err(doubt), Some(pause)) if doubt.is_transient() => tokio::time::sleep(pause).await,
                (answer, _) => break answer,
            }
        };
        let result = match &answer {
            Ok(Answer::Done { .. }) => "done",
            Ok(Answer::Refused { .. }) => "refused",
            Err(Doubt::CircuitOpen) => "circuit_open",
            Err(_) => "in_doubt",
        };
        metrics::histogram!("gateway_request_duration_seconds", "operation" => request.name(), "result" => result)
            .record(begun.elapsed().as_secs_f64());
        answer
    }
}

impl Request {
    /// For metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Authorize { .. } => "authorize",
            Self::Void { .. } => "void",
            Self::Capture { .. } => "capture",
            Self::Refund { .. } => "refund",
        }
    }
}
